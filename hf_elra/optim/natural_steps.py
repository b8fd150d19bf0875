"""How large a step suits a tensor before anything of its slopes is known: from its shape, and from its weights.

A step along a direction whose elements have a mean square of one changes a matrix by α times the root of its longer
side, in the spectral norm. What a run may change in all is known beforehand, roughly: a new matrix walks about as far
as its own natural size, which is a spectral norm near one at any width; a trained one walks a few per cent of its
weights; the pairs of LoRA change the matrix that they stand beside, which is trained too. A direction that averages
noise walks as far as the root of the number of steps, so that a rate in proportion to 1/√t makes of a length a step.

Whether a tensor is new is read off its weights: those of one that nobody has trained are independent of each other.
The length is a beginning; slopes correct it (``rules/end_slopes.py``). The constants are measured, see
docs/results/no_rate.md.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
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
    places = [(g, i) for g, group in enumerate(groups) for i in range(len(group["params"]))]
    params = {(g, i): groups[g]["params"][i] for g, i in places}
    matrices = [
        (g, i) for g, i in places if params[g, i].dim() > 1 and params[g, i].numel() and not groups[g]["embeddings"][i]
    ]
    adapters = {(g, i): groups[g]["adapters"][i] for g, i in matrices if groups[g]["adapters"][i]}
    unpaired = [place for place in matrices if place not in adapters]
    verdicts, squares, plain = {}, {}, {}
    for place in unpaired:  # one after another, as all of a matrix that is split over processes is fetched
        values = whole(params[place].detach()).flatten(1).float()
        verdicts[place], squares[place] = looks_new(values), float(vector_norm(values)) ** 2
        plain[place] = verdicts[place] is True or not stands_out(values)
    sizes = {True: 0, False: 0, None: 0}
    for place, verdict in verdicts.items():
        sizes[verdict] += params[place].numel()
    looks_trained = sizes[False] > TRAINED_SHARE * (sizes[False] + sizes[True])
    is_trained = bool(adapters) or weights == "trained" or (weights == "auto" and looks_trained)
    new = _new_ones(places, params, verdicts) if is_trained and weights == "auto" else set()
    trained = [place for place in unpaired if is_trained and place not in new]
    number = sum(params[place].numel() for place in trained)
    root_mean_square = math.sqrt(sum(squares[place] for place in trained) / max(number, 1))
    looked_at = [(params[place].numel(), plain[place]) for place in trained]
    looked_at += {pair: (size, is_plain) for pair, _, size, is_plain in adapters.values()}.values()
    is_hardly_trained = weights == "auto" and _is_hardly_trained(looked_at)
    further = HARDLY if is_hardly_trained and new else 1.0
    of_trained = TRAINED * further * max(root_mean_square, LEAST_SIZE)
    of_new = HEAD if is_trained else NEW
    rates = {
        (g, i): of_trained
        if (g, i) in trained
        else of_new / math.sqrt(_longer_side(params[g, i], is_expert=groups[g]["experts"][i]))
        for g, i in unpaired
    }
    rates |= {place: further * rate for place, rate in _rates_of_adapters(params, adapters).items()}
    counted = [*adapters, *trained] or unpaired
    rate = statistics.median(rates[place] for place in counted) if counted else NEW / math.sqrt(FEWEST)
    for g, i in places:
        if groups[g]["embeddings"][i] and params[g, i].numel():
            wide = torch.promote_types(params[g, i].dtype, torch.float32)
            norm = float(whole(vector_norm(params[g, i].detach().to(wide))))
            size = norm / math.sqrt(params[g, i].numel())
            if is_trained:
                rates[g, i] = TRAINED_EMBEDDING * further * max(size, LEAST_SIZE)
            else:
                rates[g, i] = max(rate, OUTPUT * size if groups[g]["outputs"][i] else EMBEDDING)
    for bias in (place for place in new if params[place].dim() == 1):
        rates[bias] = max(rates[place] for place in new if params[place].dim() > 1)
    return NaturalSteps(
        rate,
        [[rates.get((g, i), rate) / rate for i in range(len(group["params"]))] for g, group in enumerate(groups)],
        [[(g, i) in new for i in range(len(group["params"]))] for g, group in enumerate(groups)],
        [
            [
                flag and p.dim() == 2 and bool(unpaired) and not is_trained
                for p, flag in zip(group["params"], group["embeddings"], strict=True)
            ]
            for group in groups
        ],
        is_trained,
        FREER if is_hardly_trained else NEARER if adapters else 1.0,
    )


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


def _is_hardly_trained(looked_at: Sequence[tuple[int, bool]]) -> bool:
    """Whether a model has little to lose: most of its weights are in matrices, trained ones or beside pairs of LoRA, of
    which no singular value stands out.

    So it is after a short training, or one along polar factors, which adds the same to all directions.

    Args:
        looked_at: of every matrix its size, and whether no singular value stands out.
    """
    return 2 * sum(size for size, is_plain in looked_at if is_plain) > sum(size for size, _ in looked_at)


def _new_ones(places: Sequence[Any], params: dict[Any, Tensor], verdicts: dict[Any, bool | None]) -> set[Any]:
    """Of a trained model the matrices at its end that look new, as those of a fresh head, and their biases.

    What looks new elsewhere was trained little: before a matrix that does not look new, or before the scale of a
    normalisation that was trained. In groups of their own vectors come in the order of the matrices, but nobody knows
    whether one is behind a matrix or before it; then those that fit a matrix are behind it.
    """
    new: set[Any] = set()
    vectors = [place for place in places if params[place].dim() == 1 and params[place].numel() > 0]
    for place in reversed(verdicts):
        if verdicts[place] is False:
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


def _rates_of_adapters(params: dict[Any, Tensor], adapters: dict[Any, Any]) -> dict[Any, float]:
    """Return the rates of pairs, whose product changes by as much as suits it."""
    pairs: dict[float, list[Any]] = {}
    for place, (pair, *_) in adapters.items():
        pairs.setdefault(pair, []).append(place)
    rates = {}
    for members in pairs.values():
        multiplied = max(adapters[members[0]][1], LEAST_SIZE)
        side = max(_longer_side(params[place]) for place in members)
        rank = min(min(params[place].flatten(1).shape) for place in members)
        for place in members:
            rates[place] = ADAPTER * math.sqrt(OF_RANK / rank) / (math.sqrt(side) * multiplied)
    return rates


def _longer_side(matrix: Tensor, *, is_expert: bool = False) -> int:
    """Of the matrix that a tensor is, output channels by the rest; of stacked experts, of each of them."""
    return max(matrix[0].flatten(1).shape if is_expert else matrix.flatten(1).shape)
