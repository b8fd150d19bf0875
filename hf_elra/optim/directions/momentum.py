"""Averages of gradients, and Adam's direction: one running average or two, a number each per parameter.

Both begin with the first gradient, or without bias from zero, so that the first direction is not a short one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_elra.optim.directions import Direction, Groups


class Momentum(Direction):
    """m ← β·m + w·G, which begins with G; u = m.

    Args:
        momentum: β; 0 for u = G, which keeps no average.
        averages: w = 1 - β, so that m is as long as gradients are; else w = 1, as in ``torch.optim.SGD``.

    State per parameter: ``momentum``.
    """

    def __init__(self, momentum: float, *, averages: bool = True) -> None:
        self.momentum, self.weight = momentum, 1 - momentum if averages else 1.0
        self.is_gradient = momentum == 0

    def apply(
        self, groups: Groups, params: list[list[Tensor]], gradients: list[list[Tensor]], state: Any
    ) -> list[list[Tensor]]:
        """The averages as they are now."""
        if self.momentum == 0:
            return gradients
        return [self._of(*pair, state) for pair in zip(params, gradients, strict=True)]

    def _of(self, params: list[Tensor], gradients: list[Tensor], state: Any) -> list[Tensor]:
        known = [(state[p]["momentum"], g) for p, g in zip(params, gradients, strict=True) if "momentum" in state[p]]
        if known:
            averages, of_known = zip(*known, strict=True)
            torch._foreach_mul_(averages, self.momentum)
            torch._foreach_add_(averages, of_known, alpha=self.weight)
        for p, g in zip(params, gradients, strict=True):
            if "momentum" not in state[p]:
                state[p]["momentum"] = g.clone()
        return [state[p]["momentum"].clone() for p in params]


class Adam(Direction):
    """u = m̂/(√v̂ + ε) with averages of G and G² without bias (D. P. Kingma and J. Ba, 2015).

    Args:
        betas: shares of m and of v that are kept at an update.
        eps: ε.

    State per parameter: ``exp_avg``, ``exp_avg_sq`` and ``step``, as those of ``torch.optim.AdamW``.
    """

    is_gradient = False

    def __init__(self, betas: tuple[float, float], eps: float) -> None:
        self.betas, self.eps = betas, eps

    def apply(
        self, groups: Groups, params: list[list[Tensor]], gradients: list[list[Tensor]], state: Any
    ) -> list[list[Tensor]]:
        """Take the gradients into the averages; return their quotients."""
        return [
            [self._of(p, g, state[p]) for p, g in zip(group, of_group, strict=True)]
            for group, of_group in zip(params, gradients, strict=True)
        ]

    def _of(self, p: Tensor, gradient: Tensor, state: dict[str, Any]) -> Tensor:
        if "step" not in state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        state["step"] += 1
        first, second = self.betas
        mean = state["exp_avg"].lerp_(gradient, 1 - first)
        square = state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        updates = state["step"].item()
        scale = (square / (1 - second**updates)).sqrt_().add_(self.eps)
        return (mean / (1 - first**updates)).div_(scale)
