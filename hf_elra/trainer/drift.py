"""How far training has moved a model, as a share of its weights: a number for the logs, with any optimizer.

Matrices are compared with what they were when ``train`` was called, by a sample of their weights, so that nothing as
large as the model is kept. Of LoRA it is the product that counts, beside the frozen matrix that it is added to. What
the loss on old data does is another matter; this is what can be had without such data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_elra.optim.natural_steps import adapters_of

SAMPLE = 2048
"""Numbers that are kept of a matrix, so that its distance is right within about 2 %."""


class Drift:
    """Distance from where training began, relative to the norm of the weights there.

    A resumed run begins with the model that the Trainer was made with, before the checkpoint is read: with one from
    ``from_pretrained`` that is where the run began, too.
    """

    def __init__(self) -> None:
        self._start: dict[str, Tensor] = {}  # by name: parameters may be replaced, and kept ones would not be freed
        self._size = 0.0  # the square of the norm of all matrices that are moved

    def begin(self, model: nn.Module) -> None:
        """Remember where the matrices are that are trained."""
        pairs = list(_pairs(model))
        beside = {id(p) for pair in adapters_of(model) for p in pair[:2]}
        self._start = {
            name: _sample(p)
            for name, p in model.named_parameters()
            if p.requires_grad and p.dim() > 1 and p.numel() > 0 and id(p) not in beside and not isinstance(p, DTensor)
        }
        shares = {
            name: p.numel() / len(self._start[name]) for name, p in model.named_parameters() if name in self._start
        }
        squares = [start.square().sum() * shares[name] for name, start in self._start.items()]
        self._size = _sum([*squares, *(base.detach().float().square().sum() for base, _ in pairs)])

    def measure(self, model: nn.Module) -> float | None:
        """Return the distance over the norm; None where nothing is known, or parameters are split over processes."""
        params, pairs = dict(model.named_parameters()), list(_pairs(model))
        compared = [params.get(name) for name in self._start] + [p for _, pair in pairs for p in pair[:2]]
        if self._size == 0 or any(p is None or isinstance(p, DTensor) or p.numel() == 0 for p in compared):
            return None
        squares = [
            (_sample(params[name]) - start).square().sum() * (params[name].numel() / len(start))
            for name, start in self._start.items()
        ]
        for _, (first, second, factor) in pairs:
            a, b = first.detach().float(), second.detach().float()
            squares.append(factor**2 * ((b.mT @ b) * (a @ a.mT)).sum())  # of ‖B·A‖, without the product
        return math.sqrt(max(_sum(squares), 0.0) / self._size)


def _pairs(model: nn.Module) -> Iterator[tuple[Tensor, tuple[nn.Parameter, nn.Parameter, float]]]:
    """The pairs of LoRA that are trained, each with the matrix beside it: the matrix; A, B and their factor."""
    for first, second, factor, base in adapters_of(model):
        if base is not None and first.dim() == 2 and first.requires_grad:
            yield base, (first, second, factor)


def _sum(numbers: Sequence[Tensor]) -> float:
    """Add numbers up that may be on several devices, with one wait."""
    return float(torch.stack([number.to(numbers[0].device) for number in numbers]).sum()) if numbers else 0.0


def _sample(parameter: Tensor) -> Tensor:
    """Numbers at equal distances, which have no factor in common with most widths, in float32."""
    flat = parameter.detach().reshape(-1)
    stride = max(flat.numel() // SAMPLE, 1)
    return flat[:: stride + (stride % 2 == 0)].float().clone()
