"""The direction of ``elra_spectral``: polar factors U·Vᵀ of matrices, and what corresponds to them for other tensors.

The functions that find the embeddings and the stacked experts of a model are here too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.linalg import vector_norm
from torch.nn.modules.conv import _ConvNd

from hf_elra.optim import many_tensors
from hf_elra.optim.arguments import need_model
from hf_elra.optim.directions import Direction, Groups
from hf_elra.optim.directions.polar import near_one, polar_factor, whitening
from hf_elra.optim.exchange import each_once
from hf_elra.optim.shards import Rows, like, pieces_of, put_together, reduced
from hf_elra.optim.tensors import PIECE, in_pieces, local, wide

OVER = 1e-3
"""A tensor or row without a gradient stops once its average is below this share of the largest average, which takes 66
updates at a momentum of 0.9."""
POLAR_BATCH = 2**24
"""Numbers of the matrices, at most, whose polar factors are taken together."""


class Spectral(Direction):
    """Polar factors of averaged gradients; rows of embeddings and vectors along their own averages.

    Groups have a list of flags for each of :data:`KINDS`, one flag a parameter, of flags ``whitened``, which of the
    embeddings are, and of ``shares``, by which directions are multiplied.

    Args:
        momentum: share of the averaged gradient that is kept at an update (Nesterov's form). With 0 there is no
            average, and an existing one is dropped.
        batch: how many numbers matrices have at most whose factors are taken together.
        group: processes that have the same parameters and gradients, and share the work; None for none.
        polar_dtype: what polar factors are computed in, as for ``polar.iterates_in``.
        state_dtype: what averages and directions are kept in, as for :func:`kept_in`.

    State per parameter: ``momentum``, the averaged gradient.
    """

    is_gradient = False
    waits = True
    """Whether numbers of the device may be waited for where that saves it work."""
    counts: Tensor | None = None
    """Whether gradients count, on the device: where not, averages stay and directions mean nothing. None for yes."""

    def __init__(
        self,
        momentum: float,
        *,
        batch: int = POLAR_BATCH,
        group: dist.ProcessGroup | None = None,
        polar_dtype: str = "auto",
        state_dtype: str = "auto",
    ) -> None:
        self.momentum, self.batch, self.group = momentum, batch, group
        self.polar_dtype, self.state_dtype = polar_dtype, state_dtype

    def apply(
        self, groups: Groups, params: list[list[Tensor]], gradients: list[list[Tensor]], state: Any
    ) -> list[list[Tensor]]:
        """Return :func:`spectral_direction`; what has no gradient any more stops (:func:`freeze_inactive`).

        Directions have the type that state is kept in, so that the step is taken along the very numbers that are kept.
        """
        flags: dict[str, list[bool]] = {kind: [] for kind in KINDS}
        averages, shares, whitened = [], [], []
        for group, group_params, group_gradients in zip(groups, params, gradients, strict=True):
            places = {p: index for index, p in enumerate(group["params"])}
            for kind in KINDS:
                flags[kind] += [group[kind][places[p]] for p in group_params]
            shares += [group["shares"][places[p]] for p in group_params]
            flagged = group.get("whitened", [False] * len(places))  # checkpoints of before have no such flags
            whitened += [flagged[places[p]] for p in group_params]
            averages += self.averaged(group_params, group_gradients, state)
        directions = spectral_direction(
            averages, **flags, whitened=whitened, batch=self.batch, group=self.group, polar_dtype=self.polar_dtype
        )
        if self.momentum > 0:
            flat = [g for of_group in gradients for g in of_group]
            freeze_inactive(directions, averages, flat, **flags, waits=self.waits)
        if any(share != 1 for share in shares):
            torch._foreach_mul_([local(u) for u in directions], shares)
        remaining = iter(directions)
        return [[next(remaining) for _ in group_params] for group_params in params]

    def averaged(self, params: list[Tensor], gradients: list[Tensor], state: Any) -> list[Tensor]:
        """Return Nesterov's average of the gradients, which may begin at zero, as its size does not matter here."""
        dtypes = [kept_in(p, self.state_dtype) for p in params]
        if self.momentum == 0:
            for p in params:
                state[p].pop("momentum", None)
            return [like(self._counted(local(g), 0.0).to(dtype), g) for g, dtype in zip(gradients, dtypes, strict=True)]
        for p, dtype in zip(params, dtypes, strict=True):
            if "momentum" not in state[p]:
                state[p]["momentum"] = torch.zeros_like(p, dtype=dtype)
        averages = [local(state[p]["momentum"]) for p in params]
        here, ahead = [local(g) for g in gradients], [torch.empty_like(average) for average in averages]
        if many_tensors.pays(here):
            many_tensors.average(averages, here, ahead, self.momentum, self.counts)
        else:
            for average, gradient, target in zip(averages, here, ahead, strict=True):
                taken = self._counted(gradient, average)  # towards itself, an average does not move
                dtype = wide(average.dtype)
                for old, new, further in in_pieces(average, taken, target):
                    exact = torch.lerp(old.to(dtype), new.to(dtype), 1 - self.momentum)
                    old.copy_(exact)  # to the nearest number: an average of noisy gradients does not stall
                    further.copy_(exact.lerp_(new.to(dtype), 1 - self.momentum))
        return [like(values, p) for values, p in zip(ahead, params, strict=True)]

    def _counted(self, gradient: Tensor, other: Tensor | float) -> Tensor:
        return gradient if self.counts is None else torch.where(self.counts, gradient, other)

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


def spectral_direction(
    gradients: Sequence[Tensor],
    embeddings: Sequence[bool],
    experts: Sequence[bool] | None = None,
    *,
    whitened: Sequence[bool] | None = None,
    batch: int = POLAR_BATCH,
    group: dist.ProcessGroup | None = None,
    polar_dtype: str = "auto",
) -> list[Tensor]:
    """Return directions whose elements have a mean square of one, whatever the size of the gradients.

    For a matrix it is the polar factor U·Vᵀ of its gradient, so that a rotation of the inputs or outputs of a layer
    rotates the direction. A convolution counts as a matrix of output channels by the rest. For an embedding every row
    is taken by itself, or half by itself and half as the polar factor of all rows has it (:func:`_whitened`), and for a
    vector it is the gradient. If a gradient, or a row of an embedding, is zero, so is the direction.

    Args:
        gradients: floating point tensors of any shapes, which may be split over processes (DTensor).
        embeddings: for each, whether it is an embedding.
        experts: for each, whether it is several matrices in one, along its first dimension.
        whitened: for each, whether it is an embedding, of two dimensions, whose rows share their directions out.
        batch: how many numbers matrices have at most whose factors are taken together, if not of one alone.
        group: processes that have the same gradients, where these are no DTensors, and share the work.
        polar_dtype: what polar factors are computed in, as for ``polar.iterates_in``.
    """
    experts = experts or [False] * len(gradients)
    directions: list[Any] = [None] * len(gradients)
    by_rows = [i for i, gradient in enumerate(gradients) if gradient.dim() < 2 or embeddings[i]]
    found = _unit_rows([gradients[i] for i in by_rows], [embeddings[i] and gradients[i].dim() > 1 for i in by_rows])
    for index, direction in zip(by_rows, found, strict=True):
        is_whitened = bool(whitened and whitened[index]) and direction.numel() > 0
        directions[index] = _whitened(direction) if is_whitened else direction
    matrices = [i for i, direction in enumerate(directions) if direction is None]
    pieces = [pieces_of(gradients[i], stacked=experts[i], group=group) for i in matrices]
    compute = partial(_unit_polar_factors, polar_dtype=polar_dtype)
    results = iter(each_once([piece for of_one in pieces for piece in of_one], compute, most=batch))
    for index, of_one in zip(matrices, pieces, strict=True):
        parts = [next(results) for _ in of_one]
        directions[index] = put_together(parts, gradients[index], stacked=experts[index])
    return directions


def _whitened(table: Tensor) -> Tensor:
    """Return a table of unit rows with each half way, as unit rows, to the polar factor of all of them.

    In the polar factor all dimensions count the same. Half of each is what served most trials
    (docs/results/no_rate.md).

    Args:
        table (Tensor, shape (rows, columns)): rows with a mean square of one, or zero.
    """
    if Rows.of(table, apart=True).within:  # columns are split: rows are needed as a whole
        rows_apart = [Shard(0) if p.is_shard() else p for p in table.placements]  # type: ignore[attr-defined]
        return _whitened(table.redistribute(placements=rows_apart)).redistribute(placements=table.placements)  # type: ignore[attr-defined]
    rows, units = Rows.of(table, apart=True), local(table)
    gram = units.new_zeros(units.shape[1], units.shape[1], dtype=wide(units.dtype))
    for (some,) in _some_rows(units, elsewhere=POLAR_BATCH):
        gram += _wide(some).mT @ _wide(some)
    (gram,) = reduced([gram], [rows.between], dist.ReduceOp.SUM)
    matrix, found = whitening(gram), torch.empty_like(units)
    for target, some in _some_rows(found, units, elsewhere=POLAR_BATCH):
        further = _wide(some) @ matrix
        further *= 1 / further.square().mean(1, keepdim=True).sqrt_().clamp_min(1e-30)
        further += some
        target.copy_(further.mul_(1 / further.square().mean(1, keepdim=True).sqrt_().clamp_min(1e-30)))
    return like(found, table)


def kept_in(param: Tensor, asked: str) -> torch.dtype:
    """Return the type in which the average and the direction of a parameter are kept.

    Args:
        param: the parameter.
        asked: ``"bfloat16"``; ``"float32"``, which means at least that; or ``"auto"`` for bfloat16, but float64 of a
            parameter in float64.
    """
    if asked == "bfloat16" or (asked == "auto" and param.dtype != torch.float64):
        return torch.bfloat16
    return wide(param.dtype)


def _unit_polar_factors(matrices: Tensor, polar_dtype: str) -> Tensor:
    """Return polar factors of a batch of tensors, of a mean square of one."""
    flat = matrices.flatten(2)
    is_high = flat.shape[1] > flat.shape[2]
    factors = polar_factor(flat.mT.contiguous() if is_high else flat, polar_dtype)
    scale = (factors.shape[1] * factors.shape[2]) ** 0.5
    factors *= scale / vector_norm(factors, dim=(1, 2), keepdim=True).clamp_min(1e-30)
    factors = factors.to(matrices.dtype)
    # In the memory order of the weights: otherwise the step would be slow, and in bfloat16 be rounded differently.
    return (factors.mT.contiguous() if is_high else factors).view(matrices.shape)


def freeze_inactive(
    directions: Sequence[Tensor],
    averaged: Sequence[Tensor],
    gradients: Sequence[Tensor],
    embeddings: Sequence[bool],
    experts: Sequence[bool],
    *,
    waits: bool = True,
) -> None:
    """Set to zero, in place, directions that come only from gradients of long ago.

    A direction does not become shorter with the average that it is made of. Without this, something that has no
    gradient any more (the row of a rare token in an untied embedding, an expert that is not chosen) would go on as
    fast as ever. It stops when its gradient is exactly zero and its average is below a thousandth of the largest row
    of its embedding, or, for other tensors and experts, below a thousandth of the largest root mean square of all
    averages.

    Args:
        directions, averaged, gradients, embeddings, experts: one of each per parameter, as for
            :func:`spectral_direction`, over all groups of an optimizer, since they are compared with each other.
        waits: whether to wait for the device once, and be done where everything has a gradient.
    """
    if not directions:
        return
    flags = zip(gradients, embeddings, experts, strict=True)
    rows = [Rows.of(g, apart=bool(expert or (table and g.dim() > 1))) for g, table, expert in flags]
    within, between = [r.within for r in rows], [r.between for r in rows]
    peaks = _peaks(rows, gradients)
    together = not waits and many_tensors.pays(peaks)  # then all are on one device
    peaks = reduced(peaks, within, dist.ReduceOp.MAX)
    resting = many_tensors.at_once(lambda all_peaks: all_peaks == 0, peaks) if together else [p == 0 for p in peaks]
    first = resting[0].device
    if waits:
        some_rest = reduced([rest.any().float() for rest in resting], between, dist.ReduceOp.MAX)
        if not torch.stack([rests.to(first) for rests in some_rest]).any():  # one wait, and mostly the end
            return
    norms = list(torch._foreach_norm([local(a) for a in averaged]))
    for index, is_expert in enumerate(experts):
        if is_expert:
            norms[index] = vector_norm(rows[index].flat(averaged[index]), dim=1)
    everywhere = [w if expert else w + b for w, b, expert in zip(within, between, experts, strict=True)]
    if any(everywhere):
        norms = [square.sqrt() for square in reduced([n.square() for n in norms], everywhere, dist.ReduceOp.SUM)]
    numbers = [a.numel() / len(a) if expert else a.numel() for a, expert in zip(averaged, experts, strict=True)]
    sizes = torch._foreach_div(norms, [max(number, 1) ** 0.5 for number in numbers])
    sizes_here = [size if size.dim() == 0 else size.max() if size.numel() else size.new_zeros(()) for size in sizes]
    of_all = [b if expert else () for b, expert in zip(between, experts, strict=True)]
    largest = torch.stack([size.to(first) for size in reduced(sizes_here, of_all, dist.ReduceOp.MAX)]).max()
    lengths = _row_lengths(averaged, rows, embeddings)
    if together:
        small = many_tensors.at_once(lambda all_sizes: all_sizes < OVER * largest, sizes)
    else:
        small = [size < OVER * largest.to(size.device) for size in sizes]
    alike = [index for index, r in enumerate(rows) if not r.apart] if together else []
    pairs = [[each[i] for i in alike] for each in (resting, small)]
    both = many_tensors.at_once(torch.logical_and, *pairs) if alike else []
    ending = dict(zip(alike, both, strict=True))
    for index, (direction, rest) in enumerate(zip(directions, resting, strict=True)):
        ends = ending[index] if index in ending else rest & small[index]
        if index in lengths:
            ends |= rest & (lengths[index][0] < OVER * lengths[index][1])
        here = local(direction)
        here.masked_fill_(ends.view(-1, *[1] * (here.dim() - 1)) if rows[index].apart else ends.view(()), 0.0)


def _row_lengths(averaged: Sequence[Tensor], rows: Sequence[Rows], embeddings: Sequence[bool]) -> dict[int, Any]:
    """Return of every embedding the norms of the rows that are here, and the largest of all."""
    tables = [i for i, r in enumerate(rows) if r.apart and embeddings[i]]
    squares = [vector_norm(rows[i].flat(averaged[i]), dim=1).square() for i in tables]
    norms = [s.sqrt() for s in reduced(squares, [rows[i].within for i in tables], dist.ReduceOp.SUM)]
    here = [n.max() if n.numel() else n.new_zeros(()) for n in norms]
    largest = reduced(here, [rows[i].between for i in tables], dist.ReduceOp.MAX)
    return dict(zip(tables, zip(norms, largest, strict=True), strict=True))


def _peaks(rows: Sequence[Rows], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return of every tensor the largest absolute value of every row that is here."""
    flat = [r.flat(t) for r, t in zip(rows, tensors, strict=True)]
    if not many_tensors.pays(flat):
        return [_largest(values) for values in flat]
    of_one = many_tensors.largest([values for r, values in zip(rows, flat, strict=True) if not r.apart])
    single = (peak.view(1) for peak in of_one)
    return [_largest(values) if r.apart else next(single) for r, values in zip(rows, flat, strict=True)]


def _largest(rows: Tensor) -> Tensor:
    """Return the largest absolute value of every row."""
    if rows.numel() == 0:
        return rows.new_zeros(len(rows))
    return torch.maximum(rows.amax(1), -rows.amin(1))  # an infinity norm is ten times slower on a CPU


def embeddings_of(model: nn.Module) -> list[nn.Parameter]:
    """Return parameters of a model whose rows belong to tokens: embeddings and the output layer of a language model."""
    need_model("embeddings_of", model)
    tables = [m.weight for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
    found = [p for p in tables if isinstance(p, nn.Parameter)] + outputs_of(model)
    return list({id(p): p for p in found}.values())


def outputs_of(model: nn.Module) -> list[nn.Parameter]:
    """Return the output layer of a language model, which may be its embeddings; of another model, nothing."""
    need_model("outputs_of", model)
    inner = getattr(model, "module", model)  # as DistributedDataParallel wraps it
    weight = getattr(getattr(inner, "get_output_embeddings", lambda: None)(), "weight", None)
    return [weight] if isinstance(weight, nn.Parameter) else []


def experts_of(model: nn.Module) -> list[nn.Parameter]:
    """Return parameters of a model that hold several matrices each: those with three dimensions, as Transformers stacks
    the experts of a mixture, without those of convolutions."""
    need_model("experts_of", model)
    convolved = {id(p) for m in model.modules() if isinstance(m, _ConvNd) for p in m.parameters()}
    return [p for p in model.parameters() if p.dim() == 3 and min(p.shape) > 1 and id(p) not in convolved]


KINDS: dict[str, Callable[[nn.Module], list[nn.Parameter]]] = {"embeddings": embeddings_of, "experts": experts_of}
"""Kinds of parameters with a direction of their own: the name of their argument, and the function that finds them."""


def _unit_rows(tensors: Sequence[Tensor], apart: Sequence[bool]) -> list[Tensor]:
    """Return tensors, or their rows where these are apart, with a mean square of one."""
    if many_tensors.pays([local(t) for t in tensors]) and not any(isinstance(t, DTensor) for t in tensors):
        return _unit_rows_together(tensors, apart)
    return _unit_rows_apart(tensors, apart)


def _unit_rows_together(tensors: Sequence[Tensor], apart: Sequence[bool]) -> list[Tensor]:
    """:func:`_unit_rows` with vectors of the same length as rows of one table."""
    lots: dict[Any, list[int]] = {}
    for index, (tensor, is_apart) in enumerate(zip(tensors, apart, strict=True)):
        alone = (index,) if is_apart else ()
        lots.setdefault((*alone, tensor.shape, tensor.dtype, tensor.device), []).append(index)
    result: list[Any] = [None] * len(tensors)
    for indices in lots.values():
        lot = [tensors[index] for index in indices]
        if len(lot) == 1:
            found: Sequence[Tensor] = _unit_rows_apart(lot, [apart[indices[0]]])
        else:
            found = [row.view(lot[0].shape) for row in _unit_rows_apart([torch.stack(lot)], [True])[0]]
        for index, values in zip(indices, found, strict=True):
            result[index] = values
    return result


def _unit_rows_apart(tensors: Sequence[Tensor], apart: Sequence[bool]) -> list[Tensor]:
    """:func:`_unit_rows`, one tensor at a time."""
    rows = [Rows.of(t, apart=a) if t.dim() else Rows(False, (), ()) for t, a in zip(tensors, apart, strict=True)]
    within = [r.within for r in rows]
    flat = [r.flat(t) for r, t in zip(rows, tensors, strict=True)]
    peaks = reduced([_wide(_largest(f)) for f in flat], within, dist.ReduceOp.MAX)
    norms = []
    for values, peak in zip(flat, peaks, strict=True):
        parts = [vector_norm(near_one(_wide(v), p[:, None]), dim=1) for v, p in _some_rows(values, peak)]
        norms.append(torch.cat(parts))
    if any(within):
        norms = [square.sqrt() for square in reduced([n.square() for n in norms], within, dist.ReduceOp.SUM)]
    result = []
    for tensor, is_apart, values, peak, norm in zip(tensors, apart, flat, peaks, norms, strict=True):
        columns = tensor.numel() / max(len(tensor), 1) if is_apart else tensor.numel()
        factors = torch.where(norm > 0, columns**0.5 / norm.clamp_min(1e-30), 0.0)
        units = torch.empty_like(values)
        for unit, v, p, factor in _some_rows(units, values, peak, factors):
            unit.copy_(near_one(_wide(v), p[:, None]).mul_(factor[:, None]))
        result.append(like(units.view(local(tensor).shape), tensor))
    return result


def _some_rows(*tensors: Tensor, elsewhere: int | None = None) -> Iterator[tuple[Tensor, ...]]:
    """Yield rows of tensors that have as many: as many at once as :data:`PIECE` numbers on a CPU, as so many elsewhere,
    or else all."""
    first = tensors[0]
    most = PIECE if first.device.type == "cpu" else elsewhere
    number = max(1, len(first) if most is None else most // max(1, first[:1].numel()))
    yield from zip(*(t.split(number) for t in tensors), strict=True)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(wide(tensor.dtype))
