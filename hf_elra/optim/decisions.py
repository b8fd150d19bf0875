"""The decisions of ``guards.py`` and ``rules/end_slopes.py``, on numbers that stay on the device.

:func:`decide` judges the last step and chooses α, with plain operations of torch on 0-dim tensors. Nothing in here
branches on a number of the device, so that the host only queues work. What a number is not known is NaN; what is not to
count is left out by ``torch.where`` and never by a product, since 0·NaN is NaN. The same decisions on the host are made
by ``base.py``; tests hold both against the twin in ``reference/`` at every update.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_elra.control.statistics import ENOUGH_LOSSES, RECENT_LOSSES
from hf_elra.optim import guards
from hf_elra.optim.base import Parts
from hf_elra.optim.device_numbers import Numbers
from hf_elra.optim.guards import RestartGuard
from hf_elra.optim.natural_steps import OFFSET

OF_RULE = ("warms_up", "first", "natural", "rule_update", "ratios_count", "ratios_mean", "ratios_squares")
"""What the rule remembers; see ``EndSlopes.new_state``."""
NAMES = (*Numbers.names, "previous_slope_of_new", *OF_RULE)


class Measured(NamedTuple):
    """What an update knows before it decides, 0-dim tensors; see ``rules.Measurement``.

    Attributes:
        square: ‖G_t‖².
        current: ⟨G_t, u_{t-1}⟩.
        of_new: the part of ``current`` that belongs to tensors that are new in a trained model.
        size: sum of the squares of the weights whose size limits a step.
        loss: f_t; None where it was not told.
        was_full: whether the factor of a scheduler was 1 in the last step.
    """

    square: Tensor
    current: Tensor
    of_new: Tensor
    size: Tensor
    loss: Tensor | None
    was_full: Tensor


class Verdict(NamedTuple):
    """What becomes of the last step, 0-dim tensors of booleans.

    Attributes:
        stands: it stands, and a new one is made.
        goes_back: it is taken back and tried again. If neither is so, nothing moves.
    """

    stands: Tensor
    goes_back: Tensor


class Losses(NamedTuple):
    """What is remembered of losses, as in ``guards.new_loss_statistics``; NaN for what is not known."""

    initial_loss: Tensor
    cycle_count: Tensor
    cycle_mean: Tensor
    cycle_squares: Tensor
    last_mean: Tensor
    last_std: Tensor
    recent_count: Tensor
    recent_mean: Tensor
    recent_variance: Tensor

    def limit(self, guard: RestartGuard) -> tuple[Tensor, Tensor]:
        """``RestartGuard.limit``; NaN for a mean that is not known."""
        enough, has_cycle = self.recent_count >= ENOUGH_LOSSES, ~self.last_mean.isnan()
        recent = self.recent_mean + guard.sigma * self.recent_variance.sqrt()
        first = torch.full_like(recent, math.inf)
        if guard.initial_ratio is not None:
            known = ~self.initial_loss.isnan() & (self.initial_loss != 0)
            first = torch.where(known, self.initial_loss + (guard.initial_ratio - 1) * self.initial_loss.abs(), first)
        of_cycle = self.last_mean + guard.sigma * self.last_std
        of_cycle = torch.where(enough, torch.maximum(of_cycle, recent), of_cycle)
        limit = torch.where(has_cycle, of_cycle, torch.where(enough, recent, first))
        mean = torch.where(has_cycle, self.last_mean, self.initial_loss)
        return limit, torch.where(enough, self.recent_mean, mean)

    def recorded(self, happens: Tensor, loss: Tensor, guard: RestartGuard) -> Losses:
        """``RestartGuard.record``, where it happens."""
        limit, middle = self.limit(guard)
        most = middle + guards.COUNTS_AT_MOST * (limit - middle)
        loss = torch.where(middle.isnan(), loss, torch.minimum(loss, most))
        count, mean, squares = _added(self.cycle_count, self.cycle_mean, self.cycle_squares, loss)
        number = (self.recent_count + 1).clamp(max=RECENT_LOSSES)
        deviation = loss - self.recent_mean
        variance = (1 - 1 / number) * (self.recent_variance + deviation * deviation / number)
        return self.where(
            happens,
            initial_loss=torch.where(self.initial_loss.isnan(), loss, self.initial_loss),
            cycle_count=count,
            cycle_mean=mean,
            cycle_squares=squares,
            recent_count=number,
            recent_mean=self.recent_mean + deviation / number,
            recent_variance=variance,
        )

    def where(self, happens: Tensor, **new: Tensor | float) -> Losses:
        """Replace some of the numbers, where it happens."""
        return self._replace(**{name: torch.where(happens, value, getattr(self, name)) for name, value in new.items()})


def cycle_ended(numbers: dict[str, Tensor]) -> dict[str, Tensor]:
    """``RestartGuard.end_cycle``: return the numbers that change."""
    count, mean, squares = (numbers[name] for name in ("cycle_count", "cycle_mean", "cycle_squares"))
    ends = count > 1
    found = {"last_mean": torch.where(ends, mean, numbers["last_mean"])}
    found["last_std"] = torch.where(ends, _std(count, squares), numbers["last_std"])
    return found | {
        name: torch.where(ends, 0.0, numbers[name]) for name in ("cycle_count", "cycle_mean", "cycle_squares")
    }


def decide(
    numbers: dict[str, Tensor],
    measured: Measured,
    parts: Parts,
    *,
    soft_restart: bool,
    scale: float,
    number_sized: int,
) -> tuple[dict[str, Tensor], Verdict]:
    """Judge the last step, and choose α; as ``base.py`` does on the host. Nothing is changed.

    Args:
        numbers: of :data:`NAMES`, 0-dim tensors.
        measured: of this update.
        parts: rule and guards with their settings.
        soft_restart: whether a finite loss can be too high.
        scale: the largest factor of a scheduler.
        number_sized: how many weights ``measured.size`` is of.

    Returns:
        The numbers after the update, but those of its direction: if the last step stands, ``previous_slope``,
        ``previous_slope_of_new``, ``direction_norm`` and ``step_norm`` are to follow.
    """
    n, guard = dict(numbers), parts.restart_guard
    square, loss = measured.square, measured.loss
    known, slope, consecutive = ~n["previous_slope"].isnan(), n["previous_slope"], n["consecutive_restarts"]
    finite = square.isfinite()
    skipped = torch.zeros_like(finite)
    if loss is not None:
        finite, skipped = finite & loss.isfinite(), (square == 0) & ~loss.isfinite()
    broken = ~finite & ~skipped
    n["updates"] = n["updates"] + ~skipped
    n["skipped"] = n["skipped"] + skipped
    n["non_finite"] = n["non_finite"] + broken
    n["non_finite_in_a_row"] = torch.where(finite, 0.0, n["non_finite_in_a_row"] + broken)
    n["gradient_norm"], n["weight_square"] = square.sqrt(), measured.size

    # ---- is the loss too high? (guards.judge) ----
    too_high, failures, on_trial = torch.zeros_like(finite), consecutive, n["on_trial"] != 0
    shrink = torch.full_like(square, guards.LONGEST_RETRY)
    if loss is not None:
        losses = Losses(*(n[name] for name in Losses._fields))
        limit, middle = losses.limit(guard)
        before, mean = n["previous_loss"], losses.recent_mean
        base = torch.where(losses.recent_count >= ENOUGH_LOSSES, torch.maximum(before, mean), before)  # NaN stays NaN
        decrease = n["step_size"] * slope
        rounding = guards.ROUNDING * torch.maximum(loss.abs(), base.abs()).clamp(min=1.0)
        matters = base.isnan() | (loss - base > torch.maximum(guards.MATTERS * decrease, rounding))
        if soft_restart:
            too_high = finite & known & (loss > limit) & matters
        row = n["row_count"], n["row_mean"], n["row_squares"]
        down = (row[0] > 0) & (loss - middle < guards.COMES_DOWN * (row[1] - middle))  # never beside a NaN
        kept_count, kept_mean, kept_squares = (torch.where(down, 0.0, value) for value in row)
        row_count, row_mean, row_squares = _added(kept_count, kept_mean, kept_squares, loss)
        persists = (row_count > guards.RETRIES_OF_A_LEVEL) | (consecutive >= guards.MOST_RETRIES)
        is_level, too_high = too_high & persists, too_high & ~persists
        shrink = guards.LONGEST_RETRY * decrease / ((loss - base).clamp(min=0.0) + decrease)
        shrink = torch.where(base.isnan() | (decrease <= 0), guards.LONGEST_RETRY, shrink)
        shrink = shrink.clamp(min=guards.SHORTEST_RETRY)
        # A level is accepted (RestartGuard.accept_level).
        jump = torch.where(middle.isnan(), 0.0, (row_mean - middle).abs())
        std = torch.maximum(_std(row_count, row_squares), losses.recent_variance.sqrt())
        std = torch.maximum(std, jump / guard.sigma)
        losses = losses.where(
            is_level,
            initial_loss=row_mean,
            recent_count=float(ENOUGH_LOSSES),
            recent_mean=row_mean,
            recent_variance=std * std,
        ).where(is_level & ~losses.last_mean.isnan(), last_mean=row_mean, last_std=std)
        n["accepted_levels"] = n["accepted_levels"] + is_level
        failures, on_trial = torch.where(is_level, 0.0, failures), on_trial & ~is_level
        suspect = torch.where(is_level, math.nan, n["suspect"])
        good = finite & ~too_high
        losses = losses.recorded(good & (failures == 0) & ~suspect.isnan(), suspect, guard)  # it was the batch
        losses = losses.recorded(good, loss, guard)
        suspect = torch.where(good & ((failures != 1) | on_trial), math.nan, suspect)
        n["suspect"] = torch.where(too_high & (consecutive == 0) & ~on_trial, loss, suspect)
        n.update(losses._asdict())
        for name, new in (("row_count", row_count), ("row_mean", row_mean), ("row_squares", row_squares)):
            n[name] = torch.where(good, 0.0, torch.where(too_high, new, n[name]))

    # ---- it is taken back (guards.take_back) ----
    taken_back = broken | too_high
    stands = ~taken_back & ~skipped
    shrink = torch.where((consecutive > 0) | ~finite, guards.SHORTEST_RETRY, shrink)
    length_of_retry = n["length"] * shrink
    n["restarts"] = n["restarts"] + taken_back
    n["consecutive_restarts"] = torch.where(stands, 0.0, consecutive + taken_back)

    # ---- it stands: what does that say about α? (guards.step_was_good) ----
    alpha, lowest = n["alpha"], parts.step_guards.lr_bounds[0]
    quiet, level, proven = n["quiet"] + 1, n["level"], n["proven"]
    level = torch.where(quiet > guards.QUIET_UPDATES, math.nan, level)
    went_well = known & (failures == 0)
    reduces = known & ~went_well & ((failures > 1) | on_trial)
    was_good = alpha * n["length"]
    reduced_alpha = torch.maximum(was_good, guards.SHORTEST_RETRY * alpha).clamp(min=lowest)
    earlier = torch.where(proven.isnan(), alpha, torch.minimum(proven, alpha))
    earlier = torch.where(level.isnan(), earlier, level / 2)
    level = torch.where(went_well & (level < alpha), alpha, level)
    level = torch.where(reduces, torch.maximum(earlier, reduced_alpha), level)
    quiet = torch.where(reduces, 0.0, quiet)
    proven = torch.where(went_well, alpha, proven)
    length = torch.where(reduces, was_good / reduced_alpha, n["length"])
    full = known & (length == 1)
    now = torch.where(reduces, reduced_alpha, alpha)

    # ---- α: the rule, the way back, bounds ----
    rule = {name: n[name] for name in OF_RULE}
    fell = reduces & (reduced_alpha < alpha)
    for name in ("warms_up", "ratios_count", "ratios_mean", "ratios_squares"):
        rule[name] = torch.where(fell, 0.0, rule[name])
    proposal, proposed = _proposed(n, rule, measured, parts.rule, now)
    for name in OF_RULE:
        n[name] = torch.where(stands, torch.where(full, proposed[name], rule[name]), n[name])
    returns = (now < level) & (quiet > 0) & (slope > 0) & (measured.current > -slope)
    back = torch.where(returns, torch.minimum(guards.WAY_BACK * now, level), 0.0)
    proposal = torch.where(full, torch.maximum(proposal, back), now)
    highest = torch.full_like(proposal, parts.step_guards.lr_bounds[1])
    if (relative := parts.step_guards.max_relative_alpha) is not None:
        of_weights = relative * (measured.size / max(number_sized, 1)).sqrt()
        highest = torch.where(measured.size > 0, torch.minimum(highest, of_weights), highest)
    proposal = torch.minimum(proposal, highest).clamp(min=lowest)

    norms = n["gradient_norm"] * n["direction_norm"]
    cosine = torch.where(norms > 0, measured.current / norms, 0.0)
    n["cosine"] = torch.where(stands & known, cosine, n["cosine"])
    n["on_trial"] = torch.where(stands, (known & (failures > 0)).to(alpha.dtype), on_trial.to(alpha.dtype))
    for name, new in (("alpha", proposal), ("quiet", quiet), ("level", level), ("proven", proven)):
        n[name] = torch.where(stands, new, n[name])
    n["length"] = torch.where(stands, 1.0, torch.where(taken_back, length_of_retry, n["length"]))

    # ---- how far it goes ----
    goes_back = taken_back & known
    n["step_size"] = torch.where(stands | goes_back, scale * n["alpha"] * n["length"], n["step_size"])
    of_retry = n["step_size"] * n["direction_norm"]
    n["step_norm"] = torch.where(goes_back, of_retry, n["step_norm"])
    nothing_left = goes_back & (n["step_size"] == 0)  # back where the last step began, and nothing moves
    n["previous_slope"] = torch.where(nothing_left, math.nan, slope)
    n["previous_loss"] = torch.where(stands, math.nan if loss is None else loss, n["previous_loss"])
    return n, Verdict(stands, goes_back)


def _proposed(
    n: dict[str, Tensor], rule: dict[str, Tensor], measured: Measured, settings: Any, alpha: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """``EndSlopes.propose``: α_t and what the rule remembers then."""
    update, before = n["updates"], rule["rule_update"]
    natural = rule["natural"] / (OFFSET + (update if settings.falls else torch.full_like(update, OFFSET))).sqrt()
    on_the_way = torch.zeros_like(update, dtype=torch.bool)
    straight = alpha
    if settings.warmup > 0:
        on_the_way = update <= settings.warmup
        share = (update - 1) / settings.warmup
        straight = rule["first"] ** (1 - share) * natural**share
    falls = torch.sqrt((OFFSET + before) / (OFFSET + update)) if settings.falls else 1.0
    fallen = alpha * falls

    # Ratios are taken in, and may be significant (EndSlopes._corrected).
    slope = n["previous_slope"] - n["previous_slope_of_new"]
    takes_in = measured.was_full & (slope > 0)
    ratio = ((measured.current - measured.of_new) / torch.where(takes_in, slope, 1.0)).clamp(-1.0, 1.0)
    old = rule["ratios_count"], rule["ratios_mean"], rule["ratios_squares"]
    count, mean, squares = _added(*old, ratio)
    freedom = (count - 1).clamp(min=1.0)
    few = 1 + (settings.FEWEST / freedom) ** 2
    error = settings.SIGNIFICANCE * few * _std(count, squares) / freedom.sqrt()
    too_short, too_long = mean > error, mean + error < settings.TOO_LONG
    corrects = takes_in & (count >= settings.FEWEST) & (too_short | too_long)
    beyond = torch.where(too_short, mean, mean - settings.TOO_LONG)
    corrected = fallen * (settings.GAIN * beyond).clamp(-settings.LARGEST, settings.LARGEST).exp()
    raised = torch.maximum(fallen, torch.minimum(corrected, settings.max_correction * natural))
    if settings.fresh is not None:
        raised = torch.where(update > settings.fresh, fallen, raised)
    corrected = torch.where(corrected > fallen, raised, corrected)
    later = torch.where(corrects, corrected, fallen)

    warms_up = rule["warms_up"] != 0
    proposal = torch.where(warms_up, torch.where(on_the_way, straight, natural), later)
    takes_in, corrects = takes_in & ~warms_up, corrects & ~warms_up
    state = dict(rule, rule_update=update, warms_up=(warms_up & on_the_way).to(update.dtype))
    for name, new, kept in zip(OF_RULE[4:], (count, mean, squares), old, strict=True):
        state[name] = torch.where(corrects, 0.0, torch.where(takes_in, new, kept))
    return proposal, state


def _added(count: Tensor, mean: Tensor, squares: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``LossStatistics.add``."""
    delta = value - mean
    new_mean = mean + delta / (count + 1)
    return count + 1, new_mean, squares + delta * (value - new_mean)


def _std(count: Tensor, squares: Tensor) -> Tensor:
    """``LossStatistics.std``, of at least one value."""
    return (squares / count.clamp(min=1.0)).sqrt()
