"""Step-size rules: what two neighbouring gradients say about the best step along the last direction.

ELRA's rules are functions from a :class:`LineMeasurement` to the ratio of the line's best step to the step that was
taken; to add one, write the function and name it in ``STEP_RULES``. That of ``elra_spectral``, :class:`KestenGain`,
remembers what it saw before. None of them knows bounds or corrects for noise (see ``guards.py`` and ``elra.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from hf_elra.control.statistics import LossStatistics


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


class KestenGain:
    """Search for a step size from the sign and size of one ratio, then follow it ever more slowly.

    r = ⟨G_t, u_{t-1}⟩/⟨G_{t-1}, u_{t-1}⟩ says how far along its line the last step went: near 1 it was much too short,
    below 0 the line's minimum lies behind. log α += max(gain, c/k)·clip(r/σ, -1, 1) for the k-th ratio: the gain begins
    at ln 10, so that α changes tenfold an update, and halves whenever r changes its sign, which is a bisection in
    log α; what is left of it afterwards falls as c/k, as stochastic approximation has it (H. Robbins and S. Monro,
    1951; H. Kesten, 1958: smaller gains after changes of sign).

    A search knows whether it can be trusted, see :meth:`is_sure`. All that is remembered is in ``memory``, plain
    numbers for a checkpoint.

    Args:
        sigma: ratios beyond ± this move α at full gain.
        constant: c.
    """

    AFTER_A_SEARCH = 10
    """Ratios that count as seen where there is no search: the falling gain begins where that of a search would."""
    RUN, SIGNIFICANCE, LONG_RUN = 3, 3.0, 5
    """A way is clear if ratios begin with at least so many of one sign, whose mean is so many standard errors from
    zero, or with a long run of them, which is no chance either; and if the mean is more than half a ``sigma``. It is so
    too if losses fall, see :attr:`FALLS`."""
    FALLS = 2.0
    """Losses fall if in the second half of the search they are lower than in the first by so many standard errors. The
    fall itself makes these larger."""
    AGREE = 3.0
    """Two searches that end within such a factor of one another were not led by noise, if steps a tenth as long as the
    first one found were clearly too short."""

    def __init__(self, sigma: float, constant: float) -> None:
        self.sigma, self.constant = sigma, constant

    @classmethod
    def new_memory(cls, *, searches: bool = True) -> dict[str, Any]:
        """What is remembered: the gain of the search, the last sign, how many ratios were seen; of the search, the
        ratios of one sign with which it began (count, mean, squared deviations), whether these are over and were clear,
        how often the sign has changed, the α that was found when it was begun anew, and the losses of its first and of
        its second half (count, mean, squared deviations)."""
        gain, count = (math.log(10), 0) if searches else (0.0, cls.AFTER_A_SEARCH)
        run: dict[str, Any] = {"run": [0, 0.0, 0.0], "over": 0, "clear": 0, "changes": 0, "found": None}
        losses: dict[str, Any] = {"early": [0, 0.0, 0.0], "late": [0, 0.0, 0.0]}
        return {"gain": gain, "sign": 0, "count": count, **run, **losses}

    def factor(self, memory: dict[str, Any], ratio: float) -> float:
        """Take in a ratio; return what α is to be multiplied by."""
        memory["count"] += 1
        sign = 1 if ratio > 0 else -1
        if memory["sign"] == -sign:
            memory["gain"] /= 2
            memory["changes"] += 1
        memory["sign"] = sign
        self._extend_run(memory, ratio)
        gain = max(memory["gain"], self.constant / memory["count"])
        return math.exp(gain * min(max(ratio / self.sigma, -1.0), 1.0))

    def _extend_run(self, memory: dict[str, Any], ratio: float) -> None:
        run = LossStatistics(*memory["run"])
        memory["over"] |= int(run.count > 0 and (run.mean > 0) != (ratio > 0))
        if memory["over"]:
            return
        run.add(ratio)
        memory["run"] = [run.count, run.mean, run.squared_deviations]
        if run.count >= self.RUN and abs(run.mean) >= self.sigma / 2:
            error = math.sqrt(run.squared_deviations / (run.count * (run.count - 1)))
            memory["clear"] |= int(run.count >= self.LONG_RUN or abs(run.mean) >= self.SIGNIFICANCE * error)

    def take_loss(self, memory: dict[str, Any], loss: float, *, late: bool) -> None:
        """Take a loss of the search into account, of its second half if it is ``late``.

        Losses that fall show that the steps are of some use, also where the search began so near to its end that there
        was no way to go.
        """
        statistics = LossStatistics(*memory["late" if late else "early"])
        statistics.add(loss)
        memory["late" if late else "early"] = [statistics.count, statistics.mean, statistics.squared_deviations]
        early, late_ones = LossStatistics(*memory["early"]), LossStatistics(*memory["late"])
        if min(early.count, late_ones.count) >= self.RUN:
            error = math.hypot(*(half.std / math.sqrt(half.count - 1) for half in (early, late_ones)))
            memory["clear"] |= int(early.mean - late_ones.mean > self.FALLS * error)

    @staticmethod
    def is_sure(memory: dict[str, Any]) -> bool:
        """Whether the search has found a step size: the way to it was clear, and it has seen both sides of it.

        Where slopes are mostly noise, their ratios are near zero or of either sign from the beginning, and losses do
        not fall.
        """
        return bool(memory["clear"]) and memory["changes"] > 0

    def has_found_nothing(self, memory: dict[str, Any], alpha: float) -> bool:
        """Whether a search that ends with ``alpha`` was led by noise: no way was clear, nor do two searches agree."""
        agrees = (
            memory["found"] is not None
            and abs(math.log(alpha / memory["found"])) < math.log(self.AGREE)
            and memory["run"][1] >= self.sigma / 2
        )
        return not memory["clear"] and not agrees

    @staticmethod
    def search_again(memory: dict[str, Any], alpha: float) -> None:
        """Begin the search anew, which has found ``alpha``, but no clear way to it."""
        memory.update(gain=math.log(10), sign=0, run=[0, 0.0, 0.0], over=0, clear=0, changes=0, found=alpha)

    @staticmethod
    def end_search(memory: dict[str, Any]) -> None:
        """From now on only the falling gain counts."""
        memory["gain"] = 0.0

    @staticmethod
    def restarted(memory: dict[str, Any]) -> None:
        """α turned out too large, and the search shall not come back to it at full gain."""
        if memory["sign"] > 0:
            memory["gain"] = min(memory["gain"], math.log(10) / 2)
        memory["sign"] = -1
