"""elra_spectral to be read: float64 matrices, one sentence per line, no speed, no groups, no stacked experts.

``hf_elra.optim.ELRASpectral`` must walk the same path; tests compare points, rates and restarts after every update.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch
from torch import Tensor

from hf_elra.optim.natural_steps import natural_steps
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
        updates_per_epoch, total_updates: attributes of ``ELRASpectral``.
        lr, momentum, warmup, ...: as in ``ELRASpectral``.
    """

    def __init__(
        self,
        points: list[Tensor],
        embeddings: list[bool] | None = None,
        lr: float = 1e-3,
        *,
        momentum: float = 0.9,
        warmup: int = 10,
        max_correction: float | None = None,
        max_relative_step: float = 0.5,
        max_drift: float | None = None,
        lr_bounds: tuple[float, float] = (1e-9, 1.0),
        weight_decay: float = 0.0,
        soft_restart: bool = True,
        restart_sigma: float = 5.0,
        initial_restart_ratio: float | None = 1.1,
        updates_per_epoch: int | None = None,
        total_updates: int | None = None,
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
        self.momentum, self.max_relative_step = momentum, max_relative_step
        self.warmup, self.max_correction, self.updates_per_epoch = warmup, max_correction, updates_per_epoch
        self.high, self.weight_decay = lr_bounds[1], weight_decay
        self.updates, self.last_set = 0, 0  # the second: the update that set α last
        self.natural = 0.0
        self.max_drift, self.walked, self.began, self.total_updates = max_drift, 0.0, 0.0, total_updates
        self.shares = [1.0] * len(points)
        self.new, self.whitened = ([False] * len(points) for _ in range(2))
        self.room = 1.0
        self.warms_up = warmup > 0
        self.first = 0.0
        self.ratios: list[float] = []  # since α was corrected
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
        finite = math.isfinite(loss) and all(g.isfinite().all() for g in gradients)
        shorter = self.judge(loss) if finite else 0.1
        if shorter is not None:
            self.take_back(shorter)
            if self.previous_x is not None:
                self.x = self.stepped(self.previous_x, self.previous_u, self.alpha * self.length)
        else:
            self.go_on(loss, gradients)

    def stepped(self, points: list[Tensor], directions: list[Tensor], alpha: float) -> list[Tensor]:
        """x ← (1 - α·d)·x - α·u."""
        kept = 1 - min(alpha * self.weight_decay, 0.5)
        return [kept * x - alpha * u for x, u in zip(points, directions, strict=True)]

    def go_on(self, loss: float, gradients: list[Tensor]) -> None:
        """The last step stands."""
        before = self.alpha
        self.walked += self.alpha * self.length if self.previous_slope is not None else 0.0
        self.step_was_good(loss)
        was_full, self.length = self.length == 1, 1.0
        alpha = self.alpha
        if alpha < before:  # what ratios said is of another α
            self.warms_up, self.ratios = False, []
        if self.previous_slope is None:
            self.look_at_weights()
            self.began = self.size()
            self.first = min(alpha, self.suits(1)) if self.warms_up else alpha
            alpha, self.last_set = self.first, self.updates
        elif was_full:
            d = self.slope(gradients, self.previous_u)
            alpha = max(self.rate(alpha, gradients), self.way_back(d))
        self.alpha = self.bounded(alpha)
        if self.max_drift is not None:
            self.alpha = min(self.alpha, (self.max_drift * self.began - self.walked) * self.part_of_drift())
        directions = self.directions(gradients)
        self.previous_x, self.previous_u, self.previous_loss = self.x, directions, loss
        self.previous_slope = self.slope(gradients, directions)
        self.previous_counted = self.slope(gradients, directions, counted=True)
        self.x = self.stepped(self.x, directions, self.alpha)

    def part_of_drift(self) -> float:
        """Of what is left: over the updates to come, each counted as the rate falls from this one to it."""
        if self.total_updates is None or self.updates > self.total_updates:
            return 1 / 20
        first, last = self.updates + 50, self.total_updates + 50
        return 1 / max(2 * (math.sqrt(last + 0.5) - math.sqrt(first - 0.5)) * math.sqrt(first), 1)

    def slope(self, gradients: list[Tensor], directions: list[Tensor], *, counted: bool = False) -> float:
        """⟨G, u⟩; ``counted``: without tensors that are new in a trained model, and without whitened tables."""
        out = [counted and (new or whitened) for new, whitened in zip(self.new, self.whitened, strict=True)]
        return sum(float((g * u).sum()) for g, u, is_out in zip(gradients, directions, out, strict=True) if not is_out)

    def look_at_weights(self) -> None:
        """What suits the weights is not written down a second time."""
        embeddings = self.embeddings
        none = [0] * len(self.x)
        group = {"params": self.x, "embeddings": embeddings, "experts": none, "outputs": none, "adapters": none}
        found = natural_steps([group])
        self.natural, (self.shares,), (self.new,) = found.rate, found.shares, found.new
        (self.whitened,), self.room = found.whitened, found.room
        if found.is_trained:
            self.initial_restart_ratio = None

    def suits(self, update: int) -> float:
        """The α that suits the weights at an update."""
        return self.natural / math.sqrt(50 + (update if self.momentum > 0 else 50))

    def rate(self, alpha: float, gradients: list[Tensor]) -> float:
        """From α_0 to what suits the weights; then α falls, and the ends of steps correct it."""
        before, self.last_set = self.last_set, self.updates
        if self.warms_up and self.updates <= self.warmup:
            share = (self.updates - 1) / self.warmup
            return float(self.first ** (1 - share) * self.suits(self.updates) ** share)
        if self.warms_up:
            self.warms_up = False
            return self.suits(self.updates)
        if self.momentum > 0:
            alpha *= math.sqrt((50 + before) / (50 + self.updates))
        suits, epoch = self.suits(self.updates), self.updates_per_epoch
        if self.warmup > 0 and epoch is not None and before <= epoch < self.updates and alpha < 4.04 * suits:
            alpha = min(alpha, suits)
        if self.previous_counted <= 0:
            return alpha
        ratio = self.slope(gradients, self.previous_u, counted=True) / self.previous_counted
        self.ratios.append(min(max(ratio, -1), 1))
        n = len(self.ratios)
        if n < 3:
            return alpha
        mean = statistics.fmean(self.ratios)
        error = 3 * (1 + (3 / (n - 1)) ** 2) * statistics.stdev(self.ratios) / math.sqrt(n)
        beyond = mean if mean > error else mean + 0.5 if mean + error < -0.5 else 0.0
        if beyond == 0:
            return alpha
        self.ratios = []
        corrected = alpha * math.exp(min(max(5 * beyond, -1), 0.4))
        if beyond < 0:
            return max(corrected, min(alpha, suits))
        if epoch is not None and self.updates > epoch:
            return alpha
        room = self.room if self.max_correction is None else max(self.room, 1)
        bound = 16 * room if self.max_correction is None else self.max_correction
        most = bound if mean > 0.5 else min(4 * room, bound)
        return max(alpha, min(corrected, most * suits))

    def directions(self, gradients: list[Tensor]) -> list[Tensor]:
        """Polar factors of averaged gradients; rows of embeddings, and vectors, along their own averages."""
        along = gradients
        if self.momentum > 0:
            kept, added = self.momentum, 1 - self.momentum
            self.averages = [kept * a + added * g for a, g in zip(self.averages, gradients, strict=True)]
            along = [kept * a + added * g for a, g in zip(self.averages, gradients, strict=True)]
        found = []
        flags = self.embeddings, self.whitened
        for average, is_embedding, whitened, share in zip(along, *flags, self.shares, strict=True):
            if average.dim() < 2:
                found.append(share * unit(average))
            elif is_embedding:
                rows = torch.stack([unit(row) for row in average])
                further = torch.stack([unit(row) for row in polar(rows)]) if whitened else torch.zeros_like(rows)
                found.append(share * torch.stack([unit(row) for row in rows + further]))
            else:
                found.append(share * polar(average))
        return found
