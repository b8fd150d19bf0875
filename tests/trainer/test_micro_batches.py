"""Batch sizes that change in training: equal gradients, true counts, resume; with ELRA and with AdamW."""

import json
import random

import pytest
import torch
import transformers.integrations.integration_utils
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import HPSearchBackend

from hf_elra import ELRA, ConfigurationError, ElraTrainer
from hf_elra.control.batch_size import BatchSizeController
from hf_elra.trainer.accounting import ElraCallback
from hf_elra.trainer.arguments import LAUNCHER_FLAGS, ElraSettings
from hf_elra.trainer.batch_control import build_batch_control
from hf_elra.trainer.callbacks import DataProgressBar
from tests.conftest import arguments, llama, logged, token_rows, trainer, vit, vit_rows, weights

GROWING = dict(elra_batch_control="schedule", elra_batch_schedule="0:1,0.3:2,0.6:3")


def decisions(run):
    return [entry for entry in run.state.log_history if "condition" in entry]


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


@pytest.mark.parametrize("merged", [None, "12"])
@pytest.mark.parametrize("divides", [True, False])
def test_noise_scale_compares_the_first_pass_with_the_update(tmp_path, divides, merged):
    """Rows of unequal numbers of targets; losses that are divided by those of the update, and means over a pass."""
    seen, divisors, model = [], [], llama().double()

    class Note(ElraTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            seen.append(dict(inputs))
            divisors.append(num_items_in_batch)
            number = num_items_in_batch if divides else None
            return super().compute_loss(model, inputs, return_outputs, number)

    run = trainer(
        tmp_path, model, rows=token_rows(12, unequal=True), trainer_class=Note, optim="sgd", learning_rate=1e-12,
        per_device_train_batch_size=2, gradient_accumulation_steps=6, max_steps=1, elra_log_noise_scale=True,
        elra_max_micro_batch=merged,
    )  # fmt: skip
    run.train()
    assert len(seen) == (2 if merged else 6)  # never one pass alone

    def square(batches):
        model.zero_grad()
        inputs = {name: torch.cat([batch[name] for batch in batches]) for name in seen[0]}
        model(input_ids=inputs["input_ids"], labels=inputs["labels"]).loss.backward()
        return sum(p.grad.square().sum().item() for p in model.parameters()), inputs["labels"][:, 1:].ne(-100).sum()

    (small, small_targets), (big, targets) = square(seen[:1]), square(seen)
    share = (small_targets / targets).item()
    signal = (big - share * small) / (1 - share)
    noise = (small - big) / (1 / share - 1) * 12
    # Older versions of Transformers divide by the first token of a row too, which is no target.
    scale = 0.02 * ((targets / divisors[0]).item() ** 2 if divides else 1)
    assert run.elra.size.noise_scale.signal == pytest.approx(scale * signal, rel=1e-4)
    assert run.elra.size.noise_scale.noise == pytest.approx(scale * noise, rel=1e-4)
    assert logged(run, "noise_scale")[-1] == pytest.approx(run.elra.size.noise_scale.value)


def test_the_batch_follows_the_noise_scale_and_goes_on_when_resumed(tmp_path):
    given = dict(
        rows=token_rows(400, unequal=True), per_device_train_batch_size=2, gradient_accumulation_steps=2,
        elra_batch_control="noise", elra_control_cycle="5ba", max_steps=20, save_strategy="steps", save_steps=12,
        optim_args="max_relative_step=none",  # so that there is little left to learn
    )  # fmt: skip
    scales = []

    class Note(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % 5 == 0:
                scales.append(whole.elra.size.noise_scale.value)

    whole = trainer(tmp_path / "whole", **given)
    whole.add_callback(Note())
    whole.train()
    controller = BatchSizeController(initial_accumulation=2)
    expected = [controller.follow(scale / 2, 1.0, 0.0) for scale in scales]
    assert [d["accumulation"] for d in decisions(whole)] == [d.accumulation for d in expected]
    assert [d["condition"] for d in decisions(whole)] == [d.condition for d in expected]
    assert len({d["batch_size"] for d in decisions(whole)}) > 1
    part = trainer(tmp_path / "part", **given)
    part.add_callback(StopAt(12))
    part.train()
    again = trainer(tmp_path / "part", **given)
    again.train(resume_from_checkpoint=True)
    assert again.elra.size.noise_scale == whole.elra.size.noise_scale
    assert [d["accumulation"] for d in decisions(again)] == [d["accumulation"] for d in decisions(whole)]
    assert torch.equal(weights(again.model), weights(whole.model))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(elra_batch_control="noise"), "pass --per_device_train_batch_size 4 --gradient_accumulation_steps 2"),
        (dict(elra_log_noise_scale=True, optim="sgd"), "elra_log_noise_scale compares the gradient of a micro-batch"),
        (
            dict(elra_batch_control="noise", elra_initial_accumulation=2, elra_batch_conditions="rise"),
            "elra_batch_conditions: does nothing with elra_batch_control=noise",
        ),
    ],
)
def test_noise_scale_that_cannot_be_taken(tmp_path, given, message):
    with pytest.raises(ConfigurationError, match=message):
        trainer(tmp_path, **given)


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


