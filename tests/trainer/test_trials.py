"""hf_elra.trainer.trials: passes that leave nothing behind, losses along a line, counts of passes."""

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback, TrainingArguments

from hf_elra import ELRA, ConfigurationError, ElraTrainer
from hf_elra.recipes.image_models import SmallImageClassifier, SmallImageClassifierConfig
from hf_elra.trainer.trials import LookAhead, PassCounts
from lib.ready import together
from tests import workers
from tests.conftest import arguments, llama, logged, padded, ragged_rows, token_rows, vit, vit_rows, weights
from tests.trainer.test_micro_batches import StopAt


class Probing(ELRA):
    """Asks for losses before every step and notes them beside the one that was observed."""

    needs_line_loss = True

    def __init__(self, params, points=((0.0, "same"),), noted=None, **given):
        super().__init__(params, **given)
        self.points, self.noted = points, [] if noted is None else noted

    def step(self, closure=None, *, loss=None):
        losses = [self.line_loss(s, batches=batches) for s, batches in self.points]
        self.noted.append((float(self._observed_loss), *losses))
        return super().step(closure, loss=loss)


def probing(folder, model, rows=None, points=((0.0, "same"),), trainer_class=ElraTrainer, own=None, **given):
    noted = []
    settings = {"lr": 1e-3, "min_step_norm": 0.1, **({} if points is None else {"points": points, "noted": noted})}
    run = trainer_class(
        model, arguments(folder, **given), train_dataset=token_rows(unequal=True) if rows is None else rows,
        optimizer_cls_and_kwargs=(ELRA if points is None else Probing, settings), **(own or {}),
    )  # fmt: skip
    run.noted = noted
    return run


def flat(groups):
    return [tensor for group in groups for tensor in group]


def image_model():
    """With BatchNorm and dropout."""
    torch.manual_seed(0)
    return SmallImageClassifier(
        SmallImageClassifierConfig(architecture="fashion-cnn", image_size=8, num_channels=1, num_labels=4)
    )


MODELS = {
    "dropout": (lambda: llama(attention_dropout=0.2), None, {}),
    "BatchNorm": (image_model, vit_rows(), {}),
    "ragged": (lambda: llama(attention_dropout=0.2), ragged_rows(), {"data_collator": padded}),
}


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("together", [None, "4", "auto"])
def test_line_losses_leave_nothing_behind(tmp_path, name, together):
    build, rows, own = MODELS[name]
    given = dict(
        rows=rows, own=own, per_device_train_batch_size=2, gradient_accumulation_steps=3, max_steps=6,
        elra_max_micro_batch=together, elra_control_cycle="2ba",
    )  # fmt: skip
    if name == "BatchNorm":
        rows = [{**row, "pixel_values": row["pixel_values"].float()} for row in rows]
        given["rows"] = rows
    plain = probing(tmp_path, build(), points=None, **given)
    plain.train()
    asked = probing(tmp_path, build(), points=((0.5, "same"), (1.0, 2), (-1.0, 3)), **given)
    asked.train()
    for one, other in zip(plain.model.state_dict().values(), asked.model.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert logged(plain, "loss") == logged(asked, "loss")
    assert logged(plain, "epoch") == logged(asked, "epoch")
    assert "backward" not in vars(asked.accelerator)
    assert asked.elra_optimizer.line_loss is None


@pytest.mark.parametrize("together", [None, "8"])
@pytest.mark.parametrize("build", ["dropout", "ignores the number of items", "one pass"])
def test_at_the_point_itself_the_loss_is_the_one_that_was_observed(tmp_path, build, together):
    """With the same dropout masks."""
    model, rows = (vit().double(), vit_rows()) if build.startswith("ignores") else (llama(attention_dropout=0.3), None)
    size = {"per_device_train_batch_size": 8} if build == "one pass" else {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4,
    }  # fmt: skip
    run = probing(tmp_path, model, rows, max_steps=5, elra_max_micro_batch=together, **size)
    run.train()
    assert len(run.noted) == 5
    for observed, same in run.noted:
        assert same == pytest.approx(observed, rel=1e-6)


def test_along_a_direction_of_ones_own(tmp_path):
    """Losses at three points, against those of a model that was put there; parameters without a gradient stay out."""
    found = []

    class Own(Probing):
        def step(self, closure=None, *, loss=None):
            used = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
            assert [len(group) for group in used] != [len(group["params"]) for group in self.param_groups]
            generator = torch.Generator().manual_seed(1)
            line = [[torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in group] for group in used]
            number = run._get_num_items_in_batch([run.batch], torch.device("cpu"))  # 5.8 counts position 0 too
            before = [p.detach().clone() for p in flat(used)]
            for s in (0.01, -0.02, 0.01):
                told = self.line_loss(s, line)
                with torch.no_grad():
                    for p, point, u in zip(flat(used), before, flat(line), strict=True):
                        assert torch.equal(p, point)
                        p.copy_(point - s * u)
                    expected = run.model(**run.batch, num_items_in_batch=number).loss.item()
                    for p, point in zip(flat(used), before, strict=True):
                        p.copy_(point)
                found.append((told, expected))
            return super().step(closure, loss=loss)

    class Keeps(ElraTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            (self.batch,) = inputs
            return super().training_step(model, inputs, num_items_in_batch)

    model = llama().double()
    model.unused = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))
    run = Keeps(
        model, arguments(tmp_path, max_steps=2, weight_decay=1e-4), train_dataset=token_rows(),
        optimizer_cls_and_kwargs=(Own, {"points": ()}),
    )  # fmt: skip
    run.train()
    told, expected = zip(*found, strict=True)
    assert told == pytest.approx(expected, rel=1e-5)
    assert told[0] == told[2] != told[1]


