"""Micro-batches concatenated into fewer forward passes: the same gradient, and a fall back where that cannot be."""

import logging

import pytest
import torch
from transformers import BatchEncoding, Trainer

from hf_elra import ConfigurationError, ElraTrainer
from hf_elra.trainer.merging import CannotMerge, merge_micro_batches, plan_passes
from tests.conftest import llama, logged, padded, ragged_rows, trainer, vit, vit_rows, weights


def test_passes_take_consecutive_micro_batches_up_to_the_limit():
    assert plan_passes([(2, 5)] * 5, 6) == [3, 2]
    assert plan_passes([(2, 5)] * 5, 2) == [1] * 5
    assert plan_passes([(9, 5), (1, 5), (1, 5)], 4) == [1, 2]  # one that is too large alone is not cut
    assert plan_passes([(2, 5)] * 3, float("inf")) == [3]
    assert plan_passes([(2, 5), (2, 5), (2, 20), (2, 5)], 40, padded=True) == [2, 1, 1]


def test_rows_are_padded_on_the_right_and_structure_is_kept():
    first = {
        "input_ids": torch.tensor([[5, 6, 7]]),
        "attention_mask": torch.tensor([[0, 1, 1]]),
        "labels": torch.tensor([[5, -100, 7]]),
        "nested": {"pixel_values": torch.ones(1, 2, 2), "names": ["a"]},
        "boxes": [torch.zeros(4, 4)],
        "parts": (torch.tensor([1.0]), torch.tensor([[2.0]])),
        "factor": 0.5,
    }
    second = {
        "input_ids": torch.tensor([[1, 2, 3, 4, 5]] * 2),
        "attention_mask": torch.ones(2, 5, dtype=torch.long),
        "labels": torch.tensor([[1, 2, 3, 4, 5]] * 2),
        "nested": {"pixel_values": torch.zeros(2, 2, 2), "names": ["b", "c"]},
        "boxes": [torch.ones(3, 4), torch.ones(2, 4)],
        "parts": (torch.tensor([3.0, 4.0]), torch.tensor([[5.0], [6.0]])),
        "factor": 0.5,
    }
    merged = merge_micro_batches([first, second], pad_token_id=9)
    assert merged["input_ids"].tolist() == [[5, 6, 7, 9, 9], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5]]
    assert merged["attention_mask"][0].tolist() == [0, 1, 1, 0, 0]
    assert merged["labels"][0].tolist() == [5, -100, 7, -100, -100]
    assert merged["nested"]["pixel_values"].shape == (3, 2, 2)
    assert merged["nested"]["names"] == ["a", "b", "c"]
    assert [len(boxes) for boxes in merged["boxes"]] == [4, 3, 2]
    assert merged["parts"][0].tolist() == [1.0, 3.0, 4.0]
    assert merged["factor"] == 0.5


