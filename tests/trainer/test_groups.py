"""Batch sizes that change in training: equal gradients, true counts, resume; with ELRA and with AdamW."""

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_elra import ConfigurationError, ElraTrainer
from hf_elra.trainer.arguments import LAUNCHER_FLAGS
from tests.conftest import arguments, classifier, llama, logged, token_rows, trainer, weights

GROWING = dict(elra_batch_control="schedule", elra_batch_schedule="0:1,0.3:2,0.6:3")


def label_rows(count=48):
    return [{"input_ids": row["input_ids"], "labels": row["input_ids"][0] // 32} for row in token_rows(count)]


def decisions(run):
    return [entry for entry in run.state.log_history if "condition" in entry]


@pytest.mark.parametrize("optim", ["elra", "adamw_torch"])
@pytest.mark.parametrize(("model", "rows"), [(llama, token_rows(48, unequal=True)), (classifier, label_rows())])
def test_eight_times_one_is_four_times_two_is_one_times_eight(tmp_path, optim, model, rows):
    results = []
    for batch, first in ((8, 1), (4, 2), (1, 8)):
        run = trainer(
            tmp_path,
            model=model().eval() if model is llama else without_dropout(model()),
            rows=rows,
            optim=optim,
            per_device_train_batch_size=batch,
            elra_batch_control="elra",
            elra_initial_accumulation=first,
            elra_control_cycle="100ba",
            max_steps=6,
        )
        run.train()
        results.append((torch.tensor(logged(run, "loss")), weights(run.model)))
        assert run.elra_callback.samples == 48
    for losses, points in results[1:]:
        torch.testing.assert_close(losses, results[0][0], rtol=1e-5, atol=0)
        torch.testing.assert_close(points, results[0][1], rtol=1e-4, atol=1e-5)


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def test_noise_makes_the_batch_grow_and_every_third_change_divides(tmp_path):
    class Noisy(ElraTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return loss * (3.0 if self.state.global_step % 2 else 0.2)

    run = trainer(
        tmp_path,
        trainer_class=Noisy,
        rows=token_rows(400),
        optim="sgd",
        learning_rate=1e-4,
        per_device_train_batch_size=2,
        elra_batch_control="elra",
        elra_initial_accumulation=2,
        elra_control_cycle="4ba",
        max_steps=24,
    )
    run.train()
    assert [d["change"] for d in decisions(run)] == ["grow", "grow", "shrink", "grow", "grow", "shrink"]
    assert [d["batch_size"] for d in decisions(run)] == [6, 10, 6, 10, 14, 10]
    assert run.elra_callback.samples == 4 * (4 + 6 + 10 + 6 + 10 + 14)
    assert {d["condition"] for d in decisions(run)} <= {"noise", "rise", "stall"}
    assert [e["accumulation"] for e in run.state.log_history if "cycle_loss" in e] == [3, 5, 3, 5, 7, 5]


def test_schedule_multiplies_the_first_batch(tmp_path):
    run = trainer(tmp_path, per_device_train_batch_size=2, max_steps=10, **GROWING)
    run.train()
    assert run.elra_callback.samples == 2 * (3 * 1 + 3 * 2 + 4 * 3)


@pytest.mark.parametrize("optim", ["elra", "adamw_torch"])
def test_epochs_are_counted_by_the_data(tmp_path, optim):
    """31 micro-batches an epoch, groups that do not divide it, two and a half epochs."""
    seen = []

    class Note(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append((state.epoch, state.max_steps))

    run = trainer(
        tmp_path,
        rows=token_rows(62),
        optim=optim,
        callbacks=[Note()],
        per_device_train_batch_size=2,
        elra_initial_accumulation=3,
        max_steps=-1,
        num_train_epochs=2.5,
        **GROWING,
    )
    run.train()
    epochs = [epoch for epoch, _ in seen]
    assert epochs == sorted(epochs)
    assert run.state.epoch == pytest.approx(2.5, abs=0.3)
    assert run.state.max_steps == run.state.global_step
    if optim == "adamw_torch":  # nothing is skipped: all of the first two epochs, and half of the third
        assert run.elra_callback.samples >= 62 * 2.5


def test_the_schedule_of_the_learning_rate_follows_the_data(tmp_path):
    run = trainer(
        tmp_path,
        optim="adamw_torch",
        learning_rate=1e-3,
        lr_scheduler_type="linear",
        per_device_train_batch_size=2,
        max_steps=-1,
        num_train_epochs=2,
        **GROWING,
    )
    run.train()
    assert run.lr_scheduler.get_last_lr()[0] == pytest.approx(0, abs=1e-9)
    assert logged(run, "learning_rate") == sorted(logged(run, "learning_rate"), reverse=True)


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop = control.should_save = True


@pytest.mark.parametrize("interrupted_at", [1, 4, 7, 10, 13])
@pytest.mark.parametrize("optim", ["elra", "adamw_torch"])
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, interrupted_at, optim):
    given = dict(
        rows=token_rows(46, unequal=True),
        optim=optim,
        learning_rate=0.1,  # so high for AdamW that the mean loss rises
        lr_scheduler_type="constant",
        per_device_train_batch_size=2,
        elra_batch_control="elra",
        elra_batch_growth=1.6,
        elra_control_cycle="10sp",
        max_steps=-1,
        num_train_epochs=3,
    )
    whole = trainer(tmp_path / "whole", **given)
    whole.train()
    assert len({d["accumulation"] for d in decisions(whole)}) > 1
    assert whole.state.global_step > interrupted_at
    first = trainer(tmp_path / "parts", callbacks=[StopAt(interrupted_at)], **given)
    first.train()
    second = trainer(tmp_path / "parts", model=llama(seed=9), **given)
    second.train(resume_from_checkpoint=True)
    assert torch.equal(weights(whole.model), weights(second.model))
    assert logged(whole, "loss") == logged(second, "loss")
    assert decisions(whole) == decisions(second)
    assert whole.state.epoch == second.state.epoch
    assert whole.elra_callback.state() == second.elra_callback.state()


def test_gradient_decay(tmp_path):
    points = []
    for decay in (False, True):
        run = trainer(
            tmp_path,
            optim="sgd",
            learning_rate=0.1,
            lr_scheduler_type="constant",
            per_device_train_batch_size=2,
            elra_batch_control="schedule",
            elra_batch_schedule="0:1,0.5:4",
            elra_gradient_decay=decay,
            max_steps=2,
        )
        start = weights(run.model)
        run.train()
        points.append((start, weights(run.model)))
    assert not torch.equal(points[0][1], points[1][1])


def test_stock_trainer_under_the_launcher_with_adamw(tmp_path):
    LAUNCHER_FLAGS.values = {"elra_batch_control": "schedule", "elra_batch_schedule": "0:1,0.5:3"}
    args = arguments(tmp_path, TrainingArguments, optim="adamw_torch", max_steps=4, per_device_train_batch_size=2)
    run = Trainer(llama(), args, train_dataset=token_rows())
    run.train()
    assert run.elra_callback.samples == 2 * (1 + 1 + 3 + 3)
    assert args.max_grad_norm == 1.0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"elra_batch_control": "erla"}, "Did you mean 'elra'"),
        ({"elra_batch_control": "elra", "elra_max_batch_size": 4}, "elra_max_batch_size=4 is below the first batch"),
        ({"elra_batch_control": "elra", "elra_batch_growth": 1.0}, "growth=1.0"),
        ({"elra_batch_control": "elra", "elra_initial_accumulation": 0}, "initial_accumulation=0 must be at least 1"),
        ({"elra_batch_control": "elra", "elra_control_cycle": "soon"}, "elra_control_cycle='soon'"),
        ({"elra_max_batch_size": 64}, "elra_max_batch_size: does nothing while elra_batch_control is off"),
        ({"elra_batch_schedule": "0:1,0.5:2"}, "needs --elra_batch_control schedule"),
        ({"elra_batch_control": "schedule"}, "needs --elra_batch_schedule"),
        ({"elra_batch_control": "schedule", "elra_batch_schedule": "0:1,0.2"}, "elra_batch_schedule="),
    ],
)
@pytest.mark.parametrize("optim", ["elra", "adamw_torch"])
def test_wrong_flags_are_named_and_nothing_is_left(tmp_path, given, message, optim):
    given = {"elra_batch_control": "off", **given, "optim": optim}
    with pytest.raises(ConfigurationError, match=message):
        trainer(tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


def test_iterable_data_and_cycles_in_epochs(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(token_rows(20))

    with pytest.raises(ConfigurationError, match="elra_control_cycle='1ep' counts epochs"):
        trainer(tmp_path, rows=Stream(), elra_batch_control="elra")
    run = trainer(
        tmp_path, rows=Stream(), max_steps=6, per_device_train_batch_size=2, elra_control_cycle="2ba", **GROWING
    )
    run.train()
    assert run.state.global_step == 6
