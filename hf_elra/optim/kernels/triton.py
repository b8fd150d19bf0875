"""ELRA's update in Triton kernels: nothing waits for the host, and every number is moved as seldom as possible.

Four kinds of kernels make an update. ``products_kernel`` reads every gradient and the one before it once and writes
partial sums of ⟨G_t, G_t⟩ and ⟨G_t, G_{t-1}⟩; ``decision_kernel``, a single program, adds these up in a fixed order and
makes all decisions of ``base.py`` and ``guards.py`` on a vector of numbers that stays on the device; ``update_kernel``
reads these and takes the step, or takes the last one back. On its way it sums the squares of the parameters, for the
relative crop of the next update, which ``size_kernel`` adds up. Tensors are found through tables of their addresses, so
that one launch serves all tensors of a type in a parameter group.

The numbers are copied to the host when somebody asks for them (``device_numbers.py``). Which parameters can be
updated like this is said by :func:`why_not`; for others ``base.py`` does the same with plain tensor operations.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_elra.control import statistics
from hf_elra.optim import guards
from hf_elra.optim.device_numbers import Numbers
from hf_elra.optim.tensors import mean_over_processes

BLOCK = 1024  # numbers of a vector operation
PIECE = 16 * BLOCK  # numbers of a tensor that one program handles
KEPT_TABLES = 64  # small tables that stay on the device
BYTES_FOR_CAPTURES = 2**20

OF_UPDATE = ("verdict", "step_before", "had_previous")  # for the kernels that follow
NAMES = (*Numbers.names, *OF_UPDATE)
"""What the vector of numbers holds, in this order; NaN says that a number is not known. The verdict is 0 for a step, 1
if the last one is taken back, 2 if the batch is skipped."""

_ALPHA = tl.constexpr(NAMES.index("alpha"))
_STEP_SIZE = tl.constexpr(NAMES.index("step_size"))
_PREVIOUS_SLOPE = tl.constexpr(NAMES.index("previous_slope"))
_PREVIOUS_LOSS = tl.constexpr(NAMES.index("previous_loss"))
_GRADIENT_NORM = tl.constexpr(NAMES.index("gradient_norm"))
_DIRECTION_NORM = tl.constexpr(NAMES.index("direction_norm"))
_STEP_NORM = tl.constexpr(NAMES.index("step_norm"))
_COSINE = tl.constexpr(NAMES.index("cosine"))
_WEIGHT_SQUARE = tl.constexpr(NAMES.index("weight_square"))
_LENGTH = tl.constexpr(NAMES.index("length"))
_PROVEN = tl.constexpr(NAMES.index("proven"))
_LEVEL = tl.constexpr(NAMES.index("level"))
_RESTARTS = tl.constexpr(NAMES.index("restarts"))
_NON_FINITE = tl.constexpr(NAMES.index("non_finite"))
_CONSECUTIVE = tl.constexpr(NAMES.index("consecutive_restarts"))
_NON_FINITE_IN_A_ROW = tl.constexpr(NAMES.index("non_finite_in_a_row"))
_SKIPPED = tl.constexpr(NAMES.index("skipped"))
_ACCEPTED_LEVELS = tl.constexpr(NAMES.index("accepted_levels"))
_ON_TRIAL = tl.constexpr(NAMES.index("on_trial"))
_QUIET = tl.constexpr(NAMES.index("quiet"))
_UPDATES = tl.constexpr(NAMES.index("updates"))
_INITIAL_LOSS = tl.constexpr(NAMES.index("initial_loss"))
_COUNT = tl.constexpr(NAMES.index("cycle_count"))
_MEAN = tl.constexpr(NAMES.index("cycle_mean"))
_SQUARES = tl.constexpr(NAMES.index("cycle_squares"))
_LAST_MEAN = tl.constexpr(NAMES.index("last_mean"))
_LAST_STD = tl.constexpr(NAMES.index("last_std"))
_RECENT_COUNT = tl.constexpr(NAMES.index("recent_count"))
_RECENT_MEAN = tl.constexpr(NAMES.index("recent_mean"))
_RECENT_VARIANCE = tl.constexpr(NAMES.index("recent_variance"))
_ROW_COUNT = tl.constexpr(NAMES.index("row_count"))
_ROW_MEAN = tl.constexpr(NAMES.index("row_mean"))
_ROW_SQUARES = tl.constexpr(NAMES.index("row_squares"))
_SUSPECT = tl.constexpr(NAMES.index("suspect"))
_VERDICT = tl.constexpr(NAMES.index("verdict"))
_STEP_BEFORE = tl.constexpr(NAMES.index("step_before"))
_HAD_PREVIOUS = tl.constexpr(NAMES.index("had_previous"))

_ENOUGH = tl.constexpr(statistics.ENOUGH_LOSSES)
_RECENT = tl.constexpr(statistics.RECENT_LOSSES)
_AT_MOST = tl.constexpr(guards.COUNTS_AT_MOST)
_MATTERS = tl.constexpr(guards.MATTERS)
_ROUNDING = tl.constexpr(guards.ROUNDING)
_COMES_DOWN = tl.constexpr(guards.COMES_DOWN)
_OF_A_LEVEL = tl.constexpr(guards.RETRIES_OF_A_LEVEL)
_MOST_RETRIES = tl.constexpr(guards.MOST_RETRIES)
_LONGEST = tl.constexpr(guards.LONGEST_RETRY)
_SHORTEST = tl.constexpr(guards.SHORTEST_RETRY)
_QUIET_UPDATES = tl.constexpr(guards.QUIET_UPDATES)
_WAY_BACK = tl.constexpr(guards.WAY_BACK)


@triton.jit
def products_kernel(
    gradients, kept, sizes, tensors, starts, shares, partials,
    ALIGNED: tl.constexpr, TYPE: tl.constexpr, WIDE: tl.constexpr, PIECE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write four partial sums of one piece of one tensor, float64: G², w·G², w²·G² and v·⟨G, u⟩.

    With ``ALIGNED`` addresses and sizes are multiples of 16.

    Args:
        gradients, kept: tables of addresses, int64, one a tensor.
        sizes: numbers in every tensor.
        tensors, starts: of every program, its tensor and the first number of its piece.
        shares: of the group, float64, see :meth:`Launch.shares`.
        partials: (programs, 4).
    """
    program = tl.program_id(0)
    tensor = tl.load(tensors + program)
    size = tl.load(sizes + tensor)
    start = tl.load(starts + program)
    g = tl.load(gradients + tensor).to(tl.pointer_type(TYPE))
    u = tl.load(kept + tensor).to(tl.pointer_type(TYPE))
    if ALIGNED:
        size, start = tl.multiple_of(size, 16), tl.multiple_of(start, 16)
        g, u = tl.multiple_of(g, 16), tl.multiple_of(u, 16)
    squares = tl.zeros([BLOCK], WIDE)
    products = tl.zeros([BLOCK], WIDE)
    for offset in range(0, PIECE, BLOCK):
        index = start + offset + tl.arange(0, BLOCK)
        inside = index < size
        a = tl.load(g + index, mask=inside, other=0.0).to(WIDE)
        b = tl.load(u + index, mask=inside, other=0.0).to(WIDE)
        squares += a * a
        products += a * b
    square = tl.sum(squares, 0).to(tl.float64)
    product = tl.sum(products, 0).to(tl.float64)
    w = tl.load(shares)
    v = tl.load(shares + 1)
    target = partials + 4 * program
    tl.store(target, square)
    tl.store(target + 1, w * square)
    tl.store(target + 2, w * w * square)
    tl.store(target + 3, tl.where(v == 0, 0.0, v * product))


