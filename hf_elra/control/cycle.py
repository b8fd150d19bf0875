"""Lengths of control cycles, and a count that says when one is over.

A control cycle is the stretch of training over which the mean loss is taken. Its length is written the way Composer
users write time: ``45000sp`` (samples), ``45000tok`` (tokens), ``0.25ep`` (epochs) or ``100ba`` (updates). What happens
at the end of a cycle is decided elsewhere.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from hf_elra.errors import ConfigurationError

UNITS = {"sp": "samples", "tok": "tokens", "ep": "epochs", "ba": "updates"}
_PATTERN = re.compile(r"\s*(?P<length>\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)\s*(?P<unit>[a-z]+)\s*")


@dataclass
class ControlCycle:
    """A repeating stretch of training.

    Args:
        length (float): length of one cycle, > 0, in ``unit``.
        unit (str): ``"sp"`` samples, ``"tok"`` tokens, ``"ep"`` epochs, ``"ba"`` updates.
        completed (int): cycles that are over, counted from the start of training.
    """

    length: float
    unit: str
    completed: int = 0

    @classmethod
    def parse(cls, text: str, name: str = "control cycle") -> ControlCycle:
        """Read ``"45000sp"``, ``"45000tok"``, ``"0.25ep"`` or ``"100ba"``; ``name`` is the flag named in the error."""
        match = _PATTERN.fullmatch(str(text))
        if match is None or match["unit"] not in UNITS:
            raise ConfigurationError(
                f"{name}={text!r} is not a length: write a number and a unit, "
                "45000sp (samples), 45000tok (tokens), 1ep (epochs) or 100ba (updates)."
            )
        length, unit = float(match["length"]), match["unit"]
        if not (math.isfinite(length) and length > 0):
            raise ConfigurationError(f"{name}={text!r} must be longer than 0 {UNITS[unit]}.")
        if unit == "ba" and length < 1:
            raise ConfigurationError(f"{name}={text!r} is shorter than one update; write at least 1ba.")
        return cls(length, unit)

    def samples(self, per_epoch: float | None, tokens_per_sample: float | None) -> float | None:
        """Return the samples in a cycle, or None if the arguments do not say enough.

        Args:
            per_epoch: samples of an epoch, or None if unknown.
            tokens_per_sample: tokens of a sample, or None if unknown.
        """
        if self.unit == "sp":
            return self.length
        if self.unit == "ep" and per_epoch is not None:
            return self.length * per_epoch
        if self.unit == "tok" and tokens_per_sample is not None:
            return self.length / tokens_per_sample
        return None

    def advance(self, *, samples: int, tokens: int, epochs: float, updates: int) -> bool:
        """Take the totals since the start of training; return whether a cycle has ended since the last call.

        If several ends lie between two calls they count as one: the losses since the last end make one cycle.
        """
        position = {"sp": samples, "tok": tokens, "ep": epochs, "ba": updates}[self.unit]
        # An epoch's end is a sum of floats that may fall a rounding error short of the whole number.
        completed = int(position / self.length + 1e-9)
        ended = completed > self.completed
        self.completed = max(self.completed, completed)
        return ended
