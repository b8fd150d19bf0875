"""Makes ``--optim elra`` a name that Transformers knows, and every Trainer that uses it loss-aware.

``register()`` runs when ``hf_elra.trainer`` is imported, and ``import hf_elra`` imports it as soon as the arguments of
Transformers are imported. It adds the names of ``OPTIMIZERS`` to the enumeration and the table in which Transformers
looks optimizers up, and wraps three methods of ``Trainer``: ``__init__``, ``train`` and the set-up of a hyperparameter
trial. In these a Trainer (or any subclass, from any library) whose arguments or optimizer are ours gets
``ElraTrainerMixin`` in front of its class. Other Trainers are left as they are.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import has_length
from transformers.training_args import OptimizerNames

from hf_elra.errors import ConfigurationError
from hf_elra.optim.spectral import OF_A_MODEL
from hf_elra.trainer.arguments import (
    LAUNCHER_FLAGS,
    OPTIMIZERS,
    ElraSettings,
    control_of,
    optimizer_arguments,
    optimizer_name,
    parse_optim_args,
    refuse_unusable,
    uses_elra,
    wants_mixin,
)
from hf_elra.trainer.batch_control import budget_as_max_steps, build_batch_control, default_control
from hf_elra.trainer.checks import optimizer_of_ours, refuse_state_of_ours, warn_of_idle
from hf_elra.trainer.display import close_display
from hf_elra.trainer.mixin import ElraTrainerMixin, with_elra
from hf_elra.trainer.upstream import add_enum_member, optimizer_handlers


def register() -> None:
    """Register the names and wrap three methods of ``Trainer``; calling it again changes nothing."""
    for name in OPTIMIZERS:
        add_enum_member(OptimizerNames, name.upper(), name)
        optimizer_handlers()[OptimizerNames(name)] = _handle
    for method, wrap in _WRAPPERS.items():
        stock: Any = getattr(Trainer, method)
        if not hasattr(stock, "_hf_elra"):
            wrapped: Any = functools.wraps(stock)(wrap(stock))
            wrapped._hf_elra = True
            setattr(Trainer, method, wrapped)


def _handle(context: Any) -> tuple[type, dict[str, Any]]:
    optimizer_class = OPTIMIZERS[optimizer_name(context.args)]
    if context.model is None:
        raise ConfigurationError(
            f"model=None: optim={optimizer_name(context.args)} depends on the model; call "
            "get_optimizer_cls_and_kwargs(args, model)."
        )
    arguments = optimizer_arguments(context.args, context.model)
    for kind, find in OF_A_MODEL.items():
        if kind in inspect.signature(optimizer_class).parameters:
            arguments[kind] = find(context.model)
    return optimizer_class, arguments


def _wrap_init(initialise: Any) -> Any:
    signature = inspect.signature(initialise)

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, *args, **kwargs).arguments
        arguments, data = given.get("args"), given.get("train_dataset")
        if arguments is not None:  # refuse wrong settings before the Trainer makes folders or moves models
            _check(type(self), arguments, given.get("model"), data)
        with budget_as_max_steps(arguments, _budget(arguments, data)):
            initialise(self, *args, **kwargs)
        if not isinstance(self, ElraTrainerMixin):  # the mixin prepares itself, and tells this
            look_again(self)
        if not isinstance(self, ElraTrainerMixin):
            warn_of_idle(self.args, ElraSettings.of(self.args, only_checked=True))

    return __init__


def _wrap_train(train: Any) -> Any:
    def wrapped(self: Any, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        look_again(self)
        if isinstance(self, ElraTrainerMixin):
            resume_from_checkpoint = self.begin_training(resume_from_checkpoint)
        else:
            refuse_state_of_ours(self, resume_from_checkpoint)
        try:
            return train(self, resume_from_checkpoint, *args, **kwargs)
        finally:
            close_display(self)

    return wrapped


def _wrap_trial(set_up: Any) -> Any:
    def wrapped(self: Any, trial: Any) -> None:
        set_up(self, trial)
        if trial is not None and self.hp_search_backend is not None:  # it has set arguments
            look_again(self)

    return wrapped


_WRAPPERS = {"__init__": _wrap_init, "train": _wrap_train, "_hp_search_setup": _wrap_trial}


def look_again(trainer: Any) -> None:
    """Put the mixin in front of a Trainer's class if something needs it by now, and let it take over what has changed.

    Arguments, data and optimizer of a Trainer may change after it was made, as trials of a hyperparameter search do.

    Raises:
        ConfigurationError: a setting cannot be used; the Trainer is not changed then.
    """
    stock: Any = type(trainer)
    if isinstance(trainer, ElraTrainerMixin):
        if trainer.is_prepared:
            return
    elif optimizer_of_ours(trainer) is None and not wants_mixin(trainer.args):
        return
    _check(stock, trainer.args, trainer.model, trainer.train_dataset)
    trainer.__class__ = with_elra(stock)
    try:
        trainer.prepare_elra()
    except ConfigurationError:
        trainer.__class__ = stock
        raise


def _check(trainer_class: type, args: Any, model: Any, train_dataset: Any) -> None:
    """Raise a ConfigurationError for settings that cannot be used."""
    if uses_elra(args):
        version = (args.fsdp_plugin_args or {}).get("fsdp_version")
        ours = OPTIMIZERS[optimizer_name(args)]
        refuse_unusable(ours, fp16=args.fp16, deepspeed=bool(args.deepspeed), fsdp_version=version)
        optimizer_arguments(args, model)
    if uses_elra(args) or wants_mixin(args) or isinstance(args, ElraSettings) or LAUNCHER_FLAGS.values:
        settings = ElraSettings.of(args, only_checked=True)
        settings.check(args)
        build_batch_control(settings, args, train_dataset, default_control(trainer_class, _control_of(args)))


def _control_of(args: Any) -> str:
    """Return the batch control that suits the optimizer that ``args`` name."""
    if not uses_elra(args):
        return "off"
    optimizer_class = OPTIMIZERS[optimizer_name(args)]
    return control_of(optimizer_class, parse_optim_args(args.optim_args, optimizer_class).get("momentum"))


def _budget(args: Any, train_dataset: Any) -> int | None:
    """Return the budget in samples or tokens that ends a run over data of unknown length; None for other data."""
    if args is None or train_dataset is None or has_length(train_dataset):
        return None
    settings = ElraSettings.of(args, only_checked=True)
    return settings.elra_max_samples or settings.elra_max_tokens
