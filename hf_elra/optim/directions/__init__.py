"""Directions: what an update steps along, x ← x - α·u.

One file a direction. A direction turns the gradients of an update into tensors of the same shapes; what it remembers
of a parameter lies in the optimizer's state of it. How far a step goes is not its business (``rules/``, ``guards.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

Groups = Sequence[dict[str, Any]]


class Direction:
    """Steepest descent, u = G (ELRA, eq. 2); the base of all directions."""

    is_gradient = True
    """Whether u is G itself, so that its products are known already."""

    def apply(
        self, groups: Groups, params: list[list[Tensor]], gradients: list[list[Tensor]], state: Any
    ) -> list[list[Tensor]]:
        """Return u_t; gradients are not changed.

        Args:
            groups: the optimizer's parameter groups.
            params, gradients: group by group, the parameters that have a gradient, and these gradients.
            state: the optimizer's state: of every parameter a dict.
        """
        return gradients

    def sized(self, groups: Groups, params: list[list[Tensor]]) -> list[list[Tensor]]:
        """The weights whose size limits a step, in lots: by default all that have a gradient."""
        return params
