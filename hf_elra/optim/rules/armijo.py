"""SLS: a backtracking line search on the loss of the batch (Vaswani et al., 2019)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from hf_elra.optim.rules import Measurement, Rule
from hf_elra.optim.rules.polyak import FIRST

MOST_TRIES = 100


class Armijo(Rule):
    """The first of s, β·s, β²·s, … with f(x - s·u) ≤ f(x) - c·s·⟨G, u⟩, where s = growth·α_{t-1}.

    Args:
        c: share of the decrease that the slope promises.
        backtracking: β.
        growth: of the first try, over α_{t-1}.
        max_lr: the largest first try.
    """

    looks_ahead = True

    def __init__(self, c: float, backtracking: float, growth: float, max_lr: float) -> None:
        super().__init__()
        self.c, self.backtracking, self.growth, self.max_lr = c, backtracking, growth, max_lr

    def new_state(self) -> dict[str, Any]:
        """Whether there was a search."""
        return {"begun": 0}

    def propose(self, measured: Measurement, alpha: float) -> float:
        """Search; where the slope promises nothing α stays."""
        if measured.slope <= 0:
            return alpha
        loss_at = cast(Callable[[float], float], measured.line_loss)
        loss = loss_at(0.0) if measured.loss is None else measured.loss
        s = min(self.growth * alpha if self.state["begun"] else FIRST, self.max_lr)
        self.state["begun"] = 1
        for _ in range(MOST_TRIES):
            if loss_at(s) <= loss - self.c * s * measured.slope:  # never true of NaN
                break
            s *= self.backtracking
        return s
