"""The rule of ``elra_spectral``: a search in log α, whose gain then falls as in stochastic approximation."""

from __future__ import annotations

import math
from typing import Any

from hf_elra.control.statistics import LossStatistics
from hf_elra.optim.rules import Measurement, Rule

SIGMA, CONSTANT = 0.2, 2.5
"""Ratios beyond ± the first move α at full gain; the second is c."""
LEAST_FOUND = 1e-3
"""A search ends with an α of at least this share of the matrices' root mean square."""
NOT_FOUND = 1e-2
"""Where a search has found nothing, α is this share of the matrices' root mean square."""
LONGEST_SEARCH = 2
"""A search that is not sure goes on, to at most so many times its updates."""


class KestenGain(Rule):
    """Search for α from the sign and size of one ratio, then follow it ever more slowly.

    r = ⟨G_t, u_{t-1}⟩/⟨G_{t-1}, u_{t-1}⟩ says how far along its line the last step went: near 1 it was much too short,
    below 0 the line's minimum lies behind. log α += max(gain, c/k)·clip(r/σ, -1, 1) for the k-th ratio: the gain begins
    at ln 10, so that α changes tenfold an update, and halves whenever r changes its sign, which is a bisection in
    log α; what is left of it afterwards falls as c/k, as stochastic approximation has it (H. Robbins and S. Monro,
    1951; H. Kesten, 1958: smaller gains after changes of sign).

    A search knows whether it can be trusted, see :attr:`is_sure`. Its points are provisional.

    Args:
        search: updates of the search; 0 for none.
        holds: α stays as it is once a search is over and as many updates have passed again.
        sigma, constant: σ and c.
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

    def __init__(
        self, search: int = 0, *, holds: bool = False, sigma: float = SIGMA, constant: float = CONSTANT
    ) -> None:
        self.search, self.holds, self.sigma, self.constant = search, holds, sigma, constant
        super().__init__()

    def new_state(self) -> dict[str, Any]:
        """What is remembered before the first update.

        The update at whose end the search was over (None before), its gain, the last sign, how many ratios were seen;
        of the search, the ratios of one sign with which it began (count, mean, squared deviations), whether these are
        over and were clear, how often the sign has changed, the α that was found when it was begun anew, and the losses
        of its first and of its second half (count, mean, squared deviations).
        """
        searches = self.search > 0
        gain, count = (math.log(10), 0) if searches else (0.0, self.AFTER_A_SEARCH)
        run: dict[str, Any] = {"run": [0, 0.0, 0.0], "over": 0, "clear": 0, "changes": 0, "found": None}
        losses: dict[str, Any] = {"early": [0, 0.0, 0.0], "late": [0, 0.0, 0.0]}
        return {"searched": None if searches else 0, "gain": gain, "sign": 0, "count": count, **run, **losses}

    # ---- the rule ----

    def propose(self, measured: Measurement, alpha: float) -> float:
        """Take in the ratio of the slopes; return α_t."""
        slope = measured.previous_slope
        if slope is None or slope <= 0 or (self.holds and not self.is_finding(measured.update)):
            return alpha
        return alpha * self.factor(measured.current_slope / slope)

    def factor(self, ratio: float) -> float:
        """Take in a ratio; return what α is to be multiplied by."""
        state = self.state
        state["count"] += 1
        sign = 1 if ratio > 0 else -1
        if state["sign"] == -sign:
            state["gain"] /= 2
            state["changes"] += 1
        state["sign"] = sign
        self._extend_run(ratio)
        gain = max(state["gain"], self.constant / state["count"])
        return math.exp(gain * min(max(ratio / self.sigma, -1.0), 1.0))

    def reduced(self) -> None:
        """α turned out too large, and the search shall not come back to it at full gain."""
        if self.state["sign"] > 0:
            self.state["gain"] = min(self.state["gain"], math.log(10) / 2)
        self.state["sign"] = -1

    # ---- the search ----

    @property
    def provisional(self) -> bool:
        """Whether the search goes on."""
        return self.state["searched"] is None

    def is_finding(self, update: int) -> bool:
        """Whether the search goes on, or has ended no longer ago than it has lasted."""
        return self.provisional or update <= 2 * self.state["searched"]

    def updates_left(self, update: int) -> int:
        """How many updates of the search are still to come, at least."""
        return max(1, self.search - update) if self.provisional else 0

    def take_loss(self, measured: Measurement) -> None:
        """Take a loss of the search into account.

        Losses that fall show that the steps are of some use, also where the search began so near to its end that there
        was no way to go.
        """
        if measured.loss is None:
            return
        half = "late" if 2 * measured.update > self.search else "early"
        statistics = LossStatistics(*self.state[half])
        statistics.add(measured.loss)
        self.state[half] = [statistics.count, statistics.mean, statistics.squared_deviations]
        early, late = LossStatistics(*self.state["early"]), LossStatistics(*self.state["late"])
        if min(early.count, late.count) >= self.RUN:
            error = math.hypot(*(losses.std / math.sqrt(losses.count - 1) for losses in (early, late)))
            self.state["clear"] |= int(early.mean - late.mean > self.FALLS * error)

    def _extend_run(self, ratio: float) -> None:
        state = self.state
        run = LossStatistics(*state["run"])
        state["over"] |= int(run.count > 0 and (run.mean > 0) != (ratio > 0))
        if state["over"]:
            return
        run.add(ratio)
        state["run"] = [run.count, run.mean, run.squared_deviations]
        if run.count >= self.RUN and abs(run.mean) >= self.sigma / 2:
            error = math.sqrt(run.squared_deviations / (run.count * (run.count - 1)))
            state["clear"] |= int(run.count >= self.LONG_RUN or abs(run.mean) >= self.SIGNIFICANCE * error)

    @property
    def is_sure(self) -> bool:
        """Whether the search has found α: the way to it was clear, and it has seen both sides of it.

        Where slopes are mostly noise, their ratios are near zero or of either sign from the beginning, and losses do
        not fall.
        """
        return bool(self.state["clear"]) and self.state["changes"] > 0

    def has_found_nothing(self, alpha: float) -> bool:
        """Whether a search that ends with ``alpha`` was led by noise: no way was clear, nor do two searches agree."""
        agrees = (
            self.state["found"] is not None
            and abs(math.log(alpha / self.state["found"])) < math.log(self.AGREE)
            and self.state["run"][1] >= self.sigma / 2
        )
        return not self.state["clear"] and not agrees

    def reconsider(self, update: int, alpha: float) -> float | None:
        """End the search if it is sure of what it has found, or if it has lasted long enough.

        Where no way was clear it begins anew, once, a tenth of the way back.
        """
        state = self.state
        has_measured = state["count"] >= self.search - 1  # a step that is taken back tells nothing, nor does its retry
        if update >= LONGEST_SEARCH * self.search or (has_measured and self.is_sure):
            state["searched"] = update
        elif has_measured and not state["clear"] and state["found"] is None:
            state.update(gain=math.log(10), sign=0, run=[0, 0.0, 0.0], over=0, clear=0, changes=0, found=alpha)
            return alpha / 10
        return None

    def found(self, alpha: float, size: float) -> tuple[float | None, str | None]:
        """Only the falling gain counts from now on; a default where nothing was found."""
        self.state["gain"] = 0.0
        if self.has_found_nothing(alpha):
            return NOT_FOUND * size, "has found none, as slopes are mostly noise"
        if alpha < LEAST_FOUND * size:
            return LEAST_FOUND * size, f"ended below the least one, at {alpha:.2g}"
        return None, None
