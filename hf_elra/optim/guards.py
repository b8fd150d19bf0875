"""Guards: what keeps a step size within reason, whatever rule proposed it.

:class:`StepGuards` bounds α and the length of the step. :class:`RestartGuard` decides from the losses whether the last
step has to be taken back. :func:`take_back` and :func:`step_was_good` say what that means for α: a step that is taken
back is tried again *shorter*, with the same α, because one high loss may be the fault of its batch. Only a second
failure is evidence against α. Where losses have no noise there is no batch to blame, and α itself is reduced, as in the
paper. Nothing here touches a tensor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from hf_elra.control.statistics import ENOUGH_LOSSES, LossStatistics, RecentLosses
from hf_elra.optim.natural_steps import OFFSET
from hf_elra.optim.rules import Measurement

RESTART_FORMULAS = ("derived", "paper")
LONGEST_RETRY, SHORTEST_RETRY = 0.5, 0.1
"""Bounds on the length of a retry, as a share of the step that was taken back. After the first retry, and if loss or
gradient is not finite (no parabola can be laid through infinity), it is the lower one. If losses have no noise, a retry
may be shorter."""

RETRIES_OF_A_LEVEL = 3
"""If losses do not come down over this many retries, the data are the cause and not the step, since the last retry has
at most 1/200 of its length. The level of the losses is accepted then. This is beyond the paper."""

MOST_RETRIES = 20
"""After this many retries any finite loss is accepted, since nothing is left of the step."""

MOST_NON_FINITE = 20
"""This many updates in a row without a finite loss and gradient are an error."""

COMES_DOWN = 0.3
"""A loss comes down if its excess over the mean is below this share of the excess of the earlier losses in the row."""

COUNTS_AT_MOST = 4
"""In the statistics a single high loss is at most this many times as far above the mean as the limit is (20σ). So one
spike of 1e6 does not switch the guard off, and spikes that come more often than every 400 updates are soon ordinary."""

MATTERS = 0.01
"""A rise of the loss counts only beyond this share of the decrease that the step promises, α·slope."""

ROUNDING = 1e-6
"""A rise counts only beyond this share of the loss, too, which is a few roundings of float32. If losses are those of
batches, a loss below 1 counts as 1 here: losses near 0 are often sums of terms near 1 that cancel each other, as in a
policy gradient."""

LEAST_SIZE = 0.01
"""For the relative crop the root mean square of weights counts as at least this: weights that begin at zero have to
leave it."""

PART_OF_DRIFT = 0.05
"""Where nobody says how long a run is, a step is at most this share of what ``max_drift`` leaves, so that steps end
gently and not at once."""

QUIET_UPDATES = 50
"""If trouble recurs within this many updates, α goes back to a lower value afterwards; later it counts as over."""

WAY_BACK = 2.0
"""When trouble has ended, α goes back to its earlier value by at most this factor per update."""


@dataclass(frozen=True)
class StepGuards:
    """Bounds on α and on the step norm α‖u‖ (ELRA, sections 3.1 and 3.5).

    Args:
        max_growth: largest α_t/α_{t-1}; γ_max in the paper.
        lr_bounds: smallest and largest α.
        min_step_norm: floor under α‖u‖; the α warm-up for language models. 0 for none.
        max_step_norm: crop above α‖u‖; c in section 3.5. None for none.
        max_relative_step: crop above this share of the norm of the weights, or above ``min_step_norm`` where that is
            more; weights of a root mean square below ``LEAST_SIZE`` count as of that. None for none.
        max_first_step: the same for the first step alone, of which nothing is known. None for none.
        max_relative_alpha: α is at most this share of the root mean square of the weights; for directions whose
            elements have a mean square of one. None for none.
        max_drift: all α together are at most this share of the root mean square that the weights began with, for such
            directions; each is at most a part of what is left (:func:`part_of_drift`). None for none.
        total_updates: how many there will be; None where nobody knows.
    """

    max_growth: float = math.inf
    lr_bounds: tuple[float, float] = (0.0, math.inf)
    min_step_norm: float = 0.0
    max_step_norm: float | None = None
    max_relative_step: float | None = None
    max_first_step: float | None = None
    max_relative_alpha: float | None = None
    max_drift: float | None = None
    total_updates: int | None = None

    def need_size(self, *, is_first: bool) -> bool:
        """Whether the size of the weights has to be known."""
        first = is_first and self.max_first_step is not None
        return first or self.max_relative_step is not None or self.max_relative_alpha is not None

    def apply(
        self,
        alpha: float,
        previous_alpha: float,
        direction_norm: float,
        weight_square: float = 0.0,
        number: int = 0,
        *,
        is_first: bool = False,
        began: float = 0.0,
        walked: float = 0.0,
        update: int = 1,
    ) -> tuple[float, str | None]:
        """Return the α that may be used where a rule proposes ``alpha`` along a direction of norm ``direction_norm``,
        and which limit decided it: ``"floor"``, ``"ceiling"``, ``"crop"`` or None.

        In this order: growth, floor, bounds, crop. So a vanishing gradient cannot drive the floor past the upper bound,
        and a huge one is cropped even below the lower bound.

        Args:
            alpha: what the rule proposes.
            previous_alpha: α_{t-1}.
            direction_norm: ‖u_t‖.
            weight_square, number: sum of the squares of the weights whose size limits a step, and how many they are.
            is_first: whether it is the first step.
            began, walked: root mean square of the weights before the first step, and the sum of all α since.
            update: the number of this one, from 1.
        """
        alpha, limit = min(alpha, self.max_growth * previous_alpha), None
        if self.min_step_norm > 0 and direction_norm > 0 and alpha < self.min_step_norm / direction_norm:
            alpha, limit = self.min_step_norm / direction_norm, "floor"
        bounded = self.bounded(alpha, math.sqrt(weight_square / number) if weight_square > 0 else 0.0)
        if bounded != alpha:
            alpha, limit = bounded, "ceiling" if bounded < alpha else "floor"
        longest = math.inf if self.max_step_norm is None else self.max_step_norm
        if self.max_relative_step is not None:
            # Weights that begin at zero have to leave it.
            norm = math.sqrt(max(weight_square, LEAST_SIZE**2 * number))
            longest = min(longest, max(self.max_relative_step * norm, self.min_step_norm))
        if is_first and self.max_first_step is not None and weight_square > 0:
            longest = min(longest, max(self.max_first_step * math.sqrt(weight_square), self.min_step_norm))
        if alpha * direction_norm > longest:
            alpha, limit = longest / direction_norm, "crop"
        if self.max_drift is not None:
            left = max(self.max_drift * began - walked, 0.0) * self.part_of_drift(update)
            if alpha > left:
                alpha, limit = left, "ceiling"
        return alpha, limit

    def part_of_drift(self, update: int) -> float:
        """Return the share of what ``max_drift`` leaves that a step may take: so much that all of it is used up in the
        last update, if there is no cause for shorter steps."""
        if self.total_updates is None or update > self.total_updates:
            return PART_OF_DRIFT
        return 1 / max(updates_ahead(update, self.total_updates), 1.0)

    def bounded(self, alpha: float, root_mean_square: float) -> float:
        """Return α within its bounds, of weights of this root mean square; 0 for one that is not known."""
        low, high = self.lr_bounds
        if self.max_relative_alpha is not None and root_mean_square > 0:
            high = min(high, self.max_relative_alpha * root_mean_square)
        return max(min(alpha, high), low)


def updates_ahead(update: Any, total: int) -> Any:
    """Return how many updates there are from this one to the last, each counted as its rate over that of this one.

    Rates fall as (t + ``OFFSET``)^-½, whose sum is nearly an integral.

    Args:
        update: the number of this one, from 1; a number or a tensor of one.
        total: how many there will be.
    """
    return 2 * ((total + OFFSET + 0.5) ** 0.5 - (update + OFFSET - 0.5) ** 0.5) * (update + OFFSET) ** 0.5


def new_loss_statistics(window: int | None = None) -> dict[str, Any]:
    """The plain, serialisable memory of a :class:`RestartGuard` with this ``window``.

    Of one structure from the first update to the last: torch's distributed checkpoints merge a saved state leaf by leaf
    into that of a new optimizer. ``recent`` is count, mean and variance of a falling average; ``row`` count, mean and
    squared deviations of the losses of steps that were taken back in a row; ``suspect`` a loss that was taken for too
    high and enters the statistics once it turns out that α was not the cause.
    """
    losses = None if window is None else [None] * window
    return {
        "initial_loss": None, "window": losses, "cycle": [0, 0.0, 0.0], "last_cycle": [None, None],
        "recent": [0, 0.0, 0.0], "row": [0, 0.0, 0.0], "suspect": None,
    }  # fmt: skip


@dataclass(frozen=True)
class RestartGuard:
    """Soft restarts (ELRA, section 3.2): is a loss too high, and how much shorter must the step be?

    The guard keeps nothing; what it must remember is in the ``statistics`` that ``new_loss_statistics`` makes and
    that the optimizer stores with its state.

    Args:
        sigma: a loss above mean + ``sigma``·σ is too high.
        initial_ratio: while no mean is known, a loss above f_0 + (ratio - 1)·|f_0| is (1.1·f_0 for f_0 > 0). None drops
            this first rule, for pre-trained starts. At f_0 = 0 nothing is known of the scale and the rule is silent.
        window: mean and σ over the last ``window`` losses, from the second on. None: over the last complete cycle, or
            over the recent losses where that limit is higher or where no cycle is complete yet.
        formula: ``"derived"`` or ``"paper"``, see :meth:`shrink`.
        noisy: losses are those of batches.
    """

    sigma: float = 5.0
    initial_ratio: float | None = 1.1
    window: int | None = None
    formula: str = "derived"
    noisy: bool = True

    def limit(self, statistics: dict[str, Any]) -> tuple[float, float | None]:
        """Return the loss above which the last step is taken back (infinite while nothing is known), and the mean of
        the losses that it comes from."""
        if self.window is not None:
            window = LossStatistics()
            for loss in filter(lambda loss: loss is not None, statistics["window"]):
                window.add(loss)
            if window.count > 1:
                return window.mean + self.sigma * window.std, window.mean
        count, mean, variance = statistics["recent"]
        recent = mean + self.sigma * math.sqrt(variance) if count >= ENOUGH_LOSSES else -math.inf
        cycle_mean, cycle_std = statistics["last_cycle"]
        if cycle_mean is not None:
            return max(cycle_mean + self.sigma * cycle_std, recent), mean if count >= ENOUGH_LOSSES else cycle_mean
        if count >= ENOUGH_LOSSES:
            # Beyond the paper: losses of small batches often differ by more than a tenth, so that 1.1·f_0 alone would
            # take back good steps for a whole epoch; and a loss that has fallen far could climb back unnoticed.
            return recent, mean
        initial = statistics["initial_loss"]
        if self.initial_ratio is None or initial is None or initial == 0:
            return math.inf, initial
        return initial + (self.initial_ratio - 1) * abs(initial), initial

    def base(self, statistics: dict[str, Any], previous_loss: float | None) -> float | None:
        """Return the loss that a rise is measured from.

        That is f_{t-1}, or the recent mean where it is higher: f_{t-1} belongs to another batch, and after an easy one
        every loss would seem a steep rise.
        """
        count, mean, _ = statistics["recent"]
        if previous_loss is None or count < ENOUGH_LOSSES:
            return previous_loss
        return max(previous_loss, mean)

    def is_too_high(
        self, statistics: dict[str, Any], loss: float, *, decrease: float, previous_loss: float | None
    ) -> bool:
        """Whether a finite loss is above the limit, and its rise matters.

        A rise matters beside ``decrease``, what the step promised (α·slope), and beside the rounding of losses: near 0
        a loss doubles for no reason.
        """
        if not loss > self.limit(statistics)[0]:
            return False
        base = self.base(statistics, previous_loss)
        if base is None:
            return True
        least = 1.0 if self.noisy else 0.0
        return loss - base > max(MATTERS * decrease, ROUNDING * max(abs(loss), abs(base), least))

    def is_a_new_level(self, statistics: dict[str, Any], loss: float, *, retries: int) -> bool:
        """Take a too high loss into the row of those before it; return whether it is a level that persists."""
        mean = self.limit(statistics)[1]
        row = LossStatistics(*statistics["row"])
        if mean is not None and row.count > 0 and loss - mean < COMES_DOWN * (row.mean - mean):
            row = LossStatistics()
        row.add(loss)
        statistics["row"] = [row.count, row.mean, row.squared_deviations]
        return (self.noisy and row.count > RETRIES_OF_A_LEVEL) or retries >= MOST_RETRIES

    def accept_level(self, statistics: dict[str, Any]) -> None:
        """Let the losses of the row be ordinary from now on: the statistics take their mean and a generous spread."""
        _, mean = self.limit(statistics)
        row = LossStatistics(*statistics["row"])
        jump = 0.0 if mean is None else abs(row.mean - mean)
        std = max(row.std, math.sqrt(statistics["recent"][2]), jump / self.sigma)
        statistics["initial_loss"] = row.mean
        if self.window is not None:
            statistics["window"] = [*[None] * (self.window - 2), row.mean - std, row.mean + std]
        else:
            statistics["recent"] = [ENOUGH_LOSSES, row.mean, std * std]
            if statistics["last_cycle"][0] is not None:
                statistics["last_cycle"] = [row.mean, std]

    def record(self, statistics: dict[str, Any], loss: float) -> None:
        """Take an accepted loss into the statistics."""
        highest, mean = self.limit(statistics)
        if mean is not None:
            loss = min(loss, mean + COUNTS_AT_MOST * (highest - mean))
        if statistics["initial_loss"] is None:
            statistics["initial_loss"] = loss
        if self.window is not None:
            statistics["window"] = [*statistics["window"], loss][-self.window :]
            return
        cycle = LossStatistics(*statistics["cycle"])
        cycle.add(loss)
        statistics["cycle"] = [cycle.count, cycle.mean, cycle.squared_deviations]
        recent = RecentLosses(*statistics["recent"])
        recent.add(loss)
        statistics["recent"] = [recent.count, recent.mean, recent.variance]

    @staticmethod
    def end_cycle(statistics: dict[str, Any]) -> None:
        """Close a cycle: its mean and σ judge the next one. A cycle of fewer than two losses goes on."""
        cycle = LossStatistics(*statistics["cycle"])
        if cycle.count > 1:
            statistics["last_cycle"] = [cycle.mean, cycle.std]
            statistics["cycle"] = [0, 0.0, 0.0]

    def shrink(self, step_size: float, previous_slope: float, loss: float, base: float | None) -> float:
        """Return how much shorter than the last step the next try from x_{t-1} is.

        The parabola through f_{t-1}, its slope and f_t has its minimum at ½·α²n/(Δf + αn), n = ⟨G_{t-1},u_{t-1}⟩.
        The paper prints ‖G‖ for n = ‖G‖², whose terms do not have the same unit; ``formula="paper"`` keeps that.

        Args:
            step_size: of the last step.
            previous_slope: n.
            loss: f_t.
            base: f_{t-1}, or what :meth:`base` has for it.
        """
        slope = previous_slope if self.formula == "derived" else math.sqrt(previous_slope)
        decrease = step_size * slope
        if base is None or decrease <= 0:
            return LONGEST_RETRY
        shorter = LONGEST_RETRY * decrease / (max(loss - base, 0.0) + decrease)
        return max(shorter, SHORTEST_RETRY) if self.noisy else shorter


def guards_of(settings: dict[str, Any]) -> tuple[StepGuards, RestartGuard]:
    """The guards of optimizers whose papers have none: bounds on α, a crop where one is asked for, soft restarts."""
    step_guards = StepGuards(lr_bounds=settings["lr_bounds"], max_relative_step=settings["max_relative_step"])
    return step_guards, RestartGuard(settings["restart_sigma"], settings["initial_restart_ratio"])


def new_setbacks() -> dict[str, Any]:
    """What :func:`take_back` and :func:`step_was_good` remember, plain numbers for a checkpoint.

    ``length`` is the last step's share of a full one, α·factor; ``on_trial`` is 1 while the next full step decides
    whether α or a batch was at fault; ``proven`` the α of the last full step that was good; ``level`` the α to go back
    to, and ``quiet`` how many updates ago α was reduced.
    """
    return {
        "length": 1.0, "on_trial": 0, "proven": None, "level": None, "quiet": 0, "restarts": 0, "non_finite": 0,
        "consecutive_restarts": 0, "non_finite_in_a_row": 0, "skipped": 0, "accepted_levels": 0,
    }  # fmt: skip


def judge(scalars: dict[str, Any], guard: RestartGuard, measured: Measurement, *, soft_restart: bool) -> float | None:
    """Return how many times as long the last step is to be tried again; None where it stands.

    Args:
        scalars: of :func:`new_setbacks`, with ``loss_statistics`` and ``previous_loss``.
        guard: of the losses.
        measured: of this update.
        soft_restart: whether a finite loss can be too high.
    """
    loss, previous_slope = measured.loss, measured.previous_slope
    statistics, failures = scalars["loss_statistics"], scalars["consecutive_restarts"]
    if not math.isfinite(measured.gradient_norm_squared) or not (loss is None or math.isfinite(loss)):
        scalars["non_finite"] += 1
        scalars["non_finite_in_a_row"] += 1
        return SHORTEST_RETRY
    scalars["non_finite_in_a_row"] = 0
    if loss is None:
        return None
    if soft_restart and previous_slope is not None:
        step_size, previous_loss = measured.step_size, scalars["previous_loss"]
        if guard.is_too_high(statistics, loss, decrease=step_size * previous_slope, previous_loss=previous_loss):
            if not guard.is_a_new_level(statistics, loss, retries=failures):
                base = guard.base(statistics, previous_loss)
                if not guard.noisy:
                    guard.record(statistics, min(loss, guard.limit(statistics)[0]))
                elif failures == 0 and not scalars["on_trial"]:
                    statistics["suspect"] = loss
                return guard.shrink(step_size, previous_slope, loss, base)
            guard.accept_level(statistics)
            scalars["accepted_levels"] += 1
            scalars["consecutive_restarts"] = scalars["on_trial"] = failures = 0
            statistics["suspect"] = None
    if failures == 0 and statistics["suspect"] is not None:  # it was the batch
        guard.record(statistics, statistics["suspect"])
    if failures != 1 or scalars["on_trial"]:
        statistics["suspect"] = None
    statistics["row"] = [0, 0.0, 0.0]
    guard.record(statistics, loss)
    return None


def take_back(scalars: dict[str, Any], factor: float, *, lowest: float, noisy: bool = True) -> None:
    """The last step is taken back and tried again, ``factor`` times as long or shorter; α stays, where there is noise.

    Args:
        scalars: of :func:`new_setbacks`, with ``alpha``.
        factor: see :meth:`RestartGuard.shrink`.
        lowest: α's lower bound.
        noisy: losses are those of batches.
    """
    if not noisy:
        scalars["alpha"] = max(scalars["alpha"] * factor, lowest)
    else:
        scalars["length"] *= SHORTEST_RETRY if scalars["consecutive_restarts"] > 0 else factor
    scalars["consecutive_restarts"] += 1
    scalars["restarts"] += 1


def step_was_good(scalars: dict[str, Any], *, known: bool, lowest: float, noisy: bool = True) -> bool:
    """The last step stands. Return whether it was a full one, so that its slopes say something about α.

    If steps were taken back before, α is put on trial: the next step is a full one again. α is reduced where that is
    already the second failure, that is where the retry had failed too, or where a full step after a retry had failed;
    to the length that was good, but to not less than a tenth: losses that stay high however short the retries are, as
    those that are near the limit by chance, are no evidence against α.

    Args:
        scalars: of :func:`new_setbacks`, with ``alpha``.
        known: whether there was a step.
        lowest: α's lower bound.
        noisy: as for :func:`take_back`.
    """
    failures, alpha = scalars["consecutive_restarts"], scalars["alpha"]
    scalars["quiet"] += 1
    if scalars["quiet"] > QUIET_UPDATES:
        scalars["level"] = None
    if not known:
        scalars["length"] = 1.0
    elif failures == 0:
        scalars["proven"] = alpha
        if scalars["level"] is not None:
            scalars["level"] = max(scalars["level"], alpha)
    elif noisy and (failures > 1 or scalars["on_trial"]):
        good = alpha * scalars["length"]
        reduced = max(good, alpha * SHORTEST_RETRY, lowest)
        if scalars["level"] is not None:
            level = scalars["level"] / 2
        else:
            level = alpha if scalars["proven"] is None else min(scalars["proven"], alpha)
        scalars["alpha"], scalars["level"], scalars["quiet"] = reduced, max(level, reduced), 0
        scalars["length"] = good / reduced
    scalars["on_trial"] = int(failures > 0 and known and noisy)
    scalars["consecutive_restarts"] = 0
    full, scalars["length"] = scalars["length"] == 1, 1.0
    return full


def way_back(scalars: dict[str, Any], previous_slope: float, current_slope: float) -> float:
    """Return what α at least becomes when trouble has ended; 0 where it has not, or nothing is to be done.

    It has not where α was reduced just now, or where the last step went further than to twice the minimum of its line.
    """
    level, alpha = scalars["level"], scalars["alpha"]
    if level is None or alpha >= level or scalars["quiet"] == 0:
        return 0.0
    if previous_slope <= 0 or current_slope <= -previous_slope:
        return 0.0
    return float(min(WAY_BACK * alpha, level))
