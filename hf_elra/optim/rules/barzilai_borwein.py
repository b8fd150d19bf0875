"""ELRA's rule: the Barzilai-Borwein step of the line behind, times a correction for noise (ELRA, 2024, eq. 4)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

from hf_elra.optim.rules import Measurement, Rule


def bb1(measured: Measurement) -> float:
    """The long step ⟨s,s⟩/⟨s,y⟩ over the step that was taken: eq. (4) without κ; infinite on negative curvature."""
    slope = cast(float, measured.previous_slope)
    curvature = slope - measured.current_slope
    return slope / curvature if curvature > 0 else math.inf


def bb2(measured: Measurement) -> float:
    """The short step ⟨s,y⟩/⟨y,y⟩ over the step that was taken; infinite on negative curvature.

    Only for u = G, where ⟨y,y⟩ = ‖G_t‖² - 2⟨G_t,G_{t-1}⟩ + ‖G_{t-1}‖² needs no further product. Far better than bb1 on
    noise-free problems; on mini-batches ‖G_t‖² counts the noise and the step collapses.
    """
    slope = cast(float, measured.previous_slope)
    curvature = slope - measured.current_slope
    change = measured.gradient_norm_squared - 2 * measured.current_slope + slope
    return curvature / change if curvature > 0 and change > 0 else math.inf


FORMULAS: dict[str, Callable[[Measurement], float]] = {"bb1": bb1, "bb2": bb2}


class BarzilaiBorwein(Rule):
    """α_t = α_{t-1} · (best step of the last line / step that was taken) · κ.

    Args:
        formula: key of :data:`FORMULAS`.
        noise_correction: 0.15 in κ = 1 + 0.15/(1 + α²), with the step that was really taken for α.
    """

    def __init__(self, formula: str, noise_correction: float) -> None:
        super().__init__()
        self.ratio, self.noise_correction = FORMULAS[formula], noise_correction

    def propose(self, measured: Measurement, alpha: float) -> float:
        """Eq. (4). The ratio is not taken of the step: where noise dominates it is near 1 whatever a scheduler does."""
        if not cast(float, measured.previous_slope) > 0:  # the last gradient was zero: it says nothing
            return alpha
        correction = 1 + self.noise_correction / (1 + measured.step_size * measured.step_size)
        return alpha * self.ratio(measured) * correction
