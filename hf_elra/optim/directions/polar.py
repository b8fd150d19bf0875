"""Polar factors U·Vᵀ of matrices U·S·Vᵀ, by a Newton-Schulz iteration.

Of which matrices they are taken is in ``spectral.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.linalg import vector_norm

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of x, x³ and x⁵, as in Muon (K. Jordan et al., 2024): the polynomial is steep where singular values are
small."""
STEPS = 5


def polar_factor(matrices: Tensor) -> Tensor:
    """Return approximately U·Vᵀ for each matrix U·S·Vᵀ: singular values become 0.7 to 1.2, or less if they were small.

    Args:
        matrices (Tensor, shape (number, rows, columns), rows <= columns): the iteration runs in bfloat16 on a GPU,
            else in their own type but at least float32, which is the type of the result. The factor of zero is zero.
    """
    wide = torch.promote_types(matrices.dtype, torch.float32)
    if matrices.numel() == 0:
        return matrices.to(wide)
    largest = torch.maximum(matrices.amax((1, 2), keepdim=True), -matrices.amin((1, 2), keepdim=True))
    x = near_one(matrices.to(wide), largest.to(wide))
    x = x / vector_norm(x, dim=(1, 2), keepdim=True).clamp_min(1e-30)
    if x.is_cuda:
        x = x.bfloat16()
    a, b, c = QUINTIC
    for _ in range(STEPS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.to(wide)


def near_one(tensor: Tensor, largest: Tensor) -> Tensor:
    """Multiply by powers of two, which is exact, so that the largest value is from 1/2 to 1: squares of very small
    numbers would vanish otherwise.

    Args:
        tensor: numbers, of which ``largest`` are the largest absolute values.
    """
    exponent = (torch.log2(largest).floor() + 1).clamp(-120, 120)  # 2^120 is a number in float32; MPS has no frexp
    return tensor * torch.exp2(-exponent)
