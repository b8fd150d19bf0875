"""Callbacks of a training run: what was seen so far, control cycles, and a clean stop on Ctrl-C.

Callbacks here count and trigger; what a cycle's end decides is the optimizer's and the controller's business.
"""

from __future__ import annotations

import signal
from typing import Any

from transformers.trainer_callback import ExportableState, TrainerCallback

from hf_elra.control import ControlCycle


def unwrap_optimizer(optimizer: Any) -> Any:
    """Return the optimizer inside Accelerate's wrappers."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


class ElraCallback(TrainerCallback, ExportableState):
    """Counts samples and tokens over all processes and tells the optimizer when a control cycle is over.

    Its counts are part of every checkpoint (``trainer_state.json``, under ``stateful_callbacks``) and continue on
    resume.

    Args:
        control_cycle (str): length of a cycle, e.g. ``"1ep"``.
    """

    def __init__(self, control_cycle: str = "1ep") -> None:
        self.control_cycle = control_cycle
        self.samples = 0
        self.tokens = 0
        self._cycle = ControlCycle.parse(control_cycle, "elra_control_cycle")

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "args": {"control_cycle": self.control_cycle},
            "attributes": {"samples": self.samples, "tokens": self.tokens},
        }

    def count(self, samples: int, tokens: int) -> None:
        """Add one update's samples and tokens, summed over all processes."""
        self.samples += samples
        self.tokens += tokens

    def on_train_begin(self, args, state, control, **kwargs):  # noqa: D102
        saved = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        saved = saved[0] if isinstance(saved, list) else saved
        attributes = saved["attributes"] if saved else {"samples": 0, "tokens": 0}
        self.samples, self.tokens = attributes["samples"], attributes["tokens"]
        state.stateful_callbacks[type(self).__name__] = self.state()
        self._cycle.completed = 0
        self._advance(state)  # cycles that ended before a resume are over already

    def on_step_end(self, args, state, control, **kwargs):  # noqa: D102
        optimizer = unwrap_optimizer(kwargs["optimizer"])
        if self._advance(state) and hasattr(optimizer, "end_cycle"):
            optimizer.end_cycle()

    def _advance(self, state: Any) -> bool:
        return self._cycle.advance(
            samples=self.samples, tokens=self.tokens, epochs=state.epoch or 0.0, updates=state.global_step
        )


class StopOnSignal(TrainerCallback):
    """On SIGINT (Ctrl-C) or SIGTERM finish the update, save a checkpoint and stop; a second signal stops at once.

    ``received`` is the signal's number, or None. The previous handlers come back when training ends.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def on_train_begin(self, args, state, control, **kwargs):  # noqa: D102
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)

    def on_step_end(self, args, state, control, **kwargs):  # noqa: D102
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
