"""ElraTrainer end to end: the loss the optimizer sees, and every stock feature still working."""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import (
    EarlyStoppingCallback,
    GPT2Config,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_elra import ELRA, ConfigurationError, ElraSeq2SeqTrainer, ElraSeq2SeqTrainingArguments, ElraTrainer
from tests.conftest import arguments, classifier, llama, logged, token_rows, trainer, vit, vit_rows, weights

CHECKPOINTING = next(
    name for name in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, name)
)  # its name since 5.23, and before


class LossesSeen(TrainerCallback):
    """Notes what the optimizer was told before each update."""

    def __init__(self):
        self.losses = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.losses.append(float(optimizer.optimizer._observed_loss))


class OwnBatches(ElraTrainer):
    """Stock accumulation, as in a subclass that overrides get_batch_samples."""

    def get_batch_samples(self, *args, **kwargs):
        return super().get_batch_samples(*args, **kwargs)


def test_training_lowers_the_loss_and_logs_what_elra_did(tmp_path):
    run = trainer(tmp_path, max_steps=60)
    run.train()
    losses = logged(run, "loss")
    assert losses[-1] < 0.75 * losses[0]
    assert logged(run, "learning_rate") == logged(run, "alpha")
    assert run.elra_optimizer.alpha == logged(run, "alpha")[-1]
    for key in ("step_norm", "restarts", "cosine"):
        assert len(logged(run, key)) >= 59
    assert all(0.0999 < norm < 2.001 for norm in logged(run, "step_norm"))


