"""Optimizers around another optimizer: its direction, our α and guards."""

from __future__ import annotations

from typing import Any

import torch

from hf_elra.errors import ConfigurationError
from hf_elra.optim.base import LossAwareOptimizer
from hf_elra.optim.directions.displacement import Displacement, refuse_scheduler


class Around(LossAwareOptimizer):
    """An optimizer whose direction is that of another one; weight decay is part of it.

    Args:
        inner: any optimizer whose step needs no closure.
        settings: of the subclass; ``lr`` and ``weight_decay`` are those of ``inner``.

    State per parameter: ``inner``, that of the other optimizer, and the last direction.
    """

    scales_weight_decay = True

    def __init__(self, inner: torch.optim.Optimizer, settings: dict[str, Any]) -> None:
        wrong = isinstance(inner, (LossAwareOptimizer, torch.optim.LBFGS)) or not hasattr(inner, "param_groups")
        if wrong:
            raise ConfigurationError(
                f"inner={type(inner).__name__} must be an optimizer such as torch.optim.SGD(model.parameters(), "
                "lr=0.1), whose step needs neither the loss nor a closure."
            )
        if hasattr(inner, "train") and hasattr(inner, "eval"):
            raise ConfigurationError(
                f"inner={type(inner).__name__} trains other parameters than it evaluates, so that the way from one to "
                "the next is not its step; use it without anything around it."
            )
        refuse_scheduler(inner)
        groups = [{"params": group["params"], "lr": float(group["lr"])} for group in inner.param_groups]
        lr = max(group["lr"] for group in groups)
        self.inner = inner
        super().__init__(groups, {**settings, "lr": lr, "weight_decay": 0.0})
        self.param_groups[0]["scalars"]["parts"] += f" of {type(inner).__name__}"

    def direction(self) -> Displacement:
        """Where the other one goes."""
        return Displacement(self.inner)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "inner": self.inner}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch; the other optimizer goes on with its state too."""
        super().load_state_dict(state_dict)
        self.direction().load(self.param_groups, self.state)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, to the other optimizer too."""
        super().add_param_group(param_group)
        if len(self.param_groups) > len(self.inner.param_groups):  # not one that it has already
            self.inner.add_param_group({"params": list(param_group["params"]), "lr": self.alpha})
