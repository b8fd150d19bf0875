"""HypergradientSGD and HypergradientAdamW: gradient descent on the learning rate itself."""

from __future__ import annotations

from typing import Any

from hf_elra.optim.arguments import check_relative_crop, need_betas, need_choice, need_number, settings_of
from hf_elra.optim.base import Parts
from hf_elra.optim.directions import Direction
from hf_elra.optim.directions.momentum import Adam, Momentum
from hf_elra.optim.guards import guards_of
from hf_elra.optim.rules.cosine import Cosine
from hf_elra.optim.rules.hypergradient import Additive
from hf_elra.optim.windows import AsksEveryK

FORMULAS = ("additive", "multiplicative")
MULTIPLICATIVE_HYPER_LR = 0.02


class _Hypergradient(AsksEveryK):
    """What the two have in common."""

    scales_weight_decay = True
    default_hyper_lr: float

    def __init__(self, params: Any, settings: dict[str, Any]) -> None:
        need_choice(settings, "formula", FORMULAS)
        multiplies = settings["formula"] == "multiplicative"
        if settings["hyper_lr"] is not None:
            meaning = "a number in (0, 1), the largest change of α (0.02)" if multiplies else "a number > 0"
            need_number(settings, "hyper_lr", lambda v: v > 0 and (v < 1 or not multiplies), meaning)
        check_relative_crop(settings)
        super().__init__(params, settings)

    def direction(self) -> Direction:
        """The direction of the optimizer whose rate is learnt."""
        raise NotImplementedError

    def parts(self) -> Parts:
        """That direction, and one of the two rules."""
        s = self.param_groups[0]
        if s["formula"] == "multiplicative":
            rule: Cosine | Additive = Cosine(MULTIPLICATIVE_HYPER_LR if s["hyper_lr"] is None else s["hyper_lr"])
        else:
            rule = Additive(self.default_hyper_lr if s["hyper_lr"] is None else s["hyper_lr"])
        return Parts(self.direction(), rule, *guards_of(s))


class HypergradientSGD(_Hypergradient):
    r"""SGD whose learning rate descends its own gradient: ∂f/∂α = -⟨G_t, u_{t-1}⟩.

    α_t = α_{t-1} + η·⟨G_t, u_{t-1}⟩ (additive), or α_{t-1}·(1 + η·cos(G_t, u_{t-1})) (multiplicative).

    Args:
        params (iterable of Tensor, or of dict): parameters, or groups of them; a group may set ``lr`` and
            ``weight_decay``.
        lr (float): α_0. Default: 1e-3.
        formula (str): ``"additive"`` or ``"multiplicative"``. Default: ``"additive"``.
        hyper_lr (float or None): η; None for 1e-3 (additive) or 0.02 (multiplicative). Default: None.
        momentum (float): β in u ← β·u + G, as of ``torch.optim.SGD``. Default: 0.
        every (int or None): 1: by the update; K > 1: every K updates, by their mean directions as NTLR has them; None:
            by ``share`` of an epoch. Default: 1.
        share (float): K as a share of an epoch. Default: 0.2.
        lr_bounds (tuple of 2 floats): smallest and largest α, so that it never turns negative. Default: (1e-12, 1e6).
        max_relative_step (float or None): crop the step to this share of the norm of the parameters; None for none, as
            in the paper. Default: None.
        weight_decay (float): d in x ← (1 - α·d)·x. Default: 0.
        soft_restart (bool): take steps back that led to a too high loss; not in the paper. Default: False.
        stochastic_rounding, restart_sigma, initial_restart_ratio: as of :class:`~hf_elra.optim.ELRA`.

    Raises:
        ConfigurationError: an argument cannot be used; the message names it, its value and the remedy.

    Source: A. G. Baydin et al., "Online Learning Rate Adaptation with Hypergradient Descent" (2018);
    docs/optimizers/hypergradient.md. State: one tensor per parameter, two with momentum, two more with K > 1.
    """

    default_hyper_lr = 1e-3

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        formula: str = "additive",
        hyper_lr: float | None = None,
        momentum: float = 0.0,
        every: int | None = 1,
        share: float = 0.2,
        lr_bounds: tuple[float, float] = (1e-12, 1e6),
        max_relative_step: float | None = None,
        weight_decay: float = 0.0,
        stochastic_rounding: bool = False,
        soft_restart: bool = False,
        restart_sigma: float = 5.0,
        initial_restart_ratio: float | None = 1.1,
    ) -> None:
        settings = settings_of(locals())
        need_number(settings, "momentum", lambda v: 0 <= v < 1, "a number in [0, 1), e.g. 0.9")
        super().__init__(params, settings)

    def direction(self) -> Direction:
        """SGD's."""
        return Momentum(self.param_groups[0]["momentum"], averages=False)


class HypergradientAdamW(_Hypergradient):
    r"""AdamW whose learning rate descends its own gradient; see :class:`HypergradientSGD` for the rule.

    Args:
        params (iterable of Tensor, or of dict): parameters, or groups of them; a group may set ``lr`` and
            ``weight_decay``.
        lr (float): α_0. Default: 1e-3.
        formula (str): ``"additive"`` or ``"multiplicative"``. Default: ``"additive"``.
        hyper_lr (float or None): η; None for 1e-7 (additive) or 0.02 (multiplicative). Default: None.
        betas (tuple of 2 floats): shares of the averages of G and G² that are kept. Default: (0.9, 0.999).
        eps (float): ε in the denominator. Default: 1e-8.
        every, share, lr_bounds, max_relative_step, weight_decay, soft_restart: as of :class:`HypergradientSGD`.
        stochastic_rounding, restart_sigma, initial_restart_ratio: as of :class:`~hf_elra.optim.ELRA`.

    Raises:
        ConfigurationError: an argument cannot be used; the message names it, its value and the remedy.

    Source: as of :class:`HypergradientSGD`. State: three tensors per parameter, two more with K > 1.
    """

    default_hyper_lr = 1e-7

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        formula: str = "additive",
        hyper_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        every: int | None = 1,
        share: float = 0.2,
        lr_bounds: tuple[float, float] = (1e-12, 1e6),
        max_relative_step: float | None = None,
        weight_decay: float = 0.0,
        stochastic_rounding: bool = False,
        soft_restart: bool = False,
        restart_sigma: float = 5.0,
        initial_restart_ratio: float | None = 1.1,
    ) -> None:
        settings = settings_of(locals())
        need_betas(settings)
        need_number(settings, "eps", lambda v: v > 0, "a number > 0 (1e-8)")
        super().__init__(params, settings)

    def direction(self) -> Direction:
        """Adam's; weight decay is decoupled."""
        return Adam(self.param_groups[0]["betas"], self.param_groups[0]["eps"])
