"""How many micro-batches an update has, and how that is decided while training runs.

What the flags ask for is in ``batch_control.py``, the rules of a decision are in ``control/batch_size.py``, and how a
decision is logged is in ``logs.py``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from hf_elra.control import BatchDecision, BatchSizeController, ControlCycle, NoiseScale
from hf_elra.control.batch_size import linear_factor
from hf_elra.control.progress import TrainingProgress
from hf_elra.trainer.batch_control import BatchControl


class UpdateSize:
    """The number of micro-batches of the next update.

    Attributes:
        control: what was asked for; None if updates are those of the stock Trainer, and nothing here is used.
        controller: the controller of the present training, a copy of that of the control.
        noise_scale: noise scale of the gradient, if it is measured.
    """

    def __init__(self) -> None:
        self.control: BatchControl | None = None
        self.controller: BatchSizeController | None = None
        self.noise_scale: NoiseScale | None = None

    def prepare(self, control: BatchControl | None) -> None:
        """Set what was asked for."""
        self.control = control
        self.controller = None if control is None else control.controller

    def begin(self, cycle: str, progress: TrainingProgress, most_samples: int | None) -> None:
        """Begin a training with the first size.

        Args:
            cycle: length of a control cycle.
            progress: position in the data, which counts micro-batches.
            most_samples: most samples of an update; None for no limit.
        """
        assert self.control is not None
        self.controller = dataclasses.replace(self.control.controller)
        if most_samples is not None:  # auto_find_batch_size has made batches smaller
            self.controller.max_accumulation = most_samples // progress.samples_per_batch
        if self.control.mode == "elra":
            self._limit_to(ControlCycle.parse(cycle), progress)
        self.noise_scale = NoiseScale() if self.control.measures_noise else None

    def _limit_to(self, cycle: ControlCycle, progress: TrainingProgress) -> None:
        """Limit updates to a control cycle, whose losses have to say whether updates should grow."""
        assert self.controller is not None
        per_batch, batches = progress.samples_per_batch, progress.batches_per_epoch
        samples = cycle.samples(None if batches is None else batches * per_batch, progress.tokens_per_sample)
        if samples is not None:
            most = max(int(samples / per_batch), self.controller.initial_accumulation)
            given = self.controller.max_accumulation
            self.controller.max_accumulation = most if given is None else min(most, given)

    def accumulation(self, progress: TrainingProgress) -> int:
        """Return the micro-batches of the next update: the controller's number or a multiple of the first one."""
        assert self.control is not None
        assert self.controller is not None
        number, first = self.controller.accumulation, self.controller.initial_accumulation
        if (schedule := self.control.schedule) is not None:
            number = first * schedule.factor(progress.fraction())
        elif self.control.mode == "linear":
            number = first * linear_factor(progress.samples / (first * progress.samples_per_batch))
        if (most := self.controller.max_accumulation) is not None:
            number = min(number, most)
        if (per_epoch := progress.batches_per_epoch) is not None:
            number = min(number, per_epoch)
        return number

    def end_cycle(self, mean: float, std: float, progress: TrainingProgress) -> BatchDecision | None:
        """Decide at the end of a control cycle, if the number of micro-batches is controlled at all.

        Args:
            mean, std: mean and standard deviation of the losses of the cycle.
            progress: position in the data, which counts micro-batches.
        """
        if self.control is None or self.controller is None or not self.control.decides_at_cycles:
            return None
        if self.control.mode == "noise":
            assert self.noise_scale is not None
            scale = self.noise_scale.value
            wanted = None if scale is None else scale / progress.samples_per_batch
            decision = self.controller.follow(wanted, mean, std)
        else:
            decision = self.controller.end_cycle(mean, std)
        return dataclasses.replace(decision, accumulation=self.accumulation(progress))

    def state_dict(self, progress: TrainingProgress) -> dict[str, Any]:
        """Return what a checkpoint keeps, as JSON values."""
        assert self.controller is not None
        return {
            "samples_per_batch": progress.samples_per_batch,
            "controller": self.controller.state_dict(),
            "noise_scale": None if self.noise_scale is None else self.noise_scale.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], progress: TrainingProgress) -> None:
        """Continue from a checkpoint, in which micro-batches may have been of another size."""
        assert self.control is not None
        if self.control.decides_at_cycles:
            assert self.controller is not None
            self.controller.load_state_dict(state["controller"])
            exact = self.controller.exact * state["samples_per_batch"] / progress.samples_per_batch
            exact = max(exact, self.controller.initial_accumulation)
            self.controller.exact = min(exact, self.controller.max_accumulation or exact)
        if self.noise_scale is not None and state.get("noise_scale") is not None:
            self.noise_scale = NoiseScale(**state["noise_scale"])
