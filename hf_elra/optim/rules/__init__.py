"""Rules: what the learning rate α of the next update is, from what was measured at both ends of the last step.

One file a rule. A rule knows nothing of tensors, of bounds on α or of restarts (``guards.py``). Its state is a dict of
plain numbers, ``rule.state``, which the optimizer keeps in its checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass
class Measurement:
    """What one update knows before it decides; scalar products run over all parameters of all processes.

    Attributes:
        update: number of this update, from 1; batches that were skipped do not count.
        loss: f_t, if it was told.
        gradient_norm_squared: ‖G_t‖².
        previous_slope: ⟨G_{t-1}, u_{t-1}⟩ at the beginning of the last step; None without a step to learn from.
        current_slope: ⟨G_t, u_{t-1}⟩ at its end.
        previous_norm: ‖u_{t-1}‖.
        previous_slope_counted, current_slope_counted: the same without tensors whose slopes say nothing of the rate
            of the others: what is new in a trained model, and tables that are whitened.
        step_size: how far along u_{t-1} it went: α_{t-1} times the largest factor of a scheduler.
        was_full: whether this factor was 1.
        natural_rate: what suits the weights, see ``natural_steps.py``; known at the first update only.
        size, number: sum of the squares of the weights whose size limits a step, and how many they are; 0 where nothing
            asks for it.
        slope: ⟨G_t, u_t⟩ at the beginning of the step to come.
        direction_norm: ‖u_t‖.
        cosine: between G_t and u_{t-1}; 0 without a step to learn from.
        line_loss: for rules that look before they step: returns the loss at x - s·u_t, told s, over this update's
            batch; in a Trainer with ``batches=k`` over those of the next k updates.
    """

    update: int
    loss: float | None = None
    gradient_norm_squared: float = 0.0
    previous_slope: float | None = None
    current_slope: float = 0.0
    previous_slope_counted: float | None = None
    current_slope_counted: float = 0.0
    step_size: float = 0.0
    was_full: bool = True
    natural_rate: float = 0.0
    size: float = 0.0
    number: int = 0
    slope: float = 0.0
    direction_norm: float = 0.0
    previous_norm: float = 0.0
    cosine: float = 0.0
    line_loss: Callable[..., float] | None = None


class Rule:
    """A learning rate that stays as it is; the base of all rules.

    Attributes:
        state: plain numbers, of one structure from the first update to the last.
    """

    looks_ahead = False
    """Whether α comes from the step to come, and is proposed for every one of them; else from the step behind."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = self.new_state()

    def new_state(self) -> dict[str, Any]:
        """What the rule remembers before the first update."""
        return {}

    @property
    def began(self) -> float:
        """Root mean square of the weights before the first step, for guards that ask for it; 0 if not known."""
        return float(self.state.get("began", 0.0))

    @property
    def walked(self) -> float:
        """How long all steps together were that stand, in α; 0 if it is not counted."""
        return float(self.state.get("walked", 0.0))

    def begin(self, measured: Measurement, alpha: float) -> float:
        """Return the α of the first step, told α_0, or what was proposed of a look ahead."""
        return alpha

    def propose(self, measured: Measurement, alpha: float) -> float:
        """Return α_t. Called where the last step stands and was a full one, so that its slopes say something.

        Args:
            measured: what is known of this update.
            alpha: α_{t-1}.
        """
        return alpha

    def stands(self, measured: Measurement) -> None:
        """The last step is not taken back."""

    def again(self, measured: Measurement, alpha: float) -> float | None:
        """Return α for the last step once more from where it began, while a search along its line goes on.

        Called where the last step was not taken back; what it measured is then forgotten.

        Args:
            measured: what is known of this update.
            alpha: of the last step.
        """
        return None

    def reduced(self) -> None:
        """The guards have reduced α, as steps failed again and again."""
