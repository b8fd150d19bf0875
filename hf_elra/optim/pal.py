"""PAL: parabolic approximation line search on the batch."""

from __future__ import annotations

from functools import partial
from typing import Any

from hf_elra.optim.arguments import check_relative_crop, need_number, settings_of
from hf_elra.optim.base import LossAwareOptimizer, Parts
from hf_elra.optim.directions.momentum import Momentum
from hf_elra.optim.guards import guards_of
from hf_elra.optim.rules.line_parabola import LineParabola


class PAL(LossAwareOptimizer):
    r"""Parabolic approximation line search: every step goes to the minimum of a parabola of the batch's own loss.

    The parabola goes through the loss and the slope at the point and the loss at the distance μ along the direction,
    which is a second forward pass: ``step(loss=loss, evaluate=function)`` in a bare loop.

    Args:
        params (iterable of Tensor, or of dict): parameters, or groups of them; a group may set ``lr`` and
            ``weight_decay``.
        lr (float): of a group its share; α itself is measured in every update. Default: 1.
        measuring_step (float): μ, the distance of the second loss. Default: 0.1.
        max_step (float): the longest step. Default: 3.16.
        adaptation (float): by which the step is longer than to the minimum. Default: 1/0.6.
        momentum (float): β in u ← β·u + G. Default: 0.4.
        lr_bounds (tuple of 2 floats): smallest and largest α. Default: (1e-12, 1e12).
        max_relative_step (float or None): crop the step to this share of the norm of the parameters; None for none, as
            in the paper. Default: None.
        weight_decay (float): d in x ← (1 - α·d)·x. Default: 0.
        soft_restart (bool): take steps back that led to a too high loss; not in the paper. Default: False.
        stochastic_rounding, restart_sigma, initial_restart_ratio: as of :class:`~hf_elra.optim.ELRA`.

    Raises:
        ConfigurationError: an argument cannot be used; the message names it, its value and the remedy.

    Source: M. Mutschler, A. Zell, "Parabolic Approximation Line Search for DNNs" (2020); docs/optimizers/pal.md. State:
    two tensors per parameter, the average and the last direction.
    """

    scales_weight_decay = True
    needs_line_loss = True

    def __init__(
        self,
        params: Any,
        lr: float = 1.0,
        *,
        measuring_step: float = 0.1,
        max_step: float = 3.16,
        adaptation: float = 1 / 0.6,
        momentum: float = 0.4,
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
        need("measuring_step", lambda v: v > 0, "a number > 0, a distance along the line (0.1)")
        need("max_step", lambda v: v > 0, "a number > 0, the longest step (3.16)")
        need("adaptation", lambda v: v > 0, "a number > 0, of the step to the minimum (1.67)")
        need("momentum", lambda v: 0 <= v < 1, "a number in [0, 1), e.g. 0.4")
        check_relative_crop(settings)
        super().__init__(params, settings)

    def parts(self) -> Parts:
        """The averaged gradient and the parabola."""
        s = self.param_groups[0]
        rule = LineParabola(s["measuring_step"], s["adaptation"], s["max_step"])
        return Parts(Momentum(s["momentum"], averages=False), rule, *guards_of(s))