class Stream(torch.utils.data.IterableDataset):
    """Data without a length, 23 and a half batches of two."""

    def __iter__(self):
        return iter(token_rows(47, unequal=True))


# Map-style data end after a number of epochs, streams after a number of samples; 47 rows leave one incomplete batch.
DATA = {
    "map-style": dict(rows=token_rows(47, unequal=True), max_steps=-1, num_train_epochs=3),
    "stream": dict(rows=Stream(), max_steps=-1, elra_max_samples=130),
}


@pytest.mark.parametrize("data", list(DATA))
@pytest.mark.parametrize("settings", [{}, {"elra_max_micro_batch": "6", "lr_scheduler_type": "cosine"}], ids=str)
@pytest.mark.parametrize("optim", ["elra", "adamw_torch"])
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, optim, settings, data):
    """Interrupted at two random points, right after a change of the batch size, and in the last group of an epoch."""
    given = dict(
        optim=optim,
        learning_rate=0.1,  # so high for AdamW that the mean loss rises
        per_device_train_batch_size=2,
        elra_batch_control="elra",
        elra_batch_growth=1.6,
        elra_control_cycle="6sp",
        **{"lr_scheduler_type": "constant", **settings},
        **DATA[data],
    )
    whole = trainer(tmp_path / "whole", **given)
    whole.train()
    changes = [d["step"] for d in decisions(whole) if d["change"] != "keep"]
    assert len(changes) > 1
    points = set(random.Random(0).sample(range(1, whole.state.global_step), 2))
    for point in sorted(points | {changes[0], changes[-1] - 1}):
        folder = tmp_path / f"parts-{point}"
        trainer(folder, callbacks=[StopAt(point)], **given).train()
        second = trainer(folder, model=llama(seed=9), **given)
        second.train(resume_from_checkpoint=True)
        assert torch.equal(weights(whole.model), weights(second.model))
        for key in ("loss", "learning_rate"):
            assert logged(whole, key) == logged(second, key)
        assert decisions(whole) == decisions(second)
        for key in ("epoch", "global_step", "max_steps", "num_train_epochs", "total_flos"):
            assert getattr(whole.state, key) == getattr(second.state, key)
        assert whole.elra_callback.state() == second.elra_callback.state()


