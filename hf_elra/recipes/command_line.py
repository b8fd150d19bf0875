"""What the command lines of the training scripts share: presets, flags over them, and the settings of a run."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import hf_elra
from hf_elra.errors import ConfigurationError, nearest
from hf_elra.trainer import ElraSettings, ElraTrainingArguments
from hf_elra.trainer.arguments import OPTIMIZERS, OneLineParser
from hf_elra.trainer.upstream import optimizer_names

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
    "optim_target_modules",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "warmup_ratio",  # of Transformers before 5.9
    "label_smoothing_factor",
    "neftune_noise_alpha",
    "average_tokens_across_devices",
    "auto_find_batch_size",
    "bf16",
    "fp16",
    "tf32",
    "data_seed",
    "dataloader_drop_last",
    "train_sampling_strategy",
    "load_best_model_at_end",
    "metric_for_best_model",
    "greater_is_better",
)
"""Training arguments that decide the trajectory or what is saved of it, beside the ``--elra_*`` flags."""


def choose(flag: str, words: list[str], default: str, known: Any) -> str:
    """Return the value of ``flag``, one of ``known``; a ConfigurationError names the nearest one."""
    value = value_of(flag, words, default)
    if value not in known:
        raise ConfigurationError(f"{flag} {value} is unknown.{nearest(value, known)} Choose from {', '.join(known)}.")
    return value


def choose_optimizer(words: list[str], default: str) -> str:
    """Return the value of ``--optim``, a name that Transformers knows."""
    optim = value_of("--optim", words, default)
    known = optimizer_names()
    if optim not in known:
        longer = [name for name in known if name.startswith(optim)]  # adamw_torch, for adam
        hint = f" Did you mean '{longer[0]}'?" if longer else nearest(optim, known)
        raise ConfigurationError(
            f"--optim {optim} is unknown.{hint} Ours: {', '.join(OPTIMIZERS)}; "
            "Transformers' names work too, e.g. adamw_torch."
        )
    return optim


def parse(recipe_class: type, words: list[str], defaults: dict[str, Any]) -> tuple[Any, ElraTrainingArguments]:
    """Read recipe and training arguments; ``defaults`` are used for flags that are not given.

    If the command line gives another length of the run, the number of samples of the defaults does not count.
    """
    dataclasses: Any = (recipe_class, ElraTrainingArguments)
    before = sys.argv[1 : max(1, len(sys.argv) - len(words))]  # the name of the subcommand
    parser = OneLineParser(dataclasses, prog=shlex.join([Path(sys.argv[0]).name, *before]), allow_abbrev=False)
    parser.set_defaults(**defaults)
    if any(given(flag, words) for flag in ("--num_train_epochs", "--max_steps", "--elra_max_tokens")):
        parser.set_defaults(elra_max_samples=None)
    try:
        recipe, training = parser.parse(words)
    except ConfigurationError:
        raise
    except (ValueError, ImportError) as error:  # Transformers refuses a value of one of its flags
        raise ConfigurationError(str(error).strip().splitlines()[0]) from error
    return recipe, training


def value_of(flag: str, words: list[str], default: str) -> str:
    """Return the word after ``flag``, or after its equals sign; the last one, as argparse does."""
    found = default
    for position, word in enumerate(words):
        name, _, value = word.partition("=")
        if name == flag:
            found = value or (words[position + 1] if position + 1 < len(words) else "")
    return found


def given(flag: str, words: list[str]) -> bool:
    """Return whether ``flag`` is on the command line, written with underscores or hyphens."""
    return any(word.partition("=")[0].replace("-", "_") == flag.replace("-", "_") for word in words)


def recorded_settings(recipe: Any, training: ElraTrainingArguments, ignored: set[str]) -> dict[str, Any]:
    """Return the settings that decide the trajectory; a resumed run must have those of the interrupted one."""
    settings = {f.name: getattr(recipe, f.name) for f in fields(recipe) if f.name not in ignored}
    for name in _recorded(training):
        value = getattr(training, name)
        settings[name] = getattr(value, "value", value)
    settings["devices"] = training.world_size * max(training.n_gpu, 1)  # every device has a batch of its own
    return settings


def default_settings(settings: dict[str, Any], recipe: Any, training: Any, defaults: dict[str, Any]) -> dict[str, Any]:
    """Return the values that ``settings`` would have had without flags; they replace what an old file lacks.

    Args:
        settings: those of this run. An old file does not say how many devices there were, so the number of now counts.
        recipe, training: the objects whose fields they are.
        defaults: those of this preset and optimizer; they win over the defaults of the fields.
    """
    of_fields = {f.name: f.default for of in (recipe, training) for f in fields(of) if f.default is not MISSING}
    known = {"devices": settings["devices"], **of_fields, **defaults}
    return {name: known[name] for name in settings if name in known}


def _recorded(training: ElraTrainingArguments) -> list[str]:
    """The names of training arguments to write down, without those that this version of Transformers does not have."""
    ours = [f.name for f in fields(ElraSettings) if f.name != "elra_display"]  # which decides nothing
    names = (*TRAINING, *ours)
    return [name for name in names if hasattr(training, name)]


def command_line() -> str:
    """Return the command that started this process, as a user can type it in the same folder, on every machine.

    Several processes are started again by torchrun, whatever launcher started them.
    """
    here, everywhere = (int(os.environ.get(name, 1)) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    program, *words = sys.argv
    is_ours = Path(program).stem == "hf-elra" or Path(program) == Path(hf_elra.__file__).with_name("cli.py")
    target = ["-m", "hf_elra.cli"] if is_ours else [program]
    if everywhere > 1:
        machines = ["--nnodes", str(everywhere // here)] if everywhere > here else []
        return shlex.join(["torchrun", *machines, "--nproc_per_node", str(here), *target, *words])
    if Path(program).stem == "hf-elra":
        return shlex.join(["hf-elra" if shutil.which("hf-elra") == program else _from_here(program), *words])
    return shlex.join([_from_here(sys.executable), *target, *words])


def _from_here(path: str) -> str:
    """Return a path, relative if it is below this folder."""
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else relative
