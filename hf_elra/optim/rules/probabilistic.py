"""PLS: a line search by a Gaussian process over noisy losses and slopes (Mahsereci and Hennig, 2017).

The loss along a line is an integrated Wiener process: its mean is a cubic spline through what was observed, as closely
as the noise allows. Units are those of the line: t = α/α_0, losses as (f - f_0)/(α_0·n), slopes as d/n, with n the
slope at the beginning.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from hf_elra.optim.rules import Measurement, Rule

C1, C2, ENOUGH = 0.05, 0.5, 0.3
"""Of the two Wolfe conditions; the probability of both that is enough."""
SHIFT = 10.0
"""τ, by which the process begins before the line, so that its beginning is free."""
SHORT = 0.01
"""Where the process does not believe that the line falls at its beginning, the step is this share of the first try."""
MOST = 6
"""Observations on a line beside that at its beginning."""
LONGER, FAR, MEMORY = 1.3, 100.0, 50
"""The next search begins at so many times the α that was found, unless that is so far from their running mean; losses
and slopes that the noise is taken from."""
LOSS_NOISE, SLOPE_NOISE = 0.25, 0.3
"""Standard deviations: of a loss at most, as its share; of a slope, as a share of n."""


class SplineProcess:
    """The process, given observations.

    Args:
        times, losses, slopes: of the observations.
        loss_variance, slope_variance: of their noise.
    """

    def __init__(
        self, times: list[float], losses: list[float], slopes: list[float], loss_variance: float, slope_variance: float
    ) -> None:
        number = len(times)
        self.where = torch.tensor([*times, *times], dtype=torch.float64)
        self.is_slope = torch.tensor([False] * number + [True] * number)
        noise = torch.tensor([loss_variance] * number + [slope_variance] * number, dtype=torch.float64)
        covariance = kernel(self.where, self.is_slope, self.where, self.is_slope) + torch.diag(noise + 1e-10)
        self.factor = torch.linalg.cholesky(covariance)
        told = torch.tensor([*losses, *slopes], dtype=torch.float64)
        self.weights = torch.cholesky_solve(told[:, None], self.factor)[:, 0]

    def at(self, times: Tensor, is_slope: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and covariance of losses and slopes at these times."""
        across = kernel(times, is_slope, self.where, self.is_slope)
        solved = torch.linalg.solve_triangular(self.factor, across.T, upper=False)
        return across @ self.weights, kernel(times, is_slope, times, is_slope) - solved.T @ solved

    def losses(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """Means and standard deviations of losses."""
        mean, covariance = self.at(times, torch.zeros(len(times), dtype=torch.bool))
        return mean, covariance.diagonal().clamp_min(1e-18).sqrt()

    def probability(self, time: float) -> float:
        """Of the Wolfe conditions at a time, with the bound of the strong ones."""
        where = torch.tensor([0.0, 0.0, time, time], dtype=torch.float64)
        mean, covariance = self.at(where, torch.tensor([False, True, False, True]))
        conditions = torch.tensor([[1.0, C1 * time, -1.0, 0.0], [0.0, -C2, 0.0, 1.0]], dtype=torch.float64)
        (a, b), both = (conditions @ mean).tolist(), conditions @ covariance @ conditions.T
        highest = 2 * C2 * (abs(float(mean[1])) + 2 * math.sqrt(max(float(covariance[1, 1]), 0.0)))
        return within(a, b, both.tolist(), highest)


def kernel(left: Tensor, left_slope: Tensor, right: Tensor, right_slope: Tensor) -> Tensor:
    """Covariances of the integrated Wiener process, of values or of slopes at two lists of times."""
    s, t = (left + SHIFT)[:, None], (right + SHIFT)[None, :]
    least = torch.minimum(s, t)
    values = least**3 / 3 + (s - t).abs() * least**2 / 2
    slope_right = torch.where(s < t, s**2 / 2, s * t - t**2 / 2)
    slope_left = torch.where(t < s, t**2 / 2, s * t - s**2 / 2)
    a, b = left_slope[:, None], right_slope[None, :]
    return torch.where(a & b, least, torch.where(a, slope_left, torch.where(b, slope_right, values)))


def within(a: float, b: float, covariance: list[list[float]], highest: float) -> float:
    """P(first ≥ 0 and 0 ≤ second ≤ highest) of two normal variables with means ``a`` and ``b``."""
    (aa, ab), (_, bb) = covariance
    if aa < 1e-12 or bb < 1e-12:
        return float(a >= 0 and 0 <= b <= highest)
    sigma, slope = math.sqrt(aa), ab / aa
    rest = math.sqrt(max(bb - ab * slope, 1e-18))
    number, total, weight = 200, 0.0, 0.0
    for index in range(number):  # over the first one, in standard deviations
        z = -6 + 12 * (index + 0.5) / number
        density = math.exp(-z * z / 2)
        weight += density
        if a + sigma * z >= 0:
            mean = b + slope * sigma * z
            total += density * (_below((highest - mean) / rest) - _below(-mean / rest))
    return total / weight


def _below(z: float) -> float:
    return 0.5 * (1 + math.erf(z / math.sqrt(2)))


class Probabilistic(Rule):
    """Try an α along the line; ask the process whether it will do; otherwise try where it expects most.

    Every update is one try, with a batch of its own. The noise of losses is half the mean square of what neighbouring
    ones differ by, at most a share of the loss; that of slopes is a share of the first one. The variance within a
    batch, which the paper takes for both, is not known where gradients are means.
    """

    looks_ahead = True  # α has to fit the new line

    def new_state(self) -> dict[str, Any]:
        """Times, losses and slopes on this line, how many, those of its beginning; whether the next point is taken as
        it is; the running mean of α; the last loss, the variance of losses and the number that it is from."""
        observed: dict[str, Any] = {name: [None] * (MOST + 1) for name in ("times", "losses", "slopes")}
        return {**observed, "count": 0, "unit": 0.0, "loss": 0.0, "slope": 0.0, "ends": 0,
                "mean": None, "last": 0.0, "square": 0.0, "seen": 0}  # fmt: skip

    def propose(self, measured: Measurement, alpha: float) -> float:
        """Begin a line."""
        state = self.state
        if state["count"] > 1:  # a line has ended
            state["mean"] = alpha if state["mean"] is None else 0.95 * state["mean"] + 0.05 * alpha
            alpha *= LONGER
            if not state["mean"] / FAR < alpha < FAR * state["mean"]:
                alpha = state["mean"]
        known = measured.loss is not None and measured.slope > 0
        state.update(unit=alpha, loss=measured.loss or 0.0, slope=measured.slope, count=0, ends=0)
        if known:
            self._add(0.0, 0.0, -1.0)
            state["last"] = measured.loss
        return alpha

    def again(self, measured: Measurement, alpha: float) -> float | None:
        """α of the next try; None where the search is over."""
        state, loss = self.state, measured.loss
        if loss is None or state["count"] == 0 or alpha == 0:
            return None
        scale = state["unit"] * state["slope"]
        time = alpha / state["unit"]
        told = (loss - state["loss"]) / scale, -measured.current_slope / state["slope"]
        if not all(math.isfinite(value) and abs(value) < 1e12 for value in (time, *told)):
            return None
        self._learn(loss)
        if state["ends"]:
            state["count"] = max(state["count"], 2)
            return None
        self._add(time, *told)
        process = self._process()
        if process.probability(time) > ENOUGH:
            return None
        times = self._observed("times")
        if float(process.at(torch.zeros(1, dtype=torch.float64), torch.tensor([True]))[0]) >= 0:
            state["ends"] = 1
            return SHORT * float(state["unit"])
        if state["count"] > MOST:
            means, _ = process.losses(torch.tensor(times[1:], dtype=torch.float64))
            best = times[1 + int(means.argmin())]
            state["ends"] = 1
            return None if best == time else best * float(state["unit"])
        return self._next(process, sorted(times)) * float(state["unit"])

    def _next(self, process: SplineProcess, times: list[float]) -> float:
        """Where improvement times the probability of the Wolfe conditions is largest: minima of the mean, or beyond."""
        candidates = [times[-1] + 1.0]
        inside = torch.cat([torch.linspace(*pair, 33, dtype=torch.float64) for pair in pairwise(times)])
        slopes = process.at(inside, torch.ones(len(inside), dtype=torch.bool))[0].tolist()
        for (left, before), (right, after) in pairwise(zip(inside.tolist(), slopes, strict=True)):
            if before < 0 <= after and right > left:
                candidates.append(left + (right - left) * before / (before - after))
        at = torch.tensor(candidates, dtype=torch.float64)
        lowest = float(process.losses(torch.tensor(times, dtype=torch.float64))[0].min())
        means, deviations = (values.tolist() for values in process.losses(at))
        worth = []
        for candidate, mean, deviation in zip(candidates, means, deviations, strict=True):
            z = (lowest - mean) / deviation
            gain = (lowest - mean) * _below(z) + deviation * math.exp(-z * z / 2) / math.sqrt(2 * math.pi)
            worth.append(gain * process.probability(candidate))
        return candidates[worth.index(max(worth))]

    def _process(self) -> SplineProcess:
        state = self.state
        most = (LOSS_NOISE * state["loss"]) ** 2
        loss = min(state["square"], most) if state["seen"] else most
        times, losses, slopes = (self._observed(name) for name in ("times", "losses", "slopes"))
        unit = (state["unit"] * state["slope"]) ** 2
        return SplineProcess(times, losses, slopes, max(loss / unit, 1e-10), SLOPE_NOISE**2)

    def _learn(self, loss: float) -> None:
        """Half the mean square of what neighbouring losses differ by is the variance of their noise."""
        state = self.state
        state["seen"] += 1
        state["square"] += ((loss - state["last"]) ** 2 / 2 - state["square"]) / min(state["seen"], MEMORY)
        state["last"] = loss

    def _add(self, time: float, loss: float, slope: float) -> None:
        number = self.state["count"]
        for name, value in (("times", time), ("losses", loss), ("slopes", slope)):
            self.state[name] = [*self.state[name][:number], value, *[None] * (MOST - number)]
        self.state["count"] = number + 1

    def _observed(self, name: str) -> list[float]:
        return list(self.state[name][: self.state["count"]])
