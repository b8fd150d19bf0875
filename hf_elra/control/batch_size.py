"""A batch size that grows when noise dominates (ELRA, sections 3.3 and 3.4), in plain Python.

The unit is the accumulation number m: an update uses m base batches. At the end of every control cycle a controller
gets the mean loss and its standard deviation, and possibly how large a batch the noise asks for (``noise_scale.py``).
It answers with a :class:`BatchDecision`. How m base batches become one update is the Trainer's business.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

from hf_elra.errors import ConfigurationError, nearest

CONDITIONS = ("rise", "noise", "stall")
"""Conditions (1) to (3) of section 3.3: the mean loss rose; its relative noise is large; no progress in 3 cycles."""

CASCADE = 3
"""Every change whose number is a multiple of this one divides the batch size instead of multiplying it."""


@dataclass(frozen=True)
class BatchDecision:
    """The decision at the end of one control cycle.

    Attributes:
        cycle: number of the cycle, from 1.
        mean: mean loss of the cycle.
        std: standard deviation of the losses in it.
        condition: the condition that held (the first in the order of ``CONDITIONS``), or None; ``"noise_scale"`` if
            the noise scale made the change.
        change: ``"grow"``, ``"shrink"`` (the cascade, or a smaller noise scale) or ``"keep"``.
        accumulation: base batches of an update from now on.
    """

    cycle: int
    mean: float
    std: float
    condition: str | None
    change: str
    accumulation: int


@dataclass
class BatchSizeController:
    """Decides at the end of every control cycle how many base batches an update uses.

    Args:
        initial_accumulation: m_0, the smallest and first number of base batches; 2 for images, 1 for BabyLlama.
        growth: factor of a change; 1.5 in the paper.
        max_accumulation: m is never larger; None for no limit.
        conditions: which of ``CONDITIONS`` count.

    Raises:
        ConfigurationError: an argument cannot be used.
    """

    initial_accumulation: int = 1
    growth: float = 1.5
    max_accumulation: int | None = None
    conditions: tuple[str, ...] = CONDITIONS
    exact: float = field(init=False)
    changes: int = field(init=False, default=0)
    decisions: list[BatchDecision] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        if self.initial_accumulation < 1:
            raise ConfigurationError(f"initial_accumulation={self.initial_accumulation} must be at least 1.")
        if not (math.isfinite(self.growth) and self.growth > 1):
            raise ConfigurationError(f"growth={self.growth!r} must be a number > 1 (1.5 in the paper).")
        if self.max_accumulation is not None and self.max_accumulation < self.initial_accumulation:
            raise ConfigurationError(
                f"max_accumulation={self.max_accumulation} is below the first one, "
                f"initial_accumulation={self.initial_accumulation}; raise the one or lower the other."
            )
        for condition in self.conditions:
            if condition not in CONDITIONS:
                raise ConfigurationError(
                    f"condition {condition!r} is unknown.{nearest(condition, CONDITIONS)} Choose from "
                    f"{', '.join(CONDITIONS)}."
                )
        self.exact = float(self.initial_accumulation)

    @property
    def accumulation(self) -> int:
        """Base batches of an update: the exact m, rounded half up."""
        return math.floor(self.exact + 0.5)

    def gradient_decay(self, accumulation: int) -> float:
        """m_0/m, the factor of section 3.4 on the gradient of an update of ``accumulation`` base batches."""
        return self.initial_accumulation / accumulation

    def end_cycle(self, mean: float, std: float) -> BatchDecision:
        """Decide from the mean loss and the standard deviation of the cycle that has just ended."""
        means = [decision.mean for decision in self.decisions[-3:]]
        condition = next(
            (name for name in CONDITIONS if name in self.conditions and _holds(name, mean, std, means)), None
        )
        change = "keep"
        if condition is not None:
            cascade = (self.changes + 1) % CASCADE == 0
            target = self.exact / self.growth if cascade else self.exact * self.growth
            target = max(target, float(self.initial_accumulation))
            if self.max_accumulation is not None:
                target = min(target, float(self.max_accumulation))
            if target != self.exact or cascade:
                change = "shrink" if cascade else "grow"
                self.changes += 1
                self.exact = target
        return self._decided(mean, std, condition, change)

    def follow(self, wanted: float | None, mean: float, std: float) -> BatchDecision:
        """Let m go towards ``wanted``, by one change at most, at the end of a cycle.

        This is beyond the paper: McCandlish et al. (2018) advise a batch of about the noise scale. ``wanted`` is the
        noise scale divided by the samples of a base batch, or None if it is not known yet.
        """
        before = self.exact
        if wanted is not None:
            most = before * self.growth if self.max_accumulation is None else float(self.max_accumulation)
            self.exact = min(max(wanted, before / self.growth), before * self.growth, most)
            self.exact = max(self.exact, float(self.initial_accumulation))
        change = "keep" if self.exact == before else "grow" if self.exact > before else "shrink"
        self.changes += change != "keep"
        return self._decided(mean, std, None if change == "keep" else "noise_scale", change)

    def _decided(self, mean: float, std: float, condition: str | None, change: str) -> BatchDecision:
        decision = BatchDecision(len(self.decisions) + 1, mean, std, condition, change, self.accumulation)
        self.decisions.append(decision)
        return decision

    def state_dict(self) -> dict[str, Any]:
        """Return everything that changes, as plain JSON values."""
        return {
            "exact": self.exact,
            "changes": self.changes,
            "decisions": [asdict(decision) for decision in self.decisions],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned."""
        self.exact, self.changes = state["exact"], state["changes"]
        self.decisions = [BatchDecision(**decision) for decision in state["decisions"]]


