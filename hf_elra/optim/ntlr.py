"""NTLR: Newton-based trainable learning rate, around any optimizer, and by name over SGD and AdamW."""

from __future__ import annotations

from typing import Any

import torch

from hf_elra.optim.arguments import check_relative_crop, need_betas, need_number, settings_of
from hf_elra.optim.around import Around
from hf_elra.optim.base import Parts
from hf_elra.optim.directions import Direction
from hf_elra.optim.directions.momentum import Adam, Momentum
from hf_elra.optim.guards import guards_of
from hf_elra.optim.rules.newton import Newton
from hf_elra.optim.windows import AsksEveryK


class _NTLR(AsksEveryK):
    """What the three have in common."""

    scales_weight_decay = True

    def __init__(self, params: Any, settings: dict[str, Any]) -> None:
        need_number(settings, "gamma", lambda v: 0 < v <= 1, "a number in (0, 1], the damping of Newton's step (0.33)")
        check_relative_crop(settings)
        super().__init__(params, settings)

    def direction(self) -> Direction:
        """The direction of the optimizer that NTLR is over."""
        raise NotImplementedError

    def parts(self) -> Parts:
        """That direction, and eq. (8)."""
        s = self.param_groups[0]
        return Parts(self.direction(), Newton(s["gamma"]), *guards_of(s))


class NTLR(Around, _NTLR):
    r"""Newton-based trainable learning rate around any optimizer, whose rate is then no matter of choice.

    Every K updates α ← α·(1 + γ·⟨D_k, D_{k-1}⟩/⟨D_{k-1}, D_{k-1} - D_k⟩), D_k the mean direction of K updates. Where
    the denominator is not positive, α stays; it grows by at most 100.

    Args:
        inner (torch.optim.Optimizer): any, e.g. ``torch.optim.RMSprop(model.parameters(), lr=1e-3)``. Its ``lr`` is
            α_0; that of its groups stay in proportion. No scheduler may be on it.
        gamma (float): γ. Default: 0.33.
        every (int or None): K; None for ``share`` of an epoch, which a Trainer knows and a bare loop tells as
            ``optimizer.updates_per_epoch = len(loader)`` (100 updates where it does not). Default: None.
        share (float): p, K as a share of an epoch. Default: 0.2.
        lr_bounds (tuple of 2 floats): smallest and largest α. Default: (1e-12, 1e6).
        max_relative_step (float or None): crop the step to this share of the norm of the parameters; None for none, as
            in the paper. Default: None.
        soft_restart (bool): take steps back that led to a too high loss; not in the paper. Default: False.
        stochastic_rounding, restart_sigma, initial_restart_ratio: as of :class:`~hf_elra.optim.ELRA`.

    Raises:
        ConfigurationError: an argument cannot be used; the message names it, its value and the remedy.

    Source: G. Retsinas, G. Sfikas, P. P. Filntisis and P. Maragos, "Newton-based Trainable Learning Rate" (2023);
    docs/optimizers/ntlr.md. State: that of ``inner``, and three tensors per parameter.

    Example:
        >>> optimizer = NTLR(torch.optim.RMSprop(model.parameters(), lr=1e-3))
        >>> optimizer.updates_per_epoch = len(loader)
    """

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        *,
        gamma: float = 0.33,
        every: int | None = None,
        share: float = 0.2,
        lr_bounds: tuple[float, float] = (1e-12, 1e6),
        max_relative_step: float | None = None,
        stochastic_rounding: bool = False,
        soft_restart: bool = False,
        restart_sigma: float = 5.0,
        initial_restart_ratio: float | None = 1.1,
    ) -> None:
        Around.__init__(self, inner, settings_of(locals(), "inner"))


class NTLRSGD(_NTLR):
    r"""NTLR over SGD, with or without momentum; see :class:`NTLR` for the rule.

    Args:
        params (iterable of Tensor, or of dict): parameters, or groups of them; a group may set ``lr`` and
            ``weight_decay``.
        lr (float): α_0. Default: 1e-3.
        momentum (float): β in u ← β·u + G, as of ``torch.optim.SGD``. Default: 0.
        weight_decay (float): d in x ← (1 - α·d)·x. Default: 0.
        gamma, every, share, lr_bounds, max_relative_step, soft_restart: as of :class:`NTLR`.
        stochastic_rounding, restart_sigma, initial_restart_ratio: as of :class:`~hf_elra.optim.ELRA`.

    Raises:
        ConfigurationError: an argument cannot be used; the message names it, its value and the remedy.

    Source: as of :class:`NTLR`. State: three tensors per parameter, with momentum four.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        momentum: float = 0.0,
        gamma: float = 0.33,
        every: int | None = None,
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


class NTLRAdamW(_NTLR):
    r"""NTLR over AdamW; see :class:`NTLR` for the rule.

    Args:
        params (iterable of Tensor, or of dict): parameters, or groups of them; a group may set ``lr`` and
            ``weight_decay``.
        lr (float): α_0. Default: 1e-3.
        betas (tuple of 2 floats): shares of the averages of G and G² that are kept. Default: (0.9, 0.999).
        eps (float): ε in the denominator. Default: 1e-8.
        weight_decay (float): d in x ← (1 - α·d)·x. Default: 0.
        gamma, every, share, lr_bounds, max_relative_step, soft_restart: as of :class:`NTLR`.
        stochastic_rounding, restart_sigma, initial_restart_ratio: as of :class:`~hf_elra.optim.ELRA`.

    Raises:
        ConfigurationError: an argument cannot be used; the message names it, its value and the remedy.

    Source: as of :class:`NTLR`. State: five tensors per parameter.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        gamma: float = 0.33,
        every: int | None = None,
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