def test_a_missing_mask_is_added_only_where_the_model_takes_one():
    batches = [{"input_ids": torch.ones(1, 2, dtype=torch.long)}, {"input_ids": torch.ones(1, 3, dtype=torch.long)}]
    merged = merge_micro_batches(batches, add_attention_mask=True)
    assert merged["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    with pytest.raises(CannotMerge, match="no attention_mask"):
        merge_micro_batches(batches)


def test_the_kind_of_mapping_is_kept():
    batch = BatchEncoding({"input_ids": torch.ones(1, 2, dtype=torch.long)})
    assert isinstance(merge_micro_batches([batch, batch]), BatchEncoding)


@pytest.mark.parametrize(
    ("batches", "reason"),
    [
        ([(torch.ones(1), torch.ones(1))] * 2, "tuple, not a mapping"),
        ([{"x": torch.ones(1)}, {"y": torch.ones(1)}], "different keys"),
        ([{"x": torch.ones(1, 2)}, {"x": torch.ones(1, 3)}], "not known how to pad"),
        ([{"x": torch.ones(1), "n": 1}, {"x": torch.ones(1), "n": 2}], "'n' .int. differs"),
        (
            [{"x": torch.ones(2), "s": torch.ones(())}, {"x": torch.ones(2), "s": torch.zeros(())}],
            "no sample dimension",
        ),
        ([{"input_ids": torch.ones(1, 4), "position_ids": torch.ones(1, 4)}] * 2, "packed sequences"),
        ([{"x": torch.ones(2), "l": [1]}] * 2, "neither one entry per sample"),
        ([{"n": 1}] * 2, "holds no tensor"),
    ],
)
def test_what_cannot_be_merged_says_why(batches, reason):
    with pytest.raises(CannotMerge, match=reason):
        merge_micro_batches(batches)


def assert_close(a, b, tolerance=1e-6):
    assert ((a - b).norm() / b.norm()).item() < tolerance


MODELS = {
    "causal language model with padding": (llama, ragged_rows, dict(data_collator=padded)),
    "image classifier": (vit, vit_rows, {}),
}


@pytest.mark.parametrize("optim", ["elra", "adamw_torch"])
@pytest.mark.parametrize("name", list(MODELS))
def test_eight_times_one_four_times_two_one_times_eight_and_merged_are_the_same(tmp_path, optim, name):
    build, rows, given = MODELS[name]
    results = []
    cases = [(8, 1, None), (4, 2, None), (1, 8, None), (1, 8, "3"), (2, 4, "8"), (2, 4, "auto")]
    for batch, first, together in cases:
        run = trainer(
            tmp_path,
            model=build().double(),
            rows=rows(48),
            optim=optim,
            per_device_train_batch_size=batch,
            elra_batch_control="elra",
            elra_initial_accumulation=first,
            elra_max_micro_batch=together,
            elra_control_cycle="100ba",
            max_steps=6,
            **given,
        )
        passes = count_passes(run)
        run.train()
        results.append((torch.tensor(logged(run, "loss"), dtype=torch.float64), weights(run.model)))
        assert run.elra_callback.samples == 48
        expected = {"3": 3, "8": 1, "auto": 1, None: first}[together]
        assert len(passes) == 6 * expected
    for losses, points in results[1:]:
        assert_close(losses, results[0][0])
        assert_close(points, results[0][1])


def count_passes(run):
    """A list that gets an entry for every forward pass with gradients."""
    passes = []
    run.model.register_forward_pre_hook(lambda *_: passes.append(1) if torch.is_grad_enabled() else None)
    return passes


@pytest.mark.parametrize("together", [None, "8"])
@pytest.mark.parametrize("name", list(MODELS))
def test_an_uneven_last_group_weighs_every_sample_or_target_the_same(tmp_path, name, together):
    """45 samples: the sixth update has 5, in micro-batches of 2, 2 and 1."""
    build, rows, given = MODELS[name]
    results = []
    for batch, first in ((8, 1), (2, 4)):
        run = trainer(
            tmp_path,
            model=build().double(),
            rows=rows(45),
            optim="sgd",
            learning_rate=0.1,
            per_device_train_batch_size=batch,
            elra_batch_control="elra",
            elra_initial_accumulation=first,
            elra_max_micro_batch=together,
            max_steps=6,
            **given,
        )
        run.train()
        results.append((torch.tensor(logged(run, "loss"), dtype=torch.float64), weights(run.model)))
    assert_close(results[1][0], results[0][0])
    assert_close(results[1][1], results[0][1])


class OwnMean(ElraTrainer):
    """Computes the loss itself and ignores num_items_in_batch, as much code written for one micro-batch does."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        logits, labels = outputs.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten()
        loss = torch.nn.functional.cross_entropy(logits, labels)
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("together", [None, "8"])
def test_a_subclass_that_ignores_num_items_gets_means_not_sums(tmp_path, together):
    results = []
    for batch, first in ((8, 1), (2, 4)):
        run = trainer(
            tmp_path,
            trainer_class=OwnMean,
            model=llama(attention_dropout=0.0).double(),
            rows=ragged_rows(48),
            data_collator=padded,
            per_device_train_batch_size=batch,
            elra_initial_accumulation=first,
            elra_max_micro_batch=together,
            max_steps=6,
        )
        run.train()
        results.append(torch.tensor(logged(run, "loss"), dtype=torch.float64))
    assert_close(results[1], results[0])


def weighted_mean(outputs, labels, num_items_in_batch=None):
    return torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="mean")


def divided_sum(outputs, labels, num_items_in_batch=None):
    loss = torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="sum")
    return loss / (num_items_in_batch if num_items_in_batch is not None else len(labels))


@pytest.mark.parametrize("settings", [{}, {"label_smoothing_factor": 0.1}], ids=["plain", "label smoothing"])
@pytest.mark.parametrize("function", [None, weighted_mean, divided_sum])
@pytest.mark.parametrize("together", [None, "8"])
def test_every_kind_of_loss_is_a_mean(tmp_path, function, settings, together):
    if function is not None and settings:
        settings = {**settings, "logging_steps": 2}
    results = []
    for batch, first in ((8, 1), (2, 4)):
        run = trainer(
            tmp_path,
            model=vit().double(),
            rows=vit_rows(45),
            compute_loss_func=function,
            per_device_train_batch_size=batch,
            elra_initial_accumulation=first,
            elra_max_micro_batch=together,
            elra_skip_last_batch=False,
            max_steps=8,
            **settings,
        )
        run.train()
        results.append((torch.tensor(logged(run, "loss"), dtype=torch.float64), weights(run.model)))
    assert_close(results[1][0], results[0][0], 3e-6)
    assert_close(results[1][1], results[0][1], 3e-6)


def test_a_collator_that_returns_something_else_falls_back_with_a_note(tmp_path, caplog_warnings):
    class Odd(ElraTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return super().compute_loss(model, {"input_ids": inputs[0], "labels": inputs[0]})

    run = trainer(
        tmp_path,
        trainer_class=Odd,
        data_collator=lambda rows: (torch.stack([row["input_ids"] for row in rows]),),
        per_device_train_batch_size=2,
        elra_initial_accumulation=2,
        elra_max_micro_batch="8",
        max_steps=3,
    )
    passes = count_passes(run)
    run.train()
    assert len(passes) == 6
    notes = [r.message for r in caplog_warnings.records if "accumulated, not merged" in r.message]
    assert notes == [
        "elra_max_micro_batch: micro-batches are accumulated, not merged: the collator returns tuple, not a mapping."
    ]


class SmallMemory(ElraTrainer):
    """Runs out of memory in backward at more than ``fits`` rows."""

    fits = 5

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        if len(inputs["input_ids"]) > self.fits:
            loss.register_hook(self._fail)
        return loss

    @staticmethod
    def _fail(gradient):
        raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")


def test_auto_halves_on_running_out_of_memory_and_remembers(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    runs = []
    for kind, together in ((ElraTrainer, "4"), (SmallMemory, "auto")):
        run = trainer(
            tmp_path,
            trainer_class=kind,
            model=llama(attention_dropout=0.2),
            per_device_train_batch_size=1,
            elra_initial_accumulation=16,
            elra_max_micro_batch=together,
            max_steps=3,
        )
        passes = count_passes(run)
        run.train()
        runs.append(run)
    plain, automatic = runs
    # 16 and 8 rows fail, 4 fit: two failures, then four passes an update.
    assert len(passes) == 2 + 3 * 4
    assert sum("Out of memory in a merged forward pass; halving" in r.message for r in caplog.records) == 2
    assert torch.equal(weights(plain.model), weights(automatic.model))  # trials leave no trace, not in dropout either
    assert logged(plain, "loss") == logged(automatic, "loss")
    assert automatic.elra_callback.state()["attributes"]["data_position"]["pass_limit"] == 4 * 16


class Caches(torch.nn.Module):
    """Registers a buffer in its first forward pass, lets another grow, and averages in a third."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(16, 1)
        self.register_buffer("grows", torch.zeros(1))
        self.register_buffer("average", torch.zeros(()))

    def forward(self, input_ids, labels):
        if "cos" not in self._buffers:
            self.register_buffer("cos", torch.ones(len(input_ids)), persistent=False)
        if len(self.grows) < len(input_ids):
            self.grows = torch.arange(len(input_ids)).float()
        self.average.lerp_(input_ids.float().mean(), 0.5)
        return {"loss": (self.linear(input_ids / 64) - labels[:, :1] / 64).square().mean()}


@pytest.mark.parametrize("optim", ["elra", "adamw_torch"])
def test_a_model_whose_buffers_change_is_tried_and_accumulated(tmp_path, optim):
    runs = []
    for together in ("8", "auto", None):
        torch.manual_seed(0)
        run = trainer(
            tmp_path, Caches(), optim=optim, per_device_train_batch_size=2, max_steps=4, elra_batch_control="schedule",
            elra_batch_schedule="0:4", elra_max_micro_batch=together,
        )  # fmt: skip
        run.train()
        runs.append(run)
    assert torch.equal(weights(runs[0].model), weights(runs[1].model))
    assert torch.equal(runs[0].model.average, runs[1].model.average)
    assert logged(runs[2], "loss") == pytest.approx(logged(runs[0], "loss"), rel=1e-5)


def test_auto_goes_on_when_a_pass_that_fitted_no_longer_does(tmp_path, caplog_warnings):
    run = trainer(
        tmp_path,
        trainer_class=SmallMemory,
        per_device_train_batch_size=1,
        elra_initial_accumulation=4,
        elra_max_micro_batch="auto",
        max_steps=4,
    )
    passes = count_passes(run)
    run.fits = 4

    def shrink(*_):
        run.fits = 2 if run.state.global_step >= 2 else 4

    run.model.register_forward_pre_hook(shrink)
    run.train()
    assert run.state.global_step == 4
    assert len(passes) == 2 + (1 + 2) + 2  # two updates, failure and two passes, two passes
    assert any("halving it" in record.message for record in caplog_warnings.records)


def test_other_errors_are_not_taken_for_a_lack_of_memory(tmp_path):
    class Broken(ElraTrainer):
        def compute_loss(self, *args, **kwargs):
            raise RuntimeError("shapes do not match")

    run = trainer(tmp_path, trainer_class=Broken, elra_initial_accumulation=2, elra_max_micro_batch="auto")
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run.train()


@pytest.mark.parametrize(("value", "message"), [("4", "is below the 8 samples of one micro-batch"), ("big", "or auto")])
def test_bad_limits_are_named(tmp_path, value, message):
    with pytest.raises(ConfigurationError, match=f"elra_max_micro_batch='?{value}'?.*{message}"):
        trainer(tmp_path, elra_max_micro_batch=value)


@pytest.mark.skipif(not hasattr(Trainer, "loss_is_scaled_for_ga"), reason="this Transformers has no such attribute")
@pytest.mark.parametrize("together", ["6", "8"])
def test_a_subclass_that_says_its_loss_is_a_mean(tmp_path, together):
    class Says(ElraTrainer):
        loss_is_scaled_for_ga = False

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            return (outputs.loss, outputs) if return_outputs else outputs.loss

    given = dict(
        trainer_class=Says, optim="sgd", learning_rate=1.0, per_device_train_batch_size=2,
        gradient_accumulation_steps=4, max_steps=1, elra_batch_control="off",
    )  # fmt: skip
    apart = trainer(tmp_path / "apart", elra_max_micro_batch="2", **given)
    apart.train()
    merged = trainer(tmp_path / "merged", elra_max_micro_batch=together, **given)
    merged.train()
    assert_close(weights(apart.model), weights(merged.model), 1e-5)
    assert logged(apart, "loss") == pytest.approx(logged(merged, "loss"), rel=1e-4)
