"""PLS: probabilistic line search."""

from __future__ import annotations

from typing import Any

from hf_elra.optim.arguments import check_relative_crop, settings_of
from hf_elra.optim.base import LossAwareOptimizer, Parts
from hf_elra.optim.directions import Direction
from hf_elra.optim.guards import guards_of
from hf_elra.optim.rules.probabilistic import Probabilistic


class PLS(LossAwareOptimizer):
    r"""Probabilistic line search: a Gaussian process over noisy losses and slopes says whether a step will do.

    A step stands if the Wolfe conditions hold with a probability of more than 0.3. Otherwise the next update tries
    another α along the same line, up to six; so no pass is made beside those of training.

    Args:
        params (iterable of Tensor, or of dict): parameters, or groups of them; a group may set ``lr`` and
            ``weight_decay``.
        lr (float): the first try. Default: 1e-2.
        lr_bounds (tuple of 2 floats): smallest and largest α. Default: (1e-12, 1e6).
        max_relative_step (float or None): crop the step to this share of the norm of the parameters; None for none, as
            in the paper. Default: None.
        weight_decay (float): d in x ← (1 - α·d)·x. Default: 0.
        soft_restart (bool): take steps back that led to a too high loss; not in the paper. Default: False.
        stochastic_rounding, restart_sigma, initial_restart_ratio: as of :class:`~hf_elra.optim.ELRA`.

    Raises:
        ConfigurationError: an argument cannot be used; the message names it, its value and the remedy.

    Source: M. Mahsereci, P. Hennig, "Probabilistic Line Searches for Stochastic Optimization" (2017);
    docs/optimizers/pls.md. State: one tensor per parameter, the last direction.
    """

    scales_weight_decay = True

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        *,
        lr_bounds: tuple[float, float] = (1e-12, 1e6),
        max_relative_step: float | None = None,
        weight_decay: float = 0.0,
        stochastic_rounding: bool = False,
        soft_restart: bool = False,
        restart_sigma: float = 5.0,
        initial_restart_ratio: float | None = 1.1,
    ) -> None:
        settings = settings_of(locals())
        check_relative_crop(settings)
        super().__init__(params, settings)

    def parts(self) -> Parts:
        """The gradient and the process."""
        return Parts(Direction(), Probabilistic(), *guards_of(self.param_groups[0]))
