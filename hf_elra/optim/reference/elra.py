"""ELRA to be read beside the paper: one flat float64 vector, one line per equation, no speed and no groups.

``hf_elra.optim.ELRA`` must follow the same path; tests compare points, rates and restarts of both after every update.
Section and equation numbers are those of the paper (ELRA, 2024).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hf_elra.optim.reference.restarts import ReferenceRestarts


class ReferenceELRA(ReferenceRestarts):
    """ELRA on one float64 vector; arguments have the names that they have in :class:`hf_elra.optim.ELRA`.

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
        super().__init__(
            lr,
            lr_bounds[0],
            soft_restart=soft_restart,
            restart_sigma=restart_sigma,
            initial_restart_ratio=initial_restart_ratio,
            restart_window=restart_window,
            restart_formula=restart_formula,
            noisy=noise_correction > 0,
        )
        self.x, self.high = x.clone(), lr_bounds[1]
        self.step_rule, self.noise_correction, self.max_growth = step_rule, noise_correction, max_growth
        self.min_step_norm, self.max_step_norm = min_step_norm, math.inf if max_step_norm is None else max_step_norm
        self.max_relative_step = math.inf if max_relative_step is None else max_relative_step
        self.max_first_step = math.inf if max_first_step is None else max_first_step
        self.weight_decay = weight_decay
        self.previous_x: Any = None  # a Tensor from the first step on, like the next one
        self.previous_gradient: Any = None

    def step(self, loss: float, gradient: Tensor) -> None:
        """Update ``x`` from loss (float) and gradient (float64, shape (n,)) at ``x``."""
        if not math.isfinite(loss) and not gradient.any():  # ours: a batch without information
            self.skipped += 1
            return
        finite = math.isfinite(loss) and torch.isfinite(gradient).all()
        shorter = self.judge(loss) if finite else 0.1
        if shorter is not None:
            self.restart(shorter)
            return
        self.step_was_good(loss)
        was_full, self.length = self.length == 1, 1.0

        norm = gradient.norm().item()
        alpha, lift = self.alpha, 0.0
        if was_full and self.previous_gradient is not None and self.previous_slope > 0:
            n, d = self.previous_slope, gradient.dot(self.previous_gradient).item()
            lift = self.way_back(d)
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
            size = max(self.x.norm().item(), 0.01 * math.sqrt(len(self.x)))  # ours: a crop by the size of the weights
            alpha = min(alpha, max(self.max_relative_step * size, self.min_step_norm) / norm)
            if self.previous_x is None and self.x.norm() > 0:  # ours: the first α is a guess
                alpha = min(alpha, max(self.max_first_step * self.x.norm().item(), self.min_step_norm) / norm)

        self.previous_x, self.previous_gradient, self.previous_loss = self.x, gradient.clone(), loss
        self.previous_slope = gradient.dot(gradient).item()
        self.alpha = alpha
        self.x = (1 - self.weight_decay) * self.previous_x - alpha * gradient  # eq. (2)

    def restart(self, factor: float) -> None:
        """x_{t+1} = x_{t-1} - s·G_{t-1} with a shorter s (section 3.2)."""
        self.take_back(factor)
        if self.previous_x is not None:
            step = self.alpha * self.length
            self.x = (1 - self.weight_decay) * self.previous_x - step * self.previous_gradient
