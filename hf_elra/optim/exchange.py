"""Whole matrices are computed once each, by one process of all that hold a part of them or a copy.

Their parts go to that process and what is made of them comes back, by calls of ``torch.distributed`` that are not
waited for before something else has been computed. What is a matrix, and who holds it, ``shards.py`` finds; what is
computed is not known here (``directions/spectral.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

Waiting = Generator[None, None, Tensor]
"""Work on a batch. It stops where its transfer is under way, and waits for that when it is asked to go on."""


class Piece(NamedTuple):
    """One matrix, or what this process has of it.

    Attributes:
        values: the part of it that is here; all of it without a mesh.
        shape: of the whole matrix.
        mesh: the processes that hold the matrix.
        placements: how they do, of every dimension of the mesh: ``Shard`` or ``Replicate``, or None where each process
            has matrices of its own.
    """

    values: Tensor
    shape: tuple[int, ...]
    mesh: DeviceMesh | None = None
    placements: tuple[Any, ...] = ()

    @property
    def kind(self) -> tuple[Any, ...]:
        """Pieces of one kind can be in one batch."""
        return self.shape, self.values.dtype, self.values.device, self.mesh, self.placements


def each_once(pieces: Sequence[Piece], compute: Callable[[Tensor], Tensor], *, most: int) -> list[Tensor]:
    """Return what ``compute`` makes of every matrix, as much of it as this process has of the matrix.

    While a batch is computed, the parts of the next one are on their way here, and the results of the one before on
    their way back.

    Args:
        pieces: the same matrices in the same order on all processes of a mesh.
        compute: is given a batch of whole matrices, shape (number, ...) and maybe empty, and returns one of this shape
            and type; what becomes of a matrix must not depend on the others.
        most: how many numbers a process computes at once at most, if they are of more than one matrix.
    """
    results: list[Any] = [None] * len(pieces)
    for batches in _batches(pieces, most):
        under_way: list[tuple[list[int], Waiting]] = []
        coming = iter(batches)
        while True:
            batch = next(coming, None)
            if batch is not None:
                under_way.append((batch, _of_batch([pieces[index] for index in batch], compute)))
            if not under_way:
                break
            for entry in under_way[::-1]:  # first the parts of the new one are sent, then an older one is computed
                indices, work = entry
                try:
                    next(work)
                except StopIteration as end:
                    under_way.remove(entry)
                    for index, result in zip(indices, end.value.unbind(), strict=True):
                        results[index] = result
    return results


def _batches(pieces: Sequence[Piece], most: int) -> Iterator[list[list[int]]]:
    """Yield batches of the places of pieces, those of the same processes in turn.

    Batches of others are never under way beside them: who is not among both would see transfers in another order.
    """
    lots: dict[Any, dict[tuple[Any, ...], list[int]]] = {}
    for index, piece in enumerate(pieces):
        of_all = piece.mesh, tuple(placement is None for placement in piece.placements)
        lots.setdefault(of_all, {}).setdefault(piece.kind, []).append(index)
    for of_processes in lots.values():
        found = []
        for indices in of_processes.values():
            first = pieces[indices[0]]
            number = max(1, most // max(1, math.prod(first.shape))) * math.prod(way.size for way in _ways(first))
            found += [indices[start : start + number] for start in range(0, len(indices), number)]
        yield found


class _Way(NamedTuple):
    """How the processes along one dimension of a mesh hold matrices.

    Attributes:
        group: the processes.
        size: how many they are.
        rank: the number of this one.
        dim: the dimension of a matrix that is split over them; None for copies.
        parts: how much of this dimension each process has; empty for copies.
    """

    group: dist.ProcessGroup
    size: int
    rank: int
    dim: int | None = None
    parts: Sequence[int] = ()


def _ways(piece: Piece) -> list[_Way]:
    """Return what matters to a piece: copies first, as they share the work without a transfer; then splits, the last
    one first, as it parted what the others had left."""
    copied, split, shape = list[_Way](), list[_Way](), list(piece.shape)
    mesh = piece.mesh
    for number, placement in enumerate(piece.placements):
        if mesh is None or placement is None or mesh.size(number) == 1:
            continue
        size, rank, group = mesh.size(number), mesh.get_local_rank(number), mesh.get_group(number)
        if placement.is_shard():
            parts = _parted(shape[placement.dim], size)
            split.append(_Way(group, size, rank, placement.dim, parts))
            shape[placement.dim] = parts[rank]
        else:
            copied.append(_Way(group, size, rank))
    return copied + split[::-1]


def _of_batch(pieces: Sequence[Piece], compute: Callable[[Tensor], Tensor]) -> Waiting:
    """Make the result of :func:`each_once` of pieces of one kind."""
    ways, mine = _ways(pieces[0]), list(pieces)
    numbers = list[list[int]]()  # of every way, how many matrices each process gets
    for way in ways:
        if way.dim is None:
            numbers.append(_parted(len(mine), way.size))
            begins = sum(numbers[-1][: way.rank])
            mine = mine[begins : begins + numbers[-1][way.rank]]
    values = [piece.values for piece in mine]
    batch = torch.stack(values) if values else pieces[0].values.new_empty((0, *pieces[0].values.shape))
    for way in ways[len(numbers) :]:
        numbers.append(_parted(len(batch), way.size))
        batch = yield from _to_matrices(batch, numbers[-1], way)
    batch = compute(batch)
    for way, of_each in zip(ways[::-1], numbers[::-1], strict=True):
        batch = yield from (_to_all if way.dim is None else _to_parts)(batch, of_each, way)
    return batch


def _parted(length: int, processes: int) -> list[int]:
    """Return how much of a length each process gets, as ``Shard`` and ``Tensor.chunk`` have it."""
    most = math.ceil(length / processes)
    return [min(most, max(0, length - most * rank)) for rank in range(processes)]


def _to_matrices(batch: Tensor, numbers: list[int], way: _Way) -> Waiting:
    """Exchange parts of all matrices for all parts of some.

    Args:
        batch: shape (all matrices, ...), of every matrix the part that this process has.
        numbers: how many of the matrices each process gets.
        way: who has the other parts.
    """
    assert way.dim is not None
    shape, dim = list(batch.shape[1:]), way.dim
    shapes = [[numbers[way.rank], *shape[:dim], part, *shape[dim + 1 :]] for part in way.parts]
    given = [number * math.prod(shape) for number in numbers]
    taken = [math.prod(of_one) for of_one in shapes]
    found = yield from _exchanged(batch.reshape(-1), given, taken, way.group)
    return torch.cat([values.view(of_one) for values, of_one in zip(found.split(taken), shapes, strict=True)], dim + 1)


def _to_parts(batch: Tensor, numbers: list[int], way: _Way) -> Waiting:
    """Undo :func:`_to_matrices`: exchange all of some matrices for a part of each."""
    assert way.dim is not None
    shape = list(batch.shape[1:])
    shape[way.dim] = way.parts[way.rank]
    leaving = [values.reshape(-1) for values in batch.split(list(way.parts), way.dim + 1)]
    taken = [number * math.prod(shape) for number in numbers]
    found = yield from _exchanged(torch.cat(leaving), [len(values) for values in leaving], taken, way.group)
    return found.view(sum(numbers), *shape)


def _to_all(batch: Tensor, numbers: list[int], way: _Way) -> Waiting:
    """Tell all processes of a group what each has made of its share of matrices."""
    most = max(numbers)
    sent = torch.cat([batch, batch.new_zeros(most - len(batch), *batch.shape[1:])]) if len(batch) < most else batch
    found = batch.new_empty(most * way.size, *batch.shape[1:])
    into, source = _bytes(found.view(-1)), _bytes(sent.reshape(-1))
    transfer = dist.all_gather_into_tensor(into, source, group=way.group, async_op=True)
    yield
    transfer.wait()
    return found[: sum(numbers)]  # only the last processes have less than the most


def _exchanged(values: Tensor, given: list[int], taken: list[int], group: dist.ProcessGroup) -> Waiting:
    """Give every process a part of a flat tensor, and take as many numbers of each as is said."""
    found, width = values.new_empty(sum(taken)), values.element_size()
    sent, into = _bytes(values), _bytes(found)
    transfer = dist.all_to_all_single(
        into, sent, [width * n for n in taken], [width * n for n in given], group=group, async_op=True
    )
    yield
    transfer.wait()
    return found


def _bytes(values: Tensor) -> Tensor:
    """Return a flat tensor as bytes, which every backend moves, whatever they mean."""
    return values.view(torch.uint8)