@triton.jit
def _limit(
    initial, last_mean, last_std, recent_count, recent_mean, recent_variance, sigma, ratio, HAS_RATIO: tl.constexpr
):
    """``RestartGuard.limit``: the highest loss, and the mean of those it comes from."""
    limit = tl.full([], float("inf"), tl.float64)
    recent = recent_mean + sigma * tl.sqrt(recent_variance)
    if HAS_RATIO:
        known = (initial == initial) & (initial != 0)
        limit = tl.where(known, initial + (ratio - 1) * tl.abs(initial), limit)
    enough = recent_count >= _ENOUGH
    limit = tl.where(enough, recent, limit)
    mean = tl.where(enough, recent_mean, initial)
    of_cycle = last_mean + sigma * last_std
    has_cycle = last_mean == last_mean
    limit = tl.where(has_cycle, tl.where(enough, tl.maximum(of_cycle, recent), of_cycle), limit)
    mean = tl.where(has_cycle & (enough == 0), last_mean, mean)
    return limit, mean


@triton.jit
def _recorded(
    happens, loss, initial, count, mean, squares, last_mean, last_std, recent_count, recent_mean, recent_variance,
    sigma, ratio, HAS_RATIO: tl.constexpr,
):  # fmt: skip
    """``RestartGuard.record``, where it happens: first loss, the cycle's and the recent statistics."""
    limit, middle = _limit(
        initial, last_mean, last_std, recent_count, recent_mean, recent_variance, sigma, ratio, HAS_RATIO
    )
    loss = tl.where(middle == middle, tl.minimum(loss, middle + _AT_MOST * (limit - middle)), loss)
    new_initial = tl.where(initial == initial, initial, loss)
    delta = loss - mean
    new_mean = mean + delta / (count + 1)
    new_squares = squares + delta * (loss - new_mean)
    number = tl.minimum(recent_count + 1, _RECENT * 1.0)
    deviation = loss - recent_mean
    variance = (1 - 1 / number) * (recent_variance + deviation * deviation / number)
    return (
        tl.where(happens, new_initial, initial),
        tl.where(happens, count + 1, count),
        tl.where(happens, new_mean, mean),
        tl.where(happens, new_squares, squares),
        tl.where(happens, number, recent_count),
        tl.where(happens, recent_mean + deviation / number, recent_mean),
        tl.where(happens, variance, recent_variance),
    )


