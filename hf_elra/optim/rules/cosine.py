"""α by the angle between the gradient and the last step: c2min (ELRA, 2023), multiplicative hypergradients."""

from __future__ import annotations

from hf_elra.optim.rules import Measurement, Rule


class Cosine(Rule):
    """α_t = α_{t-1}·(1 + g·cos(G_t, u_{t-1})): where they are orthogonal, the last step ended in its line's minimum.

    Args:
        gain: g, in (0, 1): α changes by at most this share.
    """

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain = gain

    def propose(self, measured: Measurement, alpha: float) -> float:
        """Longer where the gradient still points along the last step, shorter where it points back."""
        return alpha * (1 + self.gain * max(min(measured.cosine, 1.0), -1.0))