@pytest.mark.parametrize("stop", [2, 4, 9])
def test_a_stream_that_ends_after_a_number_of_updates_goes_on_where_it_was(tmp_path, stop):
    """24 batches of two a pass, so that the stream is begun anew in the twelve updates of four batches."""
    given = dict(
        optim="adamw_torch", rows=Stream(), max_steps=12, per_device_train_batch_size=2, gradient_accumulation_steps=4,
        elra_batch_control="elra", elra_control_cycle="100ba",
    )  # fmt: skip
    whole = trainer(tmp_path / "whole", **given)
    whole.train()
    trainer(tmp_path / "parts", callbacks=[StopAt(stop)], **given).train()
    second = trainer(tmp_path / "parts", model=llama(seed=9), **given)
    second.train(resume_from_checkpoint=True)
    assert torch.equal(weights(whole.model), weights(second.model))
    assert logged(whole, "epoch") == logged(second, "epoch")
    assert whole.state.epoch == second.state.epoch == 1


def test_a_budget_far_above_the_data_does_not_ask_them_in_vain(tmp_path):
    asked = []

    class Asking(ElraTrainer):
        def get_batch_samples(self, *args, **kwargs):
            asked.append(self.state.global_step)
            return super().get_batch_samples(*args, **kwargs)

    run = trainer(tmp_path, trainer_class=Asking, rows=Stream(), max_steps=-1, elra_max_tokens=10**9,
                  elra_control_cycle="1000ba", callbacks=[StopAt(20)])  # fmt: skip
    run.train()
    assert run.state.global_step == 20
    assert len(asked) < 30  # five updates a pass, and once in vain


def test_the_users_arguments_are_left_as_they_were(tmp_path):
    given = arguments(tmp_path, TrainingArguments, optim="elra", gradient_accumulation_steps=4, max_steps=3)
    for _ in range(2):
        run = Trainer(llama(), given, train_dataset=token_rows(128))
        run.train()
        assert run.elra_callback.samples == 3 * 4 * 8
        assert given.gradient_accumulation_steps == 4


@pytest.mark.parametrize(
    ("searched", "samples", "control"),
    [
        ({"gradient_accumulation_steps": 4}, 8 * 16, "elra"),
        ({"elra_batch_control": "off", "gradient_accumulation_steps": 2}, 8 * 8, "off"),
        ({"elra_batch_control": "schedule", "elra_batch_schedule": "0:1,0.5:3"}, 4 * 4 + 4 * 12, "schedule"),
    ],
    ids=str,
)
def test_hyperparameter_search_takes_our_settings(tmp_path, monkeypatch, searched, samples, control):
    """As a trial of Optuna's does it, without Optuna."""
    for module in (transformers.integrations, transformers.integrations.integration_utils):
        monkeypatch.setattr(module, "hp_params", lambda trial: trial.params)
    given = arguments(tmp_path, max_steps=8, per_device_train_batch_size=4, disable_tqdm=False)
    run = ElraTrainer(args=given, model_init=lambda: llama(), train_dataset=token_rows(128))
    run.hp_search_backend, run.hp_space = HPSearchBackend.OPTUNA, lambda trial: trial.params
    run.train(trial=type("Trial", (), {"number": 0, "params": searched})())
    assert run.elra_callback.samples == samples
    assert (run.batch_control.mode if run.batch_control else None) == control
    assert sum(isinstance(c, ElraCallback) for c in run.callback_handler.callbacks) == 1


@pytest.mark.parametrize("resumed", [False, True])
def test_intervals_that_are_shares_of_the_run_follow_the_data(tmp_path, resumed):
    class Note(TrainerCallback):
        def __init__(self):
            self.epochs = []

        def on_evaluate(self, args, state, control, **kwargs):
            self.epochs.append(state.epoch)

    note = Note()
    given = dict(
        optim="adamw_torch", per_device_train_batch_size=2, max_steps=-1, num_train_epochs=4, logging_steps=0.125,
        eval_dataset=token_rows(4), eval_strategy="steps", eval_steps=0.25, save_strategy="steps", save_steps=0.5,
        elra_batch_control="schedule", elra_batch_schedule="0:1,0.25:4", callbacks=[note],
    )  # fmt: skip
    if resumed:
        trainer(tmp_path, **{**given, "callbacks": [note, StopAt(45)]}).train()
        run = trainer(tmp_path, model=llama(seed=9), **given)
        run.train(resume_from_checkpoint=True)
    else:
        run = trainer(tmp_path, **given)
        run.train()
    assert note.epochs == [1.0, 2.0, 3.0, 4.0]
    assert [entry["epoch"] for entry in run.state.log_history if "loss" in entry] == [k / 2 for k in range(1, 9)]
    assert {"checkpoint-40", "checkpoint-56"} <= {path.name for path in tmp_path.iterdir()}


