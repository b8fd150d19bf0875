"""Polar factors U·Vᵀ of matrices U·S·Vᵀ, by a Newton-Schulz iteration.

Of which matrices they are taken, and what is whitened, is in ``spectral.py``.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.linalg import vector_norm

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of x, x³ and x⁵, as in Muon (K. Jordan et al., 2024): the polynomial is steep where singular values are
small."""
STEPS = 5
FEWEST_IN_BFLOAT16 = 2**14
"""Numbers of a matrix from which on a CPU that can is faster in bfloat16; one small matrix costs more there."""


def polar_factor(matrices: Tensor, dtype: str = "auto") -> Tensor:
    """Return approximately U·Vᵀ for each matrix U·S·Vᵀ: singular values become 0.7 to 1.2, or less if they were small.

    Args:
        matrices (Tensor, shape (number, rows, columns), rows <= columns): the type of the result is theirs, but at
            least float32. The factor of zero is zero.
        dtype: what the iteration runs in, as for :func:`iterates_in`.
    """
    wide = torch.promote_types(matrices.dtype, torch.float32)
    if matrices.numel() == 0:
        return matrices.to(wide)
    largest = torch.maximum(matrices.amax((1, 2), keepdim=True), -matrices.amin((1, 2), keepdim=True))
    x = near_one(matrices.to(wide), largest.to(wide))
    x /= vector_norm(x, dim=(1, 2), keepdim=True).clamp_min(1e-30)
    x = x.to(iterates_in(matrices, dtype))
    a, b, c = QUINTIC
    for _ in range(STEPS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.to(wide)


def whitening(gram: Tensor) -> Tensor:
    """Return a matrix Q with which X·Q is approximately, but for its size, the polar factor of X.

    It is the same iteration, of which XᵀX alone is needed: X may be as high as it likes, or be in pieces.

    Args:
        gram (Tensor, shape (columns, columns), float32 or float64): XᵀX. Of zero Q means nothing.
    """
    a, b, c = QUINTIC
    one = torch.zeros_like(gram).fill_diagonal_(1)
    square, found = gram / gram.trace().clamp_min(1e-30), one
    for _ in range(STEPS):
        factor = a * one + b * square + c * (square @ square)
        found, square = found @ factor, factor @ square @ factor
    return found


def iterates_in(matrices: Tensor, asked: str) -> torch.dtype:
    """Return the type in which matrices are multiplied.

    Args:
        matrices: what is multiplied, shape (number, rows, columns); the number does not matter.
        asked: ``"bfloat16"``; ``"float32"``, which means at least that; or ``"auto"`` for bfloat16 where that is
            faster. In float64 a CPU stays exact.
    """
    is_large = matrices.shape[1] * matrices.shape[2] >= FEWEST_IN_BFLOAT16
    on_a_cpu = matrices.device.type == "cpu" and matrices.dtype != torch.float64 and is_large
    is_faster = matrices.is_cuda or (on_a_cpu and multiplies_bfloat16())
    if asked == "bfloat16" or (asked == "auto" and is_faster):
        return torch.bfloat16
    return torch.promote_types(matrices.dtype, torch.float32)


@functools.cache
def multiplies_bfloat16() -> bool:
    """Return whether this CPU multiplies matrices in bfloat16 faster than in float32: in tiles (AMX, six times as fast)
    or by dot products (AVX512_BF16, four times).

    PyTorch has no public names for that; where its private ones are gone, the answer is no.
    """
    asked = [getattr(torch.cpu, f"_is_{kind}_supported", None) for kind in ("amx_tile", "avx512_bf16")]
    return torch.backends.mkldnn.is_available() and any(ask is not None and ask() for ask in asked)


def near_one(tensor: Tensor, largest: Tensor) -> Tensor:
    """Multiply by powers of two, which is exact, so that the largest value is from 1/2 to 1: squares of very small
    numbers would vanish otherwise.

    Args:
        tensor: numbers, of which ``largest`` are the largest absolute values.
    """
    exponent = (torch.log2(largest).floor() + 1).clamp(-120, 120)  # 2^120 is a number in float32; MPS has no frexp
    return tensor * torch.exp2(-exponent)
