"""Callbacks of a training run: what was seen so far, control cycles, progress bar and lines, a clean stop on Ctrl-C.

Callbacks here count and trigger; what a cycle's end decides is the optimizer's and the controller's business.
"""

from __future__ import annotations

import logging
import math
import signal
import time
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers.trainer_callback import ExportableState, ProgressCallback, TrainerCallback

from hf_elra.control import ControlCycle, CycleLosses

logger = logging.getLogger(__name__)

LOSSES_ON_DEVICE = 1000
"""So many losses are collected before they are fetched; a loss fetched alone would make the host wait for the GPU."""


def unwrap_optimizer(optimizer: Any) -> Any:
    """Return the optimizer inside Accelerate's wrappers."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def finite_values(losses: list[Any]) -> list[float]:
    """Fetch losses, which may be on a device, all at once; those that are not finite are left out."""
    tensors = bool(losses) and all(isinstance(loss, Tensor) for loss in losses)
    values = torch.stack(losses).tolist() if tensors else map(float, losses)
    return [value for value in values if math.isfinite(value)]


class ElraCallback(TrainerCallback, ExportableState):
    """Counts samples and tokens over all processes, and ends control cycles.

    Its counts, the running cycle's losses, the position in the data and the batch-size controller are part of every
    checkpoint (``trainer_state.json``, under ``stateful_callbacks``) and continue on resume. The Trainer sets
    ``trainer`` whenever it looks the callback up.

    Args:
        control_cycle (str): length of a cycle, e.g. ``"1ep"``.
    """

    trainer: Any = None

    def __init__(self, control_cycle: str = "1ep") -> None:
        self.control_cycle = control_cycle
        self.samples = 0
        self.tokens = 0
        self.samples_before = self.updates_before = 0  # where a run was resumed
        self.cycle_losses = CycleLosses()
        self._waiting: list[Any] = []  # losses that are still on the device
        self.full_batch = 0  # samples in a whole micro-batch of data of unknown length, as far as seen
        self._cycle = ControlCycle.parse(control_cycle, "elra_control_cycle")

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        self._take_in()
        attributes = {
            "samples": self.samples,
            "tokens": self.tokens,
            "cycle_losses": self.cycle_losses.state_dict(),
            "full_batch": self.full_batch,
        }
        if self.trainer is not None and self.trainer.batch_control is not None:
            attributes["data_position"] = self.trainer.data_position()
        return {"args": {"control_cycle": self.control_cycle}, "attributes": attributes}

    @classmethod
    def saved_attributes(cls, state: Any) -> dict[str, Any]:
        """Return the attributes in the checkpoint that is being resumed; empty for a fresh start."""
        saved = state.stateful_callbacks.get(cls.__name__) if state.global_step else None
        saved = saved[0] if isinstance(saved, list) else saved
        return saved["attributes"] if saved else {}

    def count(self, samples: int, tokens: int, loss: Any) -> None:
        """Add one update: samples and tokens over all processes, its mean loss, which may stay on its device."""
        self.samples += samples
        self.tokens += tokens
        control = self.trainer.batch_control
        if control is None or not control.decides_at_cycles:  # nobody asks for the cycle's losses
            return
        if (optimizer := self.trainer.elra_optimizer) is not None and not optimizer.search_finished:
            return  # of a point that will be taken back
        self._waiting.append(loss)
        if len(self._waiting) >= LOSSES_ON_DEVICE:
            self._take_in()

    def _take_in(self) -> None:
        """Fetch the losses that wait, all at once, and add the finite ones to the cycle's."""
        losses, self._waiting = self._waiting, []
        for value in finite_values(losses):
            self.cycle_losses.add(value)

    def on_train_begin(self, args, state, control, **kwargs):  # noqa: D102
        saved = self.saved_attributes(state)
        self.samples, self.tokens = saved.get("samples", 0), saved.get("tokens", 0)
        self.samples_before, self.updates_before = self.samples, state.global_step
        losses, self._waiting = saved.get("cycle_losses"), []
        self.cycle_losses = CycleLosses() if losses is None else CycleLosses.from_state(losses)
        self.full_batch = saved.get("full_batch", 0)
        if (optimizer := self.trainer.elra_optimizer) is not None:
            self.trainer.remember_counts()
            updates, search = state.max_steps - state.global_step, optimizer.search_updates_left
            if 0 < updates <= search:
                logger.warning(
                    "%d updates are no more than the %d of the search for a learning rate, whose points are not meant "
                    "to be kept and are taken back at its end. Train longer, or pass --optim_args search=0.",
                    updates,
                    search,
                )
        state.stateful_callbacks[type(self).__name__] = self.state()
        self.trainer.begin_batches()
        self.trainer.begin_intervals()
        self._cycle.completed = 0
        self._advance(state)  # cycles that ended before a resume are over already

    def on_epoch_begin(self, args, state, control, **kwargs):  # noqa: D102
        self.trainer.begin_epoch()

    def on_step_end(self, args, state, control, **kwargs):  # noqa: D102
        # The true epoch first: it is in the cycle's logs; a decision then changes what is still to come.
        self.trainer.correct_state(self.samples, self.tokens)
        self.trainer.tell_new_batch()
        cycle_is_over = self._advance(state)
        self.trainer.sample_point(state.global_step, cycle_is_over)
        if cycle_is_over:
            self._take_in()
            optimizer = unwrap_optimizer(kwargs["optimizer"])
            if hasattr(optimizer, "end_cycle"):
                optimizer.end_cycle()
            statistics = self.cycle_losses.end_cycle()
            if statistics.count:
                self.trainer.finish_cycle(statistics.mean, statistics.std)
            self.trainer.correct_state(self.samples, self.tokens)
        self.trainer.time_intervals()

    def on_train_end(self, args, state, control, **kwargs):  # noqa: D102
        state.stateful_callbacks[type(self).__name__] = self.state()  # for Trainer.save_state
        self.trainer.end_at_the_mean()

    def _advance(self, state: Any) -> bool:
        return self._cycle.advance(
            samples=self.samples,
            tokens=self.tokens,
            epochs=self.trainer.true_epoch(state),
            updates=state.global_step,
        )


