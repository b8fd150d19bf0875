"""Flags, defaults and checks before training."""

import pytest
import torch
from transformers import HfArgumentParser, Trainer, TrainingArguments

from hf_elra import ConfigurationError, ElraSeq2SeqTrainingArguments, ElraTrainingArguments
from hf_elra.optim import ELRA
from hf_elra.trainer.arguments import ElraSettings, is_language_model, parse_optim_args, prepare_arguments
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
        ("min_stepnorm=0.1", "Did you mean 'min_step_norm'.*Valid names: lr, step_rule"),
        ("min_step_norm=big", "min_step_norm='big' must be float"),
        ("restart_window=1.5", "restart_window='1.5' must be int or none"),
        ("soft_restart=maybe", "must be bool"),
        ("lr_bounds=3", "must be two numbers, low:high"),
        ("min_step_norm", "not of the form name=value"),
        ("weight_decay=0.1", "pass --weight_decay 0.1"),
        ("min_step_norm=3,max_step_norm=2", "min_step_norm=3.0 is above max_step_norm=2.0"),
        ("betas=0.9", "'betas' is no argument of ELRA"),
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
def test_fp16_is_refused(tmp_path, arguments_class):
    def build():
        return Trainer(llama(), arguments(tmp_path, arguments_class, optim="elra", fp16=True), train_dataset=[])

    with pytest.raises(ConfigurationError, match=r"fp16=True.*--bf16"):
        build()


def test_deepspeed_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="DDP or FSDP"):
        arguments(tmp_path, deepspeed="ds.json")


def test_fsdp_of_the_first_version_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="fsdp_version=1 cannot be used with ELRA.*Use FSDP2"):
        prepare_arguments(arguments(tmp_path), deepspeed=False, fsdp_version=1)
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


def test_stock_arguments_lose_harmful_defaults_and_say_so(tmp_path, caplog_warnings, monkeypatch):
    run = Trainer(llama(), arguments(tmp_path, TrainingArguments, optim="elra"), train_dataset=token_rows())
    assert run.args.max_grad_norm == 0
    assert run.args.lr_scheduler_type == "constant"
    assert "max_grad_norm 1 -> 0, lr_scheduler_type linear -> constant." in caplog_warnings.text
    Trainer(llama(), arguments(tmp_path, TrainingArguments, optim="elra", warmup_steps=5), train_dataset=token_rows())
    assert "lr_scheduler_type linear -> constant, with it warmup_steps 5 -> none." in caplog_warnings.text
    monkeypatch.setattr("sys.argv", ["script.py", "--max_grad_norm=1.0", "--lr_scheduler_type", "linear"])
    run = Trainer(llama(), arguments(tmp_path, TrainingArguments, optim="elra"), train_dataset=token_rows())
    assert run.args.max_grad_norm == 1
    assert run.args.lr_scheduler_type == "linear"


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
