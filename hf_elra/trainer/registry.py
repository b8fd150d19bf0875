"""Makes ``--optim elra`` a name that Transformers knows, and every Trainer that uses it loss-aware.

``register()`` runs on ``import hf_elra``. It adds the names of ``OPTIMIZERS`` to the enumeration and the table that
Transformers looks optimizers up in, and wraps ``Trainer.__init__``: a Trainer (or any subclass, from any library) whose
``args.optim`` is one of ours gets ``ElraTrainerMixin`` in front of its class. Others are left as they are.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from transformers import Trainer, trainer_optimizer
from transformers.trainer_utils import has_length
from transformers.training_args import OptimizerNames

from hf_elra.errors import ConfigurationError
from hf_elra.optim.directions import KINDS
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
from hf_elra.trainer.mixin import ElraTrainerMixin, trains_with_elra, with_elra


def register() -> None:
    """Register the names and wrap ``Trainer.__init__``; calling it again changes nothing."""
    for name in OPTIMIZERS:
        add_enum_member(OptimizerNames, name.upper(), name)
        trainer_optimizer._OPTIMIZER_HANDLERS[OptimizerNames(name)] = _handle
    if not hasattr(Trainer.__init__, "_hf_elra"):
        Trainer.__init__ = _wrap(Trainer.__init__)  # type: ignore[method-assign]


def add_enum_member(enumeration: Any, name: str, value: str) -> None:
    """Add a member to an existing enumeration of strings, as the ``class`` statement would have."""
    if value in enumeration._value2member_map_:
        return
    member = str.__new__(enumeration, value)
    member._name_, member._value_ = name, value
    member._sort_order_ = len(enumeration._member_names_)
    enumeration._member_names_.append(name)
    enumeration._member_map_[name] = member
    enumeration._value2member_map_[value] = member
    if hasattr(enumeration, "_hashable_values_"):  # Python >= 3.13
        enumeration._hashable_values_.append(value)
    type.__setattr__(enumeration, name, member)


def _handle(context: Any) -> tuple[type, dict[str, Any]]:
    optimizer_class = OPTIMIZERS[optimizer_name(context.args)]
    if context.model is None:
        raise ConfigurationError(
            f"model=None: optim={optimizer_name(context.args)} depends on the model; call "
            "get_optimizer_cls_and_kwargs(args, model)."
        )
    arguments = optimizer_arguments(context.args, context.model)
    for kind, find in KINDS.items():
        if kind in inspect.signature(optimizer_class).parameters:
            arguments[kind] = find(context.model)
    return optimizer_class, arguments


def _wrap(initialise: Any) -> Any:
    signature = inspect.signature(initialise)

    @functools.wraps(initialise)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        # Wrong settings are refused before the Trainer makes folders or moves models.
        given = signature.bind(self, *args, **kwargs).arguments
        arguments = given.get("args")
        if arguments is not None and uses_elra(arguments):
            fsdp = arguments.fsdp_plugin_args or {}
            refuse_unusable(
                fp16=arguments.fp16, deepspeed=bool(arguments.deepspeed), fsdp_version=fsdp.get("fsdp_version")
            )
            optimizer_arguments(arguments, given.get("model"))
        if arguments is not None and (
            uses_elra(arguments)
            or wants_mixin(arguments)
            or isinstance(arguments, ElraSettings)
            or LAUNCHER_FLAGS.values
        ):
            settings = ElraSettings.of(arguments, only_checked=True)
            settings.check(arguments)
            default = default_control(type(self), _control_of(arguments))
            build_batch_control(settings, arguments, given.get("train_dataset"), default)
        with budget_as_max_steps(arguments, _budget(arguments, given.get("train_dataset"))):
            initialise(self, *args, **kwargs)
        if not isinstance(self, ElraTrainerMixin) and (trains_with_elra(self) or wants_mixin(self.args)):
            trainer_class: Any = type(self)
            self.__class__ = with_elra(trainer_class)
            self.prepare_elra()

    __init__._hf_elra = True  # type: ignore[attr-defined]
    return __init__


def _control_of(args: Any) -> str:
    """The batch control that suits the optimizer that ``args`` name."""
    if not uses_elra(args):
        return "off"
    optimizer_class = OPTIMIZERS[optimizer_name(args)]
    return control_of(optimizer_class, parse_optim_args(args.optim_args, optimizer_class).get("momentum"))


def _budget(args: Any, train_dataset: Any) -> int | None:
    """The budget in samples or tokens that ends a run over data of unknown length; None for other data."""
    if args is None or train_dataset is None or has_length(train_dataset):
        return None
    settings = ElraSettings.of(args, only_checked=True)
    return settings.elra_max_samples or settings.elra_max_tokens
