"""Settings of ELRA in a Hugging Face Trainer: the flags, their checks, and what becomes of stock arguments.

``ElraSettings`` are the ``--elra_*`` flags. They are fields of ``ElraTrainingArguments``; for a script with its own
``TrainingArguments`` the launcher takes them from the command line (``LAUNCHER_FLAGS``). Nothing here trains.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import inspect
import logging
import re
import sys
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser
from transformers.models.auto import modeling_auto
from transformers.trainer_utils import SchedulerType
from transformers.training_args import TrainingArguments
from transformers.training_args_seq2seq import Seq2SeqTrainingArguments

from hf_elra.errors import ConfigurationError, nearest
from hf_elra.optim import ELRA, LABPALNSGD, LABPALSGD, OPTIMIZERS, ELRASpectral, LossAwareOptimizer
from hf_elra.optim.spectral import OF_A_MODEL
from hf_elra.trainer.rows import number_of_rows

logger = logging.getLogger(__name__)

BATCH_CONTROLS = ("off", "elra", "noise", "linear", "schedule")
MEANS = ("off", "cycle", "run")
DISPLAYS = ("rich", "plain", "none")
LANGUAGE_MODEL_MIN_STEP_NORM = 0.1
LABPAL_SCHEDULE = ((0.0, 1), (0.5, 2), (0.75, 4))
"""LABPAL's batch over training, in multiples of the noise factor ε = (128/B)·(N/40,000), N samples in batches of B, and
at least one batch (M. Mutschler and A. Zell, 2021, algorithm 1 and eq. 6)."""


@dataclass
class LauncherFlags:
    """The ``--elra_*`` flags that the launcher took from the command line; they win over arguments.

    ``honoured`` becomes true when a Trainer has read them. If there is a path ``tell``, that file is made then.
    """

    values: dict[str, Any] = field(default_factory=dict)
    honoured: bool = False
    tell: Path | None = None

    def honour(self) -> None:
        """Note that a Trainer has read them."""
        if not self.honoured and self.tell is not None:
            self.tell.touch()
        self.honoured = True


LAUNCHER_FLAGS = LauncherFlags()

_LANGUAGE_MODEL_CLASSES = frozenset(
    name
    for mapping in (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    )
    for name in mapping.values()
)
_CAUSAL_CLASSES = frozenset(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
_LANGUAGE_MODEL_ENDINGS = ("ForCausalLM", "ForMaskedLM", "LMHeadModel")


@dataclass
class ElraSettings:
    """The ``--elra_*`` flags.

    Args:
        elra_min_step_norm (float, optional): floor under the step norm α‖G‖. Default: 0.1 for language models (paper,
            section 3.1), else 0.
        elra_control_cycle (str): the stretch of training whose losses judge the next one's: ``45000sp`` (samples),
            ``45000tok`` (tokens), ``0.25ep`` (epochs), ``100ba`` (updates). Default: ``1ep``; ``45000sp`` for data of
            unknown length.
        elra_skip_last_batch (bool): skip the last, incomplete batch of an epoch (paper, section 3.5). Default: True.
        elra_batch_control (str): ``off``; ``elra``: the batch grows at the end of a control cycle when noise dominates
            (section 3.3), with any optimizer; ``noise``: it follows the noise scale, which needs updates of at least
            two micro-batches; ``linear``: it grows by its first size every 200 updates; ``schedule``: as
            ``elra_batch_schedule`` says. Default: ``elra`` with ELRA, ``linear`` with elra_spectral where that has no
            momentum; ``schedule`` with LABPAL, which has one of its own (:data:`LABPAL_SCHEDULE`); ``off`` with all
            others and with Trainers that make batches of their own (TRL's GRPO).
        elra_batch_growth (float): factor of a change. Default: 1.5.
        elra_batch_conditions (str, optional): which of the paper's conditions count, ``rise,noise,stall``: the mean
            loss rose by more than σ/10, σ is over half the mean, no better mean in three cycles. Default: all.
        elra_max_batch_size (int, optional): most samples of an update, over all processes. Default: no limit.
        elra_initial_accumulation (int, optional): micro-batches of the first updates, m_0. Default:
            ``gradient_accumulation_steps``.
        elra_gradient_decay (bool): scale gradients (with our optimizers: steps) by m_0/m (section 3.4). Default: False.
        elra_batch_schedule (str, optional): multiples of the first batch over the progress of training,
            ``0:1,0.5:2,0.75:4``.
        elra_max_micro_batch (str, optional): most samples of one forward pass on a device: micro-batches of an update
            are concatenated up to it, with the same gradient as accumulation to rounding (BatchNorm, which normalises
            over what it is given, excepted). ``auto`` tries larger passes, and halves on running out of memory.
            Default: micro-batches run one by one.
        elra_log_noise_scale (bool): log ``noise_scale``, the batch size in samples at which noise and signal of the
            gradient weigh the same (S. McCandlish et al., 2018), from updates of two micro-batches or more: the
            gradient of the first is compared with that of all. On by itself with ``elra_batch_control=noise``.
            Default: False.
        elra_max_samples, elra_max_tokens (int, optional): end training with the update that reaches so many samples
            or tokens (padding included) over all processes. As ``max_steps`` does, they override
            ``num_train_epochs``; of several limits the first one reached counts.
        elra_boost (bool): evaluate, predict and save the mean of the points of the last control cycle (section 3.7);
            training goes on from the last point, and checkpoints hold both; the Trainer's model is the mean when
            training is over. With any optimizer. Default: False; with elra_spectral a mean is made in any case, unless
            ``elra_boost_mean`` is ``off``.
        elra_boost_mean (str): which points: ``cycle``, those of the last control cycle; ``run``, those of the whole
            run, the t-th with weight t^8, which is mostly its last ninth, whenever that is; ``off``. Default: ``run``
            with elra_spectral, else ``cycle`` with ``elra_boost`` and ``off`` without.
        elra_display (str, optional): what the terminal shows while training goes on: ``rich``, a bar with its true
            total, sparklines of loss and α, batch, restarts, validation (``pip install 'hf_elra[display]'``; where
            output is no terminal, as ``plain``); ``plain``, a line a log; ``none``. Default: what the Trainer or the
            recipe shows.
        elra_boost_every (int, optional): every how many updates a point is taken into that mean, beside the last one
            of a cycle. Default: so many that a cycle has about 50 points; 10 where its length is not known; every
            one of a whole run.
        elra_soft_restart (bool, optional): take steps back that led to a too high loss (section 3.2), with any
            optimizer; with Adam its averages are then those of the steps that stand. Default: as the optimizer has it,
            which is False for stock ones.
        elra_max_step_norm (float, optional): crop steps above this length (section 3.5), with stock optimizers and
            ELRA. Default: as the optimizer has it, none for stock ones.
    """

    elra_min_step_norm: float | None = field(
        default=None,
        metadata={"help": "Floor under ELRA's step norm. Default: 0.1 for language models, else 0."},
    )
    elra_control_cycle: str | None = field(
        default=None,
        metadata={"help": "Length of a control cycle: 45000sp (samples), 45000tok (tokens), 0.25ep, 100ba (updates)."},
    )
    elra_skip_last_batch: bool = field(
        default=True,
        metadata={"help": "Skip the last, incomplete batch of an epoch."},
    )
    elra_batch_control: str | None = field(
        default=None,
        metadata={
            "help": "Who decides the batch size: off, elra (the default with ELRA), noise, linear (the default with "
            "elra_spectral without momentum) or schedule.",
            "choices": BATCH_CONTROLS,
        },
    )
    elra_batch_growth: float = field(default=1.5, metadata={"help": "Factor of a change of the batch size."})
    elra_batch_conditions: str | None = field(
        default=None, metadata={"help": "Conditions for a change that count. Default: rise,noise,stall."}
    )
    elra_max_batch_size: int | None = field(default=None, metadata={"help": "Most samples of an update."})
    elra_initial_accumulation: int | None = field(
        default=None, metadata={"help": "Micro-batches of the first updates."}
    )
    elra_gradient_decay: bool = field(default=False, metadata={"help": "Scale gradients by m_0/m."})
    elra_batch_schedule: str | None = field(
        default=None, metadata={"help": "Multiples of the first batch over training: 0:1,0.5:2,0.75:4."}
    )
    elra_max_micro_batch: str | None = field(
        default=None,
        metadata={"help": "Concatenate micro-batches into passes of at most so many samples; auto finds out."},
    )
    elra_log_noise_scale: bool = field(default=False, metadata={"help": "Log the noise scale of the gradient."})
    elra_max_samples: int | None = field(default=None, metadata={"help": "End training after so many samples."})
    elra_max_tokens: int | None = field(default=None, metadata={"help": "End training after so many tokens."})
    elra_boost: bool = field(
        default=False, metadata={"help": "Evaluate and save the mean of the points of the last control cycle."}
    )
    elra_boost_mean: str | None = field(
        default=None,
        metadata={"help": "Points in that mean: those of the last cycle, or of the whole run.", "choices": MEANS},
    )
    elra_boost_every: int | None = field(
        default=None, metadata={"help": "Updates from one point of that mean to the next."}
    )
    elra_soft_restart: bool | None = field(
        default=None, metadata={"help": "Take steps back that led to a too high loss, with any optimizer."}
    )
    elra_max_step_norm: float | None = field(
        default=None, metadata={"help": "Crop steps above this length, with stock optimizers and ELRA."}
    )

    elra_display: str | None = field(
        default=None, metadata={"help": "What the terminal shows: rich, plain or none.", "choices": DISPLAYS}
    )

    @classmethod
    def of(cls, args: Any, *, only_checked: bool = False) -> ElraSettings:
        """Return the settings in force: those of the launcher, else those of ``args``, else the defaults.

        The launcher's settings count as honoured then, unless they are ``only_checked``.
        """
        if not only_checked:
            LAUNCHER_FLAGS.honour()
        taken = LAUNCHER_FLAGS.values
        return cls(**{f.name: taken.get(f.name, getattr(args, f.name, f.default)) for f in dataclasses.fields(cls)})

    def check(self, args: Any) -> None:
        """Raise a ConfigurationError for a value that a run with ``args`` cannot use."""
        if self.elra_boost_mean not in (None, *MEANS):
            raise ConfigurationError(f"elra_boost_mean={self.elra_boost_mean!r} must be one of {', '.join(MEANS)}.")
        if self.elra_display not in (None, *DISPLAYS):
            raise ConfigurationError(f"elra_display={self.elra_display!r} must be one of {', '.join(DISPLAYS)}.")
        if self.elra_display == "rich" and importlib.util.find_spec("rich") is None:
            raise ConfigurationError(
                "elra_display='rich' needs the package rich: pip install 'hf_elra[display]', or use plain."
            )
        if self.elra_boost and self.elra_boost_mean == "off":
            raise ConfigurationError("elra_boost=True and elra_boost_mean='off' contradict each other; leave one out.")
        if self.elra_boost_every is None:
            return
        if self.elra_boost_every < 1:
            raise ConfigurationError(f"elra_boost_every={self.elra_boost_every} must be at least 1.")
        if self.average_over(OPTIMIZERS.get(optimizer_name(args))) == "off":
            raise ConfigurationError(f"elra_boost_every={self.elra_boost_every} does nothing without --elra_boost.")

    def average_over(self, optimizer_class: type | None) -> str:
        """Return which points are averaged with an optimizer (None: of others): ``"off"``, ``"cycle"`` or ``"run"``."""
        if self.elra_boost_mean is not None:
            return self.elra_boost_mean
        if optimizer_class is not None and issubclass(optimizer_class, ELRASpectral):
            return "run"
        return "cycle" if self.elra_boost else "off"

    @property
    def guards_stock_steps(self) -> bool:
        """Whether the steps of a stock optimizer are to be cropped or taken back."""
        return bool(self.elra_soft_restart) or self.elra_max_step_norm is not None

    def changed(self) -> list[str]:
        """Return the names of the settings that are not at their defaults."""
        return [f.name for f in dataclasses.fields(ElraSettings) if getattr(self, f.name) != f.default]

    def idle_without_elra(self) -> list[str]:
        """Return the names of changed settings that do nothing for another optimizer."""
        idle = {"elra_min_step_norm", "elra_skip_last_batch"}
        if self.elra_batch_control in (None, "off") and not self.elra_boost and self.elra_boost_mean != "cycle":
            idle.add("elra_control_cycle")
        return [name for name in self.changed() if name in idle]

    def control_cycle(self, train_dataset: Any) -> str:
        """Return the length of a control cycle for these data."""
        if self.elra_control_cycle is not None:
            return self.elra_control_cycle
        return "1ep" if train_dataset is None or number_of_rows(train_dataset) is not None else "45000sp"


@dataclass
class ElraTrainingArguments(ElraSettings, TrainingArguments):
    """``TrainingArguments`` with what ELRA needs as defaults, and the ``--elra_*`` flags.

    Parameters that have another default than in ``TrainingArguments``:
        optim (str): ``"elra"``.
        learning_rate (float): 1e-3; α_0, which is adapted exponentially fast.
        lr_scheduler_type (str): ``"constant"``; ELRA finds its own rate.
        max_grad_norm (float): 0; clipping the gradient would change the scalar products the rate is made of.

    Parameters of ELRA: see :class:`ElraSettings`; the rest of ELRA's arguments go through ``optim_args``, e.g.
    ``"max_step_norm=1,restart_sigma=4"``.
    """

    optim: str = field(default="elra", metadata={"help": "The optimizer to use."})
    learning_rate: float = field(default=1e-3, metadata={"help": "The first learning rate; ELRA adapts it."})
    lr_scheduler_type: SchedulerType | str = field(
        default="constant", metadata={"help": "A schedule acts as a factor on ELRA's own rate."}
    )
    max_grad_norm: float = field(default=0.0, metadata={"help": "Gradient clipping; 0 for ELRA."})

    def __post_init__(self) -> None:
        if uses_elra(self):
            ours = OPTIMIZERS[optimizer_name(self)]
            refuse_unusable(ours, fp16=self.fp16, deepspeed=self.deepspeed is not None)
        super().__post_init__()


@dataclass
class ElraSeq2SeqTrainingArguments(ElraTrainingArguments, Seq2SeqTrainingArguments):
    """``Seq2SeqTrainingArguments`` with the defaults and flags of :class:`ElraTrainingArguments`."""


class OneLineParser(HfArgumentParser):
    """An ``HfArgumentParser`` that raises an error of one line, instead of printing a page of usage."""

    def error(self, message: str) -> Any:  # noqa: D102
        raise ConfigurationError(f"{message}.")

    def parse(self, words: list[str]) -> tuple[Any, ...]:
        """Parse all of ``words``; the error for an unknown flag names the nearest known one."""
        *results, unknown = self.parse_args_into_dataclasses(words, return_remaining_strings=True)
        if unknown:
            flag = unknown[0].partition("=")[0]
            valid = [option for action in self._actions for option in action.option_strings]
            raise ConfigurationError(f"unknown argument {flag}.{nearest(flag, valid)} --help lists all flags.")
        return tuple(results)


def optimizer_name(args: Any) -> str:
    """Return ``args.optim`` as text."""
    return str(getattr(args.optim, "value", args.optim))


def uses_elra(args: Any) -> bool:
    """Return whether ``args.optim`` names one of this package's optimizers."""
    return optimizer_name(args) in OPTIMIZERS


def control_of(optimizer_class: type, momentum: float | None = None) -> str:
    """Return the ``elra_batch_control`` that suits an optimizer: without momentum the batch averages over the noise.

    Args:
        optimizer_class: class of any optimizer.
        momentum: its momentum; None for its default.
    """
    if issubclass(optimizer_class, ELRA):
        return "elra"
    if issubclass(optimizer_class, (LABPALSGD, LABPALNSGD)):
        return "schedule"
    return "linear" if issubclass(optimizer_class, ELRASpectral) and momentum == 0 else "off"


def wants_mixin(args: Any) -> bool:
    """Return whether a flag asks for something that the stock Trainer does not do, whatever the optimizer."""
    names = ["elra_batch_control", "elra_max_micro_batch", "elra_max_samples", "elra_max_tokens"]
    names += ["elra_soft_restart", "elra_max_step_norm", "elra_boost", "elra_boost_mean", "elra_log_noise_scale"]
    names += ["elra_display"]
    values = [LAUNCHER_FLAGS.values.get(name, getattr(args, name, None)) for name in names]
    return any(value not in (None, False, "off") for value in values)


def is_language_model(model: Any) -> bool:
    """Return whether a model, bare or wrapped by PEFT, DDP or torch.compile, is trained to predict tokens."""
    return _is_one_of(model, _LANGUAGE_MODEL_CLASSES, _LANGUAGE_MODEL_ENDINGS)


def is_causal_language_model(model: Any) -> bool:
    """Return whether a model, bare or wrapped, predicts the next token, so that its labels are shifted by one."""
    return _is_one_of(model, _CAUSAL_CLASSES, ("ForCausalLM",))


def _is_one_of(model: Any, names: frozenset[str], endings: tuple[str, ...]) -> bool:
    while True:
        name = type(model).__name__
        if name in names or name.endswith(endings):
            return True
        inner = getattr(model, "get_base_model", None)
        inner = inner() if callable(inner) else getattr(model, "_orig_mod", getattr(model, "module", None))
        if inner is None or inner is model:
            return False
        model = inner


def refuse_unusable(
    ours: type[LossAwareOptimizer], *, fp16: bool, deepspeed: bool, fsdp_version: int | None = None
) -> None:
    """Raise a ConfigurationError for what an optimizer of ours cannot be combined with."""
    if fp16 and ours.needs_line_loss:
        raise ConfigurationError(
            f"fp16=True cannot be used with {ours.__name__}, which compares losses at points close to one another: in "
            "half precision they differ by less than their rounding. Use --bf16 or neither, or another optimizer."
        )
    if fp16 and fsdp_version is not None:
        raise ConfigurationError(
            f"fp16=True cannot be used with fsdp and {ours.__name__}: each process would see the overflow of its own "
            "shards alone. Use --bf16, or DDP."
        )
    if deepspeed:
        raise ConfigurationError(
            "deepspeed cannot be used with ELRA: DeepSpeed replaces the optimizer's update and never hands over the "
            "loss. Use DDP or FSDP through accelerate launch."
        )
    if fsdp_version == 1:
        raise ConfigurationError(
            "fsdp_version=1 cannot be used with ELRA: its flat shards do not say over which processes scalar products "
            "must be summed. Use FSDP2: fsdp_config={'version': 2}, or fsdp_version: 2 in Accelerate's configuration."
        )


@contextlib.contextmanager
def set_meanwhile(args: Any, **values: Any) -> Iterator[None]:
    """Let ``args`` have other values for the length of a ``with`` block, for stock code that reads them."""
    kept = {name: getattr(args, name) for name in values}
    try:
        for name, value in values.items():
            setattr(args, name, value)
        yield
    finally:
        for name, value in kept.items():
            setattr(args, name, value)


def replaced_defaults(args: TrainingArguments, *, ours: str = "ELRA") -> dict[str, Any]:
    """Return what a run with ELRA uses in place of stock defaults that would harm it.

    A warning names the replaced defaults. ``args`` are the user's, may serve another run, and are not changed.

    Args:
        args: arguments of the Trainer.
        ours: name of the optimizer in messages.
    """
    replaced: dict[str, Any] = {}
    told = []
    for name, value in (("max_grad_norm", 0.0), ("lr_scheduler_type", SchedulerType.CONSTANT)):
        if getattr(args, name) != value and not _given_by_user(args, name):
            replaced[name] = value
            told.append(f"{name} {_plain(getattr(args, name))} -> {_plain(value)}")
            if name == "lr_scheduler_type" and args.warmup_steps:
                told.append(f"with it warmup_steps {args.warmup_steps:g} -> none")
    if args.process_index == 0:
        if told:
            logger.warning(
                "%s replaces defaults of %s while it trains: %s.", ours, type(args).__name__, ", ".join(told)
            )
        if args.max_grad_norm and args.max_grad_norm > 0 and "max_grad_norm" not in replaced:
            logger.warning(
                "max_grad_norm=%g clips gradients, which changes the scalar products that the learning rate is made "
                "of. Use 0; %s.",
                args.max_grad_norm,
                "a step of elra_spectral does not grow with the gradient"
                if ours == "elra_spectral"
                else f"{ours} crops the step instead ({'max_step_norm' if ours == 'ELRA' else 'max_relative_step'})",
            )
        if args.lr_scheduler_type != SchedulerType.CONSTANT and "lr_scheduler_type" not in replaced:
            logger.warning(
                "lr_scheduler_type=%s multiplies %s's own learning rate, which then %s. Use constant.",
                _plain(args.lr_scheduler_type),
                ours,
                "is not corrected by slopes" if ours == "elra_spectral" else "makes up for it where it can",
            )
        if args.weight_decay > 1e-3 and ours == "ELRA":  # elra_spectral scales weight decay, as AdamW does
            logger.warning(
                "weight_decay=%g shrinks the weights by this share at every update, whatever the learning rate "
                "(half gone after %d updates). The paper uses 3e-4; AdamW's 0.1 at a rate of 5e-4 amounts to 5e-5.",
                args.weight_decay,
                round(0.693 / args.weight_decay),
            )
    return replaced


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(getattr(value, "value", value))


def _given_by_user(args: TrainingArguments, name: str) -> bool:
    """Return whether the user gave a value: ELRA's arguments hold it, or it differs from the default, or is a flag."""
    if isinstance(args, ElraSettings):
        return True
    default = {f.name: f.default for f in dataclasses.fields(args)}[name]
    flags = (f"--{name}", f"--{name.replace('_', '-')}")
    return getattr(args, name) != default or any(word.split("=")[0] in flags for word in sys.argv[1:])


# ---- the optimizer's own arguments ----


def optimizer_arguments(args: TrainingArguments, model: Any) -> dict[str, Any]:
    """Return the keyword arguments of the optimizer that ``args`` ask for, checked.

    In order of precedence: ``optim_args``, then ``--elra_*`` flags, then defaults that depend on the model.
    """
    name = optimizer_name(args)
    optimizer_class = OPTIMIZERS[name]
    for setting in ("learning_rate", "weight_decay"):
        if isinstance(value := getattr(args, setting), bool) or not isinstance(value, (int, float)):
            raise ConfigurationError(f"{setting}={value!r} must be a number (in YAML 1.0e-3: 1e-3 is text there).")
    if not args.learning_rate > 0:
        raise ConfigurationError(
            f"--learning_rate {args.learning_rate:g} must be above 0; it is only the first one (try 1e-3)."
        )
    settings = ElraSettings.of(args)
    min_step_norm = settings.elra_min_step_norm
    arguments: dict[str, Any] = {"lr": args.learning_rate}
    if "min_step_norm" in inspect.signature(optimizer_class).parameters:
        if min_step_norm is None:
            min_step_norm = LANGUAGE_MODEL_MIN_STEP_NORM if is_language_model(model) else 0.0
        arguments["min_step_norm"] = min_step_norm
    elif min_step_norm is not None:
        raise ConfigurationError(
            f"elra_min_step_norm={min_step_norm:g} is a setting of optim=elra; {name} needs no floor. Leave it out."
        )
    if settings.elra_soft_restart is not None:
        arguments["soft_restart"] = settings.elra_soft_restart
    if settings.elra_max_step_norm is not None:
        if "max_step_norm" not in inspect.signature(optimizer_class).parameters:
            instead = "pass --optim_args max_relative_step=0.03, a share of the norm of the parameters."
            if optimizer_class is ELRASpectral:
                instead = "leave it out, as the size of the weights bounds its steps (max_drift bounds the whole way)."
            raise ConfigurationError(
                f"elra_max_step_norm={settings.elra_max_step_norm:g} cannot be used with optim={name}; {instead}"
            )
        arguments["max_step_norm"] = settings.elra_max_step_norm
    arguments.update(parse_optim_args(args.optim_args, optimizer_class))
    # The constructor of the optimizer knows what is valid.
    constructor: Any = optimizer_class
    constructor([torch.nn.Parameter(torch.zeros(1))], **arguments, weight_decay=args.weight_decay)
    return arguments


NOT_OPTIM_ARGS = ("params", "lr", "weight_decay", *OF_A_MODEL)
"""Arguments of optimizers that the Trainer has under names of its own, or finds in the model."""


def parse_optim_args(text: str | None, optimizer_class: type[torch.optim.Optimizer]) -> dict[str, Any]:
    """Read ``"min_step_norm=0.1,max_step_norm=2"`` into values of the types of the optimizer's arguments.

    A pair is written with a colon, ``lr_bounds=1e-8:1e6``.
    """
    if text is not None and not isinstance(text, str):
        raise ConfigurationError(f'optim_args={text!r} must be text, "name=value,name=value".')
    hints = typing.get_type_hints(optimizer_class.__init__)
    parameters = inspect.signature(optimizer_class).parameters
    valid = [name for name in parameters if name not in NOT_OPTIM_ARGS]
    values: dict[str, Any] = {}
    for item in (part.strip() for part in text.split(",")) if text else ():
        name, equals, value = (part.strip() for part in item.partition("="))
        if not item:
            raise ConfigurationError(f"optim_args={text!r} has a comma with nothing beside it; leave that comma out.")
        if not equals:
            raise ConfigurationError(f"optim_args: {item!r} is not of the form name=value.")
        if name in values:
            raise ConfigurationError(f"optim_args={text!r} gives {name} twice; leave one of them out.")
        if name == "weight_decay":
            raise ConfigurationError(
                f"optim_args: weight_decay={value} belongs to the Trainer, which sets it per parameter group; "
                f"pass --weight_decay {value}."
            )
        if name == "lr":
            raise ConfigurationError(
                f"optim_args: lr={value} is the Trainer's learning_rate; pass --learning_rate {value}."
            )
        if name not in valid:
            others = [other for other, known in OPTIMIZERS.items() if name in inspect.signature(known).parameters]
            hint = nearest(name, valid)
            if others and name not in NOT_OPTIM_ARGS:
                hint = f" It is one of --optim {' and '.join(others[:2])}{' and others' if others[2:] else ''}."
            raise ConfigurationError(
                f"optim_args: {name!r} is not an argument of {optimizer_class.__name__}.{hint} "
                f"Valid names: {', '.join(valid)}."
            )
        with_commas = re.sub(r"\s+(?=\w+\s*=)", ",", value)
        if with_commas != value:
            raise ConfigurationError(
                f"optim_args: {name}={value!r} holds a second argument; commas stand between them, as in "
                f'"{name}={with_commas}".'
            )
        values[name] = _convert(name, value, hints[name])
    return values


def _convert(name: str, text: str, hint: Any) -> Any:
    """Turn the text of one optimizer argument into a value of the type that its annotation names."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if type(None) in options and text.lower() == "none":
        return None
    (target,) = (option for option in options if option is not type(None))
    try:
        if typing.get_origin(target) is tuple:
            low, high = text.strip("()").split(":")
            return float(low), float(high)
        if target is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        return target(text)
    except (ValueError, KeyError):
        wanted = "two numbers, low:high, e.g. 1e-8:1" if typing.get_origin(target) is tuple else target.__name__
        none = " or none" if type(None) in options else ""
        raise ConfigurationError(
            f"optim_args: {name}={text!r} must be {wanted}{none}; commas stand between arguments, as in "
            '"momentum=0.9,warmup=10".'
        ) from None
