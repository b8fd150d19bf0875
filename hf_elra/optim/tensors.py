"""Sums and updates over lists of tensors, on any device: the plain paths, which are always right.

This module chooses between ``foreach`` and single tensors, and handles shards of DTensors and memory order. ``base.py``
decides what is summed and what a step is. The CUDA kernels that do the same without the host are in ``kernels/``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

PIECE = 2**18
"""How many numbers of a tensor are taken at once on a CPU: this many of two tensors stay in the cache of a core."""


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that is on this process: the local shard of a DTensor, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which is computed what is kept in another one: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def flat(*tensors: Tensor) -> list[Tensor]:
    """Return tensors of one shape as vectors with elements in the same order; views if possible, else copies."""
    if all(t.is_contiguous() for t in tensors):
        return [t.view(-1) for t in tensors]
    if is_dense(tensors[0]) and all(layout(t) == layout(tensors[0]) for t in tensors):
        return [t.as_strided((t.numel(),), (1,)) for t in tensors]
    return [t.reshape(-1) for t in tensors]


def in_pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield parts of tensors of one shape, to read and to write: on a CPU as many numbers at once as :data:`PIECE`.

    What is made of a piece stays in the cache, and needs little memory. Elsewhere, and where memory orders differ, all
    is one piece.
    """
    first = tensors[0]
    alike = all(t.is_contiguous() for t in tensors) or (
        is_dense(first) and all(layout(t) == layout(first) for t in tensors)
    )
    if first.device.type != "cpu" or first.numel() <= PIECE or not alike:
        yield tensors
        return
    yield from zip(*(vector.split(PIECE) for vector in flat(*tensors)), strict=True)


def is_dense(tensor: Tensor) -> bool:
    """Return whether a tensor fills one piece of memory without gaps, in any order of its dimensions."""
    expected = 1
    for stride, size in sorted(layout(tensor)):
        if stride != expected:
            return False
        expected *= size
    return True


