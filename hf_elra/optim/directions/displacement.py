"""The direction of any torch optimizer: where it would go, over the rate at which it would go there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_elra.errors import ConfigurationError
from hf_elra.optim.directions import Direction, Groups


class Displacement(Direction):
    """u = (x - x')/α, x' where the other optimizer goes from x at the rate α; x itself stays.

    It is asked at the α of now, so that rounding costs no more than in a step of its own. Its state of a parameter lies
    in ours, as ``inner``, what it keeps in its groups in ours too.

    Args:
        inner: the other optimizer, with the same parameter groups.
    """

    is_gradient = False

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner

    def apply(
        self, groups: Groups, params: list[list[Tensor]], gradients: list[list[Tensor]], state: Any
    ) -> list[list[Tensor]]:
        """Let the other optimizer make its step, and go back."""
        scalars = groups[0]["scalars"]
        alpha = max(scalars["alpha"], scalars.get("kept_alpha", 0.0))  # not the one of a crop
        refuse_scheduler(self.inner)
        before = [[p.detach().clone() for p in group] for group in params]
        for theirs in self.inner.param_groups:
            theirs["lr"] = alpha
        self.inner.step()
        directions = []
        for group, kept in zip(params, before, strict=True):
            directions.append([(x - p.detach()).div_(alpha) for p, x in zip(group, kept, strict=True)])
            for p, x in zip(group, kept, strict=True):
                p.copy_(x)
                if p in self.inner.state:
                    state[p]["inner"] = self.inner.state[p]
        for ours, theirs in zip(groups, self.inner.param_groups, strict=True):
            ours["inner"] = {name: value for name, value in theirs.items() if name != "params"}
        return directions

    def load(self, groups: Groups, state: Any) -> None:
        """Hand what was loaded over to the other optimizer."""
        self.inner.state.clear()
        for ours, theirs in zip(groups, self.inner.param_groups, strict=True):
            theirs.update(ours.get("inner", {}))
            for p in ours["params"]:
                if "inner" in state.get(p, {}):
                    self.inner.state[p] = state[p]["inner"]


def refuse_scheduler(inner: torch.optim.Optimizer) -> None:
    """Raise a ConfigurationError where the rate of the other optimizer is a scheduler's."""
    if any("initial_lr" in group for group in inner.param_groups):
        raise ConfigurationError(
            f"inner={type(inner).__name__} has a scheduler, but its rate is ours to set. Give the scheduler the "
            "optimizer around it, whose steps it then scales, or none."
        )