class DataProgressBar(ProgressCallback):
    """The stock progress bar, in samples or tokens where updates differ in size.

    Its total is that of the limit that ends the run: tokens, samples, updates, or the samples of all epochs.
    """

    training_bar: Any

    def __init__(self, trainer: Any) -> None:
        super().__init__()
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):  # noqa: D102
        self.unit = self.trainer.progress.unit(self.trainer.accumulation)
        if state.is_world_process_zero:
            scale = self.unit != "updates"
            self.training_bar = tqdm(total=self._total(), unit=f" {self.unit}", unit_scale=scale, dynamic_ncols=True)
        self._shown = 0

    def on_step_end(self, args, state, control, **kwargs):  # noqa: D102
        if self.training_bar is not None:
            done = getattr(self.trainer.progress, self.unit)
            self.training_bar.total = self._total()
            self.training_bar.update(done - self._shown)
            self._shown = done

    def _total(self) -> int:
        return int(self.trainer.progress.total(self.unit, self.trainer.accumulation))


class StopOnSignal(TrainerCallback):
    """On SIGINT (Ctrl-C) or SIGTERM finish the update, save a checkpoint and stop; a second signal stops at once.

    ``received`` is the signal's number, or None. The previous handlers come back when training ends. A signal to one of
    several processes stops them all after the same update; ``trainer`` is to be set for that.
    """

    trainer: Any = None

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def on_train_begin(self, args, state, control, **kwargs):  # noqa: D102
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)

    def on_step_end(self, args, state, control, **kwargs):  # noqa: D102
        if args.world_size > 1:
            told = torch.tensor([self.received or 0], device=args.device)
            self.received = int(self.trainer.accelerator.gather(told).max()) or None
        if self.received is not None:
            control.should_save = True
            control.should_training_stop = True
        return control

    def on_train_end(self, args, state, control, **kwargs):  # noqa: D102
        self.restore()

    def restore(self) -> None:
        """Put the previous signal handlers back."""
        while self._previous:
            signal.signal(*self._previous.popitem())

    def _handle(self, number: int, frame: Any) -> None:
        if self.received is not None:
            self.restore()
            raise KeyboardInterrupt
        self.received = number
        print(f"\n{signal.Signals(number).name}: saving after this update; once more to stop at once.", flush=True)


class ProgressLine(TrainerCallback):
    """Prints one line per log: updates, tokens or images, their speed, loss, what ELRA did, and the time left.

    It takes the place of the Trainer's own printing. Every entry of the log history gets ``seconds``, the time since
    the run's beginning, evaluations included and interruptions not. ``trainer`` is to be set once there is one.

    Args:
        unit (str): ``"tokens"`` or ``"images"``.
    """

    trainer: Any = None

    def __init__(self, unit: str = "tokens") -> None:
        self.unit = unit

    @property
    def total(self) -> int:
        """Tokens or images since the run's beginning."""
        seen = self.trainer.elra_callback
        return int(seen.tokens if self.unit == "tokens" else seen.samples)

    @property
    def done(self) -> int:
        """Tokens or images since training began or was resumed."""
        return self.total - self._first

    def on_train_begin(self, args, state, control, **kwargs):  # noqa: D102
        self._started = time.perf_counter()
        self._seconds_before = max((entry.get("seconds", 0.0) for entry in state.log_history), default=0.0)
        self._first_share, self._first = self._share(state), self.total

    def on_log(self, args, state, control, logs=None, **kwargs):  # noqa: D102
        seconds = max(time.perf_counter() - self._started, 1e-9)
        state.log_history[-1]["seconds"] = round(self._seconds_before + seconds, 3)
        if not state.is_world_process_zero or not logs or not ("loss" in logs or "eval_loss" in logs):
            return
        share = self._share(state)
        line = f"{share:>4.0%}  update {state.global_step:>6,}  {self.total:>11,} {self.unit}"
        if "eval_loss" in logs:
            line += f"  validation loss {logs['eval_loss']:.4f}"
            if "eval_accuracy" in logs:
                line += f"  accuracy {100 * logs['eval_accuracy']:.2f} %"
            print(line, flush=True)
            return
        line += f"  {self.done / seconds:>8,.0f} {self.unit}/s  loss {logs['loss']:.4f}"
        if "batch_size" in logs:
            line += f"  batch {logs['batch_size']:g}"
        line += f"  learning rate {logs['learning_rate']:.3g}"
        if "alpha" in logs:
            line += f"  step norm {logs['step_norm']:.3g}  restarts {logs['restarts']}"
        left = seconds / max(share - self._first_share, 1e-9) * (1 - share)
        print(f"{line}  left {int(left // 60)}:{int(left % 60):02}", flush=True)

    def _share(self, state: Any) -> float:
        if self.trainer.batch_control is not None:
            progress = self.trainer.progress  # an incomplete batch at the end is skipped: that is the end
            return float(progress.fraction()) if progress.updates_left(self.trainer.accumulation) else 1.0
        return float(state.global_step / max(state.max_steps, 1))
