"""What the training scripts' command lines share: presets under flags, and the settings that make up a run."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import fields
from typing import Any

from transformers.training_args import OptimizerNames

from hf_elra.errors import ConfigurationError, nearest
from hf_elra.trainer import ElraSettings, ElraTrainingArguments
from hf_elra.trainer.arguments import OPTIMIZERS, OneLineParser

TRAINING = (
    "optim",
    "optim_args",
    "learning_rate",
    "lr_scheduler_type",
    "weight_decay",
    "max_grad_norm",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "seed",
    "max_steps",
    "num_train_epochs",
)
"""Training arguments that decide the trajectory, beside the ``--elra_*`` flags."""


def choose(flag: str, words: list[str], default: str, known: Any) -> str:
    """Return the value of ``flag``, one of ``known``; a ConfigurationError names the nearest one."""
    value = value_of(flag, words, default)
    if value not in known:
        raise ConfigurationError(f"{flag} {value} is unknown.{nearest(value, known)} Choose from {', '.join(known)}.")
    return value


def choose_optimizer(words: list[str], default: str) -> str:
    """Return the value of ``--optim``, a name that Transformers knows."""
    optim = value_of("--optim", words, default)
    known = list(OptimizerNames._value2member_map_)
    if optim not in known:
        raise ConfigurationError(
            f"--optim {optim} is unknown.{nearest(optim, known)} Ours: {', '.join(OPTIMIZERS)}; "
            "Transformers' names work too, e.g. adamw_torch."
        )
    return optim


def parse(recipe_class: type, words: list[str], defaults: dict[str, Any]) -> tuple[Any, ElraTrainingArguments]:
    """Read recipe and training arguments; ``defaults`` stand where no flag is given.

    Another length of the run on the command line takes the place of the defaults' number of samples.
    """
    dataclasses: Any = (recipe_class, ElraTrainingArguments)
    parser = OneLineParser(dataclasses, allow_abbrev=False)
    parser.set_defaults(**defaults)
    if any(given(flag, words) for flag in ("--num_train_epochs", "--max_steps", "--elra_max_tokens")):
        parser.set_defaults(elra_max_samples=None)
    try:
        recipe, training = parser.parse(words)
    except ConfigurationError:
        raise
    except (ValueError, ImportError) as error:  # what Transformers finds wrong with its own flags
        raise ConfigurationError(str(error).strip().splitlines()[0]) from error
    return recipe, training


def value_of(flag: str, words: list[str], default: str) -> str:
    """Return the word after ``flag``, or after its equals sign."""
    for position, word in enumerate(words):
        name, _, value = word.partition("=")
        if name == flag:
            return value or (words[position + 1] if position + 1 < len(words) else "")
    return default


def given(flag: str, words: list[str]) -> bool:
    """Whether ``flag`` is on the command line, written with underscores or hyphens."""
    return any(word.partition("=")[0].replace("-", "_") == flag.replace("-", "_") for word in words)


def recorded_settings(recipe: Any, training: ElraTrainingArguments, ignored: set[str]) -> dict[str, Any]:
    """The settings that decide the trajectory: what a resumed run must share with the interrupted one."""
    settings = {f.name: getattr(recipe, f.name) for f in fields(recipe) if f.name not in ignored}
    for name in (*TRAINING, *(f.name for f in fields(ElraSettings))):
        value = getattr(training, name)
        settings[name] = getattr(value, "value", value)
    return settings


def command_line() -> str:
    """The command that started this process, as a user can type it in the same folder (on several machines: on each).

    Whatever launcher started several processes, torchrun starts them again.
    """
    here, everywhere = (int(os.environ.get(name, 1)) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    if everywhere > 1:
        machines = ["--nnodes", str(everywhere // here)] if everywhere > here else []
        return shlex.join(["torchrun", *machines, "--nproc_per_node", str(here), *sys.argv])
    python = os.path.relpath(sys.executable)
    return shlex.join([sys.executable if python.startswith("..") else python, *sys.argv])
