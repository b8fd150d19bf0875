"""Guarded: any optimizer as it is, with soft restarts and steps that are cropped."""

from __future__ import annotations

import torch

from hf_elra.optim.arguments import check_relative_crop, need_number, settings_of
from hf_elra.optim.around import Around
from hf_elra.optim.base import Parts
from hf_elra.optim.guards import RestartGuard, StepGuards
from hf_elra.optim.rules import Rule
from hf_elra.optim.windows import KeepsAlpha


class Guarded(Around, KeepsAlpha):
    r"""Any optimizer at its own rate, whose steps are cropped, or taken back if they led to a too high loss.

    What the other optimizer remembers is that of the steps that stand: the gradient at a point that is left again never
    reaches it. A scheduler goes on this optimizer, not on the inner one.

    Args:
        inner (torch.optim.Optimizer): any, e.g. ``torch.optim.AdamW(model.parameters(), lr=1e-3)``. Its ``lr`` is α,
            which only failures in a row reduce.
        soft_restart (bool): take steps back that led to a too high loss. Default: True.
        max_step_norm (float or None): crop above this length of a step; None for none. Default: None.
        max_relative_step (float or None): crop above this share of the norm of the parameters; None for none. Default:
            None.
        lr_bounds (tuple of 2 floats): smallest and largest α. Default: (1e-12, 1e6).
        stochastic_rounding, restart_sigma, initial_restart_ratio: as of :class:`~hf_elra.optim.ELRA`.

    Raises:
        ConfigurationError: an argument cannot be used; the message names it, its value and the remedy.

    Source: ELRA (2024), sections 3.2 and 3.5 and table 6. State: that of ``inner``, and the last direction.

    Example:
        >>> optimizer = Guarded(torch.optim.AdamW(model.parameters(), lr=1e-3))
        >>> optimizer.step(loss=loss)
    """

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        *,
        soft_restart: bool = True,
        max_step_norm: float | None = None,
        max_relative_step: float | None = None,
        lr_bounds: tuple[float, float] = (1e-12, 1e6),
        stochastic_rounding: bool = False,
        restart_sigma: float = 5.0,
        initial_restart_ratio: float | None = 1.1,
    ) -> None:
        settings = settings_of(locals(), "inner")
        if max_step_norm is not None:
            need_number(settings, "max_step_norm", lambda v: v > 0, "a number > 0, or None for no cropping")
        check_relative_crop(settings)
        super().__init__(inner, settings)

    def parts(self) -> Parts:
        """A rate that stays."""
        s = self.param_groups[0]
        guards = StepGuards(
            lr_bounds=s["lr_bounds"], max_step_norm=s["max_step_norm"], max_relative_step=s["max_relative_step"]
        )
        return Parts(self.direction(), Rule(), guards, RestartGuard(s["restart_sigma"], s["initial_restart_ratio"]))
