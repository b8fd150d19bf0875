"""The direction of ``elra_spectral``: polar factors U·Vᵀ of matrices, and what corresponds to them for other tensors.

The functions that find the embeddings and the stacked experts of a model are here too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.nn.modules.conv import _ConvNd

from hf_elra.optim.directions import Direction, Groups

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of the Newton-Schulz iteration, as in Muon (K. Jordan et al., 2024): the polynomial is steep where
singular values are small."""
NEWTON_SCHULZ_STEPS = 5
OVER = 1e-3
"""A tensor or row without a gradient stops once its average is below this share of the largest average, which takes 66
updates at a momentum of 0.9."""


class Spectral(Direction):
    """Polar factors of averaged gradients; rows of embeddings and vectors along their own averages.

    Groups have a list of flags for each of :data:`KINDS`, one flag a parameter, and of ``shares``, by which directions
    are multiplied.

    Args:
        momentum: share of the averaged gradient that is kept at an update (Nesterov's form). With 0 there is no
            average, and an existing one is dropped.

    State per parameter: ``momentum``, the averaged gradient.
    """

    is_gradient = False

    def __init__(self, momentum: float) -> None:
        self.momentum = momentum

    def apply(
        self, groups: Groups, params: list[list[Tensor]], gradients: list[list[Tensor]], state: Any
    ) -> list[list[Tensor]]:
        """Return :func:`spectral_direction`; what has no gradient any more stops (:func:`freeze_inactive`)."""
        directions_of_groups = []
        of_all: list[list[Any]] = [[], [], [], []]
        for group, group_params, group_gradients in zip(groups, params, gradients, strict=True):
            places = {p: index for index, p in enumerate(group["params"])}
            embeddings, experts = ([group[kind][places[p]] for p in group_params] for kind in KINDS)
            averages = self.averaged(group_params, group_gradients, state)
            matrices = unstack(averages, experts)
            counts = [len(p) if is_expert else 1 for p, is_expert in zip(group_params, experts, strict=True)]
            embeddings = [flag for flag, count in zip(embeddings, counts, strict=True) for _ in range(count)]
            directions = spectral_direction(matrices, embeddings)
            parts = directions, matrices, unstack(group_gradients, experts), embeddings
            for kept, part in zip(of_all, parts, strict=True):
                kept.extend(part)
            directions_of_groups.append((directions, group_params, experts))
        if self.momentum > 0:
            freeze_inactive(*of_all)
        found = [restack(*group) for group in directions_of_groups]
        for group, group_params, directions in zip(groups, params, found, strict=True):
            shares = dict(zip(group["params"], group["shares"], strict=True))
            if any(share != 1 for share in group["shares"]) and directions:
                torch._foreach_mul_(directions, [shares[p] for p in group_params])
        return found

    def averaged(self, params: list[Tensor], gradients: list[Tensor], state: Any) -> list[Tensor]:
        """Return Nesterov's average of the gradients, which may begin at zero, as its size does not matter here."""
        if self.momentum == 0 or not params:
            for p in params:
                state[p].pop("momentum", None)
            return gradients
        for p in params:
            if "momentum" not in state[p]:
                state[p]["momentum"] = torch.zeros_like(p)
        averages = [state[p]["momentum"] for p in params]
        torch._foreach_lerp_(averages, gradients, 1 - self.momentum)
        return list(torch._foreach_lerp(averages, gradients, 1 - self.momentum))

    def sized(self, groups: Groups, params: list[list[Tensor]]) -> list[list[Tensor]]:
        """Return all matrices, with or without a gradient; all parameters if there are no matrices."""
        weights = [p for group in groups for p in group["params"]]
        matrices = [
            p
            for group in groups
            for p, is_embedding in zip(group["params"], group["embeddings"], strict=True)
            if p.dim() > 1 and not is_embedding
        ]
        return [[p for p in matrices or weights if p.numel() > 0]]


