"""Additive hypergradients: gradient descent on α itself (Baydin et al., 2018; L. Almeida et al., 1998).

The multiplicative form is the rule ``Cosine``.
"""

from __future__ import annotations

from hf_elra.optim.rules import Measurement, Rule


class Additive(Rule):
    """α_t = α_{t-1} + η·⟨G_t, u_{t-1}⟩, the slope of the loss in α. What is below zero is stopped by α's lower bound.

    Args:
        hyper_lr: η.
    """

    def __init__(self, hyper_lr: float) -> None:
        super().__init__()
        self.hyper_lr = hyper_lr

    def propose(self, measured: Measurement, alpha: float) -> float:
        """One step of gradient descent."""
        return alpha + self.hyper_lr * measured.current_slope
