"""Flags, defaults and checks before training."""

import dataclasses
import typing

import pytest
import torch
from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainingArguments

from hf_elra import ConfigurationError, ElraSeq2SeqTrainingArguments, ElraTrainingArguments
from hf_elra.optim import ELRA
from hf_elra.trainer.arguments import ElraSettings, is_language_model, parse_optim_args, refuse_unusable
from tests.conftest import arguments, classifier, llama, token_rows, trainer


@pytest.mark.parametrize("arguments_class", [ElraTrainingArguments, ElraSeq2SeqTrainingArguments])
def test_defaults_that_elra_needs_can_be_overridden(tmp_path, arguments_class):
    (args,) = HfArgumentParser(arguments_class).parse_args_into_dataclasses(["--output_dir", str(tmp_path)])
    assert (args.optim, args.learning_rate, args.max_grad_norm) == ("elra", 1e-3, 0)
    assert args.lr_scheduler_type == "constant"
    (args,) = HfArgumentParser(arguments_class).parse_args_into_dataclasses(
        f"--output_dir {tmp_path} --optim adamw_torch --learning_rate 5e-4 --max_grad_norm 1 "
        "--lr_scheduler_type cosine --elra_min_step_norm 0.3 --elra_control_cycle 10ba "
        "--no_elra_skip_last_batch".split()
    )
    assert (args.optim, args.learning_rate, args.max_grad_norm) == ("adamw_torch", 5e-4, 1)
    assert args.lr_scheduler_type == "cosine"
    assert ElraSettings.of(args) == ElraSettings(0.3, "10ba", False)


def test_optim_args_are_typed():
    text = (
        "min_step_norm=0.1, max_step_norm=none, soft_restart=false, restart_window=50, step_rule=bb2, lr_bounds=1e-6:10"
    )
    assert parse_optim_args(text, ELRA) == {
        "min_step_norm": 0.1,
        "max_step_norm": None,
        "soft_restart": False,
        "restart_window": 50,
        "step_rule": "bb2",
        "lr_bounds": (1e-6, 10.0),
    }
    assert parse_optim_args(None, ELRA) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("min_stepnorm=0.1", "Did you mean 'min_step_norm'.*Valid names: step_rule"),
        ("min_step_norm=big", "min_step_norm='big' must be float"),
        ("restart_window=1.5", "restart_window='1.5' must be int or none"),
        ("soft_restart=maybe", "must be bool"),
        ("lr_bounds=3", "must be two numbers, low:high"),
        ("min_step_norm", "not of the form name=value"),
        ("weight_decay=0.1", "pass --weight_decay 0.1"),
        ("min_step_norm=3,max_step_norm=2", "min_step_norm=3.0 is above max_step_norm=2.0"),
        ("min_step_norm=0.2,", "has a comma with nothing beside it"),
        ("min_step_norm=0.2,min_step_norm=0.4", "gives min_step_norm twice"),
        ("min_step_norm=0.2;max_step_norm=1", "commas stand between arguments"),
        ("betas=0.9", "'betas' is not an argument of ELRA"),
    ],
)
@pytest.mark.parametrize("arguments_class", [ElraTrainingArguments, TrainingArguments])
def test_bad_optim_args_are_refused_before_training(tmp_path, text, message, arguments_class):
    args = arguments(tmp_path, arguments_class, optim="elra", optim_args=text)
    with pytest.raises(ConfigurationError, match=message):
        Trainer(llama(), args, train_dataset=token_rows())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"learning_rate": "1e-3"}, "learning_rate='1e-3' must be a number"),
        ({"weight_decay": "3e-4"}, "weight_decay='3e-4' must be a number"),
        ({"optim_args": {"max_step_norm": 1}}, r"optim_args=\{'max_step_norm': 1\} must be text"),
    ],
)
def test_values_of_the_wrong_type_are_refused_before_training(tmp_path, given, message):
    with pytest.raises(ConfigurationError, match=message):
        trainer(tmp_path, optim="elra", **given)


def test_empty_data_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="train_dataset is empty"):
        trainer(tmp_path, rows=[], optim="elra").train()


def test_optim_args_reach_the_optimizer_and_win(tmp_path):
    run = trainer(tmp_path, optim_args="min_step_norm=0.2,max_step_norm=1.5", elra_min_step_norm=0.3, max_steps=1)
    run.train()
    group = run.elra_optimizer.param_groups[0]
    assert (group["min_step_norm"], group["max_step_norm"]) == (0.2, 1.5)


def test_bad_control_cycle_is_refused_before_training(tmp_path):
    with pytest.raises(ConfigurationError, match="elra_control_cycle='10 parsecs'"):
        trainer(tmp_path, elra_control_cycle="10 parsecs")


@pytest.mark.parametrize("arguments_class", [ElraTrainingArguments, TrainingArguments])
def test_fp16_is_refused_by_what_looks_along_the_line(tmp_path, arguments_class):
    def build():
        return Trainer(llama(), arguments(tmp_path, arguments_class, optim="pal", fp16=True), train_dataset=[])

    with pytest.raises(ConfigurationError, match=r"fp16=True cannot be used with PAL.*--bf16"):
        build()


def test_fp16_is_refused_where_it_cannot_be_seen(tmp_path):
    with pytest.raises(ConfigurationError, match="fp16=True cannot be used with fsdp"):
        refuse_unusable(ELRA, fp16=True, deepspeed=False, fsdp_version=2)
    flags = {"elra_log_noise_scale": True, "gradient_accumulation_steps": 2}
    with pytest.raises(ConfigurationError, match="elra_log_noise_scale cannot be used with fp16=True"):
        Trainer(llama(), arguments(tmp_path, optim="elra", fp16=True, **flags), train_dataset=token_rows())


