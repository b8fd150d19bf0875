"""How far training has moved a model, as a share of its weights: a number for the logs, with any optimizer.

Matrices are compared with what they were when ``train`` was called, by a sample of their weights, so that nothing as
large as the model is kept. Of LoRA it is the product that counts, beside the frozen matrix that it is added to. What
the loss on old data does is another matter; this is what can be had without such data.
"""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_elra.optim.natural_steps import adapters_of_layer

SAMPLE = 2048
"""Numbers that are kept of a matrix, so that its distance is right within about 2 %."""


class Drift:
    """Distance from where training began, relative to the norm of the weights there.

    A resumed run begins with the model that the Trainer was made with, before the checkpoint is read: with one from
    ``from_pretrained`` that is where the run began, too.
    """

    def __init__(self) -> None:
        self._start: list[tuple[nn.Parameter, Tensor]] = []
        self._pairs: list[tuple[nn.Parameter, nn.Parameter, float]] = []
        self._size = 0.0  # the square of the norm of all matrices that are moved

    def begin(self, model: nn.Module) -> None:
        """Remember where the matrices are that are trained, and which pairs of LoRA are."""
        self._pairs, self._size, beside = [], 0.0, set()
        for module in model.modules():
            base = getattr(getattr(module, "base_layer", None), "weight", None)
            for first, second, factor in adapters_of_layer(module):
                beside |= {id(first), id(second)}
                if isinstance(base, Tensor) and base.is_floating_point() and first.dim() == 2 and first.requires_grad:
                    self._pairs.append((first, second, factor))
                    self._size += _square(base)
        trained = [p for p in model.parameters() if p.requires_grad and p.dim() > 1 and p.numel() > 0]
        self._start = [(p, _sample(p)) for p in trained if id(p) not in beside and not isinstance(p, DTensor)]
        self._size += sum(_square(start) * p.numel() / len(start) for p, start in self._start)

    def measure(self) -> float | None:
        """Return the distance over the norm; None where nothing is known, or parameters were sharded since."""
        pairs = [p for pair in self._pairs for p in pair[:2]]
        if self._size == 0 or any(isinstance(p, DTensor) or p.numel() == 0 for p in [*pairs, *dict(self._start)]):
            return None
        squares = [(_sample(p) - start).square().sum() * (p.numel() / len(start)) for p, start in self._start]
        for first, second, factor in self._pairs:
            a, b = first.detach().float(), second.detach().float()
            squares.append(factor**2 * ((b.mT @ b) * (a @ a.mT)).sum())  # of ‖B·A‖, without the product
        return math.sqrt(max(sum(float(square) for square in squares), 0.0) / self._size)


def _square(tensor: Tensor) -> float:
    return float(tensor.detach().float().square().sum())


def _sample(parameter: Tensor) -> Tensor:
    """Numbers at equal distances, which have no factor in common with most widths, in float32."""
    flat = parameter.detach().reshape(-1)
    stride = max(flat.numel() // SAMPLE, 1)
    return flat[:: stride + (stride % 2 == 0)].float().clone()