@triton.jit(do_not_specialize=["count"])
def decision_kernel(
    numbers, partials, count, loss_address, settings,
    HAS_LOSS: tl.constexpr, SOFT: tl.constexpr, HAS_RATIO: tl.constexpr, DERIVED: tl.constexpr, BB2: tl.constexpr,
    NOISY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Decide: what an update of ELRA does with numbers, in one program and in float64.

    Args:
        numbers: the vector of :data:`NAMES`, read and written.
        partials: (count, 4), what ``products_kernel`` wrote.
        loss_address: the loss, one number.
        settings: float64: noise_correction, max_growth, lowest and highest α, min_step_norm, max_step_norm,
            restart_sigma, initial_restart_ratio, largest factor of a scheduler, max_relative_step, least norm of the
            parameters for it.
    """
    row = tl.arange(0, BLOCK)
    gg = tl.zeros([BLOCK], tl.float64)
    wg = tl.zeros([BLOCK], tl.float64)
    wwg = tl.zeros([BLOCK], tl.float64)
    gu = tl.zeros([BLOCK], tl.float64)
    start = 0
    while start < count:  # the interpreter of older Tritons cannot count to a number that is no constant
        inside = start + row < count
        at = partials + 4 * (start + row)
        gg += tl.load(at, mask=inside, other=0.0)
        wg += tl.load(at + 1, mask=inside, other=0.0)
        wwg += tl.load(at + 2, mask=inside, other=0.0)
        gu += tl.load(at + 3, mask=inside, other=0.0)
        start += BLOCK
    square = tl.sum(gg, 0)
    slope = tl.sum(wg, 0)
    norm = tl.sqrt(tl.sum(wwg, 0))
    current = tl.sum(gu, 0)

    noise_correction = tl.load(settings)
    max_growth = tl.load(settings + 1)
    lowest = tl.load(settings + 2)
    highest_alpha = tl.load(settings + 3)
    min_norm = tl.load(settings + 4)
    max_norm = tl.load(settings + 5)
    sigma = tl.load(settings + 6)
    ratio = tl.load(settings + 7)
    factor = tl.load(settings + 8)
    relative = tl.load(settings + 9)
    least_size = tl.load(settings + 10)

    alpha = tl.load(numbers + _ALPHA)
    step_size = tl.load(numbers + _STEP_SIZE)
    previous_slope = tl.load(numbers + _PREVIOUS_SLOPE)
    previous_loss = tl.load(numbers + _PREVIOUS_LOSS)
    known = previous_slope == previous_slope
    in_a_row = tl.load(numbers + _CONSECUTIVE)
    nan = tl.full([], float("nan"), tl.float64)
    loss = tl.load(loss_address).to(tl.float64) if HAS_LOSS else nan
    finite = square - square == 0
    if HAS_LOSS:
        finite = finite & (loss - loss == 0)

    skipped = finite & (finite == 0)  # no
    if HAS_LOSS:
        skipped = (square == 0) & (loss - loss != 0)  # a batch without information

    # Is the loss too high? (guards.judge, RestartGuard)
    on_trial = tl.load(numbers + _ON_TRIAL)
    too_high = finite & (finite == 0)
    level_accepted = too_high
    base = previous_loss
    failures = in_a_row
    if HAS_LOSS:
        initial = tl.load(numbers + _INITIAL_LOSS)
        number = tl.load(numbers + _COUNT)
        mean = tl.load(numbers + _MEAN)
        squares = tl.load(numbers + _SQUARES)
        last_mean = tl.load(numbers + _LAST_MEAN)
        last_std = tl.load(numbers + _LAST_STD)
        recent_count = tl.load(numbers + _RECENT_COUNT)
        recent_mean = tl.load(numbers + _RECENT_MEAN)
        recent_variance = tl.load(numbers + _RECENT_VARIANCE)
        row_count = tl.load(numbers + _ROW_COUNT)
        row_mean = tl.load(numbers + _ROW_MEAN)
        row_squares = tl.load(numbers + _ROW_SQUARES)
        suspect = tl.load(numbers + _SUSPECT)
        limit, middle = _limit(
            initial, last_mean, last_std, recent_count, recent_mean, recent_variance, sigma, ratio, HAS_RATIO
        )
        base = tl.where(recent_count >= _ENOUGH, tl.maximum(previous_loss, recent_mean), previous_loss)
        base = tl.where(previous_loss == previous_loss, base, nan)
        if SOFT:
            promised = _MATTERS * step_size * previous_slope
            rounding = tl.maximum(tl.abs(loss), tl.abs(base))
            if NOISY:
                rounding = tl.maximum(rounding, 1.0)
            rounding = _ROUNDING * rounding
            matters = (base != base) | (loss - base > tl.maximum(promised, rounding))
            too_high = finite & known & (loss > limit) & matters
        # Does it stay high however short the step is? Then the data have changed.
        comes_down = (row_count > 0) & (loss - middle < _COMES_DOWN * (row_mean - middle))
        high_count = tl.where(comes_down, 0.0, row_count) + 1
        high_mean = tl.where(comes_down, 0.0, row_mean)
        delta = loss - high_mean
        high_mean += delta / high_count
        high_squares = tl.where(comes_down, 0.0, row_squares) + delta * (loss - high_mean)
        level_accepted = too_high & (in_a_row >= _MOST_RETRIES)
        if NOISY:
            level_accepted = level_accepted | (too_high & (high_count > _OF_A_LEVEL))
        too_high = too_high & (level_accepted == 0)
        jump = tl.where(middle == middle, tl.abs(high_mean - middle), 0.0)
        spread = tl.maximum(tl.sqrt(high_squares / high_count), tl.sqrt(recent_variance))
        spread = tl.maximum(spread, jump / sigma)
        initial = tl.where(level_accepted, high_mean, initial)
        recent_count = tl.where(level_accepted, _ENOUGH * 1.0, recent_count)
        recent_mean = tl.where(level_accepted, high_mean, recent_mean)
        recent_variance = tl.where(level_accepted, spread * spread, recent_variance)
        last_std = tl.where(level_accepted & (last_mean == last_mean), spread, last_std)
        last_mean = tl.where(level_accepted & (last_mean == last_mean), high_mean, last_mean)
        failures = tl.where(level_accepted, 0.0, in_a_row)
        suspect = tl.where(level_accepted, nan, suspect)
        on_trial = tl.where(level_accepted, 0.0, on_trial)
        good = finite & (too_high == 0)
        initial, number, mean, squares, recent_count, recent_mean, recent_variance = _recorded(
            good & (failures == 0) & (suspect == suspect), suspect, initial, number, mean, squares, last_mean, last_std,
            recent_count, recent_mean, recent_variance, sigma, ratio, HAS_RATIO,
        )  # fmt: skip
        initial, number, mean, squares, recent_count, recent_mean, recent_variance = _recorded(
            good, loss, initial, number, mean, squares, last_mean, last_std,
            recent_count, recent_mean, recent_variance, sigma, ratio, HAS_RATIO,
        )  # fmt: skip
        suspect = tl.where(good & ((failures != 1) | (on_trial != 0)), nan, suspect)
        if NOISY:
            suspect = tl.where(too_high & (in_a_row == 0) & (on_trial == 0), loss, suspect)
        else:
            initial, number, mean, squares, recent_count, recent_mean, recent_variance = _recorded(
                too_high, tl.minimum(loss, limit), initial, number, mean, squares, last_mean, last_std,
                recent_count, recent_mean, recent_variance, sigma, ratio, HAS_RATIO,
            )  # fmt: skip
        tl.store(numbers + _INITIAL_LOSS, initial)
        tl.store(numbers + _COUNT, number)
        tl.store(numbers + _MEAN, mean)
        tl.store(numbers + _SQUARES, squares)
        tl.store(numbers + _LAST_MEAN, last_mean)
        tl.store(numbers + _LAST_STD, last_std)
        tl.store(numbers + _RECENT_COUNT, recent_count)
        tl.store(numbers + _RECENT_MEAN, recent_mean)
        tl.store(numbers + _RECENT_VARIANCE, recent_variance)
        tl.store(numbers + _ROW_COUNT, tl.where(good, 0.0, tl.where(too_high, high_count, row_count)))
        tl.store(numbers + _ROW_MEAN, tl.where(good, 0.0, tl.where(too_high, high_mean, row_mean)))
        tl.store(numbers + _ROW_SQUARES, tl.where(good, 0.0, tl.where(too_high, high_squares, row_squares)))
        tl.store(numbers + _SUSPECT, suspect)
    restarted = (too_high | (finite == 0)) & (skipped == 0)
    stands = (restarted == 0) & (skipped == 0)

    # The step after a restart (RestartGuard.shrink, take_back)
    length = tl.load(numbers + _LENGTH)
    decrease = step_size * (previous_slope if DERIVED else tl.sqrt(previous_slope))
    shrink = _LONGEST * decrease / (tl.maximum(loss - base, 0.0) + decrease)
    shrink = tl.where((base == base) & (decrease > 0), shrink, _LONGEST)
    if NOISY:
        shrink = tl.where(in_a_row == 0, tl.maximum(shrink, _SHORTEST), _SHORTEST)
    shrink = tl.where(finite, shrink, _SHORTEST)

    # The last step stands: what that says about α (step_was_good)
    quiet = tl.load(numbers + _QUIET)
    level = tl.load(numbers + _LEVEL)
    proven = tl.load(numbers + _PROVEN)
    quiet = tl.where(stands, quiet + 1, quiet)
    level = tl.where(stands & (quiet > _QUIET_UPDATES), nan, level)
    reduces = stands & known & ((failures > 1) | ((failures == 1) & (on_trial != 0)))
    if not NOISY:
        reduces = stands & (stands == 0)  # no: it was done at once
    was_good = alpha * length
    reduced = tl.maximum(tl.maximum(was_good, alpha * _SHORTEST), lowest)
    earlier = tl.where(proven == proven, tl.minimum(proven, alpha), alpha)
    earlier = tl.where(level == level, level / 2, earlier)
    level = tl.where(reduces, tl.maximum(earlier, reduced), level)
    level = tl.where(stands & known & (failures == 0) & (level < alpha), alpha, level)
    quiet = tl.where(reduces, 0.0, quiet)
    proven = tl.where(stands & known & (failures == 0), alpha, proven)
    length_of_last = tl.where(reduces, was_good / reduced, length)
    full = known & (length_of_last == 1)
    base_alpha = tl.where(reduces, reduced, alpha)

    # The step without one: eq. (4) and its guards
    curvature = previous_slope - current
    if BB2:
        change = square - 2 * current + previous_slope
        best = curvature / tl.where(change > 0, change, 1.0)
        convex = (curvature > 0) & (change > 0)
    else:
        best = previous_slope / tl.where(curvature > 0, curvature, 1.0)
        convex = curvature > 0
    correction = 1 + noise_correction / (1 + step_size * step_size)
    most = max_growth * base_alpha
    proposal = tl.where(convex, tl.minimum(base_alpha * best * correction, most), most)
    proposal = tl.where(full & (previous_slope > 0), proposal, tl.minimum(base_alpha, most))
    returns = full & (level == level) & (base_alpha < level) & (quiet > 0) & (current > -previous_slope)
    at_least = tl.where(returns, tl.minimum(_WAY_BACK * base_alpha, level), 0.0)
    proposal = tl.minimum(tl.maximum(proposal, at_least), most)
    moving = norm > 0
    divisor = tl.where(moving, norm, 1.0)
    proposal = tl.where(moving & (min_norm > 0), tl.maximum(proposal, min_norm / divisor), proposal)
    proposal = tl.minimum(tl.maximum(proposal, lowest), highest_alpha)
    weight_square = tl.load(numbers + _WEIGHT_SQUARE)
    size = tl.where(weight_square == weight_square, tl.maximum(tl.sqrt(weight_square), least_size), float("inf"))
    max_norm = tl.minimum(max_norm, tl.maximum(relative * size, min_norm))
    proposal = tl.where(moving & (proposal * norm > max_norm), max_norm / divisor, proposal)

    new_alpha = tl.where(stands, proposal, alpha)
    new_length = tl.where(stands, 1.0, length)
    if NOISY:
        new_length = tl.where(restarted, length * shrink, new_length)
    else:
        new_alpha = tl.where(restarted, tl.maximum(alpha * shrink, lowest), new_alpha)
    stays = skipped | (restarted & (known == 0))  # nothing to take back: no step
    new_step_size = tl.where(stays, step_size, new_alpha * new_length * factor)
    old_norm = tl.load(numbers + _DIRECTION_NORM)
    new_norm = tl.where(stands, norm, old_norm)
    both = tl.sqrt(square) * old_norm
    cosine = tl.where(both > 0, current / tl.where(both > 0, both, 1.0), 0.0)
    tl.store(numbers + _COSINE, tl.where(known & stands, cosine, tl.load(numbers + _COSINE)))
    tl.store(numbers + _STEP_BEFORE, step_size)
    tl.store(numbers + _ALPHA, new_alpha)
    tl.store(numbers + _LENGTH, new_length)
    tl.store(numbers + _STEP_SIZE, new_step_size)
    tl.store(numbers + _STEP_NORM, tl.where(stays, tl.load(numbers + _STEP_NORM), new_step_size * new_norm))
    tl.store(numbers + _GRADIENT_NORM, tl.sqrt(square))
    tl.store(numbers + _DIRECTION_NORM, new_norm)
    # Where nothing moves there is nothing to take back and nothing to learn from.
    tl.store(numbers + _PREVIOUS_SLOPE, tl.where(factor > 0, tl.where(stands, slope, previous_slope), nan))
    tl.store(numbers + _UPDATES, tl.load(numbers + _UPDATES) + tl.where(skipped, 0.0, 1.0))
    tl.store(numbers + _PREVIOUS_LOSS, tl.where(stands, loss, previous_loss))
    tl.store(numbers + _VERDICT, restarted.to(tl.float64) + 2 * skipped.to(tl.float64))
    tl.store(numbers + _HAD_PREVIOUS, known.to(tl.float64))
    tl.store(numbers + _RESTARTS, tl.load(numbers + _RESTARTS) + restarted.to(tl.float64))
    broken = ((finite == 0) & (skipped == 0)).to(tl.float64)
    tl.store(numbers + _NON_FINITE, tl.load(numbers + _NON_FINITE) + broken)
    in_a_row_broken = tl.load(numbers + _NON_FINITE_IN_A_ROW) + broken
    tl.store(numbers + _NON_FINITE_IN_A_ROW, tl.where(finite, 0.0, in_a_row_broken))
    tl.store(numbers + _CONSECUTIVE, tl.where(stands, 0.0, in_a_row + restarted.to(tl.float64)))
    tl.store(numbers + _SKIPPED, tl.load(numbers + _SKIPPED) + skipped.to(tl.float64))
    tl.store(numbers + _ACCEPTED_LEVELS, tl.load(numbers + _ACCEPTED_LEVELS) + level_accepted.to(tl.float64))
    on_trial = tl.where(stands, (known & (failures > 0)).to(tl.float64), on_trial)
    if not NOISY:
        on_trial = on_trial * 0
    tl.store(numbers + _ON_TRIAL, on_trial)
    tl.store(numbers + _QUIET, quiet)
    tl.store(numbers + _LEVEL, level)
    tl.store(numbers + _PROVEN, proven)


@triton.jit(do_not_specialize=["count"])
def size_kernel(numbers, squares, count, BLOCK: tl.constexpr):
    """Add up what ``update_kernel`` wrote: the sum of the squares of all parameters, in one program."""
    row = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    start = 0
    while start < count:
        total += tl.load(squares + start + row, mask=start + row < count, other=0.0)
        start += BLOCK
    tl.store(numbers + _WEIGHT_SQUARE, tl.sum(total, 0))


@triton.jit
def update_kernel(
    points, gradients, kept, sizes, tensors, starts, shares, numbers, squares,
    ALIGNED: tl.constexpr, COPY: tl.constexpr, ROUND: tl.constexpr, TYPE: tl.constexpr, WIDE: tl.constexpr,
    PIECE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Take the step, x ← (1 - d)·x - α·factor·G, or the last one back, in one piece of one tensor.

    With ``COPY`` the gradient is copied to where ``kept`` points. Without, the host keeps the gradient tensor itself as
    the new G_{t-1}; after a restart that must be the old one, which is then written there. ``squares`` gets the sum of
    the squares of the new parameters, one number a program.

    Args:
        points, gradients, kept: tables of addresses, as of ``products_kernel``. (An argument called ``params`` cannot
            be launched: Triton's own launcher has a variable of that name.)
    """
    program = tl.program_id(0)
    tensor = tl.load(tensors + program)
    size = tl.load(sizes + tensor)
    start = tl.load(starts + program)
    p = tl.load(points + tensor).to(tl.pointer_type(TYPE))
    g = tl.load(gradients + tensor).to(tl.pointer_type(TYPE))
    u = tl.load(kept + tensor).to(tl.pointer_type(TYPE))
    if ALIGNED:
        size, start = tl.multiple_of(size, 16), tl.multiple_of(start, 16)
        p, g, u = tl.multiple_of(p, 16), tl.multiple_of(g, 16), tl.multiple_of(u, 16)
    verdict = tl.load(numbers + _VERDICT)
    known = tl.load(numbers + _HAD_PREVIOUS) != 0
    seed = tl.load(numbers + _UPDATES).to(tl.int32)  # of stochastic rounding: another one in every update
    now = tl.load(numbers + _STEP_SIZE) * tl.load(shares)
    before = tl.load(numbers + _STEP_BEFORE) * tl.load(shares + 1)
    total = tl.zeros([BLOCK], WIDE)
    if verdict != 0:
        back = tl.where(known & (verdict == 1), before - now, 0.0).to(WIDE)
        for offset in range(0, PIECE, BLOCK):
            index = start + offset + tl.arange(0, BLOCK)
            inside = index < size
            old = tl.load(u + index, mask=inside, other=0.0)
            old = tl.where(known, old, 0.0)
            x = tl.load(p + index, mask=inside, other=0.0).to(WIDE) + back * old.to(WIDE)
            if ROUND:
                x = _round_stochastically(x, seed, index, tensor)
            tl.store(p + index, x.to(TYPE), mask=inside)
            total += x * x
            if not COPY:
                tl.store(g + index, old, mask=inside)
    else:
        step = now.to(WIDE)
        rest = tl.load(shares + 2).to(WIDE)
        for offset in range(0, PIECE, BLOCK):
            index = start + offset + tl.arange(0, BLOCK)
            inside = index < size
            new = tl.load(g + index, mask=inside, other=0.0)
            x = rest * tl.load(p + index, mask=inside, other=0.0).to(WIDE) - step * new.to(WIDE)
            if ROUND:
                x = _round_stochastically(x, seed, index, tensor)
            tl.store(p + index, x.to(TYPE), mask=inside)
            total += x * x
            if COPY:
                tl.store(u + index, new, mask=inside)
    tl.store(squares + program, tl.sum(total, 0).to(tl.float64))


@triton.jit
def _round_stochastically(x, seed, index, tensor):
    """float32 that bfloat16 holds exactly; see ``tensors.stochastically_rounded``."""
    noise = tl.randint(seed + tensor * 7919, index.to(tl.int32)) & 0xFFFF
    bits = x.to(tl.int32, bitcast=True)
    rounded = ((bits + noise.to(tl.int32)) & -65536).to(tl.float32, bitcast=True)
    return tl.where(x - x == 0, rounded, x)


# ---- the host's part ----

_TYPES = {torch.float64: tl.float64, torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Launch(NamedTuple):
    """Tensors that one launch of a kernel serves: of one parameter group and one type.

    Attributes:
        params, gradients, kept: of equal shapes and strides, each one piece of memory.
        aligned: their addresses and sizes are multiples of 16, so that several numbers are moved at once.
        copy: the gradients are copied to ``kept``; otherwise the gradient tensors themselves are kept afterwards.
        weight, last_weight: the group's share in this step and in the last one.
        decay: weight decay, 0 where nothing moves.
    """

    params: Sequence[Tensor]
    gradients: Sequence[Tensor]
    kept: Sequence[Tensor]
    aligned: bool
    copy: bool
    weight: float
    last_weight: float
    decay: float

    @property
    def shares(self) -> tuple[float, ...]:
        """What kernels know of the group; weight decay as the factor it is."""
        return self.weight, self.last_weight, 1 - self.decay


def why_not(params: Sequence[Tensor]) -> str | None:
    """Return why these parameters cannot be updated by kernels; None if they can."""
    devices = {p.device for p in params}
    if len(devices) != 1:
        return f"parameters lie on several devices ({', '.join(sorted(map(str, devices)))})"
    (device,) = devices
    if device.type != "cuda" and isinstance(products_kernel, triton.JITFunction):  # not Triton's interpreter
        return f"parameters lie on {device}, and the kernels are for CUDA"
    for p in params:
        if isinstance(p, DTensor):
            return "parameters are DTensors"
        if p.dtype not in _TYPES:
            return f"a parameter is of type {p.dtype}"
    return None


class FusedUpdate(Numbers):
    """Launches the kernels and holds the numbers on the device."""

    names = NAMES

    def __init__(self) -> None:
        super().__init__()
        self.has_moved = False  # the update that is being queued has changed parameters
        self.has_worked = False
        self._of_graphs: list[Any] = []  # what captured CUDA graphs use lives as long as this
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()
        self._for_captures: Tensor | None = None
        self._captured = 0  # bytes of it

    def update(
        self,
        launches: Sequence[Launch],
        loss: Tensor | float | None,
        scale: float,
        settings: dict[str, Any],
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        """Queue one update.

        Args:
            launches: all tensors.
            loss: of this update; a tensor on the device is not waited for.
            scale: the largest factor.
            settings: of the optimizer.
            process_group: its processes decide by the mean of their losses and numbers.
        """
        device = launches[0].params[0].device
        assert self.numbers is not None
        self.was_read = self.has_moved = False
        pieces = [self._pieces(launch.params) for launch in launches]
        tables = [self._table([launch.params, launch.gradients, launch.kept]) for launch in launches]
        programs = [len(tensors) for _, tensors, _ in pieces]
        partials = self._cached(
            ("partials", sum(programs), device),
            lambda: torch.empty(sum(programs) + 1, 4, dtype=torch.float64, device=device),
        )
        loss_here, size = partials[-1, 0], self.numbers[NAMES.index("weight_square")]
        # The loss and the size of the parameters, so that one reduction serves for all.
        shares = [self._row("shares", launch.shares, device) for launch in launches]
        first = 0
        for launch, piece, table, share, number in zip(launches, pieces, tables, shares, programs, strict=True):
            kind, wide = _kinds(launch.params[0].dtype)
            products_kernel[(number,)](
                table[1], table[2], *piece, share, partials[first:],
                ALIGNED=launch.aligned, TYPE=kind, WIDE=wide, PIECE=PIECE, BLOCK=BLOCK,
            )  # fmt: skip
            first += number
        if isinstance(loss, Tensor) and loss.device == device:
            if process_group is None:
                loss_here = loss
            else:
                loss_here.copy_(loss.view(()))
        elif loss is not None:
            loss_here.fill_(float(loss))
        if process_group is not None:
            partials[-1, 1].copy_(size)
            mean_over_processes(partials, process_group)
            size.copy_(partials[-1, 1])
        decision_kernel[(1,)](
            self.numbers, partials, sum(programs), loss_here, self._settings(settings, scale, launches, device),
            HAS_LOSS=loss is not None, SOFT=settings["soft_restart"],
            HAS_RATIO=settings["initial_restart_ratio"] is not None,
            DERIVED=settings["restart_formula"] == "derived", BB2=settings["step_rule"] == "bb2",
            NOISY=settings["noise_correction"] > 0, BLOCK=BLOCK,
        )  # fmt: skip
        squares = self._cached(
            ("squares", sum(programs), device), lambda: torch.empty(sum(programs), dtype=torch.float64, device=device)
        )
        first = 0
        for launch, piece, table, share, number in zip(launches, pieces, tables, shares, programs, strict=True):
            kind, wide = _kinds(launch.params[0].dtype)
            rounds = settings["stochastic_rounding"] and kind == tl.bfloat16
            update_kernel[(number,)](
                table[0], table[1], table[2], *piece, share, self.numbers, squares[first:],
                ALIGNED=launch.aligned, COPY=launch.copy, ROUND=rounds,
                TYPE=kind, WIDE=wide, PIECE=PIECE, BLOCK=BLOCK,
            )  # fmt: skip
            self.has_moved = True
            first += number
        size_kernel[(1,)](self.numbers, squares, sum(programs), BLOCK=BLOCK)

    # ---- small tables on the device, made once ----

    def _cached(self, key: Hashable, make: Any) -> Any:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            self._of_graphs.append(make())  # its contents come with the graph's replay, and stay in use
            return self._of_graphs[-1]
        if key not in self._kept:
            self._kept[key] = make()
            while len(self._kept) > KEPT_TABLES:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def _pieces(self, params: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Sizes of tensors, and of every program its tensor and where its piece begins."""
        sizes = tuple(p.numel() for p in params)
        device = params[0].device

        def make() -> tuple[Tensor, Tensor, Tensor]:
            pieces = [(index, start) for index, size in enumerate(sizes) for start in range(0, size, PIECE)]
            tensors, starts = zip(*pieces, strict=True)
            return tuple(self._upload(row, torch.int64, device) for row in (sizes, tensors, starts))  # type: ignore[return-value]

        return self._cached(("pieces", sizes, device), make)

    def _table(self, rows: list[Sequence[Tensor]]) -> Tensor:
        """Addresses of tensors, (rows, tensors)."""
        addresses = tuple(tuple(tensor.data_ptr() for tensor in row) for row in rows)
        device = rows[0][0].device
        return self._cached(("table", addresses, device), lambda: self._upload(addresses, torch.int64, device))

    def _row(self, name: str, row: tuple[float, ...], device: torch.device) -> Tensor:
        return self._cached((name, row, device), lambda: self._upload(row, torch.float64, device))

    def _settings(
        self, settings: dict[str, Any], scale: float, launches: Sequence[Launch], device: torch.device
    ) -> Tensor:
        longest, ratio, relative = (
            settings[name] for name in ("max_step_norm", "initial_restart_ratio", "max_relative_step")
        )
        number = sum(p.numel() for launch in launches for p in launch.params)
        row = (
            settings["noise_correction"], settings["max_growth"], *settings["lr_bounds"], settings["min_step_norm"],
            math.inf if longest is None else longest, settings["restart_sigma"], 0.0 if ratio is None else ratio, scale,
            math.inf if relative is None else relative, math.sqrt(guards.LEAST_SIZE**2 * number),
        )  # fmt: skip
        return self._row("settings", row, device)

    def _upload(self, values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Copy numbers to the device without waiting for it."""
        source = torch.tensor(values, dtype=dtype)
        if device.type != "cuda":
            return source.to(device)
        if not torch.cuda.is_current_stream_capturing():
            if self._for_captures is None:
                self._for_captures = torch.empty(BYTES_FOR_CAPTURES, dtype=torch.uint8, pin_memory=True)
            return source.pin_memory().to(device, non_blocking=True)
        # A captured copy is made again at every replay, from memory that cannot be pinned during the capture.
        end = self._captured + source.numel() * source.element_size()
        if self._for_captures is None or end > BYTES_FOR_CAPTURES:
            raise RuntimeError(
                f"ELRA needs more than {BYTES_FOR_CAPTURES} bytes for the addresses of tensors in CUDA graphs."
            )
        pinned = self._for_captures[self._captured : end].view(dtype).view(source.shape)
        self._captured = end
        return pinned.copy_(source).to(device, non_blocking=True)


def _kinds(dtype: torch.dtype) -> tuple[Any, Any]:
    """The type of numbers in memory, and the one to compute in."""
    return _TYPES[dtype], tl.float64 if dtype == torch.float64 else tl.float32
