"""Callbacks that a user sees: progress bar and lines, a clean stop on Ctrl-C. Counting is in ``accounting.py``."""

from __future__ import annotations

import signal
import time
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers.trainer_callback import ProgressCallback, TrainerCallback


class DataProgressBar(ProgressCallback):
    """The stock progress bar, in samples or tokens if updates differ in size.

    Its total is that of the limit that ends the run: tokens, samples, updates, or the samples of all epochs.
    """

    training_bar: Any

    def __init__(self, trainer: Any) -> None:
        super().__init__()
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):  # noqa: D102
        self.unit = self.trainer.progress.unit(self.trainer.elra.accounting.accumulation)
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
        return int(self.trainer.progress.total(self.unit, self.trainer.elra.accounting.accumulation))


def suit_progress_bar(trainer: Any, in_data: bool) -> None:
    """Replace the stock progress bar of a Trainer by one ``in_data``, or the other way round."""
    bars = trainer.callback_handler.callbacks
    for position, callback in enumerate(bars):
        if type(callback) is ProgressCallback and in_data:
            bars[position] = DataProgressBar(trainer)
        elif type(callback) is DataProgressBar and not in_data:
            bars[position] = ProgressCallback()


class StopOnSignal(TrainerCallback):
    """On SIGINT (Ctrl-C) or SIGTERM finish the update, save a checkpoint and stop; a second signal stops at once.

    ``received`` is the signal's number, or None. The previous handlers come back when training ends. A signal to one of
    several processes stops them all after the same update; ``trainer`` has to be set for that.
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
        """Return the tokens or images since the beginning of the run."""
        seen = self.trainer.elra_callback
        return int(seen.tokens if self.unit == "tokens" else seen.samples)

    @property
    def done(self) -> int:
        """Return the tokens or images since training began or was resumed."""
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
            return (
                float(progress.fraction()) if progress.updates_left(self.trainer.elra.accounting.accumulation) else 1.0
            )
        return float(state.global_step / max(state.max_steps, 1))
