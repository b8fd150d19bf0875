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
        self.restarts = self.restarts_in_a_row = 0

    def end_cycle(self) -> None:
        """Mean and σ of the cycle's losses judge the next cycle (section 3.2)."""
        if self.restart_window is None and len(self.losses) > 1:
            self.last_cycle = (statistics.fmean(self.losses), statistics.pstdev(self.losses))
            self.losses = []

    def highest_loss(self) -> float:
        """f̄ + 5σ; before a mean exists 1.1·f_0, written so that it also serves f_0 < 0 (section 3.2)."""
        if self.restart_window is not None and len(self.losses) > 1:
            return statistics.fmean(self.losses) + self.restart_sigma * statistics.pstdev(self.losses)
        if self.restart_window is None and self.last_cycle is not None:
            return self.last_cycle[0] + self.restart_sigma * self.last_cycle[1]
        if self.initial_restart_ratio is None or not self.initial_loss:
            return math.inf
        limit = self.initial_loss + (self.initial_restart_ratio - 1) * abs(self.initial_loss)
        if self.restart_window is None and len(self.losses) >= 10:  # ours: noise seen so far may raise the limit
            limit = max(limit, statistics.fmean(self.losses) + self.restart_sigma * statistics.pstdev(self.losses))
        return limit

    def step(self, loss: float, gradient: Tensor) -> None:
        """Update ``x`` from loss (float) and gradient (float64, shape (n,)) at ``x``."""
        if not (math.isfinite(loss) and torch.isfinite(gradient).all()):
            self.restart(0.1)
            return
        highest = self.highest_loss()
        if self.initial_loss is None:
            self.initial_loss = loss
        too_high = self.soft_restart and self.previous_x is not None and loss > highest
        accepted = too_high and self.restarts_in_a_row >= 20
        self.losses.append(loss if accepted else min(loss, highest))
        if self.restart_window is not None:
            self.losses = self.losses[-self.restart_window :]

        if accepted and self.restart_window is None:  # ours: twenty shorter steps did not help, so it was not the step
            if self.last_cycle is None:
                self.initial_loss = loss
            else:
                self.last_cycle = (self.last_cycle[0] + loss - highest, self.last_cycle[1])
        elif too_high and not accepted:
            # Section 3.2; the derived form has ‖G‖² where the paper prints ‖G‖.
            norm = self.previous_gradient.norm().item()
            decrease = self.alpha * (norm**2 if self.restart_formula == "derived" else norm)
            increase = max(loss - self.previous_loss, 0.0)
            self.restart(0.5 * decrease / (increase + decrease) if decrease > 0 else 0.5)
            return
        self.restarts_in_a_row = 0

        norm = gradient.norm().item()
        alpha = self.alpha
        if self.previous_gradient is not None and self.previous_gradient.norm() > 0:
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
        alpha = min(alpha, self.max_growth * self.alpha)  # section 3.1, γ_max
        if norm > 0:
            alpha = max(alpha, self.min_step_norm / norm)  # section 3.1, footnote 5
        alpha = min(max(alpha, self.low), self.high)  # section 3.1, bounds
        if norm > 0:
            alpha = min(alpha, self.max_step_norm / norm)  # section 3.5
            if self.previous_x is None and self.x.norm() > 0:  # ours: the first α is a guess
                alpha = min(alpha, max(self.max_first_step * self.x.norm().item(), self.min_step_norm) / norm)

        self.previous_x, self.previous_gradient, self.previous_loss = self.x, gradient.clone(), loss
        self.alpha = alpha
        self.x = (1 - self.weight_decay) * self.previous_x - alpha * gradient  # eq. (2)

    def restart(self, factor: float) -> None:
        """x_{t+1} = x_{t-1} - α_t·G_{t-1} with the smaller α_t (section 3.2)."""
        self.restarts += 1
        self.restarts_in_a_row += 1
        self.alpha = max(factor * self.alpha, self.low)
        if self.previous_x is not None:
            self.x = (1 - self.weight_decay) * self.previous_x - self.alpha * self.previous_gradient
