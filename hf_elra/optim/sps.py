"""SPS: SGD with the stochastic Polyak step size."""

from __future__ import annotations

from functools import partial
from typing import Any

from hf_elra.optim.arguments import check_relative_crop, need_number, settings_of
from hf_elra.optim.base import LossAwareOptimizer, Parts
from hf_elra.optim.directions import Direction
from hf_elra.optim.guards import guards_of
from hf_elra.optim.rules.polyak import Polyak

UPDATES_PER_EPOCH = 500
"""Where nobody has said how many; the authors' default."""


class SPS(LossAwareOptimizer):
    r"""SGD with the stochastic Polyak step size, SPS_max.

    α_t = min((f_t - f*)/(c·‖G_t‖²), γ^{1/n}·α_{t-1}, the largest).

    For models that can fit every batch, so that f* = 0. n is the number of updates of an epoch, which a Trainer knows
    and a bare loop tells as ``optimizer.updates_per_epoch = len(loader)``; otherwise it is 500.

    Args:
        params (iterable of Tensor, or of dict): parameters, or groups of them; a group may set ``lr`` and
            ``weight_decay``.
        lr (float): α where the loss is not told; of a group its share. The first α is at most 1, whatever ``lr`` is.
            Default: 1.
        c (float): c. Default: 0.5.
        f_star (float): f*, a lower bound of the loss of every batch. Default: 0.
        growth (float): γ, by which α may grow in an epoch. Default: 2.
        max_lr (float): the largest α. Default: 100.
        lr_bounds (tuple of 2 floats): smallest and largest α. Default: (1e-12, 1e6).
        max_relative_step (float or None): crop the step to this share of the norm of the parameters; None for none, as
            in the paper. Default: None.
        weight_decay (float): d in x ← (1 - α·d)·x. Default: 0.
        soft_restart (bool): take steps back that led to a too high loss; not in the paper. Default: False.
        stochastic_rounding, restart_sigma, initial_restart_ratio: as of :class:`~hf_elra.optim.ELRA`.

    Raises:
        ConfigurationError: an argument cannot be used; the message names it, its value and the remedy.

    Source: N. Loizou, S. Vaswani, I. Laradji, S. Lacoste-Julien, "Stochastic Polyak Step-size for SGD" (2021);
    docs/optimizers/sps.md. State: one tensor per parameter, the last direction.
    """

    scales_weight_decay = True

    def __init__(
        self,
        params: Any,
        lr: float = 1.0,
        *,
        c: float = 0.5,
        f_star: float = 0.0,
        growth: float = 2.0,
        max_lr: float = 100.0,
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
        need("c", lambda v: v > 0, "a number > 0 (0.5)")
        need("f_star", lambda v: True, "a number, a lower bound of losses (0)")
        need("growth", lambda v: v >= 1, "a number >= 1, by which α may grow in an epoch (2)")
        need("max_lr", lambda v: v > 0, "a number > 0, the largest α (100)")
        check_relative_crop(settings)
        super().__init__(params, settings)

    def parts(self) -> Parts:
        """The gradient and Polyak's step."""
        s = self.param_groups[0]
        growth = s["growth"] ** (1 / (self.updates_per_epoch or UPDATES_PER_EPOCH))
        return Parts(Direction(), Polyak(s["c"], s["f_star"], growth, s["max_lr"]), *guards_of(s))
