"""PAL: the minimum of a parabola along the line, from two losses and one slope of the batch (Mutschler, Zell, 2020)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

from hf_elra.optim.rules import Measurement, Rule


class LineParabola(Rule):
    """With the slope b < 0 along the unit direction and a = (f(μ) - f(0) - b·μ)/μ², a step of length -ω·b/(2a).

    Where a ≤ 0 there is no minimum, and the step has length μ. Where b ≥ 0 the line goes up, and there is no step.

    Args:
        measuring_step: μ.
        adaptation: ω; above 1 as the loss of all data has its minimum further away than that of the batch.
        max_step: the longest step.
    """

    looks_ahead = True

    def __init__(self, measuring_step: float, adaptation: float, max_step: float) -> None:
        super().__init__()
        self.measuring_step, self.adaptation, self.max_step = measuring_step, adaptation, max_step

    def propose(self, measured: Measurement, alpha: float) -> float:
        """Look once along the line."""
        norm, step = measured.direction_norm, self.measuring_step
        if norm == 0:
            return alpha
        b = -measured.slope / norm
        if b >= 0:
            return 0.0
        loss_at = cast(Callable[[float], float], measured.line_loss)
        loss = loss_at(0.0) if measured.loss is None else measured.loss
        a = (loss_at(step / norm) - loss - b * step) / step**2
        if not math.isfinite(a):
            return 0.0
        length = -self.adaptation * b / (2 * a) if a > 0 else step
        return min(length, self.max_step) / norm