class Seen(ElraTrainer):
    """Notes the rows that a training pass was over, and those of line losses."""

    def __init__(self, *args, **kwargs):
        self.trained, self.looked_at = [], []
        super().__init__(*args, **kwargs)

    def compute_loss(self, model, inputs, *args, **kwargs):
        looks = "backward" in vars(self.accelerator)
        (self.looked_at if looks else self.trained).extend(inputs["input_ids"][:, 0].tolist())
        return super().compute_loss(model, inputs, *args, **kwargs)


def stream():
    return Dataset.from_list([{k: v.tolist() for k, v in row.items()} for row in numbered(30)]).to_iterable_dataset()


def numbered(count):
    return [{"input_ids": torch.full((4,), i), "labels": torch.full((4,), (i + 1) % 64)} for i in range(count)]


@pytest.mark.parametrize("data", [numbered(30), stream()], ids=["map-style", "stream"])
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_losses_of_the_next_updates_spend_no_data(tmp_path, stop, data):
    """An epoch has three updates of 4 x 2 rows and an incomplete one, which is skipped."""

    def run(folder, points, **own):
        return probing(
            tmp_path / folder, llama(), data, points, Seen, own, per_device_train_batch_size=4,
            gradient_accumulation_steps=2, max_steps=7, elra_control_cycle="100ba", seed=3,
        )  # fmt: skip

    plain, whole = run("plain", None), run("whole", ((0.1, 2),))
    plain.train()
    whole.train()
    assert whole.trained == plain.trained
    assert torch.equal(weights(whole.model), weights(plain.model))
    assert logged(whole, "epoch") == logged(plain, "epoch")
    # Two updates ahead at the first, one at the second; at the third the epoch has none, and its own are taken.
    assert whole.looked_at[: 16 + 8 + 8] == plain.trained[8:24] + plain.trained[16:24] + plain.trained[16:24]
    part = run("part", ((0.1, 2),), callbacks=[StopAt(stop)])
    part.train()
    again = run("part", ((0.1, 2),))
    again.train(resume_from_checkpoint=True)
    assert part.trained + again.trained == whole.trained
    assert part.noted + again.noted == whole.noted
    assert torch.equal(weights(again.model), weights(whole.model))
    assert again.elra_callback.state() == whole.elra_callback.state()


