"""Mean and standard deviation of a stream of losses, in plain Python.

Losses go in one at a time, and hardly anything is stored. :class:`LossStatistics` takes every loss as it is, while
:class:`CycleLosses` lets no single one dominate. What the numbers decide (restarts, batch sizes) does not live here.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import Any

ENOUGH_LOSSES = 10
"""From this many losses on, their falling average says what is ordinary; before that, their median does."""
RECENT_LOSSES = 50
"""How many losses the falling average looks back over."""
OUTLIER_SIGMA = 5.0
"""A loss counts as at most this many standard deviations above what is ordinary, as in ELRA's soft restarts."""
LOSSES_OF_A_LEVEL = 20
"""Losses in a block of :class:`LossLevels`."""
RISE_SIGMA = 5.0
"""How many standard errors a block has to be above the lowest one."""
BLOCKS_IN_A_ROW = 3
"""High blocks in a row that count as a rise: 60 updates, as samplers that group by length sort 50 batches at once."""
LEAST_RISE = 1e-3
"""The least rise that counts, as a share of the level, so that a level that persists is followed in the end."""


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
    """Mean and variance of a falling average: of all losses at first, then of about the last ``RECENT_LOSSES``."""

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
        """The most that a loss counts as."""
        return _highest(self.mean, math.sqrt(self.variance))


@dataclass
class LossLevels:
    """Notices that losses are higher again than they were, by comparing blocks of losses.

    A small rise does not count. The mean of a block has to be above the lowest one by ``RISE_SIGMA`` standard errors,
    and more than half of the way from there to the first block has to be lost again. This must happen in
    ``BLOCKS_IN_A_ROW`` blocks, because losses also rise and fall where rows are sorted by their length.

    Attributes:
        first, lowest: statistics of the first block, and of the one with the lowest mean.
        block: statistics of the running block.
        high: how many blocks in a row were that high.
        risen: the last of these blocks once there are enough; nothing more is looked for then.
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
    """Mean and standard deviation of the losses of a control cycle; no single outlier dominates them.

    A loss that is far above the recent ones counts as at most ``OUTLIER_SIGMA`` deviations above them. A loss
    of 1000 among hundreds near 2 says nothing about the batch size, though it makes the mean rise and σ larger than the
    mean. A higher level that persists is followed within some tens of losses.

    Attributes:
        cycle: statistics of the running cycle.
        recent: falling average over all cycles so far.
        first: the first ``ENOUGH_LOSSES`` losses of a run, unchanged.
        unsettled: how many of them belong to the running cycle and are not in ``cycle`` yet.
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
        """Return the statistics of the running cycle."""
        found = LossStatistics(self.cycle.count, self.cycle.mean, self.cycle.squared_deviations)
        if self.unsettled:
            for loss in self._limited_first()[-self.unsettled :]:
                found.add(loss)
        return found

    def end_cycle(self) -> LossStatistics:
        """Return the statistics of the cycle, and begin the next one."""
        found, self.cycle, self.unsettled = self.so_far(), LossStatistics(), 0
        return found

    def _limited_first(self) -> list[float]:
        middle = statistics.median(self.first)
        deviation = 1.4826 * statistics.median(abs(loss - middle) for loss in self.first)  # σ of a normal distribution
        return [min(loss, _highest(middle, deviation)) for loss in self.first]

    def state_dict(self) -> dict[str, Any]:
        """Return everything, as plain JSON values."""
        return {
            "cycle": [self.cycle.count, self.cycle.mean, self.cycle.squared_deviations],
            "recent": [self.recent.count, self.recent.mean, self.recent.variance],
            "first": list(self.first),
            "unsettled": self.unsettled,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> CycleLosses:
        """Continue from what :meth:`state_dict` returned."""
        return cls(
            LossStatistics(*state["cycle"]), RecentLosses(*state["recent"]), list(state["first"]), state["unsettled"]
        )


def _highest(ordinary: float, std: float) -> float:
    rise = max(OUTLIER_SIGMA * std, LEAST_RISE * abs(ordinary))
    return ordinary + rise if rise > 0 else math.inf
