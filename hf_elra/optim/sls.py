"""SLS: SGD with a stochastic line search."""

from __future__ import annotations

from functools import partial
from typing import Any

from hf_elra.optim.arguments import check_relative_crop, need_number, settings_of
from hf_elra.optim.base import LossAwareOptimizer, Parts
from hf_elra.optim.directions import Direction
from hf_elra.optim.guards import guards_of
from hf_elra.optim.rules.armijo import Armijo
from hf_elra.optim.sps import UPDATES_PER_EPOCH


class SLS(LossAwareOptimizer):
    r"""SGD with a stochastic line search: α is shortened until the batch's own loss falls as Armijo's condition wants.

    The first try is γ^{1/n}·α_{t-1}, n the number of updates of an epoch, which a Trainer knows and a bare loop tells
    as ``optimizer.updates_per_epoch = len(loader)``; otherwise it is 500. Every try is a forward pass:
    ``step(loss=loss, evaluate=function)`` in a bare loop.

    Args:
        params (iterable of Tensor, or of dict): parameters, or groups of them; a group may set ``lr`` and
            ``weight_decay``.
        lr (float): of a group its share. The first search begins at 1, whatever ``lr`` is. Default: 1.
        c (float): share of the decrease α·‖G‖² that is wanted. Default: 0.1.
        backtracking (float): a try's share of the one before. Default: 0.9.
        growth (float): γ, by which α may grow in an epoch. Default: 2.
        max_lr (float): the largest first try. Default: 10.
        lr_bounds (tuple of 2 floats): smallest and largest α. Default: (1e-12, 1e6).
        max_relative_step (float or None): crop the step to this share of the norm of the parameters; None for none, as
            in the paper. Default: None.
        weight_decay (float): d in x ← (1 - α·d)·x. Default: 0.
        soft_restart (bool): take steps back that led to a too high loss; not in the paper. Default: False.
        stochastic_rounding, restart_sigma, initial_restart_ratio: as of :class:`~hf_elra.optim.ELRA`.

    Raises:
        ConfigurationError: an argument cannot be used; the message names it, its value and the remedy.

    Source: S. Vaswani et al., "Painless Stochastic Gradient" (2019); docs/optimizers/sls.md. State: one tensor per
    parameter, the last direction.
    """

    scales_weight_decay = True
    needs_line_loss = True

    def __init__(
        self,
        params: Any,
        lr: float = 1.0,
        *,
        c: float = 0.1,
        backtracking: float = 0.9,
        growth: float = 2.0,
        max_lr: float = 10.0,
        lr_bounds: tuple[float, float] = (1e-12, 1e6),
        max_relative_step: float | None = None,
        weight_decay: float = 0.0,
        stochastic_rounding: bool = False,
        soft_restart: bool = False,
        restart_sigma: float = 5.0,
        initial_restart_ratio: float | None = 1.1,
    ) -> None:
        settings = settings_of(locals())
        need = partial(need_number, settings)
        need("c", lambda v: 0 < v < 1, "a number in (0, 1), a share of the decrease that the slope promises (0.1)")
        need("backtracking", lambda v: 0 < v < 1, "a number in (0, 1), a try's share of the one before (0.9)")
        need("growth", lambda v: v >= 1, "a number >= 1, by which α may grow in an epoch (2)")
        need("max_lr", lambda v: v > 0, "a number > 0, the largest first try (10)")
        check_relative_crop(settings)
        super().__init__(params, settings)

    def parts(self) -> Parts:
        """The gradient and Armijo's condition."""
        s = self.param_groups[0]
        growth = s["growth"] ** (1 / (self.updates_per_epoch or UPDATES_PER_EPOCH))
        return Parts(Direction(), Armijo(s["c"], s["backtracking"], growth, s["max_lr"]), *guards_of(s))
