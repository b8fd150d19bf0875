"""The list of all optimizers that ``test_contract.py`` puts through its tests: a new optimizer is a new entry."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_elra import ELRA, ELRASpectral
from hf_elra.optim.reference.elra import ReferenceELRA
from hf_elra.optim.reference.spectral import ReferenceSpectral


@dataclass(frozen=True, eq=False)
class Case:
    """An optimizer, with arguments.

    Attributes:
        name: of the case.
        optimizer: the class.
        optim: its name on ``--optim``; None where a Trainer cannot make it.
        arguments: of the class.
        optim_args: the same as ``--optim_args`` has them; weight decay is none of them.
        needs_loss: whether it warns where it is not told the loss.
        takes_shards: whether parameters may be DTensors.
        twin: makes its twin in float64 of points and arguments; None for none.
        wrong: further arguments that are refused, and what the error says.
    """

    name: str
    optimizer: type[torch.optim.Optimizer]
    optim: str | None
    arguments: dict[str, Any] = field(default_factory=dict)
    optim_args: str | None = None
    needs_loss: bool = True
    takes_shards: bool = True
    twin: Callable[..., Any] | None = None
    wrong: tuple[tuple[dict[str, Any], str], ...] = ()

    def make(self, params: Any, **more: Any) -> Any:
        """A new optimizer."""
        return self.optimizer(params, **{**self.arguments, **more})


class FlatTwin:
    """The twin of ELRA, which knows one vector."""

    def __init__(self, points: list[Tensor], **arguments: Any) -> None:
        self.shapes = [point.shape for point in points]
        self.twin = ReferenceELRA(self.flat(points), **{k: v for k, v in arguments.items() if k != "memory"})

    @staticmethod
    def flat(tensors: list[Tensor]) -> Tensor:
        return torch.cat([tensor.reshape(-1) for tensor in tensors])

    def step(self, loss: float, gradients: list[Tensor]) -> None:
        self.twin.step(loss, self.flat(gradients))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.twin, name)

    @property
    def x(self) -> list[Tensor]:
        parts = self.twin.x.split([shape.numel() for shape in self.shapes])
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]


WRONG_OF_ALL = (
    ({"lr": 0}, r"lr=0 must be a number > 0"),
    ({"lr": math.nan}, r"lr=nan must be a number > 0"),
    ({"lr": 1e7}, r"lr=10000000.0 is outside lr_bounds"),
    ({"lr_bounds": (1.0, 0.1)}, "lr_bounds=.*low < high"),
    ({"weight_decay": -1}, "weight_decay=-1 must be"),
    ({"max_relative_step": 0}, "max_relative_step=0 must be a number > 0"),
    ({"restart_sigma": math.nan}, "restart_sigma=nan"),
    ({"initial_restart_ratio": 0.9}, "initial_restart_ratio=0.9"),
    ({"soft_restart": "yes"}, "soft_restart='yes' must be True or False"),
    ({"stochastic_rounding": 1}, "stochastic_rounding=1 must be True or False"),
)
WRONG_OF_ELRA = (
    *WRONG_OF_ALL,
    ({"step_rule": "bb3"}, r"step_rule='bb3' must be one of 'bb1', 'bb2'. Did you mean"),
    ({"noise_correction": -1}, "noise_correction=-1"),
    ({"max_growth": 1.0}, "max_growth=1.0"),
    ({"min_step_norm": 3.0}, "min_step_norm=3.0 is above max_step_norm=2.0"),
    ({"max_step_norm": 0}, "max_step_norm=0"),
    ({"max_first_step": 0}, "max_first_step=0"),
    ({"weight_decay": 1.5}, "weight_decay=1.5"),
    ({"restart_window": 1}, "restart_window=1"),
    ({"restart_formula": "papr"}, "Did you mean 'paper'"),
)
WRONG_OF_SPECTRAL = (
    *WRONG_OF_ALL,
    ({"momentum": 1.0}, r"momentum=1.0 must be a number in \[0, 1\)"),
    ({"warmup": 2.5}, "warmup=2.5 must be a whole number"),
    ({"max_correction": 0.5}, "max_correction=0.5 must be a number >= 1"),
)

CASES = (
    Case("elra", ELRA, "elra", twin=FlatTwin, wrong=WRONG_OF_ELRA),
    Case("elra, point", ELRA, "elra", {"memory": "point", "restart_window": 9}, "memory=point,restart_window=9",
         twin=FlatTwin),
    Case("elra, offload", ELRA, "elra", {"memory": "offload", "weight_decay": 1e-3}, "memory=offload",
         takes_shards=False, twin=FlatTwin),
    Case("elra_spectral", ELRASpectral, "elra_spectral", takes_shards=False, twin=ReferenceSpectral,
         wrong=WRONG_OF_SPECTRAL),
    Case("elra_spectral, no momentum", ELRASpectral, "elra_spectral", {"momentum": 0.0, "weight_decay": 0.1},
         "momentum=0", takes_shards=False, twin=ReferenceSpectral),
    Case("elra_spectral, no warm-up", ELRASpectral, "elra_spectral", {"warmup": 0, "lr": 1e-2}, "warmup=0",
         takes_shards=False, twin=ReferenceSpectral),
)  # fmt: skip