def test_the_largest_batch_is_one_of_samples_whatever_size_fits(tmp_path):
    class Small(ElraTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            if len(inputs["input_ids"]) > 4:
                raise RuntimeError("CUDA out of memory.")
            return super().compute_loss(model, inputs, *args, **kwargs)

    run = trainer(
        tmp_path, trainer_class=Small, auto_find_batch_size=True, max_steps=2, elra_max_batch_size=16,
        elra_batch_control="schedule", elra_batch_schedule="0:9",
    )  # fmt: skip
    run.train()
    assert run.elra_callback.samples == 2 * 16


@pytest.mark.parametrize("spike", [None, 31])
def test_one_dirty_batch_does_not_change_the_batch_size(tmp_path, spike):
    class Dirty(ElraTrainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs) * (1e3 if self.state.global_step == spike else 1)

    run = trainer(
        tmp_path, trainer_class=Dirty, optim="sgd", learning_rate=1e-6, max_grad_norm=0.0, max_steps=60,
        lr_scheduler_type="constant", elra_batch_control="elra", elra_batch_conditions="noise",
        elra_control_cycle="20ba",
    )  # fmt: skip
    run.train()
    decisions = [entry for entry in run.state.log_history if "condition" in entry]
    assert [entry["change"] for entry in decisions] == ["keep"] * 3
    assert [entry["mean"] for entry in decisions] == pytest.approx([decisions[0]["mean"]] * 3, rel=0.02)


def test_gradient_decay(tmp_path):
    """The second update is of four micro-batches."""
    points = []
    for decay, updates in ((False, 1), (False, 2), (True, 2)):
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
        if updates == 1:
            run.add_callback(StopAt(1))
        run.train()
        points.append(weights(run.model))
    first, plain, decayed = points
    torch.testing.assert_close(4 * (decayed - first), plain - first, rtol=1e-3, atol=1e-6)
    assert not torch.equal(plain, first)


@pytest.mark.parametrize("optim", ["elra", "elra_spectral"])
def test_gradient_decay_of_ours_is_told_and_leaves_gradients_alone(tmp_path, optim):
    class Watching(ElraTrainer):
        def training_step(self, model, *args, **kwargs):
            loss = super().training_step(model, *args, **kwargs)
            told.append((self.elra_optimizer.gradient_decay, model.lm_head.weight.grad.norm().item()))
            return loss

    told, plain = [], []
    given = dict(
        optim=optim, trainer_class=Watching, per_device_train_batch_size=2, max_steps=4,
        elra_batch_control="schedule", elra_batch_schedule="0:1,0.5:4",
    )  # fmt: skip
    trainer(tmp_path, elra_gradient_decay=True, **given).train()
    told, plain = [], told
    trainer(tmp_path, **given).train()
    assert [decay for decay, _ in plain] == [1.0, 1.0, 0.25, 0.25]
    assert plain[2][1] == told[2][1]


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
        (
            {"elra_batch_control": "schedule", "elra_batch_schedule": "0:1", "elra_batch_growth": 2.0},
            "elra_batch_growth: does nothing with elra_batch_control=schedule",
        ),
        ({"elra_batch_control": "elra", "elra_batch_conditions": "noise,rize"}, "'rize' is unknown. Did you mean"),
        ({"elra_batch_control": "elra", "elra_batch_conditions": ""}, "elra_batch_conditions: condition '' is unknown"),
        ({"elra_max_samples": 0}, "elra_max_samples=0 must be at least 1"),
        ({"elra_max_tokens": -5}, "elra_max_tokens=-5 must be at least 1"),
        ({"elra_batch_control": "schedule", "elra_batch_schedule": "0:1,0.2"}, "elra_batch_schedule="),
    ],
)
@pytest.mark.parametrize("optim", ["elra", "adamw_torch"])
def test_wrong_flags_are_named_and_nothing_is_left(tmp_path, given, message, optim):
    given = {"elra_batch_control": "off", **given, "optim": optim}
    with pytest.raises(ConfigurationError, match=message):
        trainer(tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("given", [{"elra_batch_control": "elra"}, {"elra_max_samples": 100}])
def test_deepspeed_is_refused(tmp_path, given):
    args = arguments(tmp_path, optim="adamw_torch", **given)
    args.deepspeed = "zero2.json"
    with pytest.raises(ConfigurationError, match=f"{next(iter(given))} cannot be used with DeepSpeed"):
        build_batch_control(ElraSettings.of(args), args, token_rows())


def test_iterable_data_and_cycles_in_epochs(tmp_path):
    with pytest.raises(ConfigurationError, match="elra_control_cycle='1ep' counts epochs"):
        trainer(tmp_path, rows=Stream(), elra_batch_control="elra", elra_control_cycle="1ep")
    run = trainer(tmp_path, rows=Stream(), max_steps=6, per_device_train_batch_size=2, **GROWING)
    run.train()
    assert run.state.global_step == 6
    assert run.elra_callback.control_cycle == "45000sp"


@pytest.mark.parametrize(
    ("cycle", "rows"), [("15sp", None), ("255tok", None), ("0.2ep", None), ("15sp", Stream()), ("0.5ba", None)]
)
def test_cycles_shorter_than_one_update_are_refused(tmp_path, cycle, rows):
    with pytest.raises(ConfigurationError, match=f"elra_control_cycle='{cycle}' is shorter than"):
        trainer(tmp_path, rows=rows, elra_control_cycle=cycle, gradient_accumulation_steps=2)


def test_a_first_update_larger_than_the_data_is_refused(tmp_path):
    message = r"takes 96 samples, but the training data have 40; lower --per_device_train_batch_size \(now 8\)"
    with pytest.raises(ConfigurationError, match=message):
        trainer(tmp_path, rows=token_rows(40), elra_control_cycle="30sp", gradient_accumulation_steps=12)


@pytest.mark.parametrize("optim", ["elra", "adamw_torch"])
@pytest.mark.parametrize("budget", [{"elra_max_samples": 90}, {"elra_max_tokens": 90 * 16}])
@pytest.mark.parametrize("rows", [token_rows(40), Stream()], ids=["map-style", "stream"])
def test_budgets_end_training_with_the_update_that_reaches_them(tmp_path, optim, budget, rows):
    fractions = []

    class Note(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            fractions.append((run.progress.fraction(), run.lr_scheduler.get_last_lr()[0]))

    run = trainer(
        tmp_path,
        rows=rows,
        optim=optim,
        learning_rate=1e-3,
        lr_scheduler_type="linear",
        callbacks=[Note()],
        per_device_train_batch_size=4,
        elra_batch_control="schedule",
        elra_batch_schedule="0:1,0.5:3",
        max_steps=-1,
        **budget,
    )
    result = run.train()
    # 4 each until half of the budget, then 12 each, but for what the end of an epoch cuts.
    assert 90 <= run.elra_callback.samples < 90 + 12
    assert run.state.max_steps == run.state.global_step == result.global_step
    assert run.args.max_steps == -1
    for fraction, rate in fractions:
        assert rate == pytest.approx(1e-3 * (1 - fraction))
    assert fractions[-1][0] == 1


def test_the_earlier_of_two_limits_counts(tmp_path):
    run = trainer(tmp_path, elra_max_samples=1000, max_steps=5)
    run.train()
    assert run.state.global_step == 5
    assert run.elra_callback.samples == 40


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"elra_max_tokens": 100}, "elra_max_tokens=100: .*'pixel_values', holds no tokens; use --elra_max_samples"),
        ({"elra_control_cycle": "1000tok"}, "elra_control_cycle='1000tok': .*'pixel_values', holds no tokens; write"),
    ],
)
def test_what_counts_tokens_needs_tokens(tmp_path, given, message):
    run = trainer(tmp_path, model=vit().double(), rows=vit_rows(), **given)
    with pytest.raises(ConfigurationError, match=message):
        run.train()


