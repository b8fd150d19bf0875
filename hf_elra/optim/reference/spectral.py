"""elra_spectral to be read: float64 matrices, one sentence per line, no speed, no groups, no stacked experts.

``hf_elra.optim.ELRASpectral`` must walk the same path; tests compare points, rates and restarts after every update.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch
from torch import Tensor

from hf_elra.optim.reference.restarts import ReferenceRestarts


def rms(tensor: Tensor) -> Tensor:
    """Root mean square of the elements."""
    return tensor.square().mean().sqrt()


def unit(tensor: Tensor) -> Tensor:
    """A tensor scaled to a mean square of one; zero stays zero."""
    return tensor / rms(tensor) if tensor.any() else tensor


def polar(matrix: Tensor) -> Tensor:
    """U·Vᵀ of U·S·Vᵀ, nearly: five Newton-Schulz steps with Muon's coefficients, on the side with fewer rows."""
    if not matrix.any():
        return matrix
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = x / x.norm()
    for _ in range(5):
        x = 3.4445 * x + (-4.7750 * x @ x.T + 2.0315 * x @ x.T @ x @ x.T) @ x
    return unit(x if matrix.shape[0] <= matrix.shape[1] else x.T)


class ReferenceSpectral(ReferenceRestarts):
    """ELRASpectral on a list of float64 tensors, with its arguments under the same names.

    Args:
        points (list of Tensor, float64): matrices and vectors, x_0.
        embeddings (list of bool, optional): of each, whether its rows are taken one by one.
        lr, momentum, search, ...: as in ``ELRASpectral``.
    """

    def __init__(
        self,
        points: list[Tensor],
        embeddings: list[bool] | None = None,
        lr: float = 1e-3,
        *,
        momentum: float = 0.9,
        search: int = 10,
        max_relative_step: float = 0.5,
        lr_bounds: tuple[float, float] = (1e-9, 1.0),
        weight_decay: float = 0.0,
        soft_restart: bool = True,
        restart_sigma: float = 5.0,
        initial_restart_ratio: float | None = 1.1,
    ) -> None:
        super().__init__(
            lr,
            lr_bounds[0],
            soft_restart=soft_restart,
            restart_sigma=restart_sigma,
            initial_restart_ratio=initial_restart_ratio,
        )
        self.x = [point.clone() for point in points]
        self.embeddings = embeddings or [False] * len(points)
        self.momentum, self.search, self.max_relative_step = momentum, search, max_relative_step
        self.high, self.weight_decay = lr_bounds[1], weight_decay
        self.start = [point.clone() for point in points]
        self.searching, self.updates, self.search_lasted = search > 0, 0, 0
        self.gain, self.ratios, self.sign = (math.log(10), 0, 0) if search else (0.0, 10, 0)
        self.run: list[float] = []  # the ratios of one sign with which the search began
        self.run_is_over = self.is_clear = False
        self.changes = 0
        self.found: float | None = None
        self.halves: tuple[list[float], list[float]] = ([], [])  # losses of the search
        self.forget_points()

    def forget_points(self) -> None:
        """Nothing is known of a last step, nor of gradients."""
        self.averages = [torch.zeros_like(x) for x in self.x]
        self.previous_x: Any = None
        self.previous_u: Any = None
        self.previous_slope = self.previous_loss = None

    def size(self) -> float:
        """Root mean square of all matrices; of everything where there are none."""
        matrices = [
            x for x, is_embedding in zip(self.x, self.embeddings, strict=True) if x.dim() > 1 and not is_embedding
        ]
        return float(rms(torch.cat([x.flatten() for x in matrices or self.x])))

    def bounded(self, alpha: float) -> float:
        """α is at most a share of the matrices' size."""
        return max(min(alpha, self.high, self.max_relative_step * self.size()), self.low)

    def step(self, loss: float, gradients: list[Tensor]) -> None:
        """Update ``x`` from loss (float) and gradients (float64, as ``x``) at ``x``."""
        if not math.isfinite(loss) and not any(g.any() for g in gradients):
            self.skipped += 1
            return
        self.updates += 1
        searching = self.searching
        finite = math.isfinite(loss) and all(g.isfinite().all() for g in gradients)
        shorter = self.judge(loss) if finite else 0.1
        if shorter is not None:
            self.take_back(shorter)
            if self.previous_x is not None:
                self.x = self.stepped(self.previous_x, self.previous_u, self.alpha * self.length)
        else:
            self.take_loss(loss)
            self.go_on(loss, gradients)
        if searching:
            self.look_at_the_search()

    def stepped(self, points: list[Tensor], directions: list[Tensor], alpha: float) -> list[Tensor]:
        """x ← (1 - α·d)·x - α·u."""
        kept = 1 - min(alpha * self.weight_decay, 0.5)
        return [kept * x - alpha * u for x, u in zip(points, directions, strict=True)]

    def go_on(self, loss: float, gradients: list[Tensor]) -> None:
        """The last step stands."""
        before = self.alpha
        self.step_was_good(loss)
        was_full, self.length = self.length == 1, 1.0
        alpha = self.alpha
        if alpha < before:  # the search shall not come back at full gain to what was too large
            self.gain = min(self.gain, math.log(10) / 2) if self.sign > 0 else self.gain
            self.sign = -1
        finding = self.searching or self.updates <= 2 * self.search_lasted
        momentum = self.momentum or (0.9 if finding else 0.0)
        if was_full and self.previous_slope is not None:
            d = sum(float((g * u).sum()) for g, u in zip(gradients, self.previous_u, strict=True))
            if self.previous_slope > 0 and momentum > 0:
                alpha *= self.factor(d / self.previous_slope)
            if not self.searching:
                alpha = max(alpha, self.way_back(d))
        self.alpha = self.bounded(alpha)
        directions = self.directions(gradients, momentum)
        self.previous_x, self.previous_u, self.previous_loss = self.x, directions, loss
        self.previous_slope = sum(float((g * u).sum()) for g, u in zip(gradients, directions, strict=True))
        self.x = self.stepped(self.x, directions, self.alpha)

    def directions(self, gradients: list[Tensor], momentum: float) -> list[Tensor]:
        """Polar factors of averaged gradients; rows of embeddings, and vectors, along their own averages."""
        along = gradients
        if momentum > 0:
            self.averages = [momentum * a + (1 - momentum) * g for a, g in zip(self.averages, gradients, strict=True)]
            along = [momentum * a + (1 - momentum) * g for a, g in zip(self.averages, gradients, strict=True)]
        found = []
        for average, is_embedding in zip(along, self.embeddings, strict=True):
            if average.dim() < 2:
                found.append(unit(average))
            elif is_embedding:
                found.append(torch.stack([unit(row) for row in average]))
            else:
                found.append(polar(average))
        return found

    def factor(self, ratio: float) -> float:
        """log α += max(gain, c/k)·clip(r/σ, -1, 1); the gain halves whenever the ratio changes its sign."""
        self.ratios += 1
        sign = 1 if ratio > 0 else -1
        if self.sign == -sign:
            self.gain /= 2
            self.changes += 1
        self.sign = sign
        if self.run and (statistics.fmean(self.run) > 0) != (ratio > 0):
            self.run_is_over = True
        if not self.run_is_over:
            self.run.append(ratio)
            mean = abs(statistics.fmean(self.run))
            if len(self.run) >= 3 and mean >= 0.1:
                error = statistics.stdev(self.run) / math.sqrt(len(self.run))
                self.is_clear = self.is_clear or len(self.run) >= 5 or mean >= 3 * error
        return math.exp(max(self.gain, 2.5 / self.ratios) * min(max(ratio / 0.2, -1), 1))

    def take_loss(self, loss: float) -> None:
        """The search is of some use if losses of its second half are clearly below those of its first."""
        if not self.searching:
            return
        self.halves[2 * self.updates > self.search].append(loss)
        early, late = self.halves
        if min(len(early), len(late)) >= 3:
            errors = [statistics.stdev(half) / math.sqrt(len(half)) for half in self.halves]
            self.is_clear = self.is_clear or statistics.fmean(early) - statistics.fmean(late) > 2 * math.hypot(*errors)

    def look_at_the_search(self) -> None:
        """It ends when it is sure, or after twice its updates; once it begins anew where no way was clear."""
        measured = self.ratios >= self.search - 1
        if self.updates >= 2 * self.search or (measured and self.is_clear and self.changes > 0):
            self.end_search()
        elif measured and not self.is_clear and self.found is None:
            self.gain, self.sign, self.changes, self.found = math.log(10), 0, 0, self.alpha
            self.run, self.run_is_over = [], False
            self.alpha = self.bounded(self.alpha / 10)

    def end_search(self) -> None:
        """Back to where it began, with α alone, or with a default where nothing was found."""
        self.searching, self.search_lasted, self.gain = False, self.updates, 0.0
        self.x = [start.clone() for start in self.start]
        agrees = (
            self.found is not None
            and abs(math.log(self.alpha / self.found)) < math.log(3)
            and bool(self.run)
            and statistics.fmean(self.run) >= 0.1
        )
        if not self.is_clear and not agrees:
            self.alpha = self.bounded(0.01 * self.size())
        elif self.alpha < 0.001 * self.size():
            self.alpha = self.bounded(0.001 * self.size())
        self.forget_points()
        self.forget_losses()
