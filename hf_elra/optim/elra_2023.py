"""ELRAC2Min and ELRAP2Min: the two optimizers of the first paper on ELRA (2023), momentum with one rule each."""

from __future__ import annotations

import math
from typing import Any

from hf_elra.optim.arguments import check_relative_crop, need_number, settings_of
from hf_elra.optim.base import LossAwareOptimizer, Parts
from hf_elra.optim.directions.momentum import Momentum
from hf_elra.optim.guards import RestartGuard, StepGuards
from hf_elra.optim.rules import Rule
from hf_elra.optim.rules.barzilai_borwein import BarzilaiBorwein
from hf_elra.optim.rules.cosine import Cosine


class _ELRA2023(LossAwareOptimizer):
    """What the two have in common."""

    def __init__(self, params: Any, settings: dict[str, Any]) -> None:
        need_number(settings, "momentum", lambda v: 0 <= v < 1, "a number in [0, 1), e.g. 0.8")
        check_relative_crop(settings)
        super().__init__(params, settings)

    def rule(self) -> Rule:
        """The rule for α."""
        raise NotImplementedError

    def parts(self) -> Parts:
        """Averaged gradients, and the guards of ELRA that suit both."""
        s = self.param_groups[0]
        return Parts(
            Momentum(s["momentum"]),
            self.rule(),
            StepGuards(s.get("max_growth", math.inf), s["lr_bounds"], max_relative_step=s["max_relative_step"]),
            RestartGuard(s["restart_sigma"], s["initial_restart_ratio"], s["restart_window"]),
        )


class ELRAC2Min(_ELRA2023):
    r"""c2min: α follows the cosine between the gradient and the last step, by at most half of it an update.

    α_t = α_{t-1}·(1 + g·cos(G_t, u_{t-1})), u_t = (1 - β)·G_t + β·u_{t-1}, x_{t+1} = x_t - α_t·u_t. Where gradient and
    step are orthogonal, the step ended in the minimum of its line.

    Args:
        params (iterable of Tensor, or of dict): parameters, or groups of them; a group may set ``lr`` and
            ``weight_decay``.
        lr (float): α_0. Default: 1e-5, the paper's.
        momentum (float): β. Default: 0.8.
        gain (float): g. Default: 0.5.
        lr_bounds (tuple of 2 floats): smallest and largest α. Default: (1e-8, 1e6).
        max_relative_step (float or None): crop the step to this share of the norm of the parameters; None for none.
            Default: 0.03, as of :class:`~hf_elra.optim.ELRA`.
        weight_decay (float): d in x ← (1 - d)·x, once per update, not scaled by α. Default: 0.
        soft_restart, restart_sigma, initial_restart_ratio, restart_window, stochastic_rounding: as of
            :class:`~hf_elra.optim.ELRA`.

    Raises:
        ConfigurationError: an argument cannot be used; the message names it, its value and the remedy.

    Source: "ELRA: Exponential learning rate adaption gradient descent optimization method" (2023, arXiv 2309.06274);
    see docs/optimizers/elra_2023.md for what its summary leaves open. State: two tensors per parameter, the average and
    the last direction.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-5,
        *,
        momentum: float = 0.8,
        gain: float = 0.5,
        lr_bounds: tuple[float, float] = (1e-8, 1e6),
        max_relative_step: float | None = 0.03,
        weight_decay: float = 0.0,
        stochastic_rounding: bool = False,
        soft_restart: bool = True,
        restart_sigma: float = 5.0,
        initial_restart_ratio: float | None = 1.1,
        restart_window: int | None = None,
    ) -> None:
        settings = settings_of(locals())
        need_number(settings, "gain", lambda v: 0 < v < 1, "a number in (0, 1), the largest change of α (0.5)")
        super().__init__(params, settings)

    def rule(self) -> Rule:
        """The angle."""
        return Cosine(self.param_groups[0]["gain"])


class ELRAP2Min(_ELRA2023):
    r"""p2min: α goes to the minimum of the parabola through the slopes at both ends of the last step.

    α_t = α_{t-1}·n/(n - d) with n = ⟨G_{t-1}, u_{t-1}⟩ and d = ⟨G_t, u_{t-1}⟩, and grows by ``max_growth`` where the
    parabola has no minimum; u_t = (1 - β)·G_t + β·u_{t-1}. ELRA (2024) is this rule without momentum and with a
    correction for noise.

    Args:
        params (iterable of Tensor, or of dict): parameters, or groups of them; a group may set ``lr`` and
            ``weight_decay``.
        lr (float): α_0. Default: 1e-5, the paper's.
        momentum (float): β. Default: 0.7.
        max_growth (float): largest α_t/α_{t-1}. Default: 10.
        lr_bounds (tuple of 2 floats): smallest and largest α. Default: (1e-8, 1e6).
        max_relative_step (float or None): crop the step to this share of the norm of the parameters; None for none.
            Default: 0.03, as of :class:`~hf_elra.optim.ELRA`.
        weight_decay (float): d in x ← (1 - d)·x, once per update, not scaled by α. Default: 0.
        soft_restart, restart_sigma, initial_restart_ratio, restart_window, stochastic_rounding: as of
            :class:`~hf_elra.optim.ELRA`.

    Raises:
        ConfigurationError: an argument cannot be used; the message names it, its value and the remedy.

    Source and state: as of :class:`ELRAC2Min`.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-5,
        *,
        momentum: float = 0.7,
        max_growth: float = 10.0,
        lr_bounds: tuple[float, float] = (1e-8, 1e6),
        max_relative_step: float | None = 0.03,
        weight_decay: float = 0.0,
        stochastic_rounding: bool = False,
        soft_restart: bool = True,
        restart_sigma: float = 5.0,
        initial_restart_ratio: float | None = 1.1,
        restart_window: int | None = None,
    ) -> None:
        settings = settings_of(locals())
        need_number(settings, "max_growth", lambda v: v > 1, "a number > 1, the largest growth of α per update (10)")
        super().__init__(params, settings)

    def rule(self) -> Rule:
        """The parabola."""
        return BarzilaiBorwein("bb1", noise_correction=0.0)
