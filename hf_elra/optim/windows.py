"""Rules that are asked only every K updates, of the mean direction of these updates beside that of the K before them.

Slopes of single batches are mostly noise; what K steps add up to is less so. The rule is told both as if they were the
slopes at the ends of one step (``Measurement``). What the rule then does is in ``rules/``. That a crop of one step does
not last to the next question is seen to here, too.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from torch import Tensor

from hf_elra.errors import ConfigurationError
from hf_elra.optim.arguments import need_number
from hf_elra.optim.base import LossAwareOptimizer, Parts
from hf_elra.optim.rules import Measurement
from hf_elra.optim.tensors import squares_and_products

WHERE_NO_EPOCH_IS_KNOWN = 100
"""Updates from one question to the next where nobody has said how many an epoch has."""

LEAST = 20
"""Updates from one question to the next where they are a share of an epoch, at least: within the memory of a momentum
of 0.9, some ten updates, directions agree whatever α is, and it grows without end. The shortest K of NTLR's experiments
is 23."""


class KeepsAlpha(LossAwareOptimizer):
    """Keeps α as it was before a crop, for rules that leave it as it is: one long direction shortens one step alone."""

    def __init__(self, params: Any, settings: dict[str, Any]) -> None:
        super().__init__(params, settings)
        self.param_groups[0]["scalars"]["kept_alpha"] = 0.0

    def _choose_alpha(self, parts: Parts, measured: Measurement) -> float:
        alpha, scalars = super()._choose_alpha(parts, measured), self._numbers_to_change()
        if scalars["quiet"] == 0:  # it was reduced just now
            scalars["kept_alpha"] = 0.0
        return alpha

    def _propose(self, parts: Parts, measured: Measurement, alpha: float) -> float:
        scalars = self._numbers_to_change()
        kept = alpha if scalars["quiet"] == 0 else max(alpha, scalars["kept_alpha"])
        scalars["kept_alpha"] = self._propose_from(parts, measured, kept)
        return float(scalars["kept_alpha"])

    def _propose_from(self, parts: Parts, measured: Measurement, alpha: float) -> float:
        """Return the rule's α, where ``alpha`` is that before a crop."""
        return parts.rule.propose(measured, alpha)


class AsksEveryK(KeepsAlpha):
    """Asks its rule every K updates (NTLR, section 2, "Technical Considerations").

    With w_k the points between stretches of K updates, D_k = (w_{k-1} - w_k)/Σα over the steps between them. The rule
    is told n = ⟨D_{k-1}, D_{k-1}⟩ and d = ⟨D_k, D_{k-1}⟩. With K = 1 it is told the slopes of the last step instead,
    which needs no further state.

    Settings that a subclass has: ``every``, K or None for ``share`` of an epoch; ``share``.

    State per parameter, for K > 1: ``window_start`` and ``window_direction``, w_{k-1} and D_{k-1}.
    """

    def __init__(self, params: Any, settings: dict[str, Any]) -> None:
        every = settings["every"]
        if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise ConfigurationError(f"every={every!r} must be a whole number of updates >= 1, or None for a share.")
        need_number(settings, "share", lambda v: 0 < v <= 1, "a number in (0, 1], a share of an epoch (0.2)")
        super().__init__(params, settings)
        self.param_groups[0]["scalars"]["window"] = {"begun": 0, "updates": 0, "length": 0.0, "known": 0}

    @property
    def every(self) -> int:
        """K of now."""
        settings = self.param_groups[0]
        if settings["every"] is not None:
            return int(settings["every"])
        if self.updates_per_epoch is None:
            return WHERE_NO_EPOCH_IS_KNOWN
        return max(LEAST, round(settings["share"] * self.updates_per_epoch))

    def _choose_alpha(self, parts: Parts, measured: Measurement) -> float:
        window = self._numbers()["window"]
        if measured.previous_slope is not None and window["begun"]:  # a step that stands
            window["updates"] += 1
            window["length"] += measured.step_size
        return super()._choose_alpha(parts, measured)

    def _propose_from(self, parts: Parts, measured: Measurement, alpha: float) -> float:
        every, window = self.every, self._numbers_to_change()["window"]
        if every == 1:
            return parts.rule.propose(measured, alpha)
        if window["begun"] and window["updates"] < every:
            return alpha
        square, product, before = self._close_window(window["length"])
        was_known, window["known"] = window["known"], window["begun"]
        window.update(begun=1, updates=0, length=0.0)
        if not was_known:
            return alpha
        norms = math.sqrt(square * before)
        told = dataclasses.replace(
            measured, previous_slope=before, current_slope=product, cosine=product / norms if norms > 0 else 0.0
        )
        return parts.rule.propose(told, alpha)

    def _close_window(self, length: float) -> tuple[float, float, float]:
        """Begin a new window at the present point; return ‖D_k‖², ⟨D_k, D_{k-1}⟩ and ‖D_{k-1}‖² of the old one."""
        params = [
            p for group in self.param_groups for p in group["params"] if self._memory.key in self.state.get(p, {})
        ]
        new, old = [], []
        for p in params:
            state = self.state[p]
            start: Tensor | None = state.get("window_start")
            if start is None or length == 0:
                state["window_start"] = p.detach().clone()
                continue
            direction = (start - p.detach()).div_(length)
            if "window_direction" in state:
                new.append(direction)
                old.append(state["window_direction"])
            state["window_direction"] = direction
            start.copy_(p.detach())
        square, product = squares_and_products(new, old)
        before = squares_and_products(old, old)[0]
        agreed = self._agreed(square, product, before)
        return agreed[0], agreed[1], agreed[2]
