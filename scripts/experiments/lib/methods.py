"""Every optimizer by name, ours and others', as experiments compare them; the others come with the extra ``peers``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_elra.optim import OPTIMIZERS, embeddings_of, outputs_of


class MuonAndAdamW(torch.optim.Optimizer):
    """torch.optim.Muon for all matrices but embeddings, torch.optim.AdamW for the rest."""

    def __init__(self, model: nn.Module, lr: float) -> None:
        params = [p for p in model.parameters() if p.requires_grad]
        marked = {id(p) for p in embeddings_of(model)}
        hidden = [p for p in params if p.dim() == 2 and id(p) not in marked]
        chosen = {id(p) for p in hidden}
        rest = [p for p in params if id(p) not in chosen]
        super().__init__(params, {})
        kinds = ((torch.optim.Muon, hidden), (torch.optim.AdamW, rest))
        self.inner: list[torch.optim.Optimizer] = [kind(own, lr=lr) for kind, own in kinds if own]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Both steps."""
        for optimizer in self.inner:
            optimizer.step()


@dataclass(frozen=True)
class Method:
    """An optimizer at its defaults.

    Attributes:
        make: of a model, the samples of a batch and a rate; None for the default of the rate.
        has_rate: whether the rate that it begins with matters to it.
        package: that has to be installed for it.
    """

    make: Callable[[nn.Module, int, float | None], Any]
    has_rate: bool = True
    package: str | None = None


def _ours(name: str) -> Callable[..., Any]:
    def make(model: nn.Module, batch: int, rate: float | None) -> Any:
        given: dict[str, Any] = {} if rate is None else {"lr": rate}
        if name == "elra_spectral":
            given |= {"embeddings": embeddings_of(model), "outputs": outputs_of(model)}
        if name == "elra" and embeddings_of(model):  # as a Trainer has it for language models
            given["min_step_norm"] = 0.1
        return OPTIMIZERS[name](model.parameters(), **given)

    return make


def _stock(kind: Any, default: float, **more: Any) -> Callable[..., Any]:
    return lambda model, batch, rate: kind(model.parameters(), lr=default if rate is None else rate, **more)


def _imported(module: str, kind: str, default: float) -> Callable[..., Any]:
    def make(model: nn.Module, batch: int, rate: float | None) -> Any:
        return getattr(__import__(module), kind)(model.parameters(), lr=default if rate is None else rate)

    return make


def _authors_elra(model: nn.Module, batch: int, rate: float | None) -> Any:
    from elra import ElraOptimizer

    return ElraOptimizer(model.parameters(), None, batch, lr=1e-4 if rate is None else rate)


NO_RATE = ("sps", "sls", "pal")
"""Whose first rate is measured."""
METHODS: dict[str, Method] = {
    **{name: Method(_ours(name), name not in NO_RATE) for name in OPTIMIZERS},
    "sgd": Method(_stock(torch.optim.SGD, 1e-3)),
    "sgd_momentum": Method(_stock(torch.optim.SGD, 1e-3, momentum=0.9)),
    "adamw": Method(_stock(torch.optim.AdamW, 1e-3)),
    "rmsprop": Method(_stock(torch.optim.RMSprop, 1e-2)),
    "adadelta": Method(_stock(torch.optim.Adadelta, 1.0)),
    "muon": Method(lambda model, batch, rate: MuonAndAdamW(model, 1e-3 if rate is None else rate)),
    "lion": Method(_imported("lion_pytorch", "Lion", 1e-4), package="lion-pytorch"),
    "prodigy": Method(_imported("prodigyopt", "Prodigy", 1.0), package="prodigyopt"),
    "schedule_free": Method(_imported("schedulefree", "AdamWScheduleFree", 2.5e-3), package="schedulefree"),
    "elra_authors": Method(_authors_elra, package="elra==0.0.5"),
}
