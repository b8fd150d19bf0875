"""ELRA to be read beside the paper: one flat float64 vector, one line per equation, no speed and no groups.

``ELRA`` (``elra.py``) must walk the same path; the tests compare points, rates and restarts of both after every update.
Section and equation numbers are those of the paper (ELRA, 2024).
"""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch
from torch import Tensor


class ReferenceELRA:
    """ELRA on one float64 vector, with the arguments of :class:`hf_elra.optim.ELRA` under the same names.

    Args:
        x (Tensor, shape (n,), float64): the start point x_0.
        lr, step_rule, ...: as in ``ELRA``.
    """

    def __init__(
        self,
        x: Tensor,
        lr: float = 1e-3,
        *,
        step_rule: str = "bb1",
        noise_correction: float = 0.15,
        max_growth: float = 10.0,
        lr_bounds: tuple[float, float] = (1e-8, 1e6),
        min_step_norm: float = 0.0,
        max_step_norm: float | None = 2.0,
        max_relative_step: float | None = 0.03,
        max_first_step: float | None = 0.01,
        weight_decay: float = 0.0,
        soft_restart: bool = True,
        restart_sigma: float = 5.0,
        initial_restart_ratio: float | None = 1.1,
        restart_window: int | None = None,
        restart_formula: str = "derived",
    ) -> None:
        self.x = x.clone()
        self.alpha = lr
        self.step_rule, self.noise_correction, self.max_growth = step_rule, noise_correction, max_growth
        self.low, self.high = lr_bounds
        self.min_step_norm, self.max_step_norm = min_step_norm, math.inf if max_step_norm is None else max_step_norm
        self.max_relative_step = math.inf if max_relative_step is None else max_relative_step
        self.max_first_step = math.inf if max_first_step is None else max_first_step
        self.weight_decay, self.soft_restart, self.restart_sigma = weight_decay, soft_restart, restart_sigma
        self.initial_restart_ratio, self.restart_window = initial_restart_ratio, restart_window
        self.restart_formula = restart_formula
        self.previous_x: Any = None  # a Tensor from the first step on, as are the next two
        self.previous_gradient: Any = None
        self.previous_loss: Any = None
        self.initial_loss: float | None = None
        self.losses: list[float] = []  # of the window, or of the cycle that is running
        self.last_cycle: tuple[float, float] | None = None
        self.recent_count, self.recent_mean, self.recent_variance = 0, 0.0, 0.0
        self.row: list[float] = []  # losses of steps that were taken back in a row
        self.suspect: float | None = None  # a high loss, maybe of its batch alone
        self.restarts = self.restarts_in_a_row = self.skipped = self.accepted_levels = 0
        self.length = 1.0  # the last step's share of a full one
        self.on_trial = False
        self.proven: float | None = None  # α of the last full step that was good
        self.level: float | None = None  # α to go back to
        self.quiet = 0  # updates since α was reduced

    def end_cycle(self) -> None:
        """Mean and σ of the cycle's losses judge the next cycle (section 3.2)."""
        if self.restart_window is None and len(self.losses) > 1:
            self.last_cycle = (statistics.fmean(self.losses), statistics.pstdev(self.losses))
            self.losses = []

    def limit(self) -> tuple[float, float | None]:
        """f̄ + 5σ and f̄; before a mean exists 1.1·f_0, written so that it also serves f_0 < 0 (section 3.2)."""
        if self.restart_window is not None and len(self.losses) > 1:
            mean = statistics.fmean(self.losses)
            return mean + self.restart_sigma * statistics.pstdev(self.losses), mean
        recent = self.recent_mean + self.restart_sigma * math.sqrt(self.recent_variance)
        if self.last_cycle is not None:
            limit = self.last_cycle[0] + self.restart_sigma * self.last_cycle[1]
            if self.recent_count < 10:
                return limit, self.last_cycle[0]
            return max(limit, recent), self.recent_mean  # ours: what is ordinary of late cannot be too high
        if self.recent_count >= 10:  # ours: in the first cycle too, losses are judged by those before them
            return recent, self.recent_mean
        if self.initial_restart_ratio is None or not self.initial_loss:
            return math.inf, self.initial_loss
        return self.initial_loss + (self.initial_restart_ratio - 1) * abs(self.initial_loss), self.initial_loss

    def record(self, loss: float) -> None:
        """Take a loss into the statistics, ours: as at most 20σ."""
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

    def step(self, loss: float, gradient: Tensor) -> None:
        """Update ``x`` from loss (float) and gradient (float64, shape (n,)) at ``x``."""
        if not math.isfinite(loss) and not gradient.any():  # ours: a batch without information
            self.skipped += 1
            return
        if not (math.isfinite(loss) and torch.isfinite(gradient).all()):
            self.restart(0.1)
            return
        if self.soft_restart and self.previous_x is not None:
            highest, mean = self.limit()
            n = self.previous_gradient.dot(self.previous_gradient).item()
            decrease = self.length * self.alpha * n
            base = self.previous_loss  # ours: a rise is one above the mean of recent losses, too
            if self.recent_count >= 10:
                base = max(base, self.recent_mean)
            if loss > highest and loss - base > max(0.01 * decrease, 1e-6 * max(abs(loss), abs(base))):
                if self.row and mean is not None and loss - mean < 0.3 * (statistics.fmean(self.row) - mean):
                    self.row = []  # it comes down
                self.row.append(loss)
                if (len(self.row) < 4 or not self.noise_correction) and self.restarts_in_a_row < 20:
                    if self.noise_correction == 0:
                        self.record(min(loss, highest))
                    elif self.restarts_in_a_row == 0 and not self.on_trial:
                        self.suspect = loss
                    if self.restart_formula == "paper":
                        decrease = self.length * self.alpha * math.sqrt(n)
                    shorter = 0.5
                    if decrease > 0:  # section 3.2; the derived form has ‖G‖² where the paper prints ‖G‖
                        shorter = 0.5 * decrease / (max(loss - base, 0.0) + decrease)
                    if self.noise_correction:
                        shorter = max(shorter, 0.1)
                    self.restart(shorter)
                    return
                self.accept_level()
        self.step_was_good(loss)
        was_full, self.length = self.length == 1, 1.0

        norm = gradient.norm().item()
        lift = 0.0
        alpha = self.alpha
        if was_full and self.previous_gradient is not None:
            n = self.previous_gradient.dot(self.previous_gradient).item()
            d = gradient.dot(self.previous_gradient).item()
            if self.level is not None and alpha < self.level and self.quiet > 0 and d > -n:
                lift = min(2 * alpha, self.level)  # ours: after trouble α goes back to where it was
        if was_full and self.previous_gradient is not None and self.previous_gradient.norm() > 0:
            n = self.previous_gradient.dot(self.previous_gradient).item()
            d = gradient.dot(self.previous_gradient).item()
            y = gradient - self.previous_gradient
            if n - d <= 0:
                ratio = math.inf  # negative curvature: as far as γ_max allows
            elif self.step_rule == "bb1":
                ratio = n / (n - d)  # eq. (4)
            else:
                ratio = (n - d) / y.dot(y).item()  # ⟨s,y⟩/⟨y,y⟩
            kappa = 1 + self.noise_correction / (1 + self.alpha**2)  # below eq. (4)
            alpha = self.alpha * ratio * kappa
        alpha = min(max(alpha, lift), self.max_growth * self.alpha)  # section 3.1, γ_max
        if norm > 0:
            alpha = max(alpha, self.min_step_norm / norm)  # section 3.1, footnote 5
        alpha = min(max(alpha, self.low), self.high)  # section 3.1, bounds
        if norm > 0:
            alpha = min(alpha, self.max_step_norm / norm)  # section 3.5
            size = max(self.x.norm().item(), 0.01 * math.sqrt(len(self.x)))  # ours: a crop by the weights' size
            alpha = min(alpha, max(self.max_relative_step * size, self.min_step_norm) / norm)
            if self.previous_x is None and self.x.norm() > 0:  # ours: the first α is a guess
                alpha = min(alpha, max(self.max_first_step * self.x.norm().item(), self.min_step_norm) / norm)

        self.previous_x, self.previous_gradient, self.previous_loss = self.x, gradient.clone(), loss
        self.alpha = alpha
        self.x = (1 - self.weight_decay) * self.previous_x - alpha * gradient  # eq. (2)

    def step_was_good(self, loss: float) -> None:
        """Ours: only a second failure is evidence against α, after a retry or of the full step that follows one."""
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
        if self.previous_x is None:
            self.length = 1.0
        elif failures == 0:
            self.proven = self.alpha
            if self.level is not None:
                self.level = max(self.level, self.alpha)
        elif self.noise_correction and (failures > 1 or self.on_trial):
            good = self.alpha * self.length
            reduced = max(good, self.alpha * 0.1, self.low)
            if self.level is not None:  # trouble recurs: less is gone back to
                level = self.level / 2
            else:
                level = self.alpha if self.proven is None else min(self.proven, self.alpha)
            self.alpha, self.length, self.level, self.quiet = reduced, good / reduced, max(level, reduced), 0
        self.on_trial = failures > 0 and self.previous_x is not None and self.noise_correction > 0
        self.restarts_in_a_row = 0

    def accept_level(self) -> None:
        """Ours: losses that stay high whatever the step are ordinary from now on."""
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

    def restart(self, factor: float) -> None:
        """x_{t+1} = x_{t-1} - s·G_{t-1} with a shorter s (section 3.2); ours: where there is noise α itself stays."""
        if self.noise_correction == 0:
            self.alpha = max(factor * self.alpha, self.low)
        else:
            self.length *= factor if self.restarts_in_a_row == 0 else 0.1
        self.restarts += 1
        self.restarts_in_a_row += 1
        if self.previous_x is not None:
            step = self.alpha * self.length
            self.x = (1 - self.weight_decay) * self.previous_x - step * self.previous_gradient
