"""What a run's log says, in words: one rule a function, each of which says one sentence or nothing.

A rule reads a :class:`~hf_elra.report.runs.Run` alone. Its thresholds are the constants beside it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

from hf_elra.report.runs import Point, Run, running_mean

MARKS = {"good": "✓", "note": "·", "bad": "!"}
"""What stands before a verdict of a kind; no colour is needed to tell them apart."""


class Verdict(NamedTuple):
    """One sentence about a run.

    Attributes:
        kind: ``"good"``, ``"note"`` or ``"bad"``.
        text: the sentence.
    """

    kind: str
    text: str


def verdicts(run: Run) -> list[Verdict]:
    """Return what all rules say about a run, in the order of :data:`RULES`."""
    found = []
    for rule in RULES:
        verdict = rule(run)
        if verdict is not None:
            found.append(verdict)
    return found


def how_far(run: Run) -> Verdict | None:
    """Whether the log covers the whole run."""
    if run.finished:
        if run.share is None or run.share > ALL_OF_IT:
            return None
        return Verdict("note", f"Training was stopped at update {run.updates:,}, {run.share:.0%} of what was planned.")
    share = "" if run.share is None else f", {run.share:.0%} of the run"
    return Verdict("note", f"The log ends at update {run.updates:,}{share}: the run goes on, or was interrupted.")


def diverged(run: Run) -> Verdict | None:
    """Whether the training loss ended where it began, or higher, or as no number."""
    losses = run.series("loss")
    if not losses:
        return None
    if not math.isfinite(losses[-1][1]):
        return Verdict("bad", "The last training loss is not a finite number.")
    if len(losses) < LOGS_OF_A_TREND:
        return None
    first, last = losses[0][1], _mean(losses[-max(1, len(losses) // 10) :])
    if last >= first:
        return Verdict("bad", f"The training loss has not fallen: it began at {first:.4g} and ended at {last:.4g}.")
    return None


def rose_again(run: Run) -> Verdict | None:
    """Whether the training loss, on average, ended well above its lowest."""
    means = running_mean(run.series("loss"))
    if len(means) < LOGS_OF_A_TREND:
        return None
    lowest = min(means, key=lambda point: point[1])
    fall, rise = means[0][1] - lowest[1], means[-1][1] - lowest[1]
    if fall > 0 and rise > max(RISES * fall, _noise(run.series("loss"))):
        return Verdict(
            "bad",
            f"The training loss rose again: on average it was {lowest[1]:.4g} at update {lowest[0]:,.0f} and "
            f"{means[-1][1]:.4g} at the end.",
        )
    return None


def not_finite(run: Run) -> Verdict | None:
    """Whether losses or gradients were not finite."""
    count = int(run.last("non_finite") or 0)
    if count == 0:
        return None
    return Verdict("bad", f"In {count:,} of {run.updates:,} updates loss or gradient was not finite; none was kept.")


def skipped(run: Run) -> Verdict | None:
    """Whether batches said nothing."""
    count = int(run.last("skipped") or 0)
    if count == 0:
        return None
    return Verdict("note", f"{count:,} batches had no information (no labels?) and were skipped.")


def restarts(run: Run) -> Verdict | None:
    """How many updates were taken back, and when."""
    if not run.is_ours:
        return None
    steps, updates = run.taken_back, run.updates
    if not steps:
        return Verdict("good", "No update was taken back.")
    share = len(steps) / max(updates, 1)
    text = f"{len(steps):,} of {updates:,} updates {'was' if len(steps) == 1 else 'were'} taken back"
    cycles = [float(entry["step"]) for entry in run.history if entry.get("cycle") == 1]
    if cycles and max(steps) <= cycles[0] + 1 < updates:
        text += ", all in the first cycle"
    elif max(steps) <= updates / 10:
        text += ", all in the first tenth of the run"
    elif 2 * sum(step > 0.9 * updates for step in steps) > len(steps):
        text += f", {'most of them ' if len(steps) > 1 else ''}in the last tenth of the run"
    kind = "good" if share < FEW_TAKEN_BACK else "note" if share < MANY_TAKEN_BACK else "bad"
    return Verdict(kind, text + ".")


def accepted_levels(run: Run) -> Verdict | None:
    """Whether losses stayed high and were accepted."""
    count = int(run.last("accepted_levels") or 0)
    if count == 0:
        return None
    times = "once" if count == 1 else f"{count:,} times"
    return Verdict("note", f"Losses stayed far above their level {times} and were accepted: have the data changed?")


def rate_at_the_end(run: Run) -> Verdict | None:
    """Whether the learning rate was still rising when the run ended."""
    rates = [(s, math.log(r)) for s, r in run.series("learning_rate") if r > 0]
    if not run.is_ours or len(rates) < LOGS_OF_A_TREND:
        return None
    third = len(rates) // 3
    late, before = _mean(rates[-max(1, third // 3) :]), _mean(rates[-third : -third + max(1, third // 3)])
    growth = math.exp(late - before)
    if growth < STILL_RISING or late - before < 2 * _noise(rates):
        return None
    return Verdict("note", f"The learning rate was still rising at the end: {growth:.2g} times within the last third.")


def limited(run: Run) -> Verdict | None:
    """Whether a limit on the step decided most of the rates, in place of the rule."""
    for name, spans in run.limits.items():
        count = sum(share * (last - first) for first, last, share in spans)
        if run.updates and count / run.updates > MOSTLY_LIMITED:
            why = {
                "floor": "the steps that the rule proposes are shorter than min_step_norm",
                "crop": "the steps that the rule proposes are longer than the longest that is allowed",
                "ceiling": "the rate that the rule proposes is above the highest that is allowed",
            }[name]
            return Verdict("note", f"The {name} decided the rate of {count / run.updates:.0%} of all updates: {why}.")
    return None


def noise(run: Run) -> Verdict | None:
    """Whether the training loss of the second half is noisier from log to log than it falls."""
    losses = [p for p in run.series("loss") if math.isfinite(p[1])]
    half = losses[len(losses) // 2 :]
    if len(half) < LOGS_OF_A_TREND:
        return None
    quarter = len(half) // 4
    fall = _mean(half[:quarter]) - _mean(half[-quarter:])
    spread = _noise(half)
    if not 0 <= fall < spread:
        return None
    return Verdict(
        "note",
        f"The loss is noisier than its fall: in the second half it fell by {fall:.2g} and differed by {spread:.2g} "
        "from log to log. A larger batch, or rarer logs, would show more.",
    )


def overfitting(run: Run) -> Verdict | None:
    """Whether the validation loss was lowest well before the end."""
    losses = [p for p in run.series("eval_loss") if math.isfinite(p[1])]
    if len(losses) < 3:
        return None
    best, last = min(losses, key=lambda point: point[1]), losses[-1]
    if best[0] > BEST_IS_LATE * run.updates or last[1] - best[1] < RISES_AGAIN * abs(best[1]):
        return None
    return Verdict(
        "note",
        f"The validation loss was lowest at update {best[0]:,.0f} ({best[1]:.4g}) and rose to {last[1]:.4g}: from "
        "there on the model overfits.",
    )


def still_falling(run: Run) -> Verdict | None:
    """Whether the validation loss was still falling when the run ended."""
    losses = [p for p in run.series("eval_loss") if math.isfinite(p[1])]
    if not run.finished or len(losses) < 5:
        return None
    before = [p for p in losses if p[0] <= 0.8 * run.updates]
    if not before or losses[-1][1] > min(v for _, v in losses):
        return None
    whole, late = losses[0][1] - losses[-1][1], before[-1][1] - losses[-1][1]
    if whole <= 0 or late < STILL_FALLING * whole:
        return None
    return Verdict(
        "note",
        f"The validation loss was still falling at the end, by {late:.2g} in the last fifth: a longer run would reach "
        "a lower one.",
    )


def batch(run: Run) -> Verdict | None:
    """How the batch has changed, and why."""
    changes, sizes = run.batch_changes, run.batch
    if not changes or not sizes:
        return None
    why = Counter(str(entry.get("condition")) for entry in changes)
    reasons = ", ".join(f"{name} {count}×" for name, count in why.most_common())
    first, last = sizes[0][1], sizes[-1][1]
    times = "one change" if len(changes) == 1 else f"{len(changes)} changes"
    return Verdict("good", f"The batch went from {first:,.0f} to {last:,.0f} samples in {times} ({reasons}).")


def drift(run: Run) -> Verdict | None:
    """How far a model that was trained before has moved: its new task may have cost old abilities."""
    moved = run.last("drift")
    if moved is None or moved < MOVED or not run.facts.get("pretrained"):
        return None
    return Verdict(
        "note",
        f"The weights have moved by {moved:.0%} of their size since training began. What the model knew before may "
        "have suffered: measure it, if it matters.",
    )


RULES: tuple[Callable[[Run], Verdict | None], ...] = (
    *(how_far, diverged, rose_again, not_finite, restarts, rate_at_the_end, limited, batch),
    *(noise, overfitting, still_falling, accepted_levels, skipped, drift),
)
"""All rules, in the order in which they are told."""

ALL_OF_IT = 0.99
"""A run that went further than this share of its plan was not stopped."""
LOGS_OF_A_TREND = 12
"""With fewer logs nothing is said of a trend."""
RISES = 0.1
"""The training loss rose again if it gave back more than this share of its fall, and more than it differs from log to
log."""
FEW_TAKEN_BACK, MANY_TAKEN_BACK = 0.05, 0.25
"""Shares of the updates below which it is nothing to look at, and above which something is wrong."""
STILL_RISING = 1.5
"""The rate rises if it grows so much within the last third, and by twice what it differs from log to log."""
MOSTLY_LIMITED = 0.5
"""A limit is told of if it decided more than this share of the updates."""
BEST_IS_LATE, RISES_AGAIN = 0.8, 0.03
"""A model overfits if its lowest validation loss came before this share of the run and rose by so much since."""
STILL_FALLING = 0.02
"""The validation loss still falls if the last fifth of the run brought this share of its whole fall."""
MOVED = 0.05
"""From this drift on a trained model is told of."""


def _noise(points: list[Point]) -> float:
    """The standard deviation of values about their trend, from the differences of neighbours."""
    steps = [after - before for (_, before), (_, after) in pairwise(points)]
    steps = [step for step in steps if math.isfinite(step)]
    return math.sqrt(sum(step * step for step in steps) / max(1, len(steps)) / 2)


def _mean(points: list[Point]) -> float:
    return sum(value for _, value in points) / len(points)