def spectral_direction(gradients: Sequence[Tensor], embeddings: Sequence[bool]) -> list[Tensor]:
    """Return directions whose elements have a mean square of one, whatever the size of the gradients.

    For a matrix it is the polar factor U·Vᵀ of its gradient, so that a rotation of the inputs or outputs of a layer
    rotates the direction. A convolution counts as a matrix of output channels by the rest. For an embedding every row
    is taken by itself, and for a vector it is the gradient. If a gradient, or a row of an embedding, is zero, so is
    the direction.

    Args:
        gradients: floating point tensors of any shapes.
        embeddings: for each, whether it is an embedding.
    """
    directions: list[Tensor] = [torch.empty(0)] * len(gradients)
    by_shape: dict[tuple[object, ...], list[int]] = {}
    for index, (gradient, embedding) in enumerate(zip(gradients, embeddings, strict=True)):
        if gradient.dim() < 2:
            directions[index] = _unit_rows(gradient.reshape(1, -1)).view_as(gradient)
        elif embedding:
            directions[index] = _unit_rows(gradient.flatten(1)).view_as(gradient)
        else:
            rows, columns = gradient.flatten(1).shape
            key = (min(rows, columns), max(rows, columns), gradient.dtype, gradient.device)
            by_shape.setdefault(key, []).append(index)
    for indices in by_shape.values():
        flat = [gradients[index].flatten(1) for index in indices]
        stacked = torch.stack([g if g.shape[0] <= g.shape[1] else g.mT for g in flat])
        factors = polar_factor(stacked)
        scale = (factors.shape[1] * factors.shape[2]) ** 0.5
        factors = factors * (scale / vector_norm(factors, dim=(1, 2), keepdim=True).clamp_min(1e-30))
        for index, g, factor in zip(indices, flat, factors, strict=True):
            whole = factor if g.shape[0] <= g.shape[1] else factor.mT
            directions[index] = whole.to(g.dtype).reshape(gradients[index].shape)
    return directions