class Clock:
    def __init__(self, folder, **given):
        self.run = trainer(folder, disable_tqdm=False, **given)
        self.bar = next(c for c in self.run.callback_handler.callbacks if isinstance(c, ProgressCallback))
        self.states = []
        original = self.bar.on_step_end

        def noted(*args, **kwargs):
            original(*args, **kwargs)
            self.states.append((self.bar.training_bar.n, self.bar.training_bar.total))

        self.bar.on_step_end = noted
        self.run.train()


@pytest.mark.parametrize(
    ("given", "unit", "end"),
    [
        (dict(max_steps=-1, num_train_epochs=2), "samples", 2 * 46),
        (dict(max_steps=-1, elra_max_samples=100), "samples", 100),
        (dict(max_steps=-1, elra_max_tokens=1600), "tokens", 1600),
        (dict(max_steps=7), "updates", 7),
    ],
)
def test_progress_bar_counts_data_and_ends_full(tmp_path, given, unit, end):
    clock = Clock(
        tmp_path, rows=token_rows(47), optim="adamw_torch", per_device_train_batch_size=2,
        dataloader_drop_last=True, **GROWING, **given,
    )  # fmt: skip
    assert isinstance(clock.bar, DataProgressBar)
    assert clock.bar.unit == unit
    done, totals = zip(*clock.states, strict=True)
    assert list(done) == sorted(done)
    assert done[-1] == totals[-1]
    assert end <= done[-1] <= end + 6 * (16 if unit == "tokens" else 1)
    if "elra_max_samples" in given or "elra_max_tokens" in given:
        assert totals[0] == end


