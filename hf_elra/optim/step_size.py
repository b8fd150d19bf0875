"""Step-size rules: what two neighbouring gradients say about the best step along the last direction.

A rule is a function from a :class:`LineMeasurement` to the ratio of the line's best step to the step that was taken.
It knows no bounds and no noise correction (see ``guards.py`` and ``elra.py``). To add a rule, write the function and
name it in ``STEP_RULES``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple


class LineMeasurement(NamedTuple):
    """Scalar products measured at both ends of the last step x_t = x_{t-1} - α u.

    Attributes:
        previous_slope: ⟨G_{t-1}, u⟩, > 0. For ELRA u = G_{t-1}, so this is ‖G_{t-1}‖².
        current_slope: ⟨G_t, u⟩.
        gradient_norm_squared: ‖G_t‖².
    """

    previous_slope: float
    current_slope: float
    gradient_norm_squared: float


StepRule = Callable[[LineMeasurement], float]


def bb1(line: LineMeasurement) -> float:
    """Long Barzilai-Borwein step ⟨s,s⟩/⟨s,y⟩, which is ELRA's eq. (4) without κ; infinite on negative curvature."""
    curvature = line.previous_slope - line.current_slope
    return line.previous_slope / curvature if curvature > 0 else math.inf


def bb2(line: LineMeasurement) -> float:
    """Short Barzilai-Borwein step ⟨s,y⟩/⟨y,y⟩; infinite on negative curvature.

    Only for u = G, where ⟨y,y⟩ = ‖G_t‖² - 2⟨G_t,G_{t-1}⟩ + ‖G_{t-1}‖² needs no further product. Far better than bb1 on
    noise-free problems; on mini-batches ‖G_t‖² counts the noise and the step collapses.
    """
    curvature = line.previous_slope - line.current_slope
    change = line.gradient_norm_squared - 2 * line.current_slope + line.previous_slope
    return curvature / change if curvature > 0 and change > 0 else math.inf


STEP_RULES: dict[str, StepRule] = {"bb1": bb1, "bb2": bb2}
