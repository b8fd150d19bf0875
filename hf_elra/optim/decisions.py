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

OF_RATIOS = ("ratios_count", "ratios_mean", "ratios_squares")
OF_RULE = ("warms_up", "first", "natural", "rule_update", "began", "walked", *OF_RATIOS)
"""What the rule remembers; see ``EndSlopes.new_state``."""
NAMES = (*Numbers.names, "previous_uncounted", *OF_RULE)


class Measured(NamedTuple):
    """What an update knows before it decides, 0-dim tensors; see ``rules.Measurement``.

    Attributes:
        square: ‖G_t‖².
        current: ⟨G_t, u_{t-1}⟩.
        uncounted: the part of ``current`` of tensors whose slopes say nothing of the others' rate.
        size: sum of the squares of the weights whose size limits a step.
        loss: f_t; None where it was not told.
        was_full: whether the factor of a scheduler was 1 in the last step.
    """

    square: Tensor
    current: Tensor
    uncounted: Tensor
    size: Tensor
    loss: Tensor | None
    was_full: Tensor


class Verdict(NamedTuple):
    """What becomes of the last step, 0-dim tensors of booleans but for one.

    Attributes:
        stands: it stands, and a new one is made.
        goes_back: it is taken back and tried again. If neither is so, nothing moves.
        limit: a number: -1 where a ceiling decided the α of a new step in place of the rule, 1 where a floor did, or 0.
    """

    stands: Tensor
    goes_back: Tensor
    limit: Tensor


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
        enough, has_cycle = self.recent_count >= ENOUGH_LOSSES, self.last_mean == self.last_mean
        recent = self.recent_mean + guard.sigma * self.recent_variance.sqrt()
        first = torch.full_like(recent, math.inf)
        if guard.initial_ratio is not None:
            of_first = self.initial_loss + (guard.initial_ratio - 1) * self.initial_loss.abs()
            first = torch.where(self.initial_loss.abs() > 0, of_first, first)  # known, and not zero
        of_cycle = self.last_mean + guard.sigma * self.last_std
        of_cycle = torch.where(enough, torch.maximum(of_cycle, recent), of_cycle)
        limit = torch.where(has_cycle, of_cycle, torch.where(enough, recent, first))
        mean = torch.where(has_cycle, self.last_mean, self.initial_loss)
        return limit, torch.where(enough, self.recent_mean, mean)

    def recorded(self, loss: Tensor, guard: RestartGuard) -> Losses:
        """``RestartGuard.record``."""
        limit, middle = self.limit(guard)
        loss = torch.fmin(loss, middle + guards.COUNTS_AT_MOST * (limit - middle))  # where a mean is known
        count, mean, squares = _added(self.cycle_count, self.cycle_mean, self.cycle_squares, loss)
        number = (self.recent_count + 1).clamp(max=RECENT_LOSSES)
        deviation = loss - self.recent_mean
        share = deviation / number
        return self._replace(
            initial_loss=torch.where(self.initial_loss == self.initial_loss, self.initial_loss, loss),
            cycle_count=count,
            cycle_mean=mean,
            cycle_squares=squares,
            recent_count=number,
            recent_mean=self.recent_mean + share,
            recent_variance=(1 - 1 / number) * (self.recent_variance + deviation * share),
        )

    def or_else(self, condition: Tensor, others: Losses) -> Losses:
        """These where the condition holds, else the others."""
        return Losses(*torch.where(condition, torch.stack(self), torch.stack(others)).unbind())


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

    What the numbers are afterwards is worked out for each of three cases, one of which is then chosen: the last step
    stands; it is taken back; the batch is skipped.

    Args:
        numbers: of :data:`NAMES`, 0-dim tensors.
        measured: of this update.
        parts: rule and guards with their settings.
        soft_restart: whether a finite loss can be too high.
        scale: the largest factor of a scheduler.
        number_sized: how many weights ``measured.size`` is of.

    Returns:
        The numbers after the update, but those of its direction: if the last step stands, ``previous_slope``,
        ``previous_uncounted``, ``direction_norm`` and ``step_norm`` are to follow.
    """
    square, loss, guard = measured.square, measured.loss, parts.restart_guard
    zero, nan = torch.zeros_like(square), torch.full_like(square, math.nan)
    slope, consecutive, alpha = numbers["previous_slope"], numbers["consecutive_restarts"], numbers["alpha"]
    known = slope == slope
    finite = square.isfinite()
    skipped = torch.zeros_like(finite)
    if loss is not None:
        has_loss = loss.isfinite()
        finite, skipped = finite & has_loss, ~has_loss & (square == 0)
    skip = {**numbers, "gradient_norm": square.sqrt(), "weight_square": measured.size}
    stand = {**skip, "updates": numbers["updates"] + 1, "non_finite_in_a_row": zero}
    back = {**skip, "updates": stand["updates"]}
    skip["skipped"] = numbers["skipped"] + 1

    # ---- is the loss too high? (guards.judge) ----
    too_high, failures, on_trial = torch.zeros_like(finite), consecutive, numbers["on_trial"] != 0
    shrink = torch.full_like(square, guards.SHORTEST_RETRY)
    stand["previous_loss"] = nan if loss is None else loss
    if loss is not None:
        losses = Losses(*(numbers[name] for name in Losses._fields))
        limit, middle = losses.limit(guard)
        before = numbers["previous_loss"]
        base = torch.where(losses.recent_count >= ENOUGH_LOSSES, torch.maximum(before, losses.recent_mean), before)
        decrease, rise = numbers["step_size"] * slope, loss - base
        least = guards.ROUNDING * torch.maximum(loss.abs(), base.abs()).clamp(min=1.0)
        matters = ~(rise <= torch.maximum(guards.MATTERS * decrease, least))  # or the base is not known
        row_count, row_mean, row_squares = (numbers[f"row_{name}"] for name in ("count", "mean", "squares"))
        # A loss that comes down begins a new row; not beside a mean that is not known, which is NaN.
        stays = ~((row_count > 0) & (loss - middle < guards.COMES_DOWN * (row_mean - middle)))
        row_count, row_mean, row_squares = _added(row_count * stays, row_mean * stays, row_squares * stays, loss)
        persists = (row_count > guards.RETRIES_OF_A_LEVEL) | (consecutive >= guards.MOST_RETRIES)
        if soft_restart:
            too_high = finite & known & (loss > limit) & matters
        is_level, too_high = too_high & persists, too_high & ~persists
        shorter = guards.LONGEST_RETRY * decrease / (rise.clamp(min=0.0) + decrease)
        shorter = torch.where((decrease > 0) & (base == base), shorter, guards.LONGEST_RETRY)
        shrink = torch.where(finite & (consecutive == 0), shorter.clamp(min=guards.SHORTEST_RETRY), shrink)
        # A level is accepted (RestartGuard.accept_level).
        jump = (row_mean - middle).abs() / guard.sigma
        std = torch.fmax(torch.maximum(_std(row_count, row_squares), losses.recent_variance.sqrt()), jump)
        has_cycle = losses.last_mean == losses.last_mean
        accepted = losses._replace(
            initial_loss=row_mean,
            recent_count=torch.full_like(zero, ENOUGH_LOSSES),
            recent_mean=row_mean,
            recent_variance=std * std,
            last_mean=torch.where(has_cycle, row_mean, nan),
            last_std=torch.where(has_cycle, std, nan),
        )
        losses = accepted.or_else(is_level, losses)
        stand["accepted_levels"] = numbers["accepted_levels"] + is_level
        failures, on_trial_now = failures * ~is_level, on_trial & ~is_level
        suspect = torch.where(is_level, nan, numbers["suspect"])
        it_was_the_batch = (failures == 0) & (suspect == suspect)
        losses = losses.recorded(suspect, guard).or_else(it_was_the_batch, losses).recorded(loss, guard)
        stand.update(losses._asdict(), row_count=zero, row_mean=zero, row_squares=zero)
        stand["suspect"] = torch.where((failures != 1) | on_trial_now, nan, suspect)
        rows = {"row_count": row_count, "row_mean": row_mean, "row_squares": row_squares}
        back.update({name: torch.where(too_high, new, numbers[name]) for name, new in rows.items()})
        is_first = too_high & (consecutive == 0) & ~on_trial
        back["suspect"] = torch.where(is_first, loss, numbers["suspect"])
        on_trial = on_trial_now

    # ---- it is taken back (guards.take_back) ----
    taken_back = (too_high | ~finite) & ~skipped
    stands = ~taken_back & ~skipped
    back["length"] = numbers["length"] * shrink
    back["restarts"] = numbers["restarts"] + 1
    back["consecutive_restarts"] = consecutive + 1
    back["non_finite"] = numbers["non_finite"] + ~finite
    back["non_finite_in_a_row"] = (numbers["non_finite_in_a_row"] + 1) * ~finite
    of_retry = scale * alpha * back["length"]
    back["step_size"] = torch.where(known, of_retry, numbers["step_size"])
    back["step_norm"] = torch.where(known, of_retry * numbers["direction_norm"], numbers["step_norm"])
    back["previous_slope"] = torch.where(of_retry == 0, nan, slope)  # where it began, and nothing moves

    # ---- it stands: what does that say about α? (guards.step_was_good) ----
    lowest, proven = parts.step_guards.lr_bounds[0], numbers["proven"]
    quiet = numbers["quiet"] + 1
    level = torch.where(quiet > guards.QUIET_UPDATES, nan, numbers["level"])
    went_well = known & (failures == 0)
    reduces = known & ((failures > 1) | (on_trial & (failures > 0)))
    was_good = alpha * numbers["length"]
    reduced = torch.maximum(was_good, guards.SHORTEST_RETRY * alpha).clamp(min=lowest)
    earlier = torch.where(level == level, level / 2, torch.fmin(proven, alpha))
    level = torch.where(went_well & (level < alpha), alpha, level)
    level = torch.where(reduces, torch.maximum(earlier, reduced), level)
    quiet = quiet * ~reduces
    full = known & (torch.where(reduces, was_good / reduced, numbers["length"]) == 1)
    now = torch.where(reduces, reduced, alpha)
    stand["proven"], stand["level"], stand["quiet"] = torch.where(went_well, alpha, proven), level, quiet
    stand["on_trial"] = (known & (failures > 0)).to(alpha.dtype)
    stand["length"], stand["consecutive_restarts"] = torch.ones_like(zero), zero

    # ---- α: the rule, the way back, bounds ----
    goes_on = ~reduces | (reduced == alpha)
    rule = {name: numbers[name] for name in OF_RULE}
    rule |= {name: rule[name] * goes_on for name in ("warms_up", *OF_RATIOS)}
    rule["walked"] = rule["walked"] + numbers["step_size"]
    proposal, proposed = _proposed(stand["updates"], numbers, rule, measured, parts.rule, now)
    of_rule = torch.where(full, torch.stack([proposed[name] for name in OF_RULE]), torch.stack(list(rule.values())))
    stand.update(zip(OF_RULE, of_rule.unbind(), strict=True))
    returns = (now < level) & (quiet > 0) & (slope > 0) & (measured.current > -slope)
    way_back = torch.minimum(guards.WAY_BACK * now, level)
    proposal = torch.where(returns, torch.maximum(proposal, way_back), proposal)
    asked = torch.where(full, proposal, now)
    proposal = asked.clamp(max=parts.step_guards.lr_bounds[1])
    if (relative := parts.step_guards.max_relative_alpha) is not None:
        of_weights = relative * (measured.size / max(number_sized, 1)).sqrt()
        proposal = torch.where(measured.size > 0, torch.minimum(proposal, of_weights), proposal)
    proposal = proposal.clamp(min=lowest)
    if (drift := parts.step_guards.max_drift) is not None:
        left = (drift * rule["began"] - rule["walked"]).clamp(min=0.0)
        proposal = torch.minimum(proposal, left * _part_of_drift(stand["updates"], parts.step_guards.total_updates))
    stand["alpha"] = proposal
    stand["step_size"] = scale * proposal
    norms = stand["gradient_norm"] * numbers["direction_norm"]
    cosine = torch.where(norms > 0, measured.current / norms, zero)
    stand["cosine"] = torch.where(known, cosine, numbers["cosine"])

    cases = (torch.stack([case[name] for name in NAMES]) for case in (stand, back, skip))
    if_stands, if_back, if_skipped = cases
    found = torch.where(stands, if_stands, torch.where(taken_back, if_back, if_skipped))
    return dict(zip(NAMES, found.unbind(), strict=True)), Verdict(
        stands, taken_back & known, (proposal - asked).sign() * stands
    )


def _part_of_drift(update: Tensor, total: int | None) -> Tensor | float:
    """``StepGuards.part_of_drift``."""
    if total is None:
        return guards.PART_OF_DRIFT
    part = 1 / guards.updates_ahead(update, total).clamp(min=1.0)
    return torch.where(update > total, guards.PART_OF_DRIFT, part)


def _proposed(
    update: Tensor,
    numbers: dict[str, Tensor],
    rule: dict[str, Tensor],
    measured: Measured,
    settings: Any,
    alpha: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """``EndSlopes.propose``: α_t and what the rule remembers then."""
    since = OFFSET + update
    natural = rule["natural"] / (since.sqrt() if settings.falls else (2 * OFFSET) ** 0.5)
    fallen = alpha * ((OFFSET + rule["rule_update"]) / since).sqrt() if settings.falls else alpha
    if settings.warmup > 0 and settings.fresh is not None:  # the first pass over the data is over
        ends = (rule["rule_update"] <= settings.fresh) & (update > settings.fresh) & (fallen < settings.PLAIN * natural)
        fallen = torch.where(ends, torch.minimum(fallen, natural), fallen)

    # Ratios are taken in, and may be significant (EndSlopes._corrected).
    slope = numbers["previous_slope"] - numbers["previous_uncounted"]
    takes_in = measured.was_full & (slope > 0)
    ratio = ((measured.current - measured.uncounted) / slope).clamp(-1.0, 1.0)
    old = [rule[name] for name in OF_RATIOS]
    count, mean, squares = _added(old[0], old[1], old[2], ratio)
    freedom = (count - 1).clamp(min=1.0)
    few = 1 + (settings.FEWEST / freedom) ** 2
    error = settings.SIGNIFICANCE * few * _std(count, squares) / freedom.sqrt()
    too_short = mean > error
    corrects = takes_in & (count >= settings.FEWEST) & (too_short | (mean + error < settings.TOO_LONG))
    beyond = torch.where(too_short, mean, mean - settings.TOO_LONG)
    corrected = fallen * (settings.GAIN * beyond).clamp(-settings.DOWN, settings.UP).exp()
    most, usually = settings.max_correction * natural, settings.usually * natural
    raised = torch.maximum(fallen, torch.minimum(corrected, torch.where(mean > settings.FAR_TOO_SHORT, most, usually)))
    if settings.fresh is not None:
        raised = torch.where(update > settings.fresh, fallen, raised)
    lowered = torch.maximum(corrected, torch.minimum(fallen, natural))
    corrected = torch.where(corrected > fallen, raised, lowered)
    proposal = torch.where(corrects, corrected, fallen)
    taken = torch.stack(
        [torch.where(takes_in, new, kept) for new, kept in zip((count, mean, squares), old, strict=True)]
    )
    ratios = taken * ~corrects

    # The warm-up comes before all that.
    warms_up, on_the_way = rule["warms_up"] != 0, update <= settings.warmup
    share = (update - 1) / max(settings.warmup, 1)
    straight = rule["first"] ** (1 - share) * natural**share
    proposal = torch.where(warms_up, torch.where(on_the_way, straight, natural), proposal)
    ratios = torch.where(warms_up, torch.stack(old), ratios)
    state = dict(rule, rule_update=update, warms_up=(warms_up & on_the_way).to(update.dtype))
    state.update(zip(OF_RATIOS, ratios.unbind(), strict=True))
    return proposal, state


def _added(count: Tensor, mean: Tensor, squares: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``LossStatistics.add``."""
    delta = value - mean
    new_mean = mean + delta / (count + 1)
    return count + 1, new_mean, squares + delta * (value - new_mean)


def _std(count: Tensor, squares: Tensor) -> Tensor:
    """``LossStatistics.std``, of at least one value."""
    return (squares / count.clamp(min=1.0)).sqrt()
