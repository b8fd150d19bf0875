"""What needs whole tensors, or numbers over whole tensors, of parameters that are split over processes.

Which matrices there are and who holds them is found here; ``exchange.py`` brings them together. ``tensors.py`` has the
sums over all parameters, and knows shards too. What is computed is not known here (``directions/spectral.py``).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from hf_elra.errors import ConfigurationError
from hf_elra.optim.exchange import Piece
from hf_elra.optim.tensors import local, shard_groups


def pieces_of(tensor: Tensor, *, stacked: bool, group: dist.ProcessGroup | None = None) -> list[Piece]:
    """Return the matrices of which this process has anything.

    Args:
        tensor: one matrix, or several.
        stacked: whether the tensor is several matrices, along its first dimension.
        group: processes that have copies of a tensor that is no DTensor, and share the work on it if they can; None
            for none.

    Raises:
        ConfigurationError: parts cannot be put together by the backend of the processes.
    """
    mesh: DeviceMesh | None = None
    placements: tuple[Any, ...] = ()
    if isinstance(tensor, DTensor):
        tensor = plain = _plainly_split(tensor)
        mesh, placements = plain.device_mesh, plain.placements
        if not all(can_move(mesh.get_group(dim), mesh.device_type) for dim in range(mesh.ndim)):
            raise ConfigurationError(
                f"elra_spectral cannot put matrices together that are split over {mesh.device_type} devices where gloo "
                "joins the processes; use the backend of these devices, as nccl for cuda."
            )
    elif group is not None and dist.get_world_size(group) > 1 and can_move(group, tensor.device.type):
        mesh, placements = _copies_on(group, tensor.device.type), (Replicate(),)
    if not stacked:
        return [Piece(local(tensor), tuple(tensor.shape), mesh, placements)]
    inside = tuple(None if p.is_shard(0) else Shard(p.dim - 1) if p.is_shard() else p for p in placements)
    return [Piece(values, tuple(tensor.shape[1:]), mesh, inside) for values in local(tensor).unbind()]


def put_together(parts: Sequence[Tensor], tensor: Tensor, *, stacked: bool) -> Tensor:
    """Return a tensor like another one from what was made of its pieces; see :func:`pieces_of`."""
    plain = _plainly_split(tensor) if isinstance(tensor, DTensor) else tensor
    if stacked:
        values = torch.stack(list(parts)) if parts else torch.empty_like(local(plain))
    else:
        (values,) = parts
    found = like(values, plain)
    if isinstance(tensor, DTensor) and isinstance(found, DTensor) and plain is not tensor:
        return found.redistribute(placements=tensor.placements)
    return found


def _as_dtensor(values: Tensor, mesh: DeviceMesh, placements: Sequence[Any], shape: torch.Size) -> DTensor:
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(values, mesh, placements, run_check=False, shape=shape, stride=stride)


def like(values: Tensor, tensor: Tensor) -> Tensor:
    """Return the local part of something as a tensor that is split like another one."""
    if not isinstance(tensor, DTensor):
        return values
    return _as_dtensor(values.contiguous(), tensor.device_mesh, tensor.placements, tensor.shape)


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor, on every process; all processes that hold it have to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def parted(values: Tensor, tensor: Tensor) -> Tensor:
    """Return something that every process has all of, split like another tensor; what is split already stays."""
    if not isinstance(tensor, DTensor) or isinstance(values, DTensor):
        return values
    everywhere = [Replicate()] * tensor.device_mesh.ndim
    copies = DTensor.from_local(values, tensor.device_mesh, everywhere, run_check=False)
    return copies.redistribute(placements=tensor.placements)


class Rows(NamedTuple):
    """Whether rows of a tensor are looked at one by one, or the tensor is one row; and who has their parts.

    Attributes:
        apart: whether the first dimension counts rows.
        within: process groups that have parts of every row that is here.
        between: process groups that have other rows.
    """

    apart: bool
    within: tuple[dist.ProcessGroup, ...]
    between: tuple[dist.ProcessGroup, ...]

    @classmethod
    def of(cls, tensor: Tensor, *, apart: bool) -> Rows:
        """Return what is so of a tensor with at least one dimension."""
        if not apart:
            return cls(False, shard_groups(tensor), ())
        return cls(True, shard_groups(tensor, lambda dim: dim != 0), shard_groups(tensor, lambda dim: dim == 0))

    def flat(self, tensor: Tensor) -> Tensor:
        """Return the local part of a tensor as a matrix, whose rows are the rows."""
        values = local(tensor)
        return values.flatten(1) if self.apart else values.reshape(1, -1)


def reduced(values: Sequence[Tensor], groups: Sequence[tuple[dist.ProcessGroup, ...]], operation: Any) -> list[Tensor]:
    """Return tensors of numbers reduced over processes, those of the same processes by one call.

    Args:
        values: any shapes, the same on all processes of a group.
        groups: for each, the process groups.
        operation: of ``torch.distributed.ReduceOp``.
    """
    result = list(values)
    lots: dict[Any, list[int]] = {}
    for index, (value, of_value) in enumerate(zip(values, groups, strict=True)):
        if of_value:
            lots.setdefault((of_value, value.dtype, value.device), []).append(index)
    for (of_lot, _, _), indices in lots.items():
        flat = torch.cat([values[index].reshape(-1) for index in indices])
        for group in of_lot:
            dist.all_reduce(flat, op=operation, group=group)
        for index, part in zip(indices, flat.split([values[index].numel() for index in indices]), strict=True):
            result[index] = part.view_as(values[index])
    return result


@functools.cache
def can_move(group: dist.ProcessGroup, device: str) -> bool:
    """Return whether matrices on this kind of device are moved between the processes of a group.

    gloo on GPUs is left out: DTensor's all-gather ended both processes (torch 2.11), its other calls were not tried.
    """
    backends = dict(part.split(":") for part in dist.get_backend_config(group).split(","))
    return device == "cpu" or backends.get(device) != "gloo"


@functools.cache
def _copies_on(group: dist.ProcessGroup, device: str) -> DeviceMesh:
    """Return the processes of a group as a mesh."""
    return DeviceMesh.from_group(group, device)


def _plainly_split(tensor: DTensor) -> DTensor:
    """Return a tensor in contiguous parts, as two ways of splitting one dimension leave none (FSDP2 of what is split by
    tensor parallelism already)."""
    placements: tuple[Any, ...] = tensor.placements
    if all(p.is_replicate() or type(p) is Shard for p in placements):
        return tensor
    return tensor.redistribute(placements=[p if p.is_replicate() else Shard(p.dim) for p in placements])
