"""Mean and standard deviation of a stream of losses, in plain Python.

Numbers go in one at a time and next to nothing is stored. :class:`LossStatistics` takes every loss as it is, whereas
:class:`CycleLosses` lets no single one dominate. What the numbers decide (restarts, batch sizes) does not live here.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import Any

ENOUGH_LOSSES = 10
"""From so many losses on their falling average says what is ordinary; before that, their median."""
RECENT_LOSSES = 50
"""Losses over which the falling average looks back."""
OUTLIER_SIGMA = 5.0
"""A loss counts as at most so many standard deviations above what is ordinary, as in ELRA's soft restarts."""
LOSSES_OF_A_LEVEL = 20
"""Losses in a block of :class:`LossLevels`."""
RISE_SIGMA = 5.0
"""Standard errors by which a block has to be above the lowest one."""
BLOCKS_IN_A_ROW = 3
"""So many such blocks are 60 updates; the stock sampler that groups rows by length sorts 50 batches at a time."""
LEAST_RISE = 1e-3
"""... or this share of it, where losses hardly vary: a level that persists shall be followed."""


@dataclass
class LossStatistics:
    """Running mean and standard deviation (population, divisor n) by Welford's update, stable for any offset."""

    count: int = 0
    mean: float = 0.0
    squared_deviations: float = 0.0

    def add(self, loss: float) -> None:
        """Take one finite loss into account."""
        self.count += 1
        delta = loss - self.mean
        self.mean += delta / self.count
        self.squared_deviations += delta * (loss - self.mean)

    @property
    def std(self) -> float:
        """Standard deviation of what was added; 0.0 while fewer than two losses are known."""
        return math.sqrt(self.squared_deviations / self.count) if self.count > 1 else 0.0


@dataclass
class RecentLosses:
    """Mean and variance of a falling average of losses: of all, then of about the last ``RECENT_LOSSES``."""

    count: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def add(self, loss: float) -> None:
        """Take one finite loss into account."""
        self.count = min(self.count + 1, RECENT_LOSSES)
        deviation = loss - self.mean
        self.variance = (1 - 1 / self.count) * (self.variance + deviation * deviation / self.count)
        self.mean += deviation / self.count

    @property
    def highest(self) -> float:
        """What a higher loss counts as."""
        return _highest(self.mean, math.sqrt(self.variance))


@dataclass
class LossLevels:
    """Notices that losses are higher again than they were, by blocks of so many of them.

    Not every rise is worth a word: the mean of a block has to be above the lowest one by ``RISE_SIGMA`` standard
    errors, and more than half of the way from there to the first block has to be lost again; and this in
    ``BLOCKS_IN_A_ROW``, as rows that are sorted by their length, for one, make losses rise and fall.

    Attributes:
        first, lowest: of the first block, and of that with the lowest mean.
        block: of the running block.
        high: how many blocks in a row were so high.
        risen: the last one of these, once they are enough; nothing more is looked for then.
    """

    first: LossStatistics | None = None
    lowest: LossStatistics | None = None
    block: LossStatistics = field(default_factory=LossStatistics)
    high: int = 0
    risen: LossStatistics | None = None

    def add(self, loss: float) -> None:
        """Take one finite loss into account."""
        self.block.add(loss)
        if self.block.count < LOSSES_OF_A_LEVEL or self.risen is not None:
            return
        last, self.block = self.block, LossStatistics()
        if self.first is None or self.lowest is None:
            self.first = self.lowest = last
        rise, error = last.mean - self.lowest.mean, math.hypot(last.std, self.lowest.std) / math.sqrt(last.count - 1)
        least = max(RISE_SIGMA * error, (self.first.mean - self.lowest.mean) / 2, LEAST_RISE * abs(last.mean))
        self.high = self.high + 1 if rise > least else 0
        if self.high == BLOCKS_IN_A_ROW:
            self.risen = last
        if rise < 0:
            self.lowest = last


@dataclass
class CycleLosses:
    """Mean and standard deviation of the losses of a control cycle, in which no single outlier dominates.

    A loss that is far above the recent ones counts as at most ``OUTLIER_SIGMA`` deviations above them. One of 1000
    among hundreds near 2 says nothing about the batch size, though it makes the mean rise and σ larger than the mean. A
    higher level that persists is followed within some tens of losses.

    Attributes:
        cycle: of the running cycle.
        recent: of all cycles so far.
        first: the first ``ENOUGH_LOSSES`` losses of a run, as they are.
        unsettled: how many of these belong to the running cycle and are not in ``cycle`` yet.
    """

    cycle: LossStatistics = field(default_factory=LossStatistics)
    recent: RecentLosses = field(default_factory=RecentLosses)
    first: list[float] = field(default_factory=list)
    unsettled: int = 0

    def add(self, loss: float) -> None:
        """Take one finite loss into account."""
        if self.recent.count:
            loss = min(loss, self.recent.highest)
            self.recent.add(loss)
            self.cycle.add(loss)
            return
        self.first.append(loss)
        self.unsettled += 1
        if len(self.first) == ENOUGH_LOSSES:
            self.cycle = self.so_far()
            self.unsettled = 0
            for ordinary in self._limited_first():
                self.recent.add(ordinary)

    def so_far(self) -> LossStatistics:
        """Statistics of the running cycle."""
        found = LossStatistics(self.cycle.count, self.cycle.mean, self.cycle.squared_deviations)
        if self.unsettled:
            for loss in self._limited_first()[-self.unsettled :]:
                found.add(loss)
        return found

    def end_cycle(self) -> LossStatistics:
        """Return the statistics of the cycle, and begin another one."""
        found, self.cycle, self.unsettled = self.so_far(), LossStatistics(), 0
        return found

    def _limited_first(self) -> list[float]:
        middle = statistics.median(self.first)
        deviation = 1.4826 * statistics.median(abs(loss - middle) for loss in self.first)  # σ of a normal distribution
        return [min(loss, _highest(middle, deviation)) for loss in self.first]

    def state_dict(self) -> dict[str, Any]:
        """Everything, as plain JSON values."""
        return {
            "cycle": [self.cycle.count, self.cycle.mean, self.cycle.squared_deviations],
            "recent": [self.recent.count, self.recent.mean, self.recent.variance],
            "first": list(self.first),
            "unsettled": self.unsettled,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> CycleLosses:
        """Go on from what :meth:`state_dict` returned."""
        return cls(
            LossStatistics(*state["cycle"]), RecentLosses(*state["recent"]), list(state["first"]), state["unsettled"]
        )


def _highest(ordinary: float, std: float) -> float:
    rise = max(OUTLIER_SIGMA * std, LEAST_RISE * abs(ordinary))
    return ordinary + rise if rise > 0 else math.inf
