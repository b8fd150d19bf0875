"""SPS_max: the stochastic Polyak step (Loizou et al., 2021), whose growth is limited."""

from __future__ import annotations

from typing import Any

from hf_elra.optim.rules import Measurement, Rule

FIRST = 1.0
"""The largest α of the first update, and where a first search begins; the papers' α_0 of SPS and SLS."""


class Polyak(Rule):
    """α_t = min((f_t - f*)/(c·⟨G_t, u_t⟩), growth·α_{t-1}, the largest).

    A loss that is not above f* says nothing, and α stays.

    Args:
        c: of the paper.
        f_star: f*, a lower bound of the loss of every batch.
        growth: largest α_t/α_{t-1}.
        max_lr: the largest α.
    """

    looks_ahead = True

    def __init__(self, c: float, f_star: float, growth: float, max_lr: float) -> None:
        super().__init__()
        self.c, self.f_star, self.growth, self.max_lr = c, f_star, growth, max_lr

    def new_state(self) -> dict[str, Any]:
        """Whether there was an update."""
        return {"begun": 0}

    def propose(self, measured: Measurement, alpha: float) -> float:
        """Polyak's step, within what growth allows."""
        loss = measured.loss
        if loss is None or loss <= self.f_star or measured.slope <= 0:
            return alpha
        longest = self.growth * alpha if self.state["begun"] else FIRST
        self.state["begun"] = 1
        return min((loss - self.f_star) / (self.c * measured.slope), longest, self.max_lr)
