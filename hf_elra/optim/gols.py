"""GOLS: gradient-only line search."""

from __future__ import annotations

from typing import Any

from hf_elra.optim.arguments import check_relative_crop, need_number, settings_of
from hf_elra.optim.base import LossAwareOptimizer, Parts
from hf_elra.optim.directions import Direction
from hf_elra.optim.guards import guards_of
from hf_elra.optim.rules.gradient_only import GradientOnly


class GOLS(LossAwareOptimizer):
    r"""Inexact gradient-only line search, GOLS-I: along every line to where the slope turns from falling to rising.

    Slopes come from the batches of the updates to come: an update either ends the search along a line and begins the
    next one, or goes on along the same line with α·η or α/η. So no pass is made beside those of training.

    Args:
        params (iterable of Tensor, or of dict): parameters, or groups of them; a group may set ``lr`` and
            ``weight_decay``.
        lr (float): the first try. Default: 1e-4.
        eta (float): η, by which α changes along a line. Default: 2.
        c2 (float): a first try stands if the slope rises by less than this share of that at the beginning. Default:
            0.9.
        lr_bounds (tuple of 2 floats): smallest and largest α. Default: (1e-8, 1e7).
        max_relative_step (float or None): crop the step to this share of the norm of the parameters; None for none, as
            in the paper. Default: None.
        weight_decay (float): d in x ← (1 - α·d)·x. Default: 0.
        soft_restart (bool): take steps back that led to a too high loss; not in the paper. Default: False.
        stochastic_rounding, restart_sigma, initial_restart_ratio: as of :class:`~hf_elra.optim.ELRA`.

    Raises:
        ConfigurationError: an argument cannot be used; the message names it, its value and the remedy.

    Source: D. Kafka, D. Wilke, "Gradient-only line searches: An alternative to probabilistic line searches" (2019);
    docs/optimizers/gols.md. State: one tensor per parameter, the last direction.
    """

    scales_weight_decay = True

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        *,
        eta: float = 2.0,
        c2: float = 0.9,
        lr_bounds: tuple[float, float] = (1e-8, 1e7),
        max_relative_step: float | None = None,
        weight_decay: float = 0.0,
        stochastic_rounding: bool = False,
        soft_restart: bool = False,
        restart_sigma: float = 5.0,
        initial_restart_ratio: float | None = 1.1,
    ) -> None:
        settings = settings_of(locals())
        need_number(settings, "eta", lambda v: v > 1, "a number > 1, by which α changes along a line (2)")
        need_number(settings, "c2", lambda v: 0 < v <= 1, "a number in (0, 1], a share of the first slope (0.9)")
        check_relative_crop(settings)
        super().__init__(params, settings)

    def parts(self) -> Parts:
        """The gradient and the search."""
        s = self.param_groups[0]
        return Parts(Direction(), GradientOnly(s["eta"], s["c2"]), *guards_of(s))
