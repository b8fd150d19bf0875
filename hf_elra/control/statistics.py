"""Mean and standard deviation of a stream of losses, in plain Python.

Numbers go in one at a time and nothing is stored but count, mean and sum of squared deviations. What the numbers
decide (restarts, batch sizes) does not live here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


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
