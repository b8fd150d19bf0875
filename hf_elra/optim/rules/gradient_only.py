"""GOLS-I: a line search by the sign of the slope alone, each of a batch of its own (Kafka and Wilke, 2019)."""

from __future__ import annotations

from typing import Any

from hf_elra.optim.rules import Measurement, Rule

SMALLEST, LARGEST = 1e-8, 1e7
"""Bounds of α; it is at most 1/‖u‖ besides."""
TRIES, GROWS, SHRINKS = 0, 1, 2


class GradientOnly(Rule):
    """Look for the α at which the slope along the line turns from falling to rising.

    At the end of a step the batch of the next update tells the slope there. Rising, but by less than the share ``c2``
    of the slope at the beginning: the step stands. Rising more: α is divided by η until the slope falls. Falling: α
    is multiplied by η until it rises. The gradient at the point where the search ends gives the next line, whose search
    begins with the same α. Every update is one try.

    Args:
        eta: η.
        c2: of the first try.
    """

    looks_ahead = True  # α has to fit the new line

    def __init__(self, eta: float, c2: float) -> None:
        super().__init__()
        self.eta, self.c2 = eta, c2

    def new_state(self) -> dict[str, Any]:
        """Whether α grows or shrinks along this line."""
        return {"phase": TRIES}

    def propose(self, measured: Measurement, alpha: float) -> float:
        """The same α for a new line."""
        self.state["phase"] = TRIES
        return max(min(alpha, self._largest(measured.direction_norm)), SMALLEST)

    def again(self, measured: Measurement, alpha: float) -> float | None:
        """α of the next try; None where the search is over."""
        before, now = measured.previous_slope, measured.current_slope
        assert before is not None
        falls = now > 0
        if self.state["phase"] == TRIES:
            if not falls and -now < self.c2 * abs(before):
                return None
            self.state["phase"] = GROWS if falls else SHRINKS
        elif falls != (self.state["phase"] == GROWS):
            return None
        further = alpha * self.eta if self.state["phase"] == GROWS else alpha / self.eta
        return further if SMALLEST <= further <= self._largest(measured.previous_norm) else None

    @staticmethod
    def _largest(norm: float) -> float:
        return min(1 / norm, LARGEST) if norm > 0 else LARGEST
