"""Guards: what keeps a step size within reason, whatever rule proposed it.

:class:`StepGuards` bounds α and the length of the step; :class:`RestartGuard` decides from the losses whether the last
step has to be taken back, and how much shorter the next try is. Rules live in ``step_size.py``; tensors are touched
only in ``elra.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from hf_elra.control.statistics import LossStatistics

NON_FINITE_BACKOFF = 0.1
"""Factor on α when loss or gradient is not finite: no parabola can be laid through infinity."""

MAX_CONSECUTIVE_RESTARTS = 20
"""After so many restarts in a row the step cannot be the cause (each at least halves it): the point is accepted, and
the limit that calls its loss too high is lifted. Beyond the paper: after a first batch of zeros, with its low loss,
nearly every update would be taken back."""


ENOUGH_LOSSES = 10
"""From so many losses on, their own mean and σ may raise the limit of the first cycle. Beyond the paper: losses of
small batches often differ by more than a tenth, and 1.1·f_0 alone would take back good steps for a whole epoch."""


@dataclass(frozen=True)
class StepGuards:
    """Bounds on α and on the step norm α‖u‖ (ELRA, sections 3.1 and 3.5).

    Args:
        max_growth: largest α_t/α_{t-1}; γ_max in the paper.
        lr_bounds: smallest and largest α.
        min_step_norm: floor under α‖u‖; the α warm-up for language models. 0 for none.
        max_step_norm: crop above α‖u‖; c in section 3.5. None for none.
    """

    max_growth: float
    lr_bounds: tuple[float, float]
    min_step_norm: float
    max_step_norm: float | None

    def apply(self, alpha: float, previous_alpha: float, direction_norm: float) -> float:
        """Return the α that may be used where a rule proposes ``alpha`` along a direction of norm ``direction_norm``.

        In this order: growth, floor, bounds, crop. So a vanishing gradient cannot drive the floor past the upper bound,
        and a huge one is cropped even below the lower bound.
        """
        alpha = min(alpha, self.max_growth * previous_alpha)
        if self.min_step_norm > 0 and direction_norm > 0:
            alpha = max(alpha, self.min_step_norm / direction_norm)
        low, high = self.lr_bounds
        alpha = min(max(alpha, low), high)
        if self.max_step_norm is not None and alpha * direction_norm > self.max_step_norm:
            alpha = self.max_step_norm / direction_norm
        return alpha


def new_restart_memory(window: int | None = None) -> dict[str, Any]:
    """The plain, serialisable memory of a :class:`RestartGuard` with this ``window``.

    Of one structure from the first update to the last: torch's distributed checkpoints merge a saved state leaf by leaf
    into that of a new optimizer.
    """
    losses = None if window is None else [None] * window
    return {"initial_loss": None, "window": losses, "cycle": [0, 0.0, 0.0], "last_cycle": [None, None]}


@dataclass(frozen=True)
class RestartGuard:
    """Soft restarts (ELRA, section 3.2): is a loss too high, and how much smaller must the step be?

    The guard keeps nothing; what it must remember is in the ``memory`` that ``new_restart_memory`` makes and that the
    optimizer stores with its state.

    Args:
        sigma: a loss above mean + ``sigma``·σ is too high.
        initial_ratio: while no mean is known, a loss above f_0 + (ratio - 1)·|f_0| is (1.1·f_0 for f_0 > 0). None drops
            this first rule, for pre-trained starts. At f_0 = 0 nothing is known of the scale and the rule is silent.
            ``ENOUGH_LOSSES`` losses may raise this limit.
        window: mean and σ over the last ``window`` losses, from the second on; None: over the last complete cycle.
        formula: ``"derived"`` or ``"paper"``, see :meth:`shrink`.
    """

    sigma: float
    initial_ratio: float | None
    window: int | None
    formula: str

    def highest_loss(self, memory: dict[str, Any]) -> float:
        """Return the loss above which the last step is taken back; infinite while nothing is known."""
        if self.window is not None:
            statistics = LossStatistics()
            for loss in filter(lambda loss: loss is not None, memory["window"]):
                statistics.add(loss)
            if statistics.count > 1:
                return statistics.mean + self.sigma * statistics.std
        mean, std = memory["last_cycle"]
        if self.window is None and mean is not None:
            return mean + self.sigma * std
        initial = memory["initial_loss"]
        if self.initial_ratio is None or initial is None or initial == 0:
            return math.inf
        limit = initial + (self.initial_ratio - 1) * abs(initial)
        running = LossStatistics(*memory["cycle"])
        if self.window is None and running.count >= ENOUGH_LOSSES:
            limit = max(limit, running.mean + self.sigma * running.std)
        return limit

    def takes_back(self, memory: dict[str, Any], loss: float, *, can: bool, in_a_row: int) -> bool:
        """Take a finite loss into the statistics; return whether the step that led to it must be taken back.

        Args:
            memory: of this guard.
            loss: where the last step led.
            can: whether there is a step to take back.
            in_a_row: how many restarts came just before. After ``MAX_CONSECUTIVE_RESTARTS`` the loss is taken for as
                good as any from now on: the step is not what made it high.
        """
        highest = self.highest_loss(memory)
        too_high = can and loss > highest
        if not too_high or in_a_row < MAX_CONSECUTIVE_RESTARTS:
            self._record(memory, min(loss, highest))
            return too_high
        self._record(memory, loss)
        if self.window is None:  # otherwise it is in the window
            if memory["last_cycle"][0] is not None:
                memory["last_cycle"][0] += loss - highest
            else:
                memory["initial_loss"] = loss
        return False

    @staticmethod
    def end_cycle(memory: dict[str, Any]) -> None:
        """Close a cycle: its mean and σ judge the next one. A cycle of fewer than two losses goes on."""
        statistics = LossStatistics(*memory["cycle"])
        if statistics.count > 1:
            memory["last_cycle"] = [statistics.mean, statistics.std]
            memory["cycle"] = [0, 0.0, 0.0]

    def shrink(self, step_size: float, previous_slope: float, loss: float, previous_loss: float | None) -> float:
        """Return the factor on α for the next try from x_{t-1}, at most ½.

        The parabola through f_{t-1}, its slope and f_t has its minimum at ½·α²n/(Δf + αn), n = ⟨G_{t-1},u_{t-1}⟩.
        The paper prints ‖G‖ for n = ‖G‖², whose terms do not have the same unit; ``formula="paper"`` keeps that.
        """
        slope = previous_slope if self.formula == "derived" else math.sqrt(previous_slope)
        decrease = step_size * slope
        if previous_loss is None or decrease <= 0:
            return 0.5
        return 0.5 * decrease / (max(loss - previous_loss, 0.0) + decrease)

    def _record(self, memory: dict[str, Any], loss: float) -> None:
        if memory["initial_loss"] is None:
            memory["initial_loss"] = loss
        if self.window is not None:
            memory["window"] = [*memory["window"], loss][-self.window :]
        else:
            statistics = LossStatistics(*memory["cycle"])
            statistics.add(loss)
            memory["cycle"] = [statistics.count, statistics.mean, statistics.squared_deviations]
