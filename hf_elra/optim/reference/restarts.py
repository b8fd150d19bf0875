"""Soft restarts in plain numbers, for every twin in this folder: when a step is taken back, and how α changes.

Section and equation numbers are those of the paper (ELRA, 2024); whatever is ours is marked.
"""

from __future__ import annotations

import math
import statistics
from typing import Any


class ReferenceRestarts:
    """The losses of a run, and what they say about its steps.

    Args:
        lr, lowest: α_0 and the least α.
        soft_restart, restart_sigma, initial_restart_ratio, restart_window, restart_formula: as of ``ELRA``.
        noisy: whether losses are those of batches.
    """

    def __init__(
        self,
        lr: float,
        lowest: float,
        *,
        soft_restart: bool = True,
        restart_sigma: float = 5.0,
        initial_restart_ratio: float | None = 1.1,
        restart_window: int | None = None,
        restart_formula: str = "derived",
        noisy: bool = True,
    ) -> None:
        self.alpha, self.low, self.noisy = lr, lowest, noisy
        self.soft_restart, self.restart_sigma = soft_restart, restart_sigma
        self.initial_restart_ratio, self.restart_window = initial_restart_ratio, restart_window
        self.restart_formula = restart_formula
        self.restarts = self.skipped = self.accepted_levels = 0
        self.previous_slope: Any = None  # a float from the first step on, like the next one
        self.previous_loss: Any = None
        self.forget_losses()

    def forget_losses(self) -> None:
        """Begin anew after a search, whose points are taken back."""
        self.initial_loss: float | None = None
        self.losses: list[float] = []  # losses of the window, or of the running cycle
        self.last_cycle: tuple[float, float] | None = None
        self.recent_count, self.recent_mean, self.recent_variance = 0, 0.0, 0.0
        self.row: list[float] = []  # losses of steps that were taken back in a row
        self.suspect: float | None = None  # a high loss, which may be the fault of its batch
        self.restarts_in_a_row = 0
        self.length = 1.0  # the last step's share of a full one
        self.on_trial = False
        self.proven: float | None = None  # α of the last full step that was good
        self.level: float | None = None  # α to go back to
        self.quiet = 0  # updates since α was reduced

    def end_cycle(self) -> None:
        """End a cycle: mean and σ of its losses judge the next one (section 3.2)."""
        if self.restart_window is None and len(self.losses) > 1:
            self.last_cycle = (statistics.fmean(self.losses), statistics.pstdev(self.losses))
            self.losses = []

    def limit(self) -> tuple[float, float | None]:
        """Return f̄ + 5σ and f̄; before a mean exists 1.1·f_0, in a form that also serves f_0 < 0 (section 3.2)."""
        if self.restart_window is not None and len(self.losses) > 1:
            mean = statistics.fmean(self.losses)
            return mean + self.restart_sigma * statistics.pstdev(self.losses), mean
        recent = self.recent_mean + self.restart_sigma * math.sqrt(self.recent_variance)
        if self.last_cycle is not None:
            limit = self.last_cycle[0] + self.restart_sigma * self.last_cycle[1]
            if self.recent_count < 10:
                return limit, self.last_cycle[0]
            return max(limit, recent), self.recent_mean  # ours: what is ordinary of late is not too high
        if self.recent_count >= 10:  # ours: the first cycle, too, judges losses by earlier ones
            return recent, self.recent_mean
        if self.initial_restart_ratio is None or not self.initial_loss:
            return math.inf, self.initial_loss
        return self.initial_loss + (self.initial_restart_ratio - 1) * abs(self.initial_loss), self.initial_loss

    def record(self, loss: float) -> None:
        """Add a loss to the statistics; ours: as at most 20σ."""
        highest, mean = self.limit()
        if mean is not None:
            loss = min(loss, mean + 4 * (highest - mean))
        if self.initial_loss is None:
            self.initial_loss = loss
        self.losses.append(loss)
        if self.restart_window is not None:
            self.losses = self.losses[-self.restart_window :]
            return
        self.recent_count = min(self.recent_count + 1, 50)
        deviation, share = loss - self.recent_mean, 1 / self.recent_count
        self.recent_mean += share * deviation
        self.recent_variance = (1 - share) * (self.recent_variance + share * deviation**2)

    def judge(self, loss: float) -> float | None:
        """Return how many times as long the last step is tried again (section 3.2), or None if it stands."""
        if not self.soft_restart or self.previous_slope is None:
            return None
        highest, mean = self.limit()
        n = self.previous_slope
        decrease = self.length * self.alpha * n
        base = self.previous_loss  # ours: a rise has to be above the mean of recent losses, too
        if self.recent_count >= 10:
            base = max(base, self.recent_mean)
        rounding = 1e-6 * max(abs(loss), abs(base), 1.0 if self.noisy else 0.0)  # ours
        if not (loss > highest and loss - base > max(0.01 * decrease, rounding)):
            return None
        if self.row and mean is not None and loss - mean < 0.3 * (statistics.fmean(self.row) - mean):
            self.row = []  # it comes down
        self.row.append(loss)
        if (len(self.row) >= 4 and self.noisy) or self.restarts_in_a_row >= 20:
            self.accept_level()
            return None
        if not self.noisy:
            self.record(min(loss, highest))
        elif self.restarts_in_a_row == 0 and not self.on_trial:
            self.suspect = loss
        if self.restart_formula == "paper":
            decrease = self.length * self.alpha * math.sqrt(n)
        shorter = 0.5
        if decrease > 0:  # section 3.2; the derived form has ‖G‖² where the paper prints ‖G‖
            shorter = 0.5 * decrease / (max(loss - base, 0.0) + decrease)
        return max(shorter, 0.1) if self.noisy else shorter

    def step_was_good(self, loss: float) -> None:
        """Ours: only a second failure is evidence against α, that of a retry or of the full step after it."""
        failures = self.restarts_in_a_row
        if failures == 0 and self.suspect is not None:
            self.record(self.suspect)  # α was not the cause
        if failures != 1 or self.on_trial:
            self.suspect = None
        self.row = []
        self.record(loss)
        self.quiet += 1
        if self.quiet > 50:
            self.level = None
        if self.previous_slope is None:
            self.length = 1.0
        elif failures == 0:
            self.proven = self.alpha
            if self.level is not None:
                self.level = max(self.level, self.alpha)
        elif self.noisy and (failures > 1 or self.on_trial):
            good = self.alpha * self.length
            reduced = max(good, self.alpha * 0.1, self.low)
            if self.level is not None:  # trouble recurs, so α goes back to less
                level = self.level / 2
            else:
                level = self.alpha if self.proven is None else min(self.proven, self.alpha)
            self.alpha, self.length, self.level, self.quiet = reduced, good / reduced, max(level, reduced), 0
        self.on_trial = failures > 0 and self.previous_slope is not None and self.noisy
        self.restarts_in_a_row = 0

    def accept_level(self) -> None:
        """Ours: losses that stay high, however short the step, are ordinary from now on."""
        level, mean = statistics.fmean(self.row), self.limit()[1]
        jump = 0.0 if mean is None else abs(level - mean)
        sigma = max(statistics.pstdev(self.row), math.sqrt(self.recent_variance), jump / self.restart_sigma)
        self.initial_loss = level
        if self.restart_window is not None:
            self.losses = [level - sigma, level + sigma]
        else:
            self.recent_count, self.recent_mean, self.recent_variance = 10, level, sigma**2
            if self.last_cycle is not None:
                self.last_cycle = (level, sigma)
        self.restarts_in_a_row, self.on_trial, self.suspect = 0, False, None
        self.accepted_levels += 1

    def take_back(self, factor: float) -> None:
        """Take a step back: the next try is shorter; ours: α itself stays if losses are noisy."""
        if not self.noisy:
            self.alpha = max(factor * self.alpha, self.low)
        else:
            self.length *= factor if self.restarts_in_a_row == 0 else 0.1
        self.restarts += 1
        self.restarts_in_a_row += 1

    def way_back(self, d: float) -> float:
        """Ours: after trouble α goes back to its earlier value; d is the slope at the end of the last step."""
        if self.level is None or self.alpha >= self.level or self.quiet == 0:
            return 0.0
        n = self.previous_slope
        return min(2 * self.alpha, self.level) if n > 0 and d > -n else 0.0
