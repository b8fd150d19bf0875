"""One operation on many tensors by few launches, where a launch costs more than its work: on a GPU.

``spectral.py`` in ``directions/`` and ``on_device.py`` ask :func:`pays`, and do the same tensor by tensor elsewhere.
Here are products, averages and steps by torch's ``foreach`` functions, a bounded number of numbers at once, as
half-precision tensors need copies in float32. Shards come as what is here of them (``tensors.local``). Nothing here
waits for a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_elra.optim.tensors import flat, wide

Pairs = Sequence[tuple[Tensor, Tensor]]
"""Pairs of tensors of equal shapes."""
DEVICES = {"cuda", "xpu"}
"""Kinds of devices on which the host hands an operation over, which takes it longer than a small one lasts."""
AT_ONCE = 2**26
"""Numbers, at most, of which copies are made at once, if not of one tensor."""
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Types to see the bits of floating point numbers of so many bytes."""


def pays(tensors: Sequence[Tensor]) -> bool:
    """Return whether to take tensors together."""
    return len(tensors) > 1 and all(t.device.type in DEVICES for t in tensors)


def lots(*lists: Sequence[Tensor]) -> Iterator[tuple[list[Tensor], ...]]:
    """Yield lists of corresponding tensors, alike in types and device, of :data:`AT_ONCE` numbers at most.

    Empty tensors are left out.

    Args:
        lists: tensors of equal shapes at equal places.
    """
    alike: dict[Any, list[tuple[Tensor, ...]]] = {}
    for row in zip(*lists, strict=True):
        if row[0].numel() > 0:
            alike.setdefault((row[0].device, *(t.dtype for t in row)), []).append(row)
    for rows in alike.values():
        lot: list[tuple[Tensor, ...]] = []
        number = 0
        for row in rows:
            if lot and number + row[0].numel() > AT_ONCE:
                yield tuple(map(list, zip(*lot, strict=True)))
                lot, number = [], 0
            lot.append(row)
            number += row[0].numel()
        yield tuple(map(list, zip(*lot, strict=True)))


def at_once(work: Callable[..., Tensor], *lists: Sequence[Tensor]) -> list[Tensor]:
    """Return what an elementwise function makes of corresponding vectors of one device, which are short."""
    found = work(*(torch.cat([t.reshape(-1) for t in vectors]) for vectors in lists))
    return list(found.split([t.numel() for t in lists[0]]))


def copies(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return copies in a type."""
    made = [torch.empty_like(t, dtype=dtype) for t in tensors]
    torch._foreach_copy_(made, list(tensors))
    return made


def in_type(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return tensors in a type: themselves where they have it already."""
    return list(tensors) if tensors[0].dtype == dtype else copies(tensors, dtype)


def sum_of_products(pairs: Pairs, dtype: torch.dtype) -> Tensor:
    """Return Σ⟨l, r⟩ as a tensor of no dimensions of a type; every lot is added up in the wider type of both."""
    total = torch.zeros((), dtype=dtype, device=pairs[0][0].device)
    for left, right in lots(*zip(*pairs, strict=True)):
        of_lot = wide(torch.promote_types(left[0].dtype, right[0].dtype))
        if all(x is y for x, y in zip(left, right, strict=True)):
            found = torch.stack(torch._foreach_norm(left, 2, of_lot)).to(dtype).square().sum()
        else:
            vectors = [flat(x, y) for x, y in zip(left, right, strict=True)]
            first, second = (_joined(list(side), of_lot) for side in zip(*vectors, strict=True))
            found = torch.dot(first, second).to(dtype)
        total = total + found
    return total


def _joined(vectors: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Return vectors in one, in a type."""
    sizes = [v.numel() for v in vectors]
    joined = torch.empty(sum(sizes), dtype=dtype, device=vectors[0].device)
    torch._foreach_copy_(list(joined.split(sizes)), vectors)
    return joined


def largest(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the largest absolute value of every tensor, 0 of an empty one."""
    values = {
        id(t): value
        for (lot,) in lots(tensors)
        for t, value in zip(lot, torch._foreach_norm(lot, float("inf")), strict=True)
    }
    return [values[id(t)] if id(t) in values else t.new_zeros(()) for t in tensors]


def counted(tensors: Sequence[Tensor], counts: Tensor) -> list[Tensor]:
    """Return copies of tensors where they count and zeros where not, whatever they hold: NaN times zero would be NaN.

    Args:
        tensors: of one type.
        counts: True or False, of no dimensions.
    """
    bits = INTEGERS[tensors[0].element_size()]
    found = torch._foreach_mul([t.view(bits) for t in tensors], counts.to(bits))
    return [t.view(tensors[0].dtype) for t in found]


def average(
    averages: Sequence[Tensor],
    gradients: Sequence[Tensor],
    ahead: Sequence[Tensor],
    momentum: float,
    counts: Tensor | None,
) -> None:
    """ā ← m·ā + (1 - m)·g, and Nesterov's m·ā + (1 - m)·g of it, both in place.

    Args:
        averages, gradients: of equal shapes.
        ahead: of equal shapes, for the second.
        momentum: m.
        counts: whether gradients count, of no dimensions; None for yes. Where not, averages stay.
    """
    for old, new, further in lots(averages, gradients, ahead):
        dtype = wide(old[0].dtype)
        exact = copies(old, dtype)
        taken = in_type(new if counts is None else counted(new, counts), dtype)
        for target in (old, further):
            if counts is None:
                torch._foreach_lerp_(exact, taken, 1 - momentum)
            else:
                change = torch._foreach_sub(taken, exact)
                torch._foreach_mul_(change, counts.to(dtype) * (1 - momentum))
                torch._foreach_add_(exact, change)
            torch._foreach_copy_(target, exact)


def replace(pairs: Pairs, where: Tensor) -> None:
    """Give the first of every pair the values of the second, where a number of the device is True; all are finite."""
    for old, new in lots(*zip(*pairs, strict=True)):
        dtype = old[0].dtype
        taken = torch._foreach_mul(in_type(new, dtype), where.to(dtype))
        torch._foreach_mul_(old, where.logical_not().to(dtype))
        torch._foreach_add_(old, taken)


def move(pairs: Pairs, kept: Tensor | None, along: Tensor) -> None:
    """x ← kept·x + along·u in place for pairs (x, u), rounded once to the type of x; None for 1."""
    for points, lines in lots(*zip(*pairs, strict=True)):
        dtype = wide(points[0].dtype)
        steps, moved = copies(lines, dtype), in_type(points, dtype)
        torch._foreach_mul_(steps, along.to(dtype))
        if kept is not None:
            torch._foreach_mul_(moved, kept.to(dtype))
        torch._foreach_add_(moved, steps)
        if moved[0] is not points[0]:
            torch._foreach_copy_(points, moved)
