"""The paper's two-dimensional problems (section 4.1) and a walk of any optimizer over them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_elra.optim import ELRA


def bowl(x: Tensor) -> Tensor:
    """3·x₁² + 24·x₂²; minimum 0 at the origin."""
    return 3 * x[0] ** 2 + 24 * x[1] ** 2


def rosenbrock(x: Tensor) -> Tensor:
    """(1 - x₁)² + 100·(x₂ - x₁²)²; minimum 0 at (1, 1), in a curved valley."""
    return (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2


def saddle(x: Tensor) -> Tensor:
    """x₁² - x₂²; unbounded below."""
    return x[0] ** 2 - x[1] ** 2


@dataclass(frozen=True)
class Problem:
    """A start on a function and the value to get below.

    Attributes:
        name: as in the paper's tables.
        function: of a tensor of shape (2,).
        start: x_0.
        below: the number of updates until f < below is counted.
        paper: the paper's counts by optimizer; ``math.inf`` where it found none.
    """

    name: str
    function: Callable[[Tensor], Tensor]
    start: tuple[float, float]
    below: float
    paper: dict[str, float]


PROBLEMS = (
    Problem("bowl, f < 0.1", bowl, (-5.75, 1.75), 0.1, {"Adam": 128, "RMSprop": 142, "ELRA": 9}),
    Problem("bowl, f < 1e-6", bowl, (-5.75, 1.75), 1e-6, {"Adam": 184, "RMSprop": math.inf, "ELRA": 12}),
    Problem("Rosenbrock from (-3, -2)", rosenbrock, (-3, -2), 1.0, {"Adam": 208, "RMSprop": 176, "ELRA": 10}),
    Problem("Rosenbrock from (-11, 121)", rosenbrock, (-11, 121), 1.0, {"Adam": 1e4, "RMSprop": 1e4, "ELRA": 300}),
    Problem("saddle from (1, 1e-9)", saddle, (1, 1e-9), -1.0, {"ELRA": 8}),
)

# Eq. (4) as printed, with the paper's bound on growth; soft restarts by the last 50 losses, as there are no epochs.
_NOISE_FREE: dict[str, Any] = dict(
    noise_correction=0.0, max_growth=1e6, max_step_norm=None, max_relative_step=None, max_first_step=None,
    restart_window=50,
)  # fmt: skip


def optimizers(problem: Problem) -> dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]]:
    """Every optimizer at the paper's settings for this problem; ELRA also with what helps or harms without noise."""
    adam = dict(lr=0.01) if problem.function is saddle else dict(lr=0.05, betas=(0.8, 0.9))
    return {
        "ELRA": lambda params: ELRA(params, **_NOISE_FREE),
        "ELRA, bb2": lambda params: ELRA(params, step_rule="bb2", **_NOISE_FREE),
        "ELRA, κ": lambda params: ELRA(params, **{**_NOISE_FREE, "noise_correction": 0.15}),
        "Adam": lambda params: torch.optim.Adam(params, **adam),  # type: ignore[arg-type]
        "RMSprop": lambda params: torch.optim.RMSprop(params, lr=0.05),
        "AdaDelta": lambda params: torch.optim.Adadelta(params, lr=1.0),
    }


def walk(
    problem: Problem,
    make_optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
    *,
    degrees: float = 0.0,
    shift: tuple[float, float] = (0.0, 0.0),
    limit: int = 10_000,
) -> list[tuple[float, float]]:
    """Return the points from the start until f < ``below``, in the problem's own coordinates.

    Args:
        problem: what to walk on.
        make_optimizer: gets the list of the one parameter.
        degrees: the optimizer works in coordinates turned by this angle.
        shift: added to the start.
        limit: give up after so many updates; the path then has ``limit + 1`` points.
    """
    angle = math.radians(degrees)
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64)
    start = torch.tensor(problem.start, dtype=torch.float64) + torch.tensor(shift, dtype=torch.float64)
    x = (turn.T @ start).requires_grad_()
    optimizer = make_optimizer([x])
    points = []
    for _ in range(limit + 1):
        optimizer.zero_grad()
        loss = problem.function(turn @ x)
        first, second = (turn @ x.detach()).tolist()
        points.append((first, second))
        if loss.item() < problem.below:
            break
        loss.backward()
        if isinstance(optimizer, ELRA):
            optimizer.observe_loss(loss.detach())
        optimizer.step()
    return points
