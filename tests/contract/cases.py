"""The list of all optimizers that ``test_contract.py`` puts through its tests: a new optimizer is a new entry.

A case that is made of the same parts as another one, but for a rule or a direction, is ``brief``: it runs a short list
(saved and resumed states, what is not finite, wrong types), as the full list takes some ten seconds a case.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_elra import ELRA, ELRASpectral
from hf_elra.optim import (
    GOLS,
    LABPALNSGD,
    LABPALSGD,
    NTLR,
    NTLRSGD,
    PAL,
    PLS,
    SLS,
    SPS,
    ELRAC2Min,
    ELRAP2Min,
    Guarded,
    HypergradientAdamW,
    HypergradientSGD,
    NTLRAdamW,
)
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
        brief: it runs the short list alone.
        grows: whether α grows where slopes never fall.
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
    brief: bool = False
    grows: bool = True

    def make(self, params: Any, **more: Any) -> Any:
        """A new optimizer."""
        if self.optimizer in (NTLR, Guarded):
            params = torch.optim.RMSprop(params, lr=more.pop("lr", 1e-2))
        return self.optimizer(params, **{**self.arguments, **more})


def step(optimizer: Any, **told: Any) -> None:
    """Make an update; one that looks along the line sees a parabola, which falls with the gradient."""
    if optimizer.needs_line_loss:
        lines = [(p, p.detach().clone(), p.grad) for group in optimizer.param_groups for p in group["params"]]
        lines = [(p, x, g) for p, x, g in lines if g is not None and not g.is_sparse]
        loss = float(torch.as_tensor(told.get("loss", 0.0)).detach())

        def evaluate() -> float:
            rises = [((p.detach() - x) * (g + (p.detach() - x))).double().sum() for p, x, g in lines]
            return loss + sum(float(rise.full_tensor() if isinstance(rise, DTensor) else rise) for rise in rises)

        told["evaluate"] = evaluate
    optimizer.step(**told)


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


OFTEN = {"every": 3, "soft_restart": True}
OFTEN_IN_A_TRAINER = "every=3,soft_restart=true"
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
    ({"weights": "train"}, r"weights='train' must be one of 'auto', 'new', 'trained'. Did you mean 'trained'"),
    ({"warmup": 2.5}, "warmup=2.5 must be a whole number"),
    ({"max_correction": 0.5}, "max_correction=0.5 must be a number >= 1"),
    ({"max_drift": 0}, "max_drift=0 must be a number > 0"),
    ({"on_device": 1}, r"on_device=1 must be True or False \(or None, to choose\)"),
    ({"polar_batch": 0}, "polar_batch=0 must be a whole number"),
    ({"state_dtype": "float16"}, "state_dtype=.float16. must be one of"),
    ({"polar_dtype": "tf32"}, "polar_dtype=.tf32. must be one of"),
    ({"distribute": "of"}, "distribute='of' must be one of 'auto', 'off'. Did you mean 'off'"),
)

CASES = (
    Case("elra", ELRA, "elra", twin=FlatTwin, wrong=WRONG_OF_ELRA),
    Case("elra, point", ELRA, "elra", {"memory": "point", "restart_window": 9}, "memory=point,restart_window=9",
         twin=FlatTwin),
    Case("elra, offload", ELRA, "elra", {"memory": "offload", "weight_decay": 1e-3}, "memory=offload",
         takes_shards=False, twin=FlatTwin),
    Case("elra_spectral", ELRASpectral, "elra_spectral", twin=ReferenceSpectral, wrong=WRONG_OF_SPECTRAL),
    Case("elra_spectral, no momentum", ELRASpectral, "elra_spectral", {"momentum": 0.0, "weight_decay": 0.1},
         "momentum=0", twin=ReferenceSpectral),
    Case("elra_spectral, no warm-up", ELRASpectral, "elra_spectral", {"warmup": 0, "lr": 1e-2}, "warmup=0",
         twin=ReferenceSpectral),
    Case("elra_spectral, on the device", ELRASpectral, "elra_spectral", {"on_device": True}, "on_device=true",
         twin=lambda points, on_device: ReferenceSpectral(points), brief=True),
    Case("elra_c2min", ELRAC2Min, "elra_c2min", {"lr": 1e-3}, brief=True,
         wrong=(*WRONG_OF_ALL, ({"gain": 1}, "gain=1 must be"))),
    Case("elra_p2min", ELRAP2Min, "elra_p2min", wrong=(({"max_growth": 1}, "max_growth=1 must be"),), brief=True),
    Case("pal", PAL, "pal", {"soft_restart": True}, "soft_restart=true", grows=False, wrong=(
        ({"measuring_step": 0}, "measuring_step=0 must"), ({"max_step": -1}, "max_step=-1 must"),
    )),
    Case("sls", SLS, "sls", {"soft_restart": True}, "soft_restart=true", brief=True, wrong=(
        ({"backtracking": 1}, "backtracking=1 must"), ({"c": 1}, "c=1 must"),
    )),
    Case("sps", SPS, "sps", {"soft_restart": True}, "soft_restart=true", grows=False, wrong=(
        ({"growth": 0.5}, "growth=0.5 must"), ({"c": 0}, "c=0 must"), ({"f_star": math.nan}, "f_star=nan must"),
    )),
    Case("labpal_sgd", LABPALSGD, "labpal_sgd", {"soft_restart": True, "every": 5},
         "soft_restart=true,every=10,approximation_samples=16", brief=True, wrong=(
        ({"every": 0}, "every=0 must"), ({"curvature": "code"}, "curvature='code' must be one of"),
        ({"approximation_samples": 1.5}, "approximation_samples=1.5 must be a whole number"),
    )),
    Case("labpal_nsgd", LABPALNSGD, "labpal_nsgd", {"soft_restart": True, "every": 5},
         "soft_restart=true,every=10,approximation_samples=16", brief=True),
    Case("gols", GOLS, "gols", {"soft_restart": True}, "soft_restart=true", brief=True, wrong=(
        ({"eta": 1}, "eta=1 must"), ({"c2": 0}, "c2=0 must"),
    )),
    Case("pls", PLS, "pls", {"soft_restart": True}, "soft_restart=true", brief=True),
    Case("guarded", Guarded, None, brief=True, wrong=(
        ({"max_step_norm": 0}, "max_step_norm=0 must"), ({"max_relative_step": -1}, "max_relative_step=-1 must"),
    )),
    Case("ntlr", NTLR, None, OFTEN, brief=True),
    Case("ntlr_sgd", NTLRSGD, "ntlr_sgd", {**OFTEN, "momentum": 0.9}, f"momentum=0.9,{OFTEN_IN_A_TRAINER}", brief=True),
    Case("ntlr_adamw", NTLRAdamW, "ntlr_adamw", {**OFTEN, "lr": 1e-2, "every": 8}, OFTEN_IN_A_TRAINER, grows=False,
         wrong=(
        ({"gamma": 0}, "gamma=0 must be"), ({"every": 0}, "every=0 must be"), ({"share": 2}, "share=2 must be"),
        ({"betas": (0.9, 1.0)}, "betas=.* must be two numbers"), ({"eps": 0}, "eps=0 must be"),
    )),
    Case("hypergradient_sgd", HypergradientSGD, "hypergradient_sgd", {"lr": 1e-2, "soft_restart": True},
         "soft_restart=true", brief=True, wrong=(
        ({"formula": "add"}, "formula=.add. must be one of .additive."),
        ({"hyper_lr": -1}, "hyper_lr=-1 must be a number > 0"),
        ({"hyper_lr": 1, "formula": "multiplicative"}, r"hyper_lr=1 must be a number in \(0, 1\)"),
    )),
    Case("hypergradient_adamw", HypergradientAdamW, "hypergradient_adamw",
         {**OFTEN, "formula": "multiplicative"}, f"formula=multiplicative,{OFTEN_IN_A_TRAINER}", brief=True),
)  # fmt: skip
