"""How large a step suits a tensor before anything of its slopes is known: from its shape, and from its weights.

A step along a direction whose elements have a mean square of one changes a matrix by α times the root of its longer
side, in the spectral norm. What a run may change in all is known beforehand, roughly: a new matrix walks about as far
as its own natural size, which is a spectral norm near one at any width; a trained one walks a few per cent of its
weights; the pairs of LoRA change the matrix that they stand beside, which is trained too. A direction that averages
noise walks as far as the root of the number of steps, so that a rate in proportion to 1/√t makes of a length a step.

Whether a tensor is new is read off its weights: those of one that nobody has trained are independent of each other.
The length is a beginning; slopes correct it (``rules/end_slopes.py``). The constants are measured, see
docs/results/no_rate_constants.md.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm

from hf_elra.optim.arguments import need_model
from hf_elra.optim.shards import whole

NEW = 0.2
"""Rate of a new matrix at update t: this over the root of its longer side and of t + :data:`OFFSET`."""
TRAINED = 0.008
"""Rate of trained matrices: this share of their root mean square over the root of t + :data:`OFFSET`."""
ADAPTER, OF_RANK = 0.06, 8
"""As :data:`NEW`, for the product of a pair of LoRA of this rank. It falls with the root of the rank, so that steps of
all ranks have one Frobenius norm: what is beside a pair is trained, and steps by a share of its root mean square."""
HEAD = 0.05
"""As :data:`NEW`, for a new matrix at the end of a trained model: a head that runs ahead spoils what is below it."""
EMBEDDING = 0.04
"""Rate of new embeddings that are read alone: at least this over the root of t + :data:`OFFSET`, at any width and size,
as only one of their rows is added up for a token."""
OUTPUT = 0.8
"""Rate of a new output layer, and of embeddings that are one too: at least this share of their root mean square over
the root of t + :data:`OFFSET`."""
TRAINED_EMBEDDING = 0.004
"""As :data:`TRAINED`, for trained embeddings and output layers. All rows step by one length, also those of tokens that
are not in the data, of which a trained model knows something."""
HARDLY = 2.0
"""Rates of trained tensors, and of pairs beside them, where a model that is hardly trained got a fresh head: so many
times those above. What it knows is little, and is to serve for something else."""
FREER, NEARER = 8.0, 0.5
"""Corrections by slopes may lead so many times as far as usual: the first where a model is hardly trained, the second
for pairs beside weights that are trained well, whose losses show room where others do not."""
OFFSET = 50
"""Updates, over which a rate hardly falls at first."""
SURE = 6.0
"""Standard errors by which the sizes of a trained matrix's rows or columns differ more than by chance. Independent
weights stay below, as ``tests/test_natural_steps.py`` sees in many trials."""
STRETCHED = 1.2
"""Largest singular value of a trained matrix, of that which independent weights have; the same holds for it."""
POWER_ITERATIONS = 20
"""For the largest singular value of a matrix, which takes minutes over the matrices of a large model if it is exact."""
TRAINED_SHARE = 0.25
"""Of the weights in matrices that tell, the share that is in trained ones if a model is trained, at least. A new model
has none, but where something begins with a pattern, as the decays of a Mamba; and what a training adds may be as good
as independent, as in many matrices of narrow models."""
FEWEST = 256
"""Numbers of a tensor below which its weights do not tell whether they are trained."""
LEAST_SIZE = 1e-3
"""Trained weights count as of at least this root mean square."""


@dataclass
class NaturalSteps:
    """What suits the parameters of an optimizer, group by group.

    Attributes:
        rate: α·sqrt(t + OFFSET) of the tensors that count: all, or those that are not new in a trained model.
        shares: of every parameter, its own rate over ``rate``.
        new: of every parameter, whether it is new in a model that is trained otherwise.
        whitened: of every parameter, whether it is a table of a new model, beside matrices, whose rows share their
            directions out (``directions/spectral.py``).
        is_trained: whether the model is trained, but for these.
        room: how many times as far as usual corrections may lead.
    """

    rate: float
    shares: list[list[float]]
    new: list[list[bool]]
    whitened: list[list[bool]]
    is_trained: bool
    room: float


def natural_steps(groups: Sequence[dict[str, Any]], weights: str = "auto") -> NaturalSteps:
    """Return what suits the parameters as they are now.

    Vectors go with the matrices: at the median rate of new ones, or at the rate of trained ones. Embeddings and output
    layers have rates of their own.

    Args:
        groups: the optimizer's parameter groups, with flags for embeddings, for those that are ``outputs`` and for
            experts, and of ``adapters`` the number of each pair, what changes of it are multiplied by in its product,
            how many weights stand beside it and whether no singular value of these stands out. Parameters may be split
            over processes, all of which have to ask then, and get the same numbers as one process does.
        weights: ``"new"`` or ``"trained"`` for what all of them are, a head at the end too; ``"auto"`` to see for
            oneself.
    """
    found = _look_at(groups)
    is_trained = bool(found.adapters) or weights == "trained" or (weights == "auto" and _looks_trained(found))
    new = _new_ones(found) if is_trained and weights == "auto" else set()
    trained = [place for place in found.matrices if is_trained and place not in new]
    is_hardly_trained = weights == "auto" and _is_hardly_trained(found, trained)
    further = HARDLY if is_hardly_trained and new else 1.0

    rates = _rates_of_matrices(found, trained, HEAD if is_trained else NEW, further)
    counted = [*found.adapters, *trained] or list(found.matrices)
    rate = statistics.median(rates[place] for place in counted) if counted else NEW / math.sqrt(FEWEST)
    rates |= _rates_of_tables(found, rate, further if is_trained else None)
    for bias in (place for place in new if found.params[place].dim() == 1):
        rates[bias] = max(rates[place] for place in new if found.params[place].dim() > 1)
    whitened = set() if is_trained or not found.matrices else {t for t in found.tables if found.params[t].dim() == 2}

    def by_group(of_place: Callable[[Place], Any]) -> list[list[Any]]:
        return [[of_place((g, i)) for i in range(len(group["params"]))] for g, group in enumerate(groups)]

    return NaturalSteps(
        rate=rate,
        shares=by_group(lambda place: rates.get(place, rate) / rate),
        new=by_group(lambda place: place in new),
        whitened=by_group(lambda place: place in whitened),
        is_trained=is_trained,
        room=FREER if is_hardly_trained else NEARER if found.adapters else 1.0,
    )


Place = tuple[int, int]
"""A parameter: the number of its group, and its number in that."""


@dataclass
class _Matrix:
    """What the weights of a matrix show: whether it looks new, if that can be told, the sum of its squares, and whether
    no singular value stands out; and its longer side, of stacked experts that of each."""

    is_new: bool | None
    squares: float
    is_plain: bool
    longer_side: int


@dataclass
class _Found:
    """What there is: all parameters, and of these the pairs of LoRA (with the group's ``adapters``), tables (with
    whether they are output layers) and all other matrices."""

    params: dict[Place, Tensor]
    adapters: dict[Place, Any]
    tables: dict[Place, bool]
    matrices: dict[Place, _Matrix]


def _look_at(groups: Sequence[dict[str, Any]]) -> _Found:
    """Sort parameters by kind, and look at the weights of matrices."""
    found = _Found({}, {}, {}, {})
    for g, group in enumerate(groups):
        for i, p in enumerate(group["params"]):
            found.params[g, i] = p
            if not p.numel():
                continue
            if group["embeddings"][i]:
                found.tables[g, i] = group["outputs"][i]
            elif p.dim() > 1 and group["adapters"][i]:
                found.adapters[g, i] = group["adapters"][i]
            elif p.dim() > 1:  # one after another, as all of a matrix that is split over processes is fetched
                values = whole(p.detach()).flatten(1).float()
                is_new = looks_new(values)
                is_plain = is_new is True or not stands_out(values)
                side = _longer_side(p.shape[1:] if group["experts"][i] else p.shape)
                found.matrices[g, i] = _Matrix(is_new, float(vector_norm(values)) ** 2, is_plain, side)
    return found


def _looks_trained(found: _Found) -> bool:
    """Whether enough of the weights that tell are in trained matrices."""
    sizes = {True: 0, False: 0, None: 0}
    for place, matrix in found.matrices.items():
        sizes[matrix.is_new] += found.params[place].numel()
    return sizes[False] > TRAINED_SHARE * (sizes[False] + sizes[True])


def _rates_of_matrices(found: _Found, trained: Sequence[Place], of_new: float, further: float) -> dict[Place, float]:
    """Return the rates of matrices: that of trained ones, of new ones ``of_new`` by their sides, and those of pairs."""
    number = sum(found.params[place].numel() for place in trained)
    squares = sum(found.matrices[place].squares for place in trained)
    of_trained = TRAINED * further * max(math.sqrt(squares / max(number, 1)), LEAST_SIZE)
    rates = {place: of_new / math.sqrt(matrix.longer_side) for place, matrix in found.matrices.items()}
    rates |= dict.fromkeys(trained, of_trained)
    return rates | {place: further * rate for place, rate in _rates_of_adapters(found).items()}


def _rates_of_tables(found: _Found, rate: float, further: float | None) -> dict[Place, float]:
    """Return the rates of embeddings and output layers; ``further`` is None in a new model."""
    rates = {}
    for place, is_output in found.tables.items():
        p = found.params[place]
        norm = float(whole(vector_norm(p.detach().to(torch.promote_types(p.dtype, torch.float32)))))
        size = norm / math.sqrt(p.numel())
        if further is None:
            rates[place] = max(rate, OUTPUT * size if is_output else EMBEDDING)
        else:
            rates[place] = TRAINED_EMBEDDING * further * max(size, LEAST_SIZE)
    return rates


def looks_new(matrix: Tensor) -> bool | None:
    """Whether the weights of a matrix are as nobody has trained them: independent, orthogonal, or all the same.

    The mean squares of its rows, and those of its columns, then differ no more than they do by chance, and no singular
    value stands out. None where there are too few weights to tell.
    """
    wide = matrix.detach().flatten(1).float()
    squares = wide.square()
    mean, spread = float(squares.mean()), float(squares.var(correction=0))
    if mean == 0 or spread <= 1e-12 * mean**2:
        return True
    if matrix.numel() < FEWEST:
        return None
    for side in (0, 1):
        means = squares.mean(1 - side)
        excess = float((means - mean).square().sum()) * squares.shape[1 - side] / spread - len(means)
        if excess > SURE * math.sqrt(2 * len(means)):
            return False
    return not stands_out(wide)


def stands_out(matrix: Tensor) -> bool:
    """Whether a singular value of a matrix, two-dimensional and in float32, is larger than independent weights have it.

    By power iteration from the longest row, which comes near from below and ends as soon as it is clear: a value that
    stands out is found in a few iterations; the ones of independent weights need not be told apart.
    """
    rows, columns = matrix.shape
    by_chance = float(vector_norm(matrix)) * (1 / math.sqrt(rows) + 1 / math.sqrt(columns))
    vector = matrix[matrix.square().sum(1).argmax()]
    vector = vector / vector_norm(vector).clamp_min(1e-30)
    for _ in range(POWER_ITERATIONS):
        product = matrix @ vector
        if float(vector_norm(product)) >= STRETCHED * by_chance > 0:
            return True
        vector = matrix.mT @ product
        vector = vector / vector_norm(vector).clamp_min(1e-30)
    return float(vector_norm(matrix @ vector)) >= STRETCHED * by_chance > 0


def _is_hardly_trained(found: _Found, trained: Sequence[Place]) -> bool:
    """Whether a model has little to lose: most of its weights are in matrices, trained ones or beside pairs of LoRA, of
    which no singular value stands out.

    So it is after a short training, or one along polar factors, which adds the same to all directions.
    """
    looked_at = [(found.params[place].numel(), found.matrices[place].is_plain) for place in trained]
    looked_at += {pair: (size, is_plain) for pair, _, size, is_plain in found.adapters.values()}.values()
    return 2 * sum(size for size, is_plain in looked_at if is_plain) > sum(size for size, _ in looked_at)


def _new_ones(found: _Found) -> set[Place]:
    """Of a trained model the matrices at its end that look new, as those of a fresh head, and their biases.

    What looks new elsewhere was trained little: before a matrix that does not look new, or before the scale of a
    normalisation that was trained. In groups of their own vectors come in the order of the matrices, but nobody knows
    whether one is behind a matrix or before it; then those that fit a matrix are behind it.
    """
    params, new = found.params, set()
    vectors = [place for place, p in params.items() if p.dim() == 1 and p.numel() > 0]
    for place in reversed(found.matrices):
        if found.matrices[place].is_new is False:
            break
        fits = bool(vectors) and len(params[vectors[-1]]) == len(params[place])
        if fits and vectors[-1][0] == place[0] and vectors[-1] < place:
            fits = False
        behind = [v for v in vectors if v[0] == place[0] and v > place] + vectors[-1:] * fits
        if any(_is_trained_scale(params[v]) for v in behind):
            break
        new.add(place)
        if fits:
            new.add(vectors.pop())
    return new


def _is_trained_scale(vector: Tensor) -> bool:
    """Whether numbers differ, as trained ones do, around a mean that is not zero, as that of a new bias is."""
    values = whole(vector.detach()).float()
    mean, spread = float(values.mean()), float(values.std(correction=0))
    return len(values) >= 16 and spread > 1e-6 * abs(mean) and abs(mean) * math.sqrt(len(values)) > SURE * spread


Pair = tuple[nn.Parameter, nn.Parameter, float, "Tensor | None"]
"""Of LoRA: A, B, the factor of their product, and the weights that stand beside it; None where these are quantised."""


def adapters_of(model: nn.Module) -> list[Pair]:
    """Return the pairs of LoRA in a model, as PEFT makes them: A, B, the factor that their product has, and the weights
    that they change, or None where these cannot be read."""
    need_model("adapters_of", model)
    pairs: list[Pair] = []
    for module in model.modules():
        scaling, base = getattr(module, "scaling", None), getattr(getattr(module, "base_layer", None), "weight", None)
        beside = base if isinstance(base, Tensor) and base.is_floating_point() else None
        for kind in ("lora_", "lora_embedding_") if isinstance(scaling, dict) else ():
            first, second = (getattr(module, f"{kind}{letter}", {}) for letter in "AB")
            for name in first:
                pair = [getattr(part[name], "weight", part[name]) for part in (first, second)]
                if all(isinstance(p, nn.Parameter) for p in pair):
                    pairs.append((pair[0], pair[1], float(scaling[name]), beside))  # type: ignore[index]
    return pairs


def _rates_of_adapters(found: _Found) -> dict[Place, float]:
    """Return the rates of pairs, whose product changes by as much as suits it."""
    params, adapters = found.params, found.adapters
    pairs: dict[float, list[Place]] = {}
    for place, (pair, *_) in adapters.items():
        pairs.setdefault(pair, []).append(place)
    rates = {}
    for members in pairs.values():
        multiplied = max(adapters[members[0]][1], LEAST_SIZE)
        side = max(_longer_side(params[place].shape) for place in members)
        rank = min(min(params[place].flatten(1).shape) for place in members)
        for place in members:
            rates[place] = ADAPTER * math.sqrt(OF_RANK / rank) / (math.sqrt(side) * multiplied)
    return rates


def _longer_side(shape: Sequence[int]) -> int:
    """Of the matrix that a tensor is: output channels by the rest."""
    return max(shape[0], math.prod(shape[1:]))