UPDATES_PER_GROWTH = 200
"""Updates between two growths of a batch that grows linearly; chosen on language models (docs/results/lm_before.md)."""


def linear_factor(data: float) -> int:
    """Return the batch size, as a multiple of the first one, of a batch that grows linearly with the updates.

    It grows by its first size every ``UPDATES_PER_GROWTH`` updates, hence as the square root of the data seen. This
    averages over noise as a learning rate does that falls with the square root of time, and the length of the run need
    not be known. S. L. Smith et al., "Don't decay the learning rate, increase the batch size" (2018), show that batch
    and rate can take each other's place.

    Args:
        data: the data seen so far, in updates of the first size; the k-th growth comes after k(k + 1)/2 times
            ``UPDATES_PER_GROWTH``.
    """
    return 1 + math.floor((math.sqrt(1 + 8 * data / UPDATES_PER_GROWTH) - 1) / 2)


def _holds(condition: str, mean: float, std: float, previous: list[float]) -> bool:
    """Return whether a condition holds; ``previous`` are the means of up to three earlier cycles, oldest first."""
    if condition == "rise":
        return bool(previous) and mean > previous[-1] + std / 10
    if condition == "noise":  # a ratio says nothing for a mean of 0 or below: its size counts then
        return mean != 0 and std / abs(mean) > 0.5
    return len(previous) == 3 and previous[0] < min(mean, previous[1], previous[2])


@dataclass(frozen=True)
class BatchSchedule:
    """Piecewise constant multiples of the first batch over the progress of training, as LABPAL uses.

    Args:
        steps: pairs (progress in [0, 1), factor >= 1), increasing in progress, the first at 0.
    """

    steps: tuple[tuple[float, int], ...]

    @classmethod
    def parse(cls, text: str, name: str = "batch schedule") -> BatchSchedule:
        """Read ``"0:1,0.5:2,0.75:4"``; ``name`` is the flag named in the error."""
        try:
            steps = tuple((float(at), int(factor)) for at, factor in _pairs(text))
        except ValueError:
            raise ConfigurationError(
                f"{name}={text!r} does not parse; write progress:factor pairs such as 0:1,0.5:2,0.75:4."
            ) from None
        times = [at for at, _ in steps]
        if not steps or times[0] != 0 or any(a >= b for a, b in pairwise(times)) or times[-1] >= 1:
            raise ConfigurationError(f"{name}={text!r} must begin at 0 and increase in time, below 1.")
        if any(factor < 1 for _, factor in steps):
            raise ConfigurationError(f"{name}={text!r} has a factor below 1; factors multiply the first batch.")
        return cls(steps)

    def factor(self, progress: float) -> int:
        """The factor at ``progress``, 0 at the start and 1 at the end of training."""
        return [factor for at, factor in self.steps if at <= progress][-1]


def _pairs(text: str) -> Iterable[tuple[str, str]]:
    for part in text.split(","):
        at, colon, factor = part.partition(":")
        if not colon:
            raise ValueError(part)
        yield at, factor
