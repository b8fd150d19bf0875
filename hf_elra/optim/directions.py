"""Directions: what an update steps along.

A direction turns the gradients of one update into tensors of the same shapes; the step is x ← x - α·direction. ELRA's
is the gradient itself; ``elra_spectral`` follows :func:`spectral_direction`. Step sizes and guards live elsewhere and
do not care which direction is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Direction = Callable[[list[Tensor]], list[Tensor]]

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of the Newton-Schulz iteration, those of Muon (K. Jordan et al., 2024): steep where singular values are
small."""
NEWTON_SCHULZ_STEPS = 5


def gradient_direction(gradients: list[Tensor]) -> list[Tensor]:
    """Steepest descent: the direction is the gradient (ELRA, eq. 2)."""
    return gradients


def spectral_direction(gradients: Sequence[Tensor], tables: Sequence[bool]) -> list[Tensor]:
    """Return directions whose elements have a mean square of one, whatever the size of the gradients.

    Of a matrix (and of a convolution, as output channels by the rest) the polar factor U·Vᵀ of its gradient, so that a
    rotation of a layer's inputs or outputs rotates the direction; of a table, as of an embedding, every row by itself;
    of vectors the gradient. Where a gradient, or a row of a table's, is zero, so is the direction.

    Args:
        gradients: floating point tensors of any shapes.
        tables: of each, whether it is a table.
    """
    directions: list[Tensor] = [torch.empty(0)] * len(gradients)
    by_shape: dict[tuple[object, ...], list[int]] = {}
    for index, (gradient, table) in enumerate(zip(gradients, tables, strict=True)):
        if gradient.dim() < 2:
            directions[index] = _unit_rows(gradient.reshape(1, -1)).view_as(gradient)
        elif table:
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
        factors = factors * (scale / factors.norm(dim=(1, 2), keepdim=True).clamp_min(1e-30))
        for index, g, factor in zip(indices, flat, factors, strict=True):
            whole = factor if g.shape[0] <= g.shape[1] else factor.mT
            directions[index] = whole.to(g.dtype).reshape(gradients[index].shape)
    return directions


def polar_factor(matrices: Tensor) -> Tensor:
    """Return U·Vᵀ of each matrix U·S·Vᵀ, nearly: its singular values are between 0.7 and 1.2, small ones less.

    Args:
        matrices (Tensor, shape (number, rows, columns), rows <= columns): iterated in bfloat16 on a GPU, otherwise in
            their own type but at least float32; the result is of the latter.

    Source: Newton-Schulz iteration with the coefficients of Muon.
    """
    a, b, c = QUINTIC
    wide = torch.promote_types(matrices.dtype, torch.float32)
    x = matrices.to(wide)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-30)
    if x.is_cuda:
        x = x.bfloat16()
    for _ in range(NEWTON_SCHULZ_STEPS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.to(wide)


def tables_of(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a model whose rows belong to tokens: embeddings, and a language model's output layer."""
    modules: list[Any] = [m for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
    modules.append(getattr(model, "get_output_embeddings", lambda: None)())
    found = [getattr(module, "weight", None) for module in modules]
    return list({id(p): p for p in found if isinstance(p, nn.Parameter)}.values())


def _unit_rows(matrix: Tensor) -> Tensor:
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    norms = wide.norm(dim=1, keepdim=True)
    return torch.where(norms > 0, wide * (matrix.shape[1] ** 0.5 / norms.clamp_min(1e-30)), 0.0).to(matrix.dtype)
