"""The optimizers that ours are compared with, as strong as they are known to be: one list.

Those that need a rate are given a grid of rates. The best of it is taken afterwards by the loss of validation, which is
generous to them. They are PyTorch's own, or from the packages of the extra ``peers``. What is trained, and for how
long, is up to the caller.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_elra.optim.directions.spectral import embeddings_of

WARM_UP = 0.05
"""Share of the run over which a rate goes up, where a partner has a warm-up."""
CLIPPED_AT = 1.0


@dataclass(frozen=True)
class Partner:
    """An optimizer and how people run it.

    Attributes:
        make: optimizers of a model, from a rate and the number of updates; together they are one.
        schedule: ``"cosine"`` to zero after a warm-up, ``"cosine, no warm-up"`` or ``"constant"``.
        has_rate: whether there is a rate to choose.
        needs_loss: whether a step is told the loss.
    """

    make: Callable[[nn.Module, float, int], list[torch.optim.Optimizer]]
    schedule: str = "cosine"
    has_rate: bool = True
    needs_loss: bool = False

    def factor(self, update: int, updates: int) -> float:
        """What the rate is multiplied by at an update, counted from 0."""
        if self.schedule == "constant":
            return 1.0
        begins = 0 if "no warm-up" in self.schedule else max(1, round(WARM_UP * updates))
        if update < begins:
            return (update + 1) / begins
        return 0.5 + 0.5 * math.cos(math.pi * (update - begins) / (updates - begins))


class Training:
    """A partner at work on a model.

    Args:
        partner: which.
        model: what is trained, in place.
        rate: of a partner that has one.
        updates: how many there will be.
    """

    def __init__(self, partner: Partner, model: nn.Module, rate: float | None, updates: int) -> None:
        self.partner, self.updates, self.done = partner, updates, 0
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.optimizers = partner.make(model, 1.0 if rate is None else rate, updates)
        self.rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        self._call("train")

    def step(self, loss: Tensor) -> None:
        """Make an update from the mean loss of its batch."""
        loss.backward()
        nn.utils.clip_grad_norm_(self.params, CLIPPED_AT)
        factor = self.partner.factor(self.done, self.updates)
        for optimizer, rates in zip(self.optimizers, self.rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            step: Callable[..., Any] = optimizer.step
            step(**({"loss": loss.detach()} if self.partner.needs_loss else {}))
            optimizer.zero_grad()
        self.done += 1

    def to_evaluate(self) -> None:
        """Put the point in place that the optimizer would have evaluated."""
        self._call("eval")

    def to_train(self) -> None:
        """Go on."""
        self._call("train")

    def state_bytes(self) -> int:
        """Bytes of the optimizer's tensors."""
        return sum(bytes_of(state) for o in self.optimizers for state in o.state.values())

    def _call(self, name: str) -> None:
        for optimizer in self.optimizers:
            getattr(optimizer, name, lambda: None)()


class Together(torch.optim.Optimizer):
    """Several optimizers as one, for a Trainer, whose schedule and clipping see their groups."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self.inner = optimizers
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        super().__init__([p for group in groups for p in group["params"]], {})
        self.param_groups = groups

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step with each of them."""
        for optimizer in self.inner:
            optimizer.step()