def layout(tensor: Tensor) -> list[tuple[int, int]]:
    """Return stride and size of every dimension with more than one element; equal results mean equal memory orders."""
    return [(stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size != 1]


def accumulates_in(device: torch.device | str) -> torch.dtype:
    """Return the widest type in which a device can add numbers up: Apple's MPS has no float64."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


def squares_and_products(
    lefts: Sequence[Tensor],
    rights: Iterable[Tensor | None],
    *,
    minus: Sequence[Tensor] | None = None,
) -> tuple[float, float]:
    """Return Σ⟨l, l⟩ and Σ⟨l, r⟩ over pairs of equal shapes; a pair without ``r`` counts in the first sum only.

    Each product is taken in the tensors' own precision but at least float32; sums over tensors are taken in float64, on
    the host. On a CPU both products are taken piece by piece, so that every number comes from memory once. For
    DTensors the shards are multiplied and the sums are added up over the mesh.

    Args:
        lefts: tensors, or DTensors that are sharded or replicated.
        rights: as many; they may be made one at a time.
        minus: as many; if given, r - m takes the place of r.
    """
    sums: dict[Any, list[list[Any]]] = {}
    for index, (left, right) in enumerate(zip(lefts, rights, strict=True)):
        less = minus[index] if minus is not None and right is not None else None
        members: list[Any] = [None if t is None else local(t) for t in (left, right, less)]
        totals = sums.setdefault((local(left).device, shard_groups(left)), [[], []])
        square, product = _square_and_product(*members)
        totals[0].append(square)
        totals[1].append(product)
    result = [0.0, 0.0]
    for (device, groups), totals in sums.items():
        numbers = _add_up(totals, device)
        for group in groups:
            over_mesh = torch.tensor(numbers, dtype=accumulates_in(device), device=device)
            dist.all_reduce(over_mesh, group=group)
            numbers = over_mesh.tolist()
        result = [total + number for total, number in zip(result, numbers, strict=True)]
    return result[0], result[1]


def dot(lefts: Sequence[Tensor], rights: Iterable[Tensor]) -> float:
    """Return Σ⟨l, r⟩; see :func:`squares_and_products`."""
    return squares_and_products(lefts, rights)[1]


def mean_over_processes(numbers: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Replace ``numbers`` by their mean over the processes of a group, and return them."""
    dist.all_reduce(numbers, group=group)
    return numbers.div_(dist.get_world_size(group))


def _square_and_product(left: Tensor, right: Tensor | None, minus: Tensor | None) -> tuple[Any, Any]:
    """Return ⟨l, l⟩ and ⟨l, r⟩ of one pair: floats on a CPU, tensors elsewhere, so that no device is waited for."""
    others = [t if t.device == left.device else t.to(left.device) for t in (right, minus) if t is not None]
    x, *rest = flat(left, *others)
    wide = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.promote_types(x.dtype, torch.float32)
    if x.device.type != "cpu":
        return _products_of_piece(x, rest, wide)
    squares = products = 0.0
    for start in range(0, x.numel(), PIECE):
        if x.numel() > PIECE:
            parts = [v[start : start + PIECE] for v in (x, *rest)]
            square, product = _products_of_piece(parts[0], parts[1:], wide)
        else:
            square, product = _products_of_piece(x, rest, wide)
        squares += square.item()
        products += 0.0 if product is None else product.item()
    return squares, products


def _products_of_piece(x: Tensor, rest: list[Tensor], wide: torch.dtype) -> tuple[Tensor, Tensor | None]:
    if x.dtype != wide:
        x = x.to(wide)
    square = torch.dot(x, x)
    if not rest:
        return square, None
    y = rest[0] if rest[0].dtype == wide else rest[0].to(wide)
    if len(rest) == 2:
        y = y - rest[1].to(wide)
    return square, torch.dot(x, y)


def _add_up(totals: list[list[Any]], device: torch.device) -> list[float]:
    """Return sums of numbers, which are tensors on a device or floats on a CPU; None counts as 0."""
    if device.type != "cpu":  # fetch all at once
        numbers = iter(torch.stack([v for row in totals for v in row if v is not None]).tolist())
        totals = [[None if v is None else next(numbers) for v in row] for row in totals]
    return [sum(v for v in row if v is not None) for row in totals]


def shard_groups(
    tensor: Tensor, along: Callable[[int], bool] = lambda dimension: True
) -> tuple[dist.ProcessGroup, ...]:
    """Return the process groups over which a tensor is split, along dimensions that ``along`` chooses."""
    if not isinstance(tensor, DTensor):
        return ()
    if any(placement.is_partial() for placement in tensor.placements):
        raise RuntimeError(
            f"ELRA cannot use a gradient that is still to be summed over processes (placements {tensor.placements}); "
            "redistribute it first."
        )
    mesh, placements = tensor.device_mesh, cast(tuple[Any, ...], tensor.placements)
    return tuple(
        mesh.get_group(dimension)
        for dimension, placement in enumerate(placements)
        if not placement.is_replicate() and mesh.size(dimension) > 1 and along(placement.dim)
    )


def descend(
    params: Sequence[Tensor],
    directions: Sequence[Tensor],
    step_size: float,
    decay: float,
    *,
    foreach: bool | None,
    rounding_seed: int | None = None,
) -> None:
    """x ← (1 - decay)·x - step_size·u for all pairs, in place; parts that would change nothing are skipped.

    Args:
        params, directions: tensors of equal shapes and types.
        step_size: step size of this update.
        decay: share of the parameters that this update takes off.
        foreach: False for one tensor at a time.
        rounding_seed: round bfloat16 parameters stochastically, with random numbers from this seed, and alike where
            processes have the same part of a parameter; None: to nearest.
    """
    pairs = [(local(p), local(u)) for p, u in zip(params, directions, strict=True)]
    if rounding_seed is not None and (decay != 0 or step_size != 0):
        generators: dict[torch.device, torch.Generator] = {}
        for number, (p, (x, u)) in enumerate(zip(params, pairs, strict=True)):
            if x.dtype != torch.bfloat16:
                continue
            if isinstance(p, DTensor):
                generator = torch.Generator(x.device).manual_seed(seed_of_part(p, rounding_seed, number))
            else:
                if x.device not in generators:
                    generators[x.device] = torch.Generator(x.device).manual_seed(rounding_seed)
                generator = generators[x.device]
            wide = (1 - decay) * x.float() - step_size * u.float()
            x.copy_(stochastically_rounded(wide, generator))
        pairs = [pair for pair in pairs if pair[0].dtype != torch.bfloat16]
    for x, u in [pair for pair in pairs if pair[0].dtype != pair[1].dtype]:  # foreach functions would copy all of u
        for part, along in in_pieces(x, u):
            if decay != 0:
                part.mul_(1 - decay)
            if step_size != 0:
                part.add_(along, alpha=-step_size)
    pairs = [pair for pair in pairs if pair[0].dtype == pair[1].dtype]
    lots = [[pair] for pair in pairs] if foreach is False else [pairs] if pairs else []
    for lot in lots:
        xs, us = zip(*lot, strict=True)
        if decay != 0:
            torch._foreach_mul_(xs, 1 - decay)
        if step_size != 0:
            torch._foreach_add_(xs, us, alpha=-step_size)


def seed_of_part(tensor: DTensor, seed: int, number: int) -> int:
    """Return a seed for the part of a tensor that is here: that of its copies on other processes, and of no other part.

    One generator for all would part ways with other processes after a tensor of which they have more or less.

    Args:
        tensor: split over processes.
        seed: of the update.
        number: of the tensor in the update.
    """
    mesh = tensor.device_mesh
    place = 0
    for dimension, placement in enumerate(tensor.placements):
        if not placement.is_replicate():
            place = place * mesh.size(dimension) + mesh.get_local_rank(dimension)
    return hash((seed, number, place)) % 2**63


def lost_in_rounding(params: Sequence[Tensor], directions: Sequence[Tensor], step_size: float) -> float:
    """Return the largest share, over bfloat16 parameters, of numbers that a step x - step_size·u would not move."""
    shares = []
    for p, u in zip(params, directions, strict=True):
        x, along = local(p), local(u)
        if x.dtype == torch.bfloat16 and x.numel() > 0 and step_size != 0:
            moves = along != 0
            stays = (x.float() - step_size * along.float()).to(x.dtype) == x
            shares.append((moves & stays).sum() / moves.sum().clamp(min=1))
    return max((float(share) for share in shares), default=0.0)  # queue all before waiting for the first


def stochastically_rounded(values: Tensor, generator: torch.Generator) -> Tensor:
    """Round float32 to bfloat16, up or down with probabilities that make the result right on average.

    bfloat16 is the upper half of a float32: a random number added to the lower half carries into the upper one just
    often enough. What is not finite stays as it is.
    """
    bits = values.view(torch.int32)
    noise = torch.randint(0, 2**16, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    rounded = ((bits + noise) & -(2**16)).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)