def test_stock_progress_bar_stays_where_nothing_changes(tmp_path):
    assert type(Clock(tmp_path, optim="adamw_torch", max_steps=2).bar) is ProgressCallback


@pytest.mark.parametrize("optim", ["elra", "adamw_torch"])
def test_speed_tokens_and_flops_count_what_was_really_done(tmp_path, optim):
    run = trainer(
        tmp_path,
        optim=optim,
        per_device_train_batch_size=2,
        include_num_input_tokens_seen="all",
        max_steps=10,
        **GROWING,
    )
    metrics = run.train().metrics
    samples = 2 * (3 * 1 + 3 * 2 + 4 * 3)
    assert metrics["train_samples_per_second"] == pytest.approx(samples / metrics["train_runtime"], abs=1e-2)
    assert metrics["train_steps_per_second"] == pytest.approx(10 / metrics["train_runtime"], abs=1e-2)
    assert run.state.num_input_tokens_seen == run.elra_callback.tokens == samples * 16
    one = 6 * 16 * run.model.num_parameters(exclude_embeddings=True)
    assert run.state.total_flos == pytest.approx(samples * one)


def test_cycle_logs_hold_what_a_user_wants_to_know(tmp_path):
    run = trainer(
        tmp_path,
        rows=token_rows(64),
        per_device_train_batch_size=2,
        elra_initial_accumulation=3,
        elra_max_micro_batch="4",
        elra_control_cycle="3ba",
        max_steps=9,
    )
    run.train()
    for entry in decisions(run):
        assert entry["batch_size"] == 2 * entry["accumulation"]
        assert entry["batch_tokens"] == 16 * entry["batch_size"]
        assert entry["change"] in ("grow", "shrink", "keep")
    assert decisions(run)[0]["micro_batches_per_pass"] == 1.5
    numbers = [entry for entry in run.state.log_history if "cycle_loss" in entry]
    assert [e["cycle_loss"] for e in numbers] == [d["mean"] for d in decisions(run)]


