"""LABPAL: a parabola through losses of many samples, once in many updates (Mutschler and Zell, 2021, algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

from hf_elra.optim.rules import Measurement, Rule

POINTS = (1e-4, 1e-2)
"""Distances along the unit direction at which the loss is taken, beside 0 (section 2.2)."""

SOON = 0.05
"""Where nothing was ever found, after this share of the updates between measurements the next one is made."""


class LargeBatchParabola(Rule):
    """Every so many updates, the step to the minimum of a parabola through three losses, times ω; α is kept in between.

    Where the parabola has no minimum ahead, what was measured last stays; where nothing was, α does, and it is measured
    again soon.

    Args:
        batches: of how many of the next updates the losses are.
        every: updates from one measurement to the next.
        adaptation: ω.
        max_step: the longest step to a minimum.
        keeps_length: the length of the step is kept in between, not α (LABPAL&NSGD).
        halves_curvature: as the released code does, which doubles the step.
    """

    looks_ahead = True

    def __init__(
        self,
        batches: int,
        every: int,
        adaptation: float,
        max_step: float,
        *,
        keeps_length: bool,
        halves_curvature: bool = False,
    ) -> None:
        super().__init__()
        self.batches, self.every, self.adaptation, self.max_step = batches, every, adaptation, max_step
        self.keeps_length, self.halves_curvature = keeps_length, halves_curvature

    def new_state(self) -> dict[str, Any]:
        """Updates since the last measurement, None where there was none; the length that it found, likewise."""
        return {"updates": None, "length": None}

    def propose(self, measured: Measurement, alpha: float) -> float:
        """Measure where it is time to."""
        state, norm = self.state, measured.direction_norm
        if norm == 0:
            return alpha
        if state["updates"] is None or state["updates"] >= self.every:
            length = self._measure(cast(Callable[..., float], measured.line_loss), norm)
            if length is not None:
                state["length"], alpha = length, length / norm
            waits = 1.0 if length is not None or state["length"] is not None else SOON
            state["updates"] = self.every - math.ceil(waits * self.every)
        state["updates"] += 1
        return state["length"] / norm if self.keeps_length and state["length"] is not None else alpha

    def _measure(self, loss_at: Callable[..., float], norm: float) -> float | None:
        """The length of the step; None where the parabola has no minimum ahead."""
        near, far = POINTS
        here, first, second = (loss_at(s / norm, batches=self.batches) for s in (0.0, near, far))
        rise, higher = (first - here) / near, (second - here) / far
        curvature = (higher - rise) / (far - near)
        slope = rise - curvature * near
        if not (math.isfinite(curvature) and curvature > 0 > slope):
            return None
        length = -slope / (2 * curvature) * (2 if self.halves_curvature else 1)
        return self.adaptation * min(length, self.max_step)
