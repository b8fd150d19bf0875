"""How noisy gradients are: the batch size at which noise and signal weigh the same, in plain Python.

The Trainer measures the squared norms that go in (``trainer/micro_batches.py``). What the noise scale decides about
the batch is in ``batch_size.py``.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

MEMORY = 0.98
"""Share of an average that is kept at an update, so that it reaches over about 50 updates."""


@dataclass
class NoiseScale:
    """The simple noise scale tr(Σ)/‖G‖², a number of samples, from squared norms of gradients over two batch sizes.

    E‖g_B‖² = ‖G‖² + tr(Σ)/B for the mean gradient g_B of B samples. Two sizes give both unknowns, without bias. Both
    are averaged over updates, since the ratio of single estimates is far too noisy.

    Attributes:
        signal: average of the estimates of ‖G‖².
        noise: average of the estimates of tr(Σ), the trace of the covariance of one sample's gradient.
        count: updates that were measured.

    Source: S. McCandlish et al., "An Empirical Model of Large-Batch Training" (2018), appendix A.1.
    """

    signal: float = 0.0
    noise: float = 0.0
    count: int = 0

    def add(self, small: float, small_square: float, big: float, big_square: float) -> None:
        """Add the numbers of one update; numbers that are not finite are left out.

        Args:
            small, big: samples of either batch; small < big.
            small_square, big_square: ‖g‖² of their mean gradients.
        """
        signal = (big * big_square - small * small_square) / (big - small)
        noise = (small_square - big_square) / (1 / small - 1 / big)
        if not (math.isfinite(signal) and math.isfinite(noise)):
            return
        self.signal = MEMORY * self.signal + (1 - MEMORY) * signal
        self.noise = MEMORY * self.noise + (1 - MEMORY) * noise
        self.count += 1

    @property
    def value(self) -> float | None:
        """Return the noise scale in samples: infinite if the signal is lost in the noise, None before any update."""
        if self.count == 0:
            return None
        if self.signal <= 0:
            return math.inf
        return max(self.noise, 0.0) / self.signal

    def state_dict(self) -> dict[str, Any]:
        """Return everything, as plain JSON values."""
        return asdict(self)
