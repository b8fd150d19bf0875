"""What the batch flags ask for, checked against each other and the data before a Trainer does anything.

The result, a :class:`BatchControl`, is what ``update_size.py`` works with. The flags themselves are in
``arguments.py``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from torch.utils.data import IterableDataset

from hf_elra.control import ControlCycle, batch_size
from hf_elra.control.batch_size import CONDITIONS, BatchSchedule, BatchSizeController
from hf_elra.errors import ConfigurationError, nearest
from hf_elra.trainer.arguments import BATCH_CONTROLS, LABPAL_SCHEDULE, ElraSettings
from hf_elra.trainer.rows import number_of_rows, samples_per_micro_batch

logger = logging.getLogger(__name__)

_BATCH_FLAGS = (
    "elra_batch_growth",
    "elra_batch_conditions",
    "elra_max_batch_size",
    "elra_initial_accumulation",
    "elra_gradient_decay",
)
_GROUP_FLAGS = ("elra_max_samples", "elra_max_tokens", "elra_max_micro_batch", "elra_log_noise_scale")


@dataclasses.dataclass
class BatchControl:
    """What the flags ask for, checked.

    Attributes:
        controller: the object that has the number of micro-batches of an update.
        mode: ``"elra"`` or ``"noise"`` if the controller changes that number; ``"linear"`` or ``"schedule"`` if the
            updates seen do; ``"off"`` if it stays.
        schedule: multiples of the first number over training, or None.
        gradient_decay: scale gradients by m_0/m.
        max_samples, max_tokens: budgets that end the run, or None.
        max_pass: most samples of one forward pass; ``"auto"``; None to run micro-batches as they come.
        measures_noise: whether the noise scale is measured.
        asked_for: False if no flag asks for any of this, and only the position in the data is kept.
    """

    controller: BatchSizeController
    mode: str
    schedule: BatchSchedule | None
    gradient_decay: bool
    max_samples: int | None
    max_tokens: int | None
    max_pass: int | str | None
    measures_noise: bool
    asked_for: bool = True

    @property
    def decides_at_cycles(self) -> bool:
        """Whether the batch changes at the ends of control cycles, or by their losses."""
        return self.mode in ("elra", "noise")

    @property
    def follows_the_data(self) -> bool:
        """Whether the batch changes with the amount of data seen."""
        return self.mode in ("linear", "schedule")


def build_batch_control(
    settings: ElraSettings, args: Any, train_dataset: Any, default: str = "off", *, always: bool = False
) -> BatchControl | None:
    """Build what ``settings`` ask for; None if updates are those of the stock Trainer.

    Args:
        settings: the flags.
        args: the Trainer's arguments.
        train_dataset: the Trainer's training data.
        default: the ``elra_batch_control`` if it is not given; see :func:`default_control`.
        always: whether a control is built even if nothing is asked for.

    Raises:
        ConfigurationError: flags contradict each other or the data; the message names the flag.
    """
    control = settings.elra_batch_control
    if control is None:
        control = default
    if control not in BATCH_CONTROLS:
        raise ConfigurationError(
            f"elra_batch_control={control!r} must be one of {', '.join(BATCH_CONTROLS)}."
            + nearest(control, BATCH_CONTROLS)
        )
    schedule = settings.elra_batch_schedule
    if schedule is not None and control != "schedule":
        raise ConfigurationError(f"elra_batch_schedule={schedule!r} needs --elra_batch_control schedule beside it.")
    if control == "off" and (idle := [name for name in settings.changed() if name in _BATCH_FLAGS]):
        raise ConfigurationError(
            f"{', '.join(idle)}: does nothing while elra_batch_control is off; add --elra_batch_control elra."
        )
    without_effect = {
        "noise": ("elra_batch_conditions",),
        **dict.fromkeys(("linear", "schedule"), ("elra_batch_growth", "elra_batch_conditions")),
    }
    if idle := [name for name in settings.changed() if name in without_effect.get(control, ())]:
        raise ConfigurationError(f"{', '.join(idle)}: does nothing with elra_batch_control={control}; leave it out.")
    base = samples_per_micro_batch(args, args.train_batch_size)
    max_pass = _read_max_pass(settings.elra_max_micro_batch, args.train_batch_size)
    for name in ("elra_max_samples", "elra_max_tokens"):
        budget = getattr(settings, name)
        if budget is not None and budget < 1:
            raise ConfigurationError(f"{name}={budget} must be at least 1; leave it out for no budget.")
    measures_noise = settings.elra_log_noise_scale or control == "noise"
    wanted = bool(
        control != "off"
        or settings.elra_max_samples
        or settings.elra_max_tokens
        or max_pass is not None
        or measures_noise
    )
    first = args.gradient_accumulation_steps
    if control != "off" and settings.elra_initial_accumulation is not None:
        first = settings.elra_initial_accumulation
    if wanted or default == "elra":
        _check_cycle(settings, control, args, train_dataset, max(first, 1) * base)
    if not (wanted or always):
        return None
    if args.deepspeed:
        given = [name for name in settings.changed() if name in ("elra_batch_control", *_GROUP_FLAGS)]
        raise ConfigurationError(
            f"{', '.join(given)} cannot be used with DeepSpeed, which does its own accumulation; leave it out."
        )
    if control == "schedule" and schedule is None and default == "schedule":
        schedule = labpal_schedule(first * base, number_of_rows(train_dataset))
    if control == "schedule" and schedule is None:
        raise ConfigurationError("elra_batch_control='schedule' needs --elra_batch_schedule, e.g. 0:1,0.5:2,0.75:4.")
    if measures_noise:
        _check_noise(control, first, args)
    most = settings.elra_max_batch_size
    if most is not None and most < first * base:
        raise ConfigurationError(
            f"elra_max_batch_size={most} is below the first batch of {first} x {base} = {first * base} samples; "
            "raise it, or lower --per_device_train_batch_size or --elra_initial_accumulation."
        )
    names = settings.elra_batch_conditions
    conditions = CONDITIONS if names is None else tuple(part.strip() for part in names.split(","))
    try:
        controller = BatchSizeController(
            first, settings.elra_batch_growth, None if most is None else most // base, conditions
        )
        if control != "elra":
            controller.conditions = ()
    except ConfigurationError as error:
        text = str(error)
        text = f"elra_batch_conditions: {text}" if text.startswith("condition ") else text
        text = f"elra_batch_{text}" if text.startswith("growth=") else text
        text = f"elra_{text}" if text.startswith("initial_accumulation=") else text
        raise ConfigurationError(text) from None
    return BatchControl(
        controller,
        control,
        None if schedule is None else BatchSchedule.parse(schedule, "elra_batch_schedule"),
        settings.elra_gradient_decay,
        settings.elra_max_samples,
        settings.elra_max_tokens,
        max_pass,
        measures_noise,
        wanted,
    )


def labpal_schedule(batch: int, rows: int | None) -> str:
    """LABPAL's batch over training, for data of ``rows`` samples in batches of ``batch``; None: as many as CIFAR's."""
    noise = 128 / batch * (40_000 if rows is None else rows) / 40_000
    return ",".join(f"{at}:{max(int(factor * noise), 1)}" for at, factor in LABPAL_SCHEDULE)


def control_for(trainer: Any, settings: ElraSettings, wanted: str) -> BatchControl | None:
    """Return the control that ``settings`` ask for, else the ``wanted`` one, if the Trainer allows it.

    If a Trainer makes batches of its own, whatever was not asked for is off. With an optimizer of ours, groups do the
    accumulation in all other Trainers even if nothing is asked for, as they know the position in the data.
    """
    kind = type(trainer)
    default = default_control(kind, wanted)
    if default != wanted and settings.elra_batch_control is None:
        logger.warning(
            "The batch size stays as it is: %s makes batches of its own. --elra_batch_control %s changes that.",
            kind.__name__,
            wanted,
        )
    always = trainer.elra_active and not makes_own_batches(kind)
    control = build_batch_control(settings, trainer.args, trainer.train_dataset, default, always=always)
    if control is None:
        return None
    if control.mode == "linear" and settings.elra_batch_control is None:
        logger.warning(
            "The batch grows by its first size every %d updates, as there is no momentum to average over the noise. "
            "--elra_max_batch_size limits it, --elra_batch_control off leaves it as it is.",
            batch_size.UPDATES_PER_GROWTH,
        )
    if control.max_pass == "auto" and trainer.args.device.type == "cpu":
        logger.warning(
            "elra_max_micro_batch=auto: on a CPU, running out of memory may end the process before it can be caught; "
            "a number of samples is safer."
        )
    return control


def default_control(trainer_class: type, wanted: str) -> str:
    """Return the ``wanted`` control, or ``"off"`` for a Trainer that overrides how batches are made.

    For example, TRL's GRPO relies on a fixed accumulation.
    """
    return "off" if makes_own_batches(trainer_class) else wanted


def makes_own_batches(trainer_class: type) -> bool:
    """Return whether a Trainer overrides how batches are made."""
    return any(
        not cls.__module__.startswith(("transformers.", "hf_elra."))
        and any(name in vars(cls) for name in ("get_batch_samples", "_prepare_inputs", "_inner_training_loop"))
        for cls in trainer_class.__mro__
    )


def _check_noise(control: str, first: int, args: Any) -> None:
    """Refuse to measure the noise scale with FSDP or a loss scaler, or where updates have one micro-batch alone."""
    flag = "elra_batch_control=noise" if control == "noise" else "elra_log_noise_scale"
    if args.fp16:
        raise ConfigurationError(
            f"{flag} cannot be used with fp16=True, whose gradients are multiplied by a scale that changes; use --bf16."
        )
    if args.fsdp:
        raise ConfigurationError(
            f"{flag} cannot be used with FSDP, which holds no gradient of a micro-batch; leave it out."
        )
    if first < 2 and control in ("off", "noise"):
        size = args.per_device_train_batch_size
        smaller = f"--per_device_train_batch_size {size // 2} " if size > 1 else ""
        raise ConfigurationError(
            f"{flag} compares the gradient of a micro-batch with that of an update, but an update begins with one "
            f"micro-batch; pass {smaller}--gradient_accumulation_steps 2."
        )


def _read_max_pass(text: str | int | None, micro_batch: int) -> int | str | None:
    """Read ``elra_max_micro_batch``: None, ``"auto"`` or a number of samples."""
    if text is None or text == "auto":
        return text
    try:
        number = int(text)
    except ValueError:
        raise ConfigurationError(f"elra_max_micro_batch={text!r} must be a number of samples or auto.") from None
    if number < micro_batch:
        raise ConfigurationError(
            f"elra_max_micro_batch={number} is below the {micro_batch} samples of one micro-batch; raise it, or lower "
            "--per_device_train_batch_size."
        )
    return number


def _check_cycle(settings: ElraSettings, control: str, args: Any, train_dataset: Any, first: int) -> None:
    """Refuse a control cycle that cannot be counted, or that is shorter than the first update of ``first`` samples."""
    text = settings.control_cycle(train_dataset)
    cycle = ControlCycle.parse(text, "elra_control_cycle")
    if cycle.unit == "ep" and train_dataset is not None and number_of_rows(train_dataset) is None and control != "off":
        raise ConfigurationError(
            f"elra_control_cycle={text!r} counts epochs, but the training data have no length; write it in samples "
            "(45000sp), tokens (45000tok) or updates (100ba)."
        )
    if cycle.unit == "ep" and cycle.length >= 1:
        return  # an update is never larger than an epoch
    samples = _samples_of_cycle(cycle, train_dataset)
    if samples is None or samples >= first:
        return
    rows = number_of_rows(train_dataset)
    if rows is not None and rows < first:
        raise ConfigurationError(
            f"the first update takes {first} samples, but the training data have {rows}; lower "
            f"--per_device_train_batch_size (now {args.per_device_train_batch_size}) or what multiplies it."
        )
    raise ConfigurationError(
        f"elra_control_cycle={text!r} is shorter than the first update of {first} samples; write at least {first}sp."
    )


def tokens_of_first_row(train_dataset: Any) -> int | None:
    """Return the tokens of the first sample of map-style data of token rows; None for anything else.

    This reads the row, which may draw random numbers. Call it only where the number is needed.
    """
    map_style = hasattr(train_dataset, "__getitem__") and not isinstance(train_dataset, IterableDataset | Mapping)
    if not map_style or not number_of_rows(train_dataset):
        return None
    row = train_dataset[0]
    tokens = row.get("input_ids") if hasattr(row, "get") else None
    return len(tokens) if tokens is not None and hasattr(tokens, "__len__") else None


def _samples_of_cycle(cycle: ControlCycle, train_dataset: Any) -> float | None:
    """Return the samples in a control cycle, or None if the training data do not tell beforehand."""
    tokens = tokens_of_first_row(train_dataset) if cycle.unit == "tok" else None
    return cycle.samples(number_of_rows(train_dataset), tokens)


@contextlib.contextmanager
def budget_as_max_steps(args: Any, budget: int | None) -> Iterator[None]:
    """Give the Trainer a budget in samples or tokens as ``max_steps``, if that is not given.

    The Trainer insists on ``max_steps`` for data of unknown length. A budget bounds the number of updates too, as each
    update has at least one sample and one token.
    """
    given = args.max_steps if args is not None else None
    if budget is not None and given is not None and given <= 0:
        args.max_steps = budget
    try:
        yield
    finally:
        if args is not None:
            args.max_steps = given


def updates_per_cycle(trainer: Any) -> float | None:
    """Return the updates of the first size in a control cycle; None if that is not known beforehand."""
    data, args = trainer.train_dataset, trainer.args
    cycle = ControlCycle.parse(trainer.elra_settings.control_cycle(data))
    if cycle.unit == "ba":
        return cycle.length
    control = trainer.batch_control
    first = args.gradient_accumulation_steps if control is None else control.controller.initial_accumulation
    samples = _samples_of_cycle(cycle, data)
    return None if samples is None else samples / (first * samples_per_micro_batch(args, args.train_batch_size))