def bytes_of(kept: Any) -> int:
    """Bytes of the tensors in something, however deep."""
    if isinstance(kept, Tensor):
        return kept.numel() * kept.element_size()
    inside = kept.values() if isinstance(kept, dict) else kept if isinstance(kept, (list, tuple)) else ()
    return sum(map(bytes_of, inside))


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _groups(params: Sequence[nn.Parameter], decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices, none for vectors, as in the Trainer."""
    return [
        {"params": [p for p in params if p.dim() > 1], "weight_decay": decay},
        {"params": [p for p in params if p.dim() <= 1], "weight_decay": 0.0},
    ]


def _adamw(model: nn.Module, rate: float, updates: int) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW(_groups(_trained(model), 0.1), lr=rate, betas=(0.9, 0.95))]


def _nadamw(model: nn.Module, rate: float, updates: int) -> list[torch.optim.Optimizer]:
    return [torch.optim.NAdam(_groups(_trained(model), 0.1), lr=rate, decoupled_weight_decay=True)]


def _muon(model: nn.Module, rate: float, updates: int) -> list[torch.optim.Optimizer]:
    """Muon for hidden matrices of two dimensions, AdamW for the rest, both at the same rate."""
    params, marked = _trained(model), {id(p) for p in embeddings_of(model)}
    hidden = [p for p in params if p.dim() == 2 and id(p) not in marked]
    others = [p for p in params if all(p is not other for other in hidden)]
    found: list[torch.optim.Optimizer] = []
    if hidden:
        found.append(torch.optim.Muon(hidden, lr=rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"))
    if others:
        found.append(torch.optim.AdamW(_groups(others, 0.1), lr=rate, betas=(0.9, 0.95)))
    return found


def _soap(model: nn.Module, rate: float, updates: int) -> list[torch.optim.Optimizer]:
    from pytorch_optimizer import SOAP

    # A side of a table as long as a vocabulary is left alone, as in its paper: decomposing it takes minutes an update.
    return [SOAP(_groups(_trained(model), 0.1), lr=rate, max_precondition_dim=4096)]


def _schedule_free(model: nn.Module, rate: float, updates: int) -> list[torch.optim.Optimizer]:
    from schedulefree import AdamWScheduleFree

    warm_up = max(1, round(WARM_UP * updates))
    return [AdamWScheduleFree(_groups(_trained(model), 0.1), lr=rate, warmup_steps=warm_up)]


def _schedule_free_radam(model: nn.Module, rate: float, updates: int) -> list[torch.optim.Optimizer]:
    from schedulefree import RAdamScheduleFree

    return [RAdamScheduleFree(_groups(_trained(model), 0.1), lr=rate)]


def _prodigy_plus(model: nn.Module, rate: float, updates: int) -> list[torch.optim.Optimizer]:
    from prodigyplus import ProdigyPlusScheduleFree

    return [ProdigyPlusScheduleFree(_groups(_trained(model), 0.1))]


def _momo(model: nn.Module, rate: float, updates: int) -> list[torch.optim.Optimizer]:
    """One group, which its step asks for, so that weight decay is left out."""
    from momo import MomoAdam

    return [MomoAdam(_trained(model))]


def _mechanic(model: nn.Module, rate: float, updates: int) -> list[torch.optim.Optimizer]:
    from mechanic_pytorch import mechanize

    return [mechanize(torch.optim.AdamW)(_groups(_trained(model), 0.1), lr=1.0)]


def _prodigy(model: nn.Module, rate: float, updates: int) -> list[torch.optim.Optimizer]:
    from prodigyopt import Prodigy

    return [Prodigy(_groups(_trained(model), 0.1), safeguard_warmup=True, use_bias_correction=True)]


PARTNERS = {
    "AdamW, cosine": Partner(_adamw),
    "AdamW, constant": Partner(_adamw, "constant"),
    "NadamW, cosine": Partner(_nadamw),
    "Muon, cosine": Partner(_muon),
    "Muon, constant": Partner(_muon, "constant"),
    "SOAP, cosine": Partner(_soap),
    "schedule-free AdamW": Partner(_schedule_free, "constant"),
    "schedule-free RAdam": Partner(_schedule_free_radam, "constant"),
    "Prodigy, cosine": Partner(_prodigy, "cosine, no warm-up", has_rate=False),
    "Prodigy, schedule-free": Partner(_prodigy_plus, "constant", has_rate=False),
    "MomoAdam": Partner(_momo, "constant", has_rate=False, needs_loss=True),
    "Mechanic, cosine": Partner(_mechanic, has_rate=False),
}
"""Name → partner. ``SOAP`` is from pytorch-optimizer, others from torch, schedulefree, prodigyopt,
prodigy-plus-schedule-free, momo-opt and mechanic-pytorch."""
