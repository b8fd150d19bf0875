"""NTLR's rule: a damped Newton step in α (Retsinas et al., eq. 8)."""

from __future__ import annotations

from hf_elra.optim.rules import Measurement, Rule

MOST = 100.0
"""Largest growth of α in one step of Newton's (section 2)."""


class Newton(Rule):
    """α ← α·(1 + γ·d/(n - d)), n and d the slopes along u before and after the step.

    A denominator that is not positive keeps α: there is no minimum to go to. As d/(n - d) > -1 for n > 0, the factor is
    above 1 - γ, so that α stays positive; it is at most :data:`MOST`.

    Args:
        gamma: γ in (0, 1]; 1 goes to the minimum of the parabola.
    """

    def __init__(self, gamma: float) -> None:
        super().__init__()
        self.gamma = gamma

    def propose(self, measured: Measurement, alpha: float) -> float:
        """Eq. (8)."""
        slope = measured.previous_slope
        if slope is None or slope <= 0:
            return alpha
        curvature = slope - measured.current_slope
        if curvature <= 0:
            return alpha
        return alpha * min(1 + self.gamma * measured.current_slope / curvature, MOST)
