"""LABPALSGD and LABPALNSGD: SGD whose rate, or step length, is measured once in a thousand updates."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from hf_elra.optim.arguments import check_relative_crop, need_choice, need_number, settings_of
from hf_elra.optim.base import LossAwareOptimizer, Parts
from hf_elra.optim.directions.momentum import Momentum
from hf_elra.optim.guards import guards_of
from hf_elra.optim.rules.large_batch_parabola import LargeBatchParabola

CURVATURES = ("formula", "released")


class LABPALSGD(LossAwareOptimizer):
    r"""LABPAL&SGD: every 1,000 updates α is measured on 1,280 samples, by a parabola along the gradient of one batch.

    In a Trainer these are samples of the next updates, which are kept and trained on when it is their turn, and by
    default the batch is doubled after half and after three quarters of training, from the noise factor on. In a bare
    loop ``step(loss=loss, evaluate=function)`` returns the loss of as many samples as are wanted.

    Args:
        params (iterable of Tensor, or of dict): parameters, or groups of them; a group may set ``lr`` and
            ``weight_decay``.
        lr (float): α until a measurement has found one, and of a group its share. Default: 1e-2.
        approximation_samples (int): samples of a measurement, rounded up to whole updates. Default: 1280.
        every (int): updates from one measurement to the next. Default: 1000.
        adaptation (float): by which the step is longer than to the minimum. Default: 1.8.
        max_step (float): the longest step to a minimum. Default: 1.
        curvature (str): ``"formula"``; ``"released"`` halves the curvature as the released code does, which doubles
            the step. Default: ``"formula"``.
        momentum (float): β in u ← β·u + G. Default: 0.
        lr_bounds (tuple of 2 floats): smallest and largest α. Default: (1e-12, 1e12).
        max_relative_step (float or None): crop the step to this share of the norm of the parameters; None for none, as
            in the paper. Default: None.
        weight_decay (float): d in x ← (1 - α·d)·x. Default: 0.
        soft_restart (bool): take steps back that led to a too high loss; not in the paper. Default: False.
        stochastic_rounding, restart_sigma, initial_restart_ratio: as of :class:`~hf_elra.optim.ELRA`.

    Raises:
        ConfigurationError: an argument cannot be used; the message names it, its value and the remedy.

    Source: M. Mutschler, A. Zell, "Using a one dimensional parabolic model of the full-batch loss to estimate learning
    rates during training" (2021), algorithm 1; docs/optimizers/labpal.md. State: one tensor per parameter, the last
    direction, with momentum two.
    """

    scales_weight_decay = True
    needs_line_loss = True
    keeps_length = False
    """Whether the length of the step is kept between measurements, and not α."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        *,
        approximation_samples: int = 1280,
        every: int = 1000,
        adaptation: float = 1.8,
        max_step: float = 1.0,
        curvature: str = "formula",
        momentum: float = 0.0,
        lr_bounds: tuple[float, float] = (1e-12, 1e12),
        max_relative_step: float | None = None,
        weight_decay: float = 0.0,
        stochastic_rounding: bool = False,
        soft_restart: bool = False,
        restart_sigma: float = 5.0,
        initial_restart_ratio: float | None = 1.1,
    ) -> None:
        settings = settings_of(locals())
        need = partial(need_number, settings)
        for name, value in (("approximation_samples", 1280), ("every", 1000)):
            need(name, lambda v: isinstance(v, int) and v >= 1, f"a whole number >= 1 ({value})")
        need("adaptation", lambda v: v > 0, "a number > 0, of the step to the minimum (1.8)")
        need("max_step", lambda v: v > 0, "a number > 0, the longest step to a minimum (1)")
        need("momentum", lambda v: 0 <= v < 1, "a number in [0, 1), e.g. 0.4")
        need_choice(settings, "curvature", CURVATURES)
        check_relative_crop(settings)
        super().__init__(params, settings)

    def parts(self) -> Parts:
        """The gradient, or its sum, and the parabola."""
        s = self.param_groups[0]
        rule = LargeBatchParabola(
            math.ceil(s["approximation_samples"] / (self.samples_per_update or s["approximation_samples"])),
            s["every"],
            s["adaptation"],
            s["max_step"],
            keeps_length=self.keeps_length,
            halves_curvature=s["curvature"] == "released",
        )
        return Parts(Momentum(s["momentum"], averages=False), rule, *guards_of(s))


class LABPALNSGD(LABPALSGD):
    r"""LABPAL&NSGD: as :class:`LABPALSGD`, but what is kept between measurements is the length of the step.

    Args:
        params, lr, ...: as of :class:`LABPALSGD`.

    Raises, source, state: as of :class:`LABPALSGD`.
    """

    keeps_length = True
