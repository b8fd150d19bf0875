"""What a terminal shows while training goes on: ``--elra_display rich``, ``plain`` or ``none``.

Without the flag it is what the Trainer shows, see ``callbacks.py``, where the lines of ``plain`` are, too.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback

from hf_elra.report.text import number, sparkline
from hf_elra.trainer.callbacks import ProgressLine, suit_progress_bar

LOGS_SHOWN = 240
"""So many rates and losses are remembered for their sparklines."""
SPARKS = 30
BETWEEN_FRAMES = 0.25
"""Seconds."""


def suit_display(trainer: Any, display: str | None, in_data: bool) -> None:
    """Give a Trainer the callbacks of a display.

    Args:
        trainer (Trainer): with :class:`~hf_elra.trainer.mixin.ElraTrainerMixin`.
        display: ``"rich"`` (where output is no terminal, ``"plain"``), ``"plain"`` or ``"none"``; None
            for the Trainer's own.
        in_data: whether the Trainer's own bar is to count samples or tokens.
    """
    if display is None:
        suit_progress_bar(trainer, in_data)
        return
    if display == "rich" and not sys.stdout.isatty():
        display = "plain"
    ours = ProgressLine, RichDisplay
    found = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, ours)]
    wanted: type = RichDisplay if display == "rich" else ProgressLine
    shown = next((callback for callback in found if type(callback) is wanted), None)
    if shown is None and display != "none":
        shown = RichDisplay() if display == "rich" else ProgressLine(None)
        found.append(shown)
    for callback in found:
        callback.trainer = trainer
        callback.silent = callback is not shown or display == "none"
    rest = (PrinterCallback, ProgressCallback, *ours)
    kept = [callback for callback in trainer.callback_handler.callbacks if not isinstance(callback, rest)]
    trainer.callback_handler.callbacks[:] = [*kept, *found]


def close_display(trainer: Any) -> None:
    """Give the terminal back, however training has ended."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, RichDisplay):
            callback.close()


class RichDisplay(TrainerCallback):
    """A bar over samples, tokens or updates with their true total, and below it what the optimizer does.

    Its total is that of the limit that ends the run, however updates grow. ``trainer`` is to be set.
    """

    trainer: Any = None
    silent = False

    def __init__(self) -> None:
        self._live: Any = None
        self._begin()

    def _begin(self) -> None:
        self._rates: list[float] = []
        self._losses: list[float] = []
        self._batch: float | None = None
        self._restarts = 0
        self._validation = ""

    def on_train_begin(self, args, state, control, **kwargs):  # noqa: D102
        if self.silent or not state.is_world_process_zero:
            return
        from rich.live import Live
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self.close()
        self._begin()
        self._unit = "updates"
        if self.trainer.batch_control is not None:
            self._unit = self.trainer.progress.unit(self.trainer.elra.accounting.accumulation)
        self._bar = Progress(
            BarColumn(bar_width=SPARKS), TextColumn("{task.percentage:>3.0f}%"), TextColumn("{task.fields[counts]}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        )  # fmt: skip
        self._task = self._bar.add_task("", total=None, counts="")
        self._live = Live(console=self.console(), refresh_per_second=4)
        self._show(state)
        self._live.start()

    def console(self) -> Any:
        """Where it is shown."""
        from rich.console import Console

        return Console()

    def on_step_end(self, args, state, control, **kwargs):  # noqa: D102
        if self._live is None:
            return
        optimizer = self.trainer.elra_optimizer
        if getattr(optimizer, "last_update", None) is not None:  # known without waiting for the device
            self._rates = [*self._rates, optimizer.alpha][-LOGS_SHOWN:]
            self._restarts = optimizer.restarts
        if time.perf_counter() - self._shown > BETWEEN_FRAMES:
            self._show(state)

    def on_log(self, args, state, control, logs=None, **kwargs):  # noqa: D102
        if self._live is None or not logs:
            return
        if "loss" in logs:
            self._losses = [*self._losses, float(logs["loss"])][-LOGS_SHOWN:]
            if getattr(self.trainer.elra_optimizer, "last_update", None) is None:
                self._rates = [*self._rates, float(logs["learning_rate"])][-LOGS_SHOWN:]
                self._restarts = int(logs.get("restarts", 0))
        if "eval_loss" in logs:
            accuracy = f", accuracy {100 * logs['eval_accuracy']:.2f} %" if "eval_accuracy" in logs else ""
            self._validation = f"{number(logs['eval_loss'])}{accuracy} (update {state.global_step:,})"
        if "batch_size" in logs:
            self._batch = float(logs["batch_size"])
        self._show(state)

    def on_train_end(self, args, state, control, **kwargs):  # noqa: D102
        if self._live is not None:
            self._show(state)
        self.close()

    def close(self) -> None:
        """Leave what is shown, and give the terminal back."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def _show(self, state: Any) -> None:
        from rich.console import Group
        from rich.text import Text

        self._shown = time.perf_counter()
        if self._unit == "updates":
            done, total = state.global_step, state.max_steps
        else:
            done = getattr(self.trainer.progress, self._unit)
            total = int(self.trainer.progress.total(self._unit, self.trainer.elra.accounting.accumulation))
        counts = f"{done:,} of {total:,} {self._unit}"
        self._bar.update(self._task, completed=done, total=total, counts=counts)
        self._live.update(Group(self._bar, Text("\n".join(self.lines(state)))))

    def lines(self, state: Any) -> list[str]:
        """What stands below the bar."""
        optimizer = self.trainer.elra_optimizer
        lines = []
        if self._losses:
            lines.append(f"loss        {sparkline(self._losses, SPARKS):<{SPARKS}}  {number(self._losses[-1])}")
        if self._rates:
            name = "rate" if optimizer is None else "α"
            lines.append(f"{name:<12}{sparkline(self._rates, SPARKS, log=True):<{SPARKS}}  {number(self._rates[-1])}")
        facts = [f"update {state.global_step:,}"]
        if self._batch is not None:
            facts.append(f"batch {self._batch:g}")
        if optimizer is not None:
            facts.append(f"taken back {self._restarts:,}")
        lines.append("   ".join(facts))
        if self._validation:
            lines.append(f"validation loss {self._validation}")
        return lines