def polar_factor(matrices: Tensor) -> Tensor:
    """Return approximately U·Vᵀ for each matrix U·S·Vᵀ: singular values become 0.7 to 1.2, or less if they were small.

    Args:
        matrices (Tensor, shape (number, rows, columns), rows <= columns): the iteration runs in bfloat16 on a GPU,
            else in their own type but at least float32, which is the type of the result. The factor of zero is zero.

    Source: Newton-Schulz iteration with the coefficients of Muon.
    """
    a, b, c = QUINTIC
    wide = torch.promote_types(matrices.dtype, torch.float32)
    x = _near_one(matrices.to(wide), (1, 2))
    x = x / vector_norm(x, dim=(1, 2), keepdim=True).clamp_min(1e-30)
    if x.is_cuda:
        x = x.bfloat16()
    for _ in range(NEWTON_SCHULZ_STEPS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.to(wide)


def freeze_inactive(
    directions: Sequence[Tensor], averaged: Sequence[Tensor], gradients: Sequence[Tensor], embeddings: Sequence[bool]
) -> None:
    """Set to zero, in place, directions that come only from gradients of long ago.

    A direction does not become shorter with the average that it is made of. Without this, something that has no
    gradient any more (the row of a rare token in an untied embedding, an expert that is not chosen) would go on as
    fast as ever. It stops when its gradient is exactly zero and its average is below a thousandth of the largest row
    of its embedding, or, for other tensors, below a thousandth of the largest root mean square of all averages.

    Args:
        directions, averaged, gradients, embeddings: one of each per parameter, as for :func:`spectral_direction`, over
            all groups of an optimizer, since they are compared with each other.
    """
    if not directions:
        return
    peaks = [_peaks(gradient, embedding) for gradient, embedding in zip(gradients, embeddings, strict=True)]
    if not torch.cat([peak.to(peaks[0].device) == 0 for peak in peaks]).any():  # one wait, and mostly the end
        return
    norms = torch._foreach_norm(list(averaged))
    sizes = torch.stack([n.to(norms[0]) / max(a.numel(), 1) ** 0.5 for n, a in zip(norms, averaged, strict=True)])
    small = (sizes < OVER * sizes.max()).tolist()
    for direction, average, peak, is_small in zip(directions, averaged, peaks, small, strict=True):
        if is_small and (peak == 0).all():
            direction.zero_()
        elif peak.numel() > 1:
            rows = vector_norm(average.flatten(1), dim=1)
            direction.flatten(1).masked_fill_(((peak == 0) & (rows < OVER * rows.max()))[:, None], 0.0)


def _peaks(gradient: Tensor, embedding: bool) -> Tensor:
    """Return the largest absolute value of every row of an embedding, or of another tensor as a whole."""
    if gradient.numel() == 0:
        return gradient.new_zeros(1)
    by_rows = gradient.flatten(1) if embedding and gradient.dim() > 1 else gradient.reshape(1, -1)
    return torch.maximum(by_rows.amax(1), -by_rows.amin(1))  # an infinity norm is ten times slower on a CPU


def embeddings_of(model: nn.Module) -> list[nn.Parameter]:
    """Return parameters of a model whose rows belong to tokens: embeddings and the output layer of a language model."""
    modules: list[Any] = [m for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
    inner = getattr(model, "module", model)  # as DistributedDataParallel wraps it
    modules.append(getattr(inner, "get_output_embeddings", lambda: None)())
    found = [getattr(module, "weight", None) for module in modules]
    return list({id(p): p for p in found if isinstance(p, nn.Parameter)}.values())


def experts_of(model: nn.Module) -> list[nn.Parameter]:
    """Return parameters of a model that hold several matrices each: those with three dimensions, as Transformers stacks
    the experts of a mixture, without those of convolutions."""
    convolved = {id(p) for m in model.modules() if isinstance(m, _ConvNd) for p in m.parameters()}
    return [p for p in model.parameters() if p.dim() == 3 and min(p.shape) > 1 and id(p) not in convolved]


KINDS: dict[str, Callable[[nn.Module], list[nn.Parameter]]] = {"embeddings": embeddings_of, "experts": experts_of}
"""Kinds of parameters with a direction of their own: the name of their argument, and the function that finds them."""


def unstack(tensors: Iterable[Tensor], stacked: Iterable[bool]) -> list[Tensor]:
    """Return views of the matrices that are stacked in some tensors, and the other tensors, in order."""
    return [part for t, is_expert in zip(tensors, stacked, strict=True) for part in (t.unbind() if is_expert else (t,))]


def restack(parts: Iterable[Tensor], tensors: Iterable[Tensor], stacked: Iterable[bool]) -> list[Tensor]:
    """Put ``parts``, which correspond to what :func:`unstack` made of some tensors, together again."""
    parts = iter(parts)
    return [
        torch.stack([next(parts) for _ in t]) if is_expert else next(parts)
        for t, is_expert in zip(tensors, stacked, strict=True)
    ]


def _near_one(tensor: Tensor, dim: tuple[int, ...]) -> Tensor:
    """Multiply by powers of two, which is exact, so that squares of very small numbers do not vanish."""
    if tensor.numel() == 0:
        return tensor
    largest = tensor.abs().amax(dim, keepdim=True)
    exponent = torch.log2(largest).floor().clamp(-120, 120)  # 2^120 is a number in float32; MPS has no frexp
    return tensor * torch.exp2(-exponent)


def _unit_rows(matrix: Tensor) -> Tensor:
    wide = _near_one(matrix.to(torch.promote_types(matrix.dtype, torch.float32)), (1,))
    norms = vector_norm(wide, dim=1, keepdim=True)
    return torch.where(norms > 0, wide * (matrix.shape[1] ** 0.5 / norms.clamp_min(1e-30)), 0.0).to(matrix.dtype)