def test_cycle_logs_leave_out_what_says_nothing(tmp_path):
    run = trainer(tmp_path, vit().double(), vit_rows(), per_device_train_batch_size=2, elra_control_cycle="3ba")
    run.train()
    assert len(decisions(run)) == 3
    for entry in run.state.log_history:
        assert not {"batch_tokens", "micro_batches_per_pass"} & set(entry)


def test_cycles_are_logged_at_their_true_epoch_also_in_the_saved_state(tmp_path):
    run = trainer(
        tmp_path,
        rows=token_rows(40),
        per_device_train_batch_size=2,
        elra_initial_accumulation=5,
        elra_control_cycle="0.5ep",
        elra_batch_conditions="noise",
        max_steps=-1,
        num_train_epochs=2,
    )
    run.train()
    assert [e["epoch"] for e in run.state.log_history if "cycle_loss" in e] == [0.5, 1.0, 1.5, 2.0]
    run.save_state()
    saved = json.loads((tmp_path / "trainer_state.json").read_text())["stateful_callbacks"]["ElraCallback"]
    saved = saved[-1] if isinstance(saved, list) else saved
    assert saved["attributes"]["samples"] == 80
    assert len(saved["attributes"]["data_position"]["controller"]["decisions"]) == 4


def test_iterable_data_with_a_length(tmp_path):
    class Sized(Stream):
        def __len__(self):
            return 47

    run = trainer(tmp_path, rows=Sized(), per_device_train_batch_size=2, max_steps=3)
    run.train()
    assert run.state.global_step == 3


def test_what_the_data_do_not_allow_is_told(tmp_path, caplog_warnings):
    trainer(
        tmp_path, rows=token_rows(40), elra_initial_accumulation=9, elra_control_cycle="2000sp", max_steps=1
    ).train()
    messages = [record.message for record in caplog_warnings.records]
    assert "Updates of 9 micro-batches are cut to the 5 that an epoch has." in messages
    assert "elra_control_cycle=2000sp is no shorter than this run: the batch size will not change." in messages


def test_an_update_never_outgrows_its_control_cycle(tmp_path):
    run = trainer(
        tmp_path,
        rows=token_rows(200),
        per_device_train_batch_size=2,
        elra_control_cycle="9sp",
        elra_batch_growth=10,
        max_steps=12,
        elra_batch_conditions="noise",
    )
    run.train()
    run.elra.size.controller.exact = 1.0
    run.elra.size.controller.end_cycle(1.0, 10.0)
    assert run.elra.accounting.accumulation == 4


def test_control_is_on_with_elra_and_off_with_others_and_where_batches_are_made_otherwise(tmp_path, caplog_warnings):
    class OwnBatches(Trainer):
        def _prepare_inputs(self, inputs):
            return super()._prepare_inputs(inputs)

    assert trainer(tmp_path).batch_control.mode == "elra"
    assert trainer(tmp_path, optim="adamw_torch").batch_control is None
    args = arguments(tmp_path, TrainingArguments, optim="elra")
    assert Trainer(llama(), args, train_dataset=token_rows()).batch_control.mode == "elra"
    given = Trainer(
        llama(), arguments(tmp_path, TrainingArguments), train_dataset=token_rows(), optimizer_cls_and_kwargs=(ELRA, {})
    )
    assert given.batch_control.mode == "elra"
    assert not [r for r in caplog_warnings.records if "makes batches of its own" in r.message]
    assert OwnBatches(llama(), args, train_dataset=token_rows()).batch_control is None
    assert [r for r in caplog_warnings.records if "OwnBatches makes batches of its own" in r.message]
