"""The rule of ``elra_spectral``: a rate that falls as 1/√t, corrected by the slopes at the ends of steps.

``decisions.py`` makes the same decisions on the device, and ``reference/spectral.py`` in plain float64; tests hold the
three together.
"""

from __future__ import annotations

import math
from typing import Any

from hf_elra.control.statistics import LossStatistics
from hf_elra.optim.natural_steps import OFFSET
from hf_elra.optim.rules import Measurement, Rule


class EndSlopes(Rule):
    """A rate from the weights, which falls as 1/sqrt(t + 50) and is corrected where slopes show that it is wrong.

    r = ⟨G_t, u_{t-1}⟩/⟨G_{t-1}, u_{t-1}⟩ is the slope at the end of a step as a share of that at its beginning. The
    gradient of G_t has not been used for u_{t-1}, so that its sign can be trusted on average: above zero the step was
    too short to reach the lowest point of its line, far below zero it has climbed up again behind it. Between the two
    is where a run gets on best: in trials, whose files are not kept, good constant rates had mean ratios from -0.01 at
    batches of 4 to -0.3 at 64, since the noise that this leaves is averaged away. So ratios are gathered until their
    mean is significantly above zero or below :data:`TOO_LONG`; then α is corrected, and they are gathered anew.

    That is so while every batch is new. Later the slopes are those of examples that have been trained on, along which a
    longer step always looks better as the network learns them by heart; so α is raised in the first pass over the data
    alone. When it is over α goes back to what suits the weights, as people fine-tune gently where they go over a text
    again, unless slopes were so plain that the model is far from its goal still (see below).

    What suits the weights is a guess, and how far corrections may lead away from it depends on how plain they are. A
    slope that a step leaves at more than half of what it was says that the lowest point is at least as far again, as
    when a model learns another language: α may go to ``max_correction`` times the guess. Less than that is also what
    losses show that can always be lowered by longer weights, as those of preferences: then fewer are the most.
    Downwards corrections take back what others added, and end at the guess. Where there is little noise every step
    climbs up again behind the lowest point of its line, whatever its length, and still the mean of the run gets on best
    with the guess or more; a step that really does harm is taken back for its loss.

    This is hypergradient descent (A. Baydin et al., "Online learning rate adaptation with hypergradient descent",
    2018, whose dα is in proportion to ⟨G_t, u_{t-1}⟩), with a sequential test in place of a second learning rate.

    Args:
        warmup: updates over which α goes from α_0 to what suits the weights; 0 to begin with α_0 and trust it, so that
            α does not go back to what suits the weights either.
        max_correction: corrections make α at most so many times what suits the weights; beyond :data:`USUALLY` times
            only while the mean ratio is above :data:`FAR_TOO_SHORT`. None: :data:`MOST`, times ``room``.
        room: how many times as far both bounds are, as suits the model; 1 at least if ``max_correction`` is given.
        fresh: in so many updates the data are new; None: in all.
        falls: whether α falls with the number of updates; if not, it stays where a falling one is after 50 of them.
    """

    TOO_LONG = -0.5
    """Mean ratio below which steps are too long."""
    FAR_TOO_SHORT = 0.5
    """Mean ratio above which α may go to the second of these bounds."""
    USUALLY, MOST = 4.0, 16.0
    """Times what suits the weights: two bounds of α."""
    PLAIN = 1.01 * USUALLY
    """An α of so many times what suits the weights outlasts the first pass; what is over 4 is for rounding."""
    FEWEST, SIGNIFICANCE = 3, 3.0
    """A mean is of at least so many ratios, and so many standard errors beyond its limit; more of them where there are
    few ratios, whose spread is not known well, and which are looked at again and again."""
    GAIN, UP, DOWN = 5.0, 0.4, 1.0
    """log α changes by the first times what the mean is beyond its limit, by the second at most upwards and by the
    third downwards: a step that is too long does harm, one that is too short is corrected again soon."""

    def __init__(
        self,
        warmup: int = 10,
        *,
        max_correction: float | None = None,
        room: float = 1.0,
        fresh: int | None = None,
        falls: bool = True,
    ) -> None:
        if max_correction is not None:
            room = max(room, 1.0)
        self.max_correction = room * self.MOST if max_correction is None else max_correction
        self.usually = min(room * self.USUALLY, self.max_correction)
        self.warmup = warmup
        self.fresh, self.falls = fresh, falls
        super().__init__()

    def new_state(self) -> dict[str, Any]:
        """Return what is remembered before the first update.

        Whether α still warms up, α_0, the α that suits the weights (at t + 50 = 1), the last update that set α, the
        root mean square of the weights, how far they walked, ratios since the last correction (count, mean, squared
        deviations).
        """
        return {
            "warms_up": int(self.warmup > 0), "first": 0.0, "natural": 0.0, "update": 0, "began": 0.0, "walked": 0.0,
            "ratios": [0, 0.0, 0.0],
        }  # fmt: skip

    def stands(self, measured: Measurement) -> None:
        """Count the last step."""
        self.state["walked"] += measured.step_size

    def begin(self, measured: Measurement, alpha: float) -> float:
        """Return the first α: α_0, or what suits the weights if that is less."""
        state = self.state
        state["update"], state["natural"] = measured.update, measured.natural_rate
        state["first"] = min(alpha, self._natural(1)) if state["warms_up"] else alpha
        state["began"] = math.sqrt(measured.size / measured.number) if measured.number > 0 else 0.0
        return float(state["first"])

    def propose(self, measured: Measurement, alpha: float) -> float:
        """Return α_t: on a straight way in log α to what suits the weights, and then as they fall and are corrected."""
        state, update = self.state, measured.update
        before, state["update"] = state["update"], update
        if state["warms_up"] and update <= self.warmup:
            share = (update - 1) / self.warmup
            return float(state["first"] ** (1 - share) * self._natural(update) ** share)
        if state["warms_up"]:
            state["warms_up"] = 0
            return self._natural(update)
        alpha *= math.sqrt((OFFSET + before) / (OFFSET + update)) if self.falls else 1.0
        if self.warmup > 0 and self.fresh is not None and before <= self.fresh < update:
            natural = self._natural(update)
            alpha = min(alpha, natural) if self.is_near(alpha) else alpha
        return self._corrected(alpha, measured) if measured.was_full else alpha

    def is_near(self, alpha: float) -> bool:
        """Whether α, that of the last update, is not so far above what suits the weights as to outlast a pass."""
        return alpha < self.PLAIN * self._natural(self.state["update"])

    def _natural(self, update: int) -> float:
        return float(self.state["natural"]) / math.sqrt(OFFSET + (update if self.falls else OFFSET))

    def _corrected(self, alpha: float, measured: Measurement) -> float:
        """Take in a ratio; return α, corrected if ratios are significant."""
        state, slope = self.state, measured.previous_slope_counted
        if slope is None or slope <= 0:
            return alpha
        ratios = LossStatistics(*state["ratios"])
        ratios.add(min(max(measured.current_slope_counted / slope, -1.0), 1.0))
        state["ratios"] = [ratios.count, ratios.mean, ratios.squared_deviations]
        if ratios.count < self.FEWEST:
            return alpha
        freedom = ratios.count - 1
        error = self.SIGNIFICANCE * (1 + (self.FEWEST / freedom) ** 2) * ratios.std / math.sqrt(freedom)
        beyond = 0.0
        if ratios.mean > error:
            beyond = ratios.mean
        elif ratios.mean + error < self.TOO_LONG:
            beyond = ratios.mean - self.TOO_LONG
        if beyond == 0:
            return alpha
        state["ratios"] = [0, 0.0, 0.0]
        corrected = alpha * math.exp(min(max(self.GAIN * beyond, -self.DOWN), self.UP))
        natural = self._natural(measured.update)
        if corrected <= alpha:
            return max(corrected, min(alpha, natural))
        if self.fresh is not None and measured.update > self.fresh:
            return alpha
        most = self.max_correction if ratios.mean > self.FAR_TOO_SHORT else self.usually
        return max(alpha, min(corrected, most * natural))

    def reduced(self) -> None:
        """Steps failed: α does not warm up any further, and what ratios said before is of another α."""
        self.state.update(warms_up=0, ratios=[0, 0.0, 0.0])
