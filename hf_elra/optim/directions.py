"""Directions: what an update steps along.

A direction turns the gradients of one update into tensors of the same shapes; the step is x ← x - α·direction. ELRA's
is the gradient itself. Step sizes and guards live elsewhere and do not care which direction is used.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Direction = Callable[[list[Tensor]], list[Tensor]]


def gradient_direction(gradients: list[Tensor]) -> list[Tensor]:
    """Steepest descent: the direction is the gradient (ELRA, eq. 2)."""
    return gradients