@pytest.mark.parametrize("batches", [0, -1, 1.5, "next", True, None])
def test_what_batches_cannot_be(tmp_path, batches):
    with pytest.raises(ConfigurationError, match="batches=.* must be 'same', or a number of updates of at least 1"):
        probing(tmp_path, llama(), points=((0.0, batches),)).train()


def test_an_optimizer_is_given_line_losses_for_its_step_and_only_where_it_needs_them(tmp_path):
    class Note(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            given.append((optimizer.optimizer.line_loss is not None, len(run.elra.micro_batches.passes)))

    for points, expected in ((None, (False, 0)), (((0.0, "same"),), (True, 2))):
        given = []
        size = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=2)
        run = probing(tmp_path, llama(), points=points, own={"callbacks": [Note()]}, **size)
        run.train()
        assert given == [expected] * 2
        assert run.elra_optimizer.line_loss is None


def test_passes_are_counted_logged_and_kept(tmp_path):
    given = dict(per_device_train_batch_size=2, gradient_accumulation_steps=3, max_steps=6, elra_control_cycle="100ba")
    points = ((0.0, "same"), (0.1, 1))
    run = probing(tmp_path / "whole", llama(), points=points, **given)
    run.train()
    assert logged(run, "forwards") == [9 * update for update in range(1, 7)]
    assert logged(run, "backwards") == [3 * update for update in range(1, 7)]
    probing(tmp_path / "part", llama(), points=points, own={"callbacks": [StopAt(4)]}, **given).train()
    again = probing(tmp_path / "part", llama(), points=points, **given)
    again.train(resume_from_checkpoint=True)
    assert logged(again, "forwards") == logged(run, "forwards")
    assert again.elra.trials.counts == run.elra.trials.counts == PassCounts(forwards=54, backwards=18)
    again.train()
    assert again.elra.trials.counts == run.elra.trials.counts  # of a run of its own


def test_evaluation_is_not_counted_and_other_optimizers_log_nothing_new(tmp_path):
    run = probing(tmp_path, llama(), points=None, max_steps=4, eval_strategy="steps", eval_steps=2,
                  own={"eval_dataset": token_rows(8)}, elra_boost=True)  # fmt: skip
    run.train()
    assert run.elra.trials.counts == PassCounts(forwards=4, backwards=4)
    args = arguments(tmp_path, TrainingArguments, optim="adamw_torch", max_steps=2)
    other = ElraTrainer(llama(), args, train_dataset=token_rows())
    other.train()
    assert logged(other, "forwards") == []


def test_looking_ahead():
    data = iter(range(5))
    last = []
    ahead = LookAhead(data, lambda: bool(last))
    assert next(ahead) == 0
    assert ahead.peek(2) == ahead.peek(2) == [1, 2]
    assert next(ahead) == 1
    last.append(True)  # as a loader says when it has given its last item
    assert ahead.peek(9) == [2, 3, 4]
    assert not ahead.is_at_its_end
    assert list(ahead) == [2, 3, 4]
    assert ahead.is_at_its_end
    assert ahead.peek(1) == []


def test_on_several_processes_line_losses_are_those_of_all(tmp_path):
    """0 is one pass over the same rows by a process alone."""
    found = together(workers.line_losses, 2, folder=str(tmp_path))
    assert found["equal"]
    for observed, same, ahead in found["noted"]:
        assert same == pytest.approx(observed, rel=1e-6)
        assert ahead > 0
    alone = workers.line_losses(str(tmp_path / "alone"))
    for one, other in zip(found["noted"], alone["noted"], strict=True):
        assert one == pytest.approx(other, rel=1e-5)
