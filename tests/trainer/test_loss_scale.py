"""Losses that are divided by num_items_in_batch and losses that are means: told apart with user code called once."""

import pytest
import torch
from transformers import Trainer

from hf_elra import ElraTrainer
from hf_elra.trainer.loss_scale import NotedNumber
from lib.ready import together
from tests import workers
from tests.conftest import arguments, logged, trainer, vit, vit_rows, weights


class Counts(ElraTrainer):
    """Counts and logs inside compute_loss, as TRL's trainers count tokens."""

    def __init__(self, *args, **kwargs):
        self.tokens, self.calls = 0, 0
        super().__init__(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.calls += 1
        self.tokens += inputs["input_ids"].numel()
        self.log({"calls": self.calls})
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


@pytest.mark.parametrize(("merged", "calls"), [(None, 20), ("auto", 10)])
@pytest.mark.parametrize("optim", ["elra", "elra_spectral", "adamw_torch"])
def test_user_code_is_called_once_for_every_pass(tmp_path, optim, merged, calls):
    run = trainer(
        tmp_path, trainer_class=Counts, optim=optim, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        elra_batch_control="schedule", elra_batch_schedule="0:1", max_steps=10,
        elra_max_micro_batch=merged,
    )  # fmt: skip
    run.train()
    assert run.calls == calls
    assert run.tokens == 40 * 16
    assert [entry["calls"] for entry in run.state.log_history if "calls" in entry] == list(range(1, calls + 1))


def total_over(number):
    """A compute_loss_func that divides by ``number`` of num_items_in_batch."""

    def function(outputs, labels, num_items_in_batch=None):
        return torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / number(num_items_in_batch)

    return function


def mean(outputs, labels, num_items_in_batch=None):
    return torch.nn.functional.cross_entropy(outputs.logits, labels)


READINGS = {
    "as it is": lambda n: n,
    "int": int,
    "item": lambda n: n.item(),
    "long": lambda n: n.long(),
    "in place": lambda n: n.clamp_(min=1),
    "detach": lambda n: n.detach(),
    "maximum": lambda n: max(n, 1),
}


@pytest.mark.parametrize("function", [*map(total_over, READINGS.values()), mean], ids=[*READINGS, "mean"])
def test_the_update_is_that_of_one_large_batch(tmp_path, function):
    results = []
    for batch, accumulation in ((8, 1), (2, 4)):
        run = trainer(
            tmp_path, vit().double(), vit_rows(), compute_loss_func=function, per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation, max_steps=3,
        )  # fmt: skip
        run.train()
        assert run.compute_loss_func is function
        assert "compute_loss" not in vars(run)
        results.append((logged(run, "loss"), weights(run.model)))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-5)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-5, atol=1e-7)


def test_a_loss_function_without_items_to_count_gives_means(tmp_path):
    """Labels of another name are not counted: num_items_in_batch is None."""

    def function(outputs, labels, num_items_in_batch=None):
        assert labels is num_items_in_batch is None
        return outputs.logits.square().mean()

    rows = [{"pixel_values": row["pixel_values"]} for row in vit_rows()]
    losses = []
    for batch, accumulation in ((8, 1), (2, 4)):
        run = trainer(
            tmp_path, vit().double(), rows, compute_loss_func=function, per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation, max_steps=3,
        )  # fmt: skip
        run.train()
        losses.append(logged(run, "loss"))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_an_auxiliary_loss_beside_a_divided_one(tmp_path):
    """As of a mixture of experts: only a part of it is divided, which is no mean for that."""

    class Both(ElraTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch) + 0.0 * weights(model)[0]

    plain = trainer(tmp_path / "plain", gradient_accumulation_steps=2, max_steps=2)
    both = trainer(tmp_path / "both", trainer_class=Both, gradient_accumulation_steps=2, max_steps=2)
    for run in (plain, both):
        run.train()
    assert logged(both, "loss") == pytest.approx(logged(plain, "loss"), rel=1e-6)


def test_it_is_seen_in_a_compiled_model_too(tmp_path):
    losses = []
    for given in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        run = trainer(tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=4, max_steps=2, **given)
        run.train()
        losses.append(logged(run, "loss"))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_trainer_that_makes_its_own_groups(tmp_path):
    """Stock accumulation, as in a subclass that overrides get_batch_samples: the loss is the mean there as well."""

    class Own(Trainer):
        def get_batch_samples(self, *args, **kwargs):
            return super().get_batch_samples(*args, **kwargs)

    losses = []
    for batch, accumulation in ((8, 1), (2, 4)):
        run = Own(
            vit().double(),
            arguments(
                tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, max_steps=3
            ),
            train_dataset=vit_rows(),
        )  # fmt: skip
        assert run.batch_control is None
        run.train()
        losses.append(logged(run, "loss"))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_several_processes(tmp_path):
    """The first update and the ones after it, whether the model divides by the number of items or ignores it."""
    found = {number: together(workers.losses_of_both_kinds, number, folder=str(tmp_path)) for number in (1, 2)}
    for kind in ("divides", "ignores"):
        assert found[2][kind] == pytest.approx(found[1][kind], rel=1e-5)


def test_a_noted_number_is_a_plain_number_otherwise():
    noted = NotedNumber.of(torch.tensor(12), torch.device("cpu"))
    assert type(noted * 2) is torch.Tensor
    assert f"{torch.ones(3).sum() / noted:.2f}" == "0.25"
    parameter = torch.ones((), requires_grad=True)
    assert not noted.was_used_in(parameter * 2)
    assert noted.was_used_in((parameter * 2 / noted).exp())
    assert int(noted) == 12
    assert noted.was_used_in(parameter * 2)  # may have been