@pytest.mark.parametrize("rows", [token_rows(unequal=True), token_rows()])
def test_accumulated_micro_batches_give_the_true_mean_loss(tmp_path, rows):
    """8×1 = 4×2 = 1×8: the same losses told, the same weights; also with unequal numbers of target tokens."""
    results = []
    for batch, accumulation in ((8, 1), (4, 2), (1, 8)):
        seen = LossesSeen()
        run = trainer(
            tmp_path,
            rows=rows,
            callbacks=[seen],
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=6,
        )
        run.train()
        results.append((torch.tensor(seen.losses), weights(run.model)))
        assert run.elra_callback.samples == 48
        assert run.elra_callback.tokens == 48 * 16
    for losses, points in results[1:]:
        torch.testing.assert_close(losses, results[0][0], rtol=1e-5, atol=0)
        torch.testing.assert_close(points, results[0][1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("given", [{}, {"label_smoothing_factor": 0.1}])
def test_models_that_ignore_the_number_of_items_are_divided_by_the_micro_batches(tmp_path, given):
    rows = [{"input_ids": row["input_ids"], "labels": row["input_ids"][0] // 32} for row in token_rows(48)]
    results = []
    for batch, accumulation in ((8, 1), (2, 4)):
        model = classifier()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        seen = LossesSeen()
        run = trainer(
            tmp_path,
            model=model,
            rows=rows,
            callbacks=[seen],
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=6,
            **given,
        )
        run.train()
        results.append((torch.tensor(seen.losses), weights(run.model)))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=0)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-4, atol=1e-5)


def test_loss_told_is_the_mean_over_target_tokens(tmp_path):
    rows = token_rows(8, unequal=True)
    seen = LossesSeen()
    run = trainer(
        tmp_path,
        rows=rows,
        callbacks=[seen],
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        max_steps=1,
    )
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    count = run._get_num_items_in_batch([batch], torch.device("cpu"))  # 5.8 counts position 0 too
    with torch.no_grad():
        expected = copy.deepcopy(run.model).train()(**batch, num_items_in_batch=count).loss.item()
    run.train()
    assert seen.losses == [pytest.approx(expected, rel=1e-5)]


def test_model_without_loss_arguments(tmp_path):
    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(4, 1)

        def forward(self, x, labels):
            return {"loss": (self.linear(x).squeeze(-1) - labels).square().mean()}

    generator = torch.Generator().manual_seed(0)
    rows = [{"x": (x := torch.randn(4, generator=generator)), "labels": x.sum()} for _ in range(32)]
    points = []
    for batch, accumulation in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        run = trainer(
            tmp_path,
            model=Plain(),
            rows=rows,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=80,
            elra_control_cycle="1000ba",  # the batch stays
            optim_args="max_relative_step=none",  # five parameters
        )
        run.train()
        points.append(weights(run.model))
        assert logged(run, "loss")[-1] < 0.5 * logged(run, "loss")[0]
        assert run.elra_optimizer.param_groups[0]["min_step_norm"] == 0  # no language model
    torch.testing.assert_close(points[0], points[1], rtol=1e-4, atol=1e-5)


def test_compute_loss_func_and_label_smoothing(tmp_path):
    def loss_function(outputs, labels, num_items_in_batch=None):
        return torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / (num_items_in_batch or 1)

    rows = [{"input_ids": row["input_ids"], "labels": row["input_ids"][0] // 32} for row in token_rows(32)]
    given = dict(max_steps=60, per_device_train_batch_size=32)
    run = ElraTrainer(classifier(), arguments(tmp_path, **given), train_dataset=rows, compute_loss_func=loss_function)
    run.train()
    assert logged(run, "loss")[-1] < 0.9 * logged(run, "loss")[0]
    run = trainer(tmp_path, model=classifier(), rows=rows, label_smoothing_factor=0.1, **given)
    run.train()
    assert logged(run, "loss")[-1] < 0.9 * logged(run, "loss")[0]
    assert run.elra_optimizer.param_groups[0]["min_step_norm"] == 0


def test_a_loss_made_of_gradients(tmp_path):
    """Whether such a loss is divided by the number of items cannot be tried without gradients."""

    class Penalty(ElraTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            (gradient,) = torch.autograd.grad(outputs.loss, model.model.norm.weight, create_graph=True)
            loss = outputs.loss + gradient.square().sum()
            return (loss, outputs) if return_outputs else loss

    run = trainer(
        tmp_path, trainer_class=Penalty, model=llama(attn_implementation="eager"), gradient_accumulation_steps=2
    )
    run.train()
    assert logged(run, "loss")[0] == pytest.approx(4.2, abs=0.3)  # a mean, not a sum over two
    assert logged(run, "loss")[-1] < logged(run, "loss")[0]


def test_evaluation_best_model_and_early_stopping(tmp_path):
    run = trainer(
        tmp_path,
        eval_dataset=token_rows(16, seed=1),
        callbacks=[EarlyStoppingCallback(3)],
        max_steps=12,
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="steps",
        save_steps=3,
        save_total_limit=2,
        load_best_model_at_end=True,
    )
    run.train()
    best = min(entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry)
    assert run.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize(
    "given",
    [
        {CHECKPOINTING: True},
        {"bf16": True},
        {"torch_compile": True, "torch_compile_backend": "eager"},
        {"lr_scheduler_type": "cosine"},
        {"weight_decay": 3e-4},
        {"neftune_noise_alpha": 0.1},
        {"dataloader_num_workers": 1},
    ],
    ids=lambda given: next(iter(given)),
)
def test_stock_features_go_on_working(tmp_path, given):
    run = trainer(tmp_path, **{"max_steps": 20, **given})
    run.train()
    losses = logged(run, "loss")
    assert len(losses) == 20
    assert min(losses) < 0.95 * losses[0]


def test_lora_parameters_only(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run = trainer(tmp_path, model=model, max_steps=20)
    run.train()
    assert run.elra_optimizer.param_groups[0]["min_step_norm"] == 0.1  # a language model inside PEFT
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all("lora" in name for name in moved)
    assert logged(run, "loss")[-1] < logged(run, "loss")[0]


def test_seq2seq(tmp_path):
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )
    run = ElraSeq2SeqTrainer(
        model,
        arguments(tmp_path, ElraSeq2SeqTrainingArguments, max_steps=20, predict_with_generate=True),
        train_dataset=token_rows(),
        eval_dataset=token_rows(8),
    )
    run.train()
    assert logged(run, "loss")[-1] < logged(run, "loss")[0]
    assert run.elra_optimizer.param_groups[0]["min_step_norm"] == 0.1
    assert "eval_loss" in run.evaluate()


@pytest.mark.parametrize("given", [{}, {"optim": "elra_spectral"}, {"optim": "adamw_torch", "elra_boost": True}])
def test_a_model_that_is_frozen_altogether_is_refused(tmp_path, given):
    model = llama()
    model.requires_grad_(False)
    run = trainer(tmp_path, model=model, **given)
    with pytest.raises(ConfigurationError, match="no parameter of this LlamaForCausalLM has requires_grad=True"):
        run.train()


def test_last_incomplete_batch_is_skipped_in_training_only(tmp_path):
    rows = token_rows(21)
    run = trainer(
        tmp_path, rows=rows, eval_dataset=rows, max_steps=-1, num_train_epochs=2, per_device_train_batch_size=4
    )
    assert len(run.get_train_dataloader()) == 5
    assert sum(len(batch["labels"]) for batch in run.get_eval_dataloader()) == 21
    run.train()
    assert run.state.global_step == 10
    assert run.state.epoch == 2
    assert run.elra_callback.samples == 40


def test_last_incomplete_group_is_skipped_and_can_be_kept(tmp_path):
    given = dict(per_device_train_batch_size=4, gradient_accumulation_steps=3, max_steps=-1, num_train_epochs=2)
    run = trainer(tmp_path, rows=token_rows(30), **given)  # 7 whole micro-batches: 2 whole groups
    run.train()
    assert (run.state.global_step, run.state.epoch, run.elra_callback.samples) == (4, 2, 48)
    run = trainer(tmp_path, rows=token_rows(30), elra_skip_last_batch=False, **given)
    run.train()
    assert (run.state.global_step, run.state.epoch, run.elra_callback.samples) == (6, 2, 60)


def test_data_smaller_than_a_batch_are_used_with_a_warning(tmp_path, caplog_warnings):
    run = trainer(tmp_path, rows=token_rows(5), max_steps=3)
    run.train()
    assert run.elra_callback.samples == 15
    assert "less than one batch" in caplog_warnings.text


def test_short_last_batch_of_an_iterable_data_set_is_skipped(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(token_rows(21))

    run = trainer(tmp_path, rows=Stream(), per_device_train_batch_size=4, max_steps=12)
    run.train()
    assert (run.state.global_step, run.elra_callback.samples) == (12, 48)  # 5 whole batches a pass
    run = trainer(tmp_path, rows=Stream(), per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=5)
    run.train()
    assert (run.state.global_step, run.elra_callback.samples) == (5, 40)  # 2 whole groups a pass


def test_control_cycles_end_and_give_statistics(tmp_path):
    run = trainer(tmp_path, elra_control_cycle="24sp", max_steps=7)  # 8 samples an update: after 3 and 6 updates
    run.train()
    memory = run.elra_optimizer.param_groups[0]["scalars"]["loss_statistics"]
    losses = logged(run, "loss")
    assert memory["last_cycle"][0] == pytest.approx(sum(losses[3:6]) / 3, rel=1e-3)
    assert memory["cycle"][0] == 1


@pytest.mark.parametrize("interrupted_at", [3, 8, 11])
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, interrupted_at):
    class StopAt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = control.should_save = state.global_step == interrupted_at

    given = dict(
        rows=token_rows(50),
        max_steps=15,
        per_device_train_batch_size=4,
        elra_control_cycle="20sp",
        elra_min_step_norm=0.3,
    )
    whole = trainer(tmp_path / "whole", **given)
    whole.train()
    first = trainer(tmp_path / "parts", callbacks=[StopAt()], **given)
    first.train()
    assert first.state.global_step == interrupted_at
    second = trainer(tmp_path / "parts", model=llama(seed=9), **given)
    second.train(resume_from_checkpoint=True)
    assert torch.equal(weights(whole.model), weights(second.model))
    assert logged(whole, "loss")[interrupted_at:] == logged(second, "loss")[interrupted_at:]
    assert logged(whole, "alpha") == logged(second, "alpha")
    assert whole.elra_callback.state() == second.elra_callback.state()


def test_second_call_of_train_starts_its_counts_anew(tmp_path):
    run = trainer(tmp_path, max_steps=4)
    run.train()
    run.train()
    assert run.elra_callback.samples == 32


def test_a_spike_in_the_loss_is_taken_back(tmp_path, recwarn):
    class Spiky(ElraTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            return loss * 1e6 if self.state.global_step == 6 else loss

    run = trainer(tmp_path, trainer_class=Spiky, max_steps=12, elra_control_cycle="3ba")
    run.train()
    assert logged(run, "restarts")[-1] >= 1
    assert logged(run, "loss")[-1] < 1.2 * logged(run, "loss")[5]
    assert not [w for w in recwarn if "has a gradient" in str(w.message)]  # it is not missed where the loss decides


def test_not_a_number_is_survived_and_told(tmp_path, caplog_warnings):
    class Broken(ElraTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return loss * float("nan") if self.state.global_step in (0, 5) else loss

    run = trainer(tmp_path, trainer_class=Broken, max_steps=12, logging_steps=3, save_strategy="steps", save_steps=9)
    run.train()
    assert logged(run, "restarts") == logged(run, "non_finite") == [1, 2, 2, 2]
    assert torch.isfinite(weights(run.model)).all()
    told = [r.getMessage() for r in caplog_warnings.records if "was not finite" in r.getMessage()]
    assert [text[:9] for text in told] == ["Update 3:", "Update 6:"]

    caplog_warnings.clear()
    run.train(resume_from_checkpoint=True)
    assert "was not finite" not in caplog_warnings.text  # that was before


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if r.name == "hf_elra.trainer.logs"]


def test_updates_that_are_taken_back_in_a_row_are_told(tmp_path, caplog_warnings):
    class TakesBack(TrainerCallback):
        """Stands in for an optimizer that takes one update back, and later five in a row."""

        def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            optimizer.param_groups[0]["scalars"]["restarts"] += state.global_step in (3, 6, 7, 8, 9, 10)

    run = trainer(tmp_path, max_steps=18, logging_steps=6, callbacks=[TakesBack()])
    run.train()
    told = [text for text in warnings_of(caplog_warnings) if "were taken back" in text]
    assert len(told) == 1  # one alone is nothing to be told of
    assert told[0].startswith("Update 12: 5 of the last 6 updates were taken back for a loss far above")
    caplog_warnings.clear()
    run.train()
    assert len([text for text in warnings_of(caplog_warnings) if "were taken back" in text]) == 1


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ({"skipped": 2}, "Update 6: 2 batches since the last log said nothing: their loss was not finite"),
        (
            {"accepted_levels": 1},
            "Update 6: losses stayed far above their level before, however short the step (so often",
        ),
        ({"restarts": 5}, "Update 6: 5 of the last 6 updates were taken back for a loss far above the ones before. "),
        (
            {"restarts": 4, "consecutive_restarts": 4},
            "were taken back for a loss far above the ones before, the last 4",
        ),
        ({"restarts": 3, "consecutive_restarts": 3}, None),
        ({"restarts": 3, "non_finite": 3}, "not finite in 3 of the updates since the last log"),
        ({}, None),
    ],
    ids=str,
)
def test_what_an_optimizer_counts_is_told_once(tmp_path, caplog_warnings, numbers, text):
    """Counters that an optimizer may have; stood in for here."""
    run = trainer(tmp_path, max_steps=1)
    run.train()
    caplog_warnings.clear()
    run.elra.logs._counts_told, run.state.global_step = (0, {"restarts": 0, "non_finite": 0}), 6
    run.elra.logs.warn_of_updates({"restarts": 0, "non_finite": 0, **numbers})
    told = warnings_of(caplog_warnings)
    assert len(told) == (text is not None)
    assert text is None or text in told[0]
    run.state.global_step = 12
    run.elra.logs.warn_of_updates({"restarts": 0, "non_finite": 0, **numbers, "consecutive_restarts": 0})
    assert warnings_of(caplog_warnings) == told


def test_an_elra_passed_in_is_told_the_loss_too(tmp_path):
    model = llama()
    optimizer = ELRA(model.parameters(), min_step_norm=0.1)
    args = arguments(tmp_path, TrainingArguments, max_steps=5)
    run = Trainer(model, args, train_dataset=token_rows(), optimizers=(optimizer, None))
    assert run.replaced_defaults == {"max_grad_norm": 0, "lr_scheduler_type": "constant"}
    run.train()
    assert run.elra_optimizer is optimizer
    assert optimizer.param_groups[0]["scalars"]["loss_statistics"]["initial_loss"] is not None


def test_with_another_optimizer_nothing_changes(tmp_path):
    points = []
    for trainer_class in (Trainer, ElraTrainer):
        args = arguments(tmp_path, TrainingArguments, optim="adamw_torch", max_steps=6)
        run = trainer_class(llama(), args, train_dataset=token_rows(50))
        run.train()
        points.append(weights(run.model))
        assert args.max_grad_norm == 1.0
    assert torch.equal(*points)


def test_flags_without_effect_are_named(tmp_path, caplog_warnings):
    trainer(tmp_path, optim="adamw_torch", elra_min_step_norm=0.3)
    assert "elra_min_step_norm has no effect with optim=adamw_torch" in caplog_warnings.text


def test_trackers_get_the_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = trainer(tmp_path, max_steps=3, report_to="tensorboard")
    run.train()
    (folder,) = {event.parent for event in tmp_path.rglob("events.*")}
    events = EventAccumulator(str(folder)).Reload()
    for key in ("alpha", "learning_rate", "step_norm", "restarts"):
        values = [scalar.value for scalar in events.Scalars(f"train/{key}")]
        assert values == pytest.approx(logged(run, key), rel=1e-6)
    assert len(events.Scalars("train/cosine")) == 2


def test_gpt2_default_floor(tmp_path):
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=1, n_head=2))
    run = trainer(tmp_path, model=model, max_steps=2)
    run.train()
    assert run.elra_optimizer.param_groups[0]["min_step_norm"] == 0.1


def test_on_several_processes_the_optimizer_is_told_its_own_loss_and_averages_it_itself(tmp_path, monkeypatch):
    """It is told the loss of this process, or that of the others where there is none; what is counted is of all."""
    run = trainer(tmp_path, elra_batch_control="elra")
    run.train()
    others = torch.tensor([5.0, 1.0, 24.0, 384.0], dtype=torch.float64)
    monkeypatch.setattr(type(run.accelerator), "num_processes", 2)
    monkeypatch.setattr(run.accelerator, "reduce", lambda told, reduction: told + others)
    counted = []
    monkeypatch.setattr(run.elra_callback, "count", lambda *numbers: counted.append(numbers))
    for own, told, mean in ((3.0, 3.0, 4.0), (float("nan"), 5.0, 5.0)):
        run.elra.accounting.begin_update()
        run.elra.accounting.add(torch.tensor(own), samples=8, tokens=128)
        run.elra.accounting.end_update()
        assert float(run.elra_optimizer._observed_loss) == told
        assert run.elra_optimizer._observed_loss.dtype == torch.float32
        assert counted.pop() == (32, 512, mean)


def test_on_several_processes_no_number_is_read_until_somebody_asks(tmp_path, monkeypatch):
    """What a process adds up and gets from the others may be on a device; on this one numbers cannot be read."""
    run = trainer(tmp_path, optim="elra_spectral")
    run.train()
    before = run.elra_callback.samples, run.elra_callback.tokens
    monkeypatch.setattr(type(run.accelerator), "num_processes", 2)
    monkeypatch.setattr(run.accelerator, "reduce", lambda told, reduction: told)
    accounting, callback = run.elra.accounting, run.elra_callback

    def update(loss):
        accounting.begin_update()
        accounting.take(1)
        accounting.add(loss, samples=8, tokens=128)
        mean = accounting.end_update()
        callback.on_step_end(run.args, run.state, run.control)
        return mean

    assert update(torch.tensor(3.0, device="meta")).is_meta
    assert callback.samples == before[0] + 8
    with pytest.raises(RuntimeError, match="meta"):
        callback.tokens  # noqa: B018 - this reads
    callback.seen.begin(*before)
    monkeypatch.setattr(run.accelerator, "reduce", lambda told, reduction: torch.tensor([4.0, 2.0, 16.0, 256.0]))
    assert [float(update(torch.tensor(3.0))) for _ in range(3)] == [2, 2, 2]
    assert (callback.samples, callback.tokens) == (before[0] + 24, before[1] + 768)


@pytest.mark.parametrize(("optim", "remedy"), [("elra", "max_step_norm=0.1"), ("elra_spectral", "--optim elra, or")])
def test_losses_that_rise_again_are_told_once(tmp_path, caplog_warnings, optim, remedy):
    """Each by too little to be taken back, as with a preference loss."""

    class Rises(ElraTrainer):
        def compute_loss(self, *args, **kwargs):
            loss, update = super().compute_loss(*args, **kwargs), self.state.global_step
            return loss + 1 + 0.02 * update - loss.detach()

    run = trainer(
        tmp_path, trainer_class=Rises, optim=optim, learning_rate=1e-2, max_steps=100, logging_steps=15,
        optim_args="soft_restart=false",
    )  # fmt: skip
    run.train()
    told = [text for text in warnings_of(caplog_warnings) if "has risen again" in text]
    assert len(told) == 1
    assert remedy in told[0]
    caplog_warnings.clear()
    trainer(tmp_path, optim=optim, max_steps=100).train()
    assert "has risen again" not in caplog_warnings.text


@pytest.mark.parametrize("trainer_class", [ElraTrainer, OwnBatches])
@pytest.mark.parametrize(("unlabelled", "non_finite", "skipped"), [((10,), 0, 0), ((10, 11), 0, 1)])
def test_a_micro_batch_without_labels_is_left_out_of_the_loss(tmp_path, trainer_class, unlabelled, non_finite, skipped):
    """Its loss is 0/0; where no micro-batch of an update has labels the update is skipped."""

    class Unlabelled(trainer_class):
        def compute_loss(self, model, inputs, **given):
            labels = torch.full_like(inputs["labels"], -100) if len(losses) in unlabelled else inputs["labels"]
            losses.append(cross_entropy(model(inputs["pixel_values"]).logits, labels))
            return losses[-1]

    losses, seen = [], LossesSeen()
    run = trainer(
        tmp_path, vit().double(), vit_rows(), Unlabelled, callbacks=[seen], gradient_accumulation_steps=2,
        per_device_train_batch_size=4, max_steps=8,
    )  # fmt: skip
    run.train()
    assert [logged(run, name)[-1] for name in ("non_finite", "skipped")] == [non_finite, skipped]
    assert seen.losses[5] == pytest.approx(losses[11].item(), nan_ok=True)
    assert seen.losses[4] == pytest.approx((losses[8] + losses[9]).item() / 2)


@pytest.mark.parametrize("restored", [False, True])
def test_what_counts_is_called_first_and_reading_it_changes_nothing(tmp_path, restored):
    """Also where a checkpoint brings callbacks of its own."""
    given = dict(max_steps=4, save_strategy="steps", save_steps=2, restore_callback_states_from_checkpoint=restored)
    trainer(tmp_path, **given).train()
    run = trainer(tmp_path, **given)
    callbacks = run.callback_handler.callbacks
    assert run.elra_callback is callbacks[0]
    callbacks.reverse()
    assert run.elra_callback is callbacks[-1]
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert run.elra_callback is run.callback_handler.callbacks[0]
    assert run.elra_callback.samples == 32
