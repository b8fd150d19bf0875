"""Numbers of an optimizer that are on a device: how they get there and back, and which of the two copies counts.

Numbers are on the host, in ``param_groups[0]["scalars"]``, until the first update that decides on the device. From then
on those on the device count, until something is changed on the host; reading copies them and changes nothing. What the
updates do with them is in ``on_device.py`` (``elra_spectral``) and in ``kernels/`` (``elra``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_elra.optim.base import LossAwareOptimizer
from hf_elra.optim.tensors import accumulates_in

COUNTS = (
    "restarts", "non_finite", "consecutive_restarts", "non_finite_in_a_row", "skipped", "accepted_levels", "on_trial",
    "quiet", "updates",
)  # fmt: skip
OF_SCALARS = (
    "alpha", "step_size", "previous_slope", "previous_loss", "gradient_norm", "direction_norm", "step_norm", "cosine",
    "weight_square", "length", "proven", "level", *COUNTS,
)  # fmt: skip
"""Names in ``scalars``; those of :data:`COUNTS` are whole numbers there."""
OF_LOSSES = (
    "initial_loss", "cycle_count", "cycle_mean", "cycle_squares", "last_mean", "last_std",
    "recent_count", "recent_mean", "recent_variance", "row_count", "row_mean", "row_squares", "suspect",
)  # fmt: skip
"""What ``scalars["loss_statistics"]`` holds, where no window is kept."""


class Numbers:
    """A vector on the device, in which NaN says that a number is not known.

    Attributes:
        names: what it holds, in this order.
        numbers: the vector; None before the first update on the device.
        in_force: the numbers on the device are those that count, not the host's.
        was_read: the host has a copy of them.
    """

    names: tuple[str, ...] = (*OF_SCALARS, *OF_LOSSES)

    def __init__(self) -> None:
        self.numbers: Tensor | None = None
        self.in_force = self.was_read = False

    def push(self, scalars: dict[str, Any], device: torch.device, more: Sequence[float] = ()) -> None:
        """Copy the host's numbers to the device, and ``more`` behind them."""
        found = self.read(scalars)
        row = [math.nan if found.get(name) is None else float(found[name]) for name in self.names]
        on_host = torch.tensor([*row, *more], dtype=accumulates_in(device))
        if self.numbers is None or self.numbers.device != device or self.numbers.shape != on_host.shape:
            self.numbers = torch.empty_like(on_host, device=device)
        self.numbers.copy_(on_host)  # in place: a captured CUDA graph goes on with this very tensor
        self.in_force = self.was_read = True

    def pull(self, scalars: dict[str, Any]) -> list[float]:
        """Copy the device's numbers to the host, which waits for the device; return what follows those with names."""
        assert self.numbers is not None
        self.was_read = True
        row = self.numbers.tolist()
        named = zip(self.names, row[: len(self.names)], strict=True)
        self.write(scalars, {name: None if math.isnan(value) else value for name, value in named})
        return row[len(self.names) :]

    def read(self, scalars: dict[str, Any]) -> dict[str, Any]:
        """Return the host's numbers by name."""
        memory = scalars["loss_statistics"]
        found = {name: scalars[name] for name in OF_SCALARS}
        found["initial_loss"], found["suspect"] = memory["initial_loss"], memory["suspect"]
        found["cycle_count"], found["cycle_mean"], found["cycle_squares"] = memory["cycle"]
        found["last_mean"], found["last_std"] = memory["last_cycle"]
        found["recent_count"], found["recent_mean"], found["recent_variance"] = memory["recent"]
        found["row_count"], found["row_mean"], found["row_squares"] = memory["row"]
        return found

    def write(self, scalars: dict[str, Any], found: dict[str, Any]) -> None:
        """Put numbers by name in their place on the host."""
        for name in OF_SCALARS:
            scalars[name] = int(found[name]) if name in COUNTS else found[name]
        if scalars["gradient_norm"] is None and scalars["updates"] > 0:
            scalars["gradient_norm"] = math.nan
        memory = scalars["loss_statistics"]
        memory["initial_loss"], memory["suspect"] = found["initial_loss"], found["suspect"]
        memory["cycle"] = [int(found["cycle_count"]), found["cycle_mean"], found["cycle_squares"]]
        memory["last_cycle"] = [found["last_mean"], found["last_std"]]
        memory["recent"] = [int(found["recent_count"]), found["recent_mean"], found["recent_variance"]]
        memory["row"] = [int(found["row_count"]), found["row_mean"], found["row_squares"]]


class NumbersOnDevice(LossAwareOptimizer):
    """Keeps the numbers of an optimizer on host or device; a subclass makes the updates there."""

    @property
    def _there(self) -> Numbers | None:
        """The numbers on the device; None before the first update there."""
        raise NotImplementedError(f"{type(self).__name__} must say where its numbers are")

    @property
    def _is_replayed(self) -> bool:
        """Whether updates may be replays of a CUDA graph, which are not noticed here."""
        raise NotImplementedError(f"{type(self).__name__} must say whether its updates are captured")

    def _push(self, device: torch.device) -> None:
        """Copy the host's numbers to the device."""
        raise NotImplementedError(f"{type(self).__name__} must say which numbers it has")

    def _pull(self) -> None:
        """Copy the device's numbers to the host."""
        raise NotImplementedError(f"{type(self).__name__} must say which numbers it has")

    @property
    def reading_waits(self) -> bool:
        """Whether whoever reads α, counts or metrics now waits for the device."""
        return self._there is not None and self._there.in_force and not self._there.was_read

    def _numbers(self) -> dict[str, Any]:
        """Return the numbers of the optimizer; reading them changes nothing."""
        there = self._there
        if there is not None and self.reading_waits:
            self._pull()
            there.was_read = not self._is_replayed
        return super()._numbers()

    def _numbers_to_change(self) -> dict[str, Any]:
        """Return the numbers to change them on the host; those of the host count from now on."""
        scalars = self._numbers()
        if self._there is not None:
            self._there.in_force = False
        return scalars

    def _renew_numbers_on_device(self) -> None:
        """Copy a change on the host to the device, since a captured CUDA graph sees only what is there."""
        there = self._there
        if there is not None and there.numbers is not None and self._is_replayed:
            self._push(there.numbers.device)

    def end_cycle(self) -> None:
        """End a cycle, as with every loss-aware optimizer; a captured CUDA graph sees it, too."""
        super().end_cycle()
        self._renew_numbers_on_device()

    # ---- checkpoints ----

    def state_dict(self) -> dict[str, Any]:
        """As in torch; checkpoints do not depend on where numbers are."""
        self._numbers()
        self._memory.finish()
        return super().state_dict()

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles hold."""
        self._numbers()
        self._memory.finish()
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a pickled or saved state, which does not hold the numbers on the device."""
        super().__setstate__(state)
        if self._there is not None:
            self._there.in_force = False
