"""Checks of a Trainer before it trains: what is refused, what is warned of, and by which values it decides.

Single flags are checked in ``arguments.py``, batch flags in ``batch_control.py``.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from hf_elra.errors import ConfigurationError
from hf_elra.optim import ELRA, ELRASpectral, Guarded, LossAwareOptimizer, embeddings_of
from hf_elra.optim.around import Around
from hf_elra.trainer.arguments import (
    OPTIMIZERS,
    ElraSettings,
    control_of,
    optimizer_name,
    parse_optim_args,
    refuse_unusable,
    replaced_defaults,
)
from hf_elra.trainer.checkpoints import last_whole_checkpoint
from hf_elra.trainer.rows import number_of_rows
from hf_elra.trainer.upstream import fsdp_version, unwrap_optimizer

logger = logging.getLogger(__name__)

SETTINGS = (
    *(field.name for field in dataclasses.fields(ElraSettings)),
    *("optim", "optim_args", "learning_rate", "weight_decay", "max_grad_norm", "lr_scheduler_type", "warmup_steps"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "fp16", "deepspeed", "fsdp"),
)
"""The arguments that a Trainer with the mixin decides by."""


def optimizer_of_ours(trainer: Trainer) -> type[LossAwareOptimizer] | None:
    """Return the class of the optimizer that a Trainer has or will make, if it is one of ours.

    The order is that of the stock Trainer: an existing optimizer counts before a class that was passed in, and the
    class before the name in the arguments. With a ``model_init`` every training makes its own optimizer.
    """
    there = None if trainer.model_init is not None else unwrap_optimizer(trainer.optimizer)
    given = trainer.optimizer_cls_and_kwargs
    found: Any = OPTIMIZERS.get(optimizer_name(trainer.args))
    if there is not None:
        found = type(there)
    elif given is not None:
        found = given[0]
    if isinstance(found, type) and issubclass(found, LossAwareOptimizer):
        return found
    return Guarded if ElraSettings.of(trainer.args, only_checked=True).guards_stock_steps else None


def guarded(optimizer: Any, settings: ElraSettings) -> Guarded:
    """A stock optimizer with the guards that ``settings`` ask for."""
    return Guarded(optimizer, soft_restart=bool(settings.elra_soft_restart), max_step_norm=settings.elra_max_step_norm)


def decided_by(trainer: Any) -> tuple[list[Any], list[Any]]:
    """Return what a Trainer decides by: values, and objects that may be replaced by others."""
    values = [getattr(trainer.args, name, None) for name in SETTINGS]
    objects = [type(trainer.args), optimizer_of_ours(trainer), trainer.optimizer_cls_and_kwargs, trainer.train_dataset]
    return values, objects


def are_the_same(one: tuple[list[Any], list[Any]] | None, other: tuple[list[Any], list[Any]]) -> bool:
    """Return whether two results of :func:`decided_by` are the same."""
    if one is None:
        return False
    return one[0] == other[0] and all(a is b for a, b in zip(one[1], other[1], strict=True))


def check_trainer(trainer: Any, ours: type[LossAwareOptimizer] | None, settings: ElraSettings) -> dict[str, Any]:
    """Check that a Trainer suits its optimizer; return what it uses in place of harmful stock defaults.

    Args:
        trainer (Trainer): any Trainer.
        ours: class of its optimizer, if it is one of ours.
        settings: the flags.

    Raises:
        ConfigurationError: the optimizer cannot be used with what the Trainer has.
    """
    if ours is None:
        warn_of_idle(trainer.args, settings)
        return {}
    if trainer.is_fsdp_enabled and issubclass(ours, Around):
        raise ConfigurationError(
            f"fsdp cannot be used with {ours.__name__}, as the optimizer inside it would keep the parameters from "
            "before they were sharded. Use DDP, or an optimizer by name (optim=ntlr_adamw)."
        )
    args, version = trainer.args, fsdp_version(trainer)
    refuse_unusable(ours, fp16=args.fp16, deepspeed=trainer.is_deepspeed_enabled, fsdp_version=version)
    if ours is Guarded:  # what suits a stock optimizer suits it still
        return {}
    return replaced_defaults(args, ours="ELRA" if issubclass(ours, ELRA) else name_of(ours))


def warn_of_idle(args: Any, settings: ElraSettings) -> None:
    """Warn of flags that do nothing with an optimizer that is none of ours."""
    if idle := settings.idle_without_elra():
        logger.warning("%s has no effect with optim=%s.", ", ".join(idle), optimizer_name(args))


def name_of(ours: type[LossAwareOptimizer]) -> str:
    """The name of an optimizer on ``--optim``, or of its class."""
    return next((name for name, known in OPTIMIZERS.items() if known is ours), ours.__name__)


def suiting_control(trainer: Any, ours: type[LossAwareOptimizer] | None) -> str:
    """The batch control that suits a Trainer's optimizer."""
    if ours is None or ours is Guarded:
        return "off"
    if trainer.optimizer is not None and trainer.model_init is None:
        settings = trainer.optimizer.param_groups[0]
    elif trainer.optimizer_cls_and_kwargs is not None:
        settings = trainer.optimizer_cls_and_kwargs[1]
    else:
        settings = parse_optim_args(trainer.args.optim_args, ours)
    return control_of(ours, settings.get("momentum"))