def test_deepspeed_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="DDP or FSDP"):
        arguments(tmp_path, deepspeed="ds.json")


def test_fsdp_of_the_first_version_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="fsdp_version=1 cannot be used with ELRA.*Use FSDP2"):
        refuse_unusable(ELRA, fp16=False, deepspeed=False, fsdp_version=1)
    given = arguments(tmp_path, fsdp=True, fsdp_config={"version": 1})
    with pytest.raises(ConfigurationError, match="fsdp_version=1"):
        Trainer(llama(), given, train_dataset=[])


def test_clipping_schedule_and_decay_given_by_hand_are_kept_with_a_warning(tmp_path, caplog_warnings):
    run = trainer(tmp_path, max_grad_norm=1.0, lr_scheduler_type="cosine", weight_decay=0.1)
    assert run.args.max_grad_norm == 1.0
    for words in ("max_grad_norm=1 clips", "lr_scheduler_type=cosine multiplies", "weight_decay=0.1 shrinks"):
        assert words in caplog_warnings.text
    caplog_warnings.clear()
    trainer(tmp_path, optim="elra_spectral", weight_decay=0.1)  # scaled by the rate: an ordinary value
    assert "weight_decay" not in caplog_warnings.text


class AsTrained(TrainerCallback):
    """Notes the norm of the gradient that the optimizer gets, and the schedule's factors."""

    def __init__(self):
        self.norms, self.factors = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **kwargs):
        self.norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])))
        self.factors.append(lr_scheduler.get_last_lr()[0] / args.learning_rate)


def steep(seed=0):
    """A model whose gradients are longer than 1."""
    model = llama(seed)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(40)
    return model


def test_harmful_defaults_of_stock_arguments_are_replaced_while_elra_trains_and_there_alone(tmp_path, caplog_warnings):
    args = arguments(tmp_path, TrainingArguments, optim="elra", max_steps=3)
    seen = AsTrained()
    run = Trainer(steep(), args, train_dataset=token_rows(), callbacks=[seen])
    assert "max_grad_norm 1 -> 0, lr_scheduler_type linear -> constant." in caplog_warnings.text
    run.train()
    assert min(seen.norms) > 1.5
    assert seen.factors == [1, 1, 1]
    assert run.args is args
    assert (args.max_grad_norm, args.lr_scheduler_type) == (1.0, "linear")
    saved = arguments(tmp_path, TrainingArguments, optim="elra", max_steps=3)
    assert {f.name: getattr(args, f.name) for f in dataclasses.fields(args)} == {
        f.name: getattr(saved, f.name) for f in dataclasses.fields(saved)
    }

    other, seen = dataclasses.replace(args, optim="adamw_torch"), AsTrained()
    Trainer(steep(), other, train_dataset=token_rows(), callbacks=[seen]).train()
    assert max(seen.norms) < 1.0001
    assert seen.factors == pytest.approx([1, 2 / 3, 1 / 3])


def test_the_command_line_tells_what_is_the_users_own(tmp_path, caplog_warnings, monkeypatch):
    Trainer(llama(), arguments(tmp_path, TrainingArguments, optim="elra", warmup_steps=5), train_dataset=token_rows())
    assert "lr_scheduler_type linear -> constant, with it warmup_steps 5 -> none." in caplog_warnings.text
    monkeypatch.setattr("sys.argv", ["script.py", "--max_grad_norm=1.0", "--lr_scheduler_type", "linear"])
    seen = AsTrained()
    args = arguments(tmp_path, TrainingArguments, optim="elra", max_steps=2)
    Trainer(steep(), args, train_dataset=token_rows(), callbacks=[seen]).train()
    assert max(seen.norms) < 1.0001
    assert seen.factors == [1, 0.5]


def test_what_is_saved_and_told_are_the_users_arguments(tmp_path):
    class Note(TrainerCallback):
        seen: typing.ClassVar = []

        def on_train_begin(self, args, state, control, **kwargs):
            self.seen.append(args.gradient_accumulation_steps)

        on_log = on_evaluate = on_save = on_train_end = on_train_begin

    args = arguments(
        tmp_path, TrainingArguments, optim="elra", gradient_accumulation_steps=2, max_steps=2, save_strategy="steps",
        save_steps=1, eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    run = Trainer(llama(), args, train_dataset=token_rows(), eval_dataset=token_rows(8), callbacks=[Note()])
    run.train()
    assert run.batch_control is not None
    assert set(Note.seen) == {2}
    saved = torch.load(tmp_path / "checkpoint-1" / "training_args.bin", weights_only=False)
    assert (saved.gradient_accumulation_steps, saved.max_grad_norm, saved.lr_scheduler_type) == (2, 1.0, "linear")


def test_language_models_are_recognised():
    class CustomForCausalLM(torch_module()):
        pass

    class Wrapper(torch_module()):
        def __init__(self, module):
            super().__init__()
            self.module = module

    assert is_language_model(llama())
    assert is_language_model(torch.compile(llama()))
    assert is_language_model(CustomForCausalLM())
    assert is_language_model(Wrapper(llama()))
    assert not is_language_model(classifier())
    assert not is_language_model(Wrapper(classifier()))


def torch_module():
    import torch

    return torch.nn.Module
