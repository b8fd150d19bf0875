"""Updates made of a changing number of micro-batches, inside the stock training loop.

The loop is left at one step per update: ``get_batch_samples`` takes as many micro-batches as the controller wants and
returns them as *one* group, ``training_step`` runs over it, and what counts batches (epoch, resume position, tokens,
learning-rate schedule, number of updates) is put right. Which number is wanted is decided in ``control/batch_size.py``;
what the optimizer is told is in ``mixin.py``. Works with any optimizer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer
from transformers.trainer_utils import has_length

from hf_elra.control import ControlCycle
from hf_elra.control.batch_size import BatchDecision, BatchSchedule, BatchSizeController
from hf_elra.errors import ConfigurationError, nearest
from hf_elra.trainer.arguments import BATCH_CONTROLS, ElraSettings
from hf_elra.trainer.callbacks import ElraCallback

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


_BATCH_FLAGS = ("elra_batch_growth", "elra_max_batch_size", "elra_initial_accumulation", "elra_gradient_decay")


class MicroBatchGroup(list):
    """The micro-batches of one update."""


def build_batch_control(
    settings: ElraSettings, args: Any, train_dataset: Any
) -> tuple[BatchSizeController | None, BatchSchedule | None]:
    """Build the controller and the schedule that ``settings`` ask for; (None, None) where the control is off.

    Raises:
        ConfigurationError: flags that contradict each other or the data; the message names the flag.
    """
    control = settings.elra_batch_control
    if control not in BATCH_CONTROLS:
        raise ConfigurationError(
            f"elra_batch_control={control!r} must be one of {', '.join(BATCH_CONTROLS)}."
            + nearest(control, BATCH_CONTROLS)
        )
    schedule = settings.elra_batch_schedule
    if schedule is not None and control != "schedule":
        raise ConfigurationError(f"elra_batch_schedule={schedule!r} needs --elra_batch_control schedule beside it.")
    if control == "off":
        idle = [name for name in settings.changed() if name in _BATCH_FLAGS]
        if idle:
            raise ConfigurationError(
                f"{', '.join(idle)}: does nothing while elra_batch_control is off; add --elra_batch_control elra."
            )
        return None, None
    if args.deepspeed:
        raise ConfigurationError(
            "elra_batch_control cannot be used with DeepSpeed, which does its own accumulation; "
            "pass --elra_batch_control off."
        )
    if control == "schedule" and schedule is None:
        raise ConfigurationError("elra_batch_control='schedule' needs --elra_batch_schedule, e.g. 0:1,0.5:2,0.75:4.")
    ControlCycle.parse(settings.elra_control_cycle, "elra_control_cycle")
    if not has_length(train_dataset) and settings.elra_control_cycle.strip().endswith("ep"):
        raise ConfigurationError(
            f"elra_control_cycle={settings.elra_control_cycle!r} counts epochs, but the training data have no "
            "length; write it in samples (45000sp), tokens (45000tok) or updates (100ba)."
        )
    first = settings.elra_initial_accumulation
    first = args.gradient_accumulation_steps if first is None else first
    base = args.train_batch_size * args.world_size
    most = settings.elra_max_batch_size
    if most is not None and most < first * base:
        raise ConfigurationError(
            f"elra_max_batch_size={most} is below the first batch of {first} x {base} = {first * base} samples; "
            "raise it, or lower --per_device_train_batch_size or --elra_initial_accumulation."
        )
    try:
        controller = BatchSizeController(first, settings.elra_batch_growth, None if most is None else most // base)
    except ConfigurationError as error:
        raise ConfigurationError(f"--elra_batch_growth, --elra_initial_accumulation: {error}") from None
    return controller, None if schedule is None else BatchSchedule.parse(schedule, "elra_batch_schedule")


class DynamicBatchMixin(_Base):
    """Gives a Trainer updates of ``batch_controller.accumulation`` micro-batches; does nothing while that is None."""

    batch_controller: BatchSizeController | None = None
    batch_schedule: BatchSchedule | None = None
    _decay_gradients = False
    _batches_per_epoch: int | None = None
    # Position in the data: epochs that are over, and micro-batches taken in the one that runs.
    _epoch = 0
    _micro_batches = 0
    _first_epoch_of_call = True

    def prepare_batch_control(self, settings: ElraSettings) -> None:
        """Take the controller that ``settings`` ask for; from here on groups do the accumulation."""
        self.batch_controller, self.batch_schedule = build_batch_control(settings, self.args, self.train_dataset)
        if self.batch_controller is not None:
            self.args.gradient_accumulation_steps = 1
            self._decay_gradients = settings.elra_gradient_decay

    @property
    def accumulation(self) -> int:
        """Micro-batches of the next update: the controller's number or the schedule's, at most those of an epoch."""
        assert self.batch_controller is not None
        number = self.batch_controller.accumulation
        if self.batch_schedule is not None:
            number = self.batch_controller.initial_accumulation * self.batch_schedule.factor(self._progress())
            if self.batch_controller.max_accumulation is not None:
                number = min(number, self.batch_controller.max_accumulation)
        return min(number, self._batches_per_epoch) if self._batches_per_epoch else number

    def end_batch_cycle(self, mean: float, std: float) -> BatchDecision | None:
        """A control cycle is over: decide, unless a schedule does."""
        if self.batch_controller is None or self.batch_schedule is not None:
            return None
        return self.batch_controller.end_cycle(mean, std)

    # ---- the loop's hooks ----

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Take the micro-batches of one update and return them as one group."""
        if self.batch_controller is None:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        wanted = self.accumulation
        batches, num_items = super().get_batch_samples(epoch_iterator, wanted, device)
        if len(batches) < wanted and self._skips_last_batch():
            batches = []
        if not batches:
            return [], None
        self._micro_batches += len(batches)
        return [MicroBatchGroup(batches)], num_items

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Run over a group of micro-batches; gradients meet those of other processes only at the last one."""
        if not isinstance(inputs, MicroBatchGroup):
            return super().training_step(model, inputs, num_items_in_batch)
        self.current_gradient_accumulation_steps = len(inputs)
        total: Any = 0.0
        for position, micro_batch in enumerate(inputs, start=1):
            last = position == len(inputs)
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model=model):
                total = total + super().training_step(model, micro_batch, num_items_in_batch)
            if not last:
                self.control = self.callback_handler.on_substep_end(self.args, self.state, self.control)
        if self._decay_gradients and self.batch_controller is not None:
            factor = self.batch_controller.initial_accumulation / len(inputs)
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            if factor != 1 and gradients:
                torch._foreach_mul_(gradients, factor)
        return total

    def floating_point_ops(self, inputs):
        """Sum over a group."""
        if isinstance(inputs, MicroBatchGroup):
            return sum(super(DynamicBatchMixin, self).floating_point_ops(batch) for batch in inputs)
        return super().floating_point_ops(inputs)

    def _track_num_input_tokens(self, inputs):
        for batch in inputs if isinstance(inputs, MicroBatchGroup) else [inputs]:
            super()._track_num_input_tokens(batch)

    # ---- counting ----

    def set_initial_training_values(self, args, dataloader):
        """Stock counts; with a limit in updates there may be as many epochs as updates."""
        values = super().set_initial_training_values(args, dataloader)
        if self.batch_controller is None:
            return values
        self._batches_per_epoch = len(dataloader) if has_length(dataloader) else None
        if args.max_steps > 0 and self._batches_per_epoch:
            return args.max_steps, *values[1:]
        return values

    def _init_training_state(self, *args, **kwargs):
        epochs, skip = super()._init_training_state(*args, **kwargs)
        if self.batch_controller is None:
            return epochs, skip
        self._restore_position(self.batch_controller)
        self._first_epoch_of_call = True
        if self._batches_per_epoch and self._epoch_is_over():
            self._epoch, self._micro_batches = self._epoch + 1, 0
        return self._epoch, 0 if self.args.ignore_data_skip else self._micro_batches

    def data_position(self) -> dict[str, Any]:
        """Where in the data the run is, and the controller's state, as JSON values for the checkpoint."""
        controller = self.batch_controller.state_dict() if self.batch_controller is not None else None
        return {"epoch": self._epoch, "micro_batches": self._micro_batches, "controller": controller}

    def _restore_position(self, controller: BatchSizeController) -> None:
        """Take position and controller from the checkpoint that is resumed; without one start anew."""
        position = ElraCallback.saved_attributes(self.state).get("data_position")
        self.batch_controller = dataclasses.replace(controller)
        self._epoch = self._micro_batches = 0
        if position is not None:
            self._epoch, self._micro_batches = position["epoch"], position["micro_batches"]
            self.batch_controller.load_state_dict(position["controller"])

    def true_epoch(self, state: Any) -> float:
        """Epochs of data seen, also before the stock count is corrected."""
        if self.batch_controller is None or not self._batches_per_epoch:
            return state.epoch or 0.0
        return self._epoch + (1.0 if self._epoch_is_over() else self._micro_batches / self._batches_per_epoch)

    def _epoch_is_over(self) -> bool:
        left = (self._batches_per_epoch or 0) - self._micro_batches
        return left <= 0 or (left < self.accumulation and self._skips_last_batch())

    def begin_epoch(self) -> None:
        """The loop begins an epoch: the first one of a call goes on where a checkpoint stopped."""
        if not self._first_epoch_of_call:
            self._epoch, self._micro_batches = self._epoch + 1, 0
        self._first_epoch_of_call = False

    def correct_state(self, group_size: int) -> None:
        """After an update: the true epoch, the updates still to come, and a schedule that follows the data."""
        if self.batch_controller is None or not self._batches_per_epoch:
            return
        self.state.epoch = self.true_epoch(self.state)
        if self.args.max_steps > 0:
            return
        self.state.max_steps = self.state.global_step + self._updates_left()
        scheduler = self.lr_scheduler
        if isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
            for _ in range(group_size - 1):  # it was built for one update per micro-batch
                scheduler.step()

    def _updates_left(self) -> int:
        length, number = self._batches_per_epoch or 1, self.accumulation
        total = math.ceil(self.args.num_train_epochs * length)
        updates, epoch, taken = 0, self._epoch, self._micro_batches
        while epoch * length + taken < total:
            left = min(length - taken, total - epoch * length - taken)
            whole_epoch = left == length - taken
            # At the end of an epoch an incomplete group is skipped; at the end of training the epoch may just stop.
            updates += left // number if whole_epoch and self._skips_last_batch() else -(-left // number)
            epoch, taken = epoch + 1, 0
        return updates

    def _progress(self) -> float:
        if self.args.max_steps > 0:
            return self.state.global_step / self.args.max_steps
        length = self._batches_per_epoch or 1
        return min(1.0, (self._epoch * length + self._micro_batches) / (self.args.num_train_epochs * length))

    def _skips_last_batch(self) -> bool:
        return bool(self.args.dataloader_drop_last)