def check_trainable(model: nn.Module) -> None:
    """Raise a ConfigurationError if no parameter of the model is trained."""
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigurationError(
            f"model: no parameter of this {type(model).__name__} has requires_grad=True, so that there is nothing to "
            "train; unfreeze some of them, or add adapters."
        )


def check_made(trainer: Any, made: Any) -> None:
    """Raise a ConfigurationError if ``create_optimizer`` did not make the optimizer of ours that is named; warn if one
    that was passed in has to know which parameters are tables, and was not told."""
    there = trainer.elra_optimizer
    if isinstance(there, ELRASpectral) and not any(any(group["embeddings"]) for group in there.param_groups):
        of_optimizer = {id(p) for group in there.param_groups for p in group["params"]}
        if any(id(p) in of_optimizer for p in embeddings_of(trainer.model)):
            logger.warning(
                "The optimizer that was passed in was not told which parameters are embeddings, and takes them for "
                "hidden matrices. Make it with embeddings=embeddings_of(model), outputs=outputs_of(model), or pass "
                "optim='elra_spectral' and let the Trainer make it."
            )
    if trainer.elra_active and trainer.elra_optimizer is None:
        raise ConfigurationError(
            f"optim={optimizer_name(trainer.args)} is not what {type(trainer).__name__}.create_optimizer makes, which "
            f"is {type(unwrap_optimizer(made)).__name__}: name that one, or let create_optimizer make the one that is "
            "named (super().create_optimizer() does)."
        )


def refuse_state_of_ours(trainer: Any, resume_from_checkpoint: Any) -> None:
    """Raise a ConfigurationError where a stock optimizer is to go on from a state of ours, which it cannot read."""
    folder = resume_from_checkpoint
    if folder is True:
        folder = get_last_checkpoint(trainer.args.output_dir)
    if not isinstance(folder, (str, Path)) or not (file := Path(folder) / "optimizer.pt").is_file():
        return
    try:
        groups = torch.load(file, map_location="cpu", weights_only=True, mmap=True)["param_groups"]
        parts = groups[0]["scalars"]["parts"]
    except Exception:  # a state of another optimizer; what is wrong with a file is told by whoever loads it
        return
    raise ConfigurationError(
        f"resume_from_checkpoint={str(folder)!r} holds the state of an optimizer of hf_elra ({parts}), which "
        f"optim={optimizer_name(trainer.args)} cannot read. Go on with the same --optim, or load the weights alone "
        "(from_pretrained) and begin a new run."
    )


def checkpoint_to_resume(trainer: Any, resume_from_checkpoint: Any) -> Any:
    """Return the checkpoint to resume from, or None; True stands for the newest one that was written to its end.

    Raises:
        ConfigurationError: there is none, or there is nothing to train on.
    """
    if number_of_rows(trainer.train_dataset) == 0:
        raise ConfigurationError("train_dataset is empty; give it samples to train on.")
    if resume_from_checkpoint is not True:
        return resume_from_checkpoint
    found = last_whole_checkpoint(str(trainer.args.output_dir))
    if found is None:
        raise ConfigurationError(
            f"resume_from_checkpoint=True: output_dir={trainer.args.output_dir!r} holds no whole checkpoint; leave it "
            "out to begin anew."
        )
    return found
