"""ELRA: steps along the gradient, by the Barzilai-Borwein rule. The update itself is in ``base.py``.

``kernels/`` makes the same update on a GPU, without the host. ``reference/elra.py`` is the same method in plain
float64, equation by equation; tests hold both against it at every step.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from hf_elra.errors import ConfigurationError
from hf_elra.optim.arguments import need_choice, need_flag, need_number, settings_of
from hf_elra.optim.base import Parts
from hf_elra.optim.directions import Direction
from hf_elra.optim.guards import RESTART_FORMULAS, RestartGuard, StepGuards
from hf_elra.optim.kernels.host import UpdatesOnDevice
from hf_elra.optim.memory import MEMORIES
from hf_elra.optim.rules.barzilai_borwein import FORMULAS, BarzilaiBorwein

_LENGTHS = ("min_step_norm", "max_step_norm", "max_relative_step", "max_first_step")  # limits on a step


class ELRA(UpdatesOnDevice):
    r"""Exponential Learning Rate Adaption: momentum-free descent whose one learning rate α finds itself.

    x_{t+1} = x_t - α_t·G_t, where α_t comes from the scalar products of neighbouring gradients over *all* parameters of
    *all* groups. That estimate is the long Barzilai-Borwein step times a noise correction κ. If a loss turns out too
    high, the step that led there is taken back and tried again shorter (soft restart). α itself is reduced only if that
    does not help, or if the next full step fails too, and it goes back when the trouble ends. If losses stay high
    however short the step is, their level is accepted. A batch without information (a loss that is not finite, with
    gradients of zero) is skipped.

    ELRA has to know the loss. Pass it as ``step(closure)``, as ``step(loss=value)`` or as ``observe_loss(value)``
    before ``step()``. Without a loss it makes its steps without restarts, and warns once.

    Args:
        params (iterable of Tensor, or of dict): parameters, or groups of them. A group may set its own ``lr`` (its
            share relative to the ``lr`` below) and its own ``weight_decay``; everything else is one per optimizer.
        lr (float): α_0, the first learning rate; it is adapted exponentially fast. Default: 1e-3.
        step_rule (str): ``"bb1"`` (eq. 4) for training, ``"bb2"`` for deterministic problems, and only with one rate in
            all groups. Default: ``"bb1"``.
        noise_correction (float): 0.15 in κ = 1 + 0.15/(1 + α²). Use 0 for deterministic problems: a high loss is then
            never the fault of a batch, and a step that is taken back reduces α at once. Default: 0.15.
        max_growth (float): largest α_t/α_{t-1}, γ_max in the paper. Default: 10.
        lr_bounds (tuple of 2 floats): smallest and largest α. Default: (1e-8, 1e6).
        min_step_norm (float): floor under α‖G‖, the α warm-up of section 3.1 (0.1 for language models). It never
            applies to a retraced step. Default: 0.
        max_step_norm (float or None): crop above α‖G‖, c in section 3.5. None for none. Default: 2.
        max_relative_step (float or None): crop above this share of the norm of the parameters (or above
            ``min_step_norm`` if that is more; weights of a root mean square below 0.01 count as of 0.01). Not in the
            paper, whose crop of 2 is as long as all weights of a small model. None for none. Default: 0.03.
        max_first_step (float or None): crop the very first step to this share of the norm of the parameters (or to
            ``min_step_norm`` if that is more), so that a far too large ``lr`` does no harm before a second gradient is
            known. Not in the paper, which loses runs from α_0 = 0.1 and 1. None for none. Default: 0.01.
        weight_decay (float): d in x ← (1 - d)·x, once per update and *not* scaled by α: the paper's factor 0.9997 is
            3e-4. Default: 0.
        soft_restart (bool): take back steps that led to a loss that is too high. A loss or gradient that is not finite
            always causes a restart. Default: True.
        restart_sigma (float): a loss above mean + ``restart_sigma``·σ is too high. Default: 5.
        initial_restart_ratio (float or None): while no mean is known, a loss above f_0 + (ratio - 1)·|f_0| is. None
            drops this rule, for a pre-trained start. Default: 1.1.
        restart_window (int or None): mean and σ are taken over this many recent losses; None for those of the last
            cycle, as declared by :meth:`end_cycle`. Default: None.
        restart_formula (str): ``"derived"`` or ``"paper"``: section 3.2's formula with or without the square that its
            print lost. Default: ``"derived"``.
        memory (str): what is kept of the last step, one number per parameter: ``"gradient"`` keeps the old gradient
            tensor itself, ``"point"`` the last point (exact retraces in any type), ``"offload"`` the gradient in host
            memory. See ``memory.py``. Default: ``"gradient"``.
        fused (bool, optional): True to make updates in Triton kernels, which never wait for the host; None to do so if
            possible: on one CUDA device, with ``memory="gradient"``. The first update, and one in which other
            parameters have a gradient than before, are made without kernels. Default: None.
        foreach (bool, optional): False to update one tensor at a time if kernels are not used. Default: None, all
            together.
        capturable (bool): copy gradients instead of keeping them, so that :meth:`step` can be captured in a CUDA graph.
            This needs kernels, and at least two updates before the capture. A graph keeps the settings of all groups,
            the ``lr`` of a scheduler among them, as they were at its capture. Also use it if gradients lie in the
            static memory of another graph. Default: False.
        stochastic_rounding (bool): round bfloat16 parameters up or down at random, right on average, so that steps
            below their precision are not lost. The same on every process and in a resumed run. Default: False.

    Raises:
        ConfigurationError: an argument cannot be used; the message names it, its value and the remedy.
        RuntimeError: from :meth:`step`, when a gradient is sparse, or when loss or gradient stay non-finite however
            short the steps are (with kernels: from :attr:`metrics`, as nothing is known before it is read).

    The learning rate in force is :attr:`alpha` and every group's ``"alpha"``. A scheduler that writes ``group["lr"]``
    acts as a factor: the step taken is α·lr/initial_lr. The rule sees that step, and makes up for the factor if noise
    does not dominate. A factor of 0 freezes the parameters and leaves α alone.

    Several processes that keep the same parameters (DDP) must decide alike, but each of them sees its own loss. Set the
    attribute :attr:`process_group` (the Trainer does). Losses and scalar products are then averaged over it in small
    all-reduces, so that processes take the same step on different hardware, too, and if one of them reads a gradient
    that is not finite. For DTensors (FSDP2, tensor parallelism) sums are always taken over all shards.

    Source: "A gradient descent optimizer with auto controlled large learning rates, dynamic batch sizes and without
    momentum" (ELRA, 2024), sections 2 and 3. State: one tensor per parameter, the last direction.

    Example:
        >>> optimizer = ELRA(model.parameters())
        >>> for epoch in range(epochs):
        ...     for inputs, targets in batches:
        ...         loss = loss_function(model(inputs), targets)
        ...         loss.backward()
        ...         optimizer.step(loss=loss)
        ...         optimizer.zero_grad()
        ...     optimizer.end_cycle()
    """

    stays_with_object = ("memory", "fused", "foreach", "capturable", "stochastic_rounding")

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        step_rule: str = "bb1",
        noise_correction: float = 0.15,
        max_growth: float = 10.0,
        lr_bounds: tuple[float, float] = (1e-8, 1e6),
        min_step_norm: float = 0.0,
        max_step_norm: float | None = 2.0,
        max_relative_step: float | None = 0.03,
        max_first_step: float | None = 0.01,
        weight_decay: float = 0.0,
        soft_restart: bool = True,
        restart_sigma: float = 5.0,
        initial_restart_ratio: float | None = 1.1,
        restart_window: int | None = None,
        restart_formula: str = "derived",
        memory: str = "gradient",
        fused: bool | None = None,
        foreach: bool | None = None,
        capturable: bool = False,
        stochastic_rounding: bool = False,
    ) -> None:
        settings = settings_of(locals())
        _check_settings(settings)
        super().__init__(params, settings)
        if step_rule == "bb2" and not self.direction().is_gradient:
            raise ConfigurationError("step_rule='bb2' is only for steps along the gradient; use step_rule='bb1'.")

    def direction(self) -> Direction:
        """Return u = G; a subclass may choose another direction, for which there are no kernels."""
        return Direction()

    def parts(self) -> Parts:
        """Return the gradient, eq. 4, and the guards of sections 3.1, 3.2 and 3.5."""
        s = self.settings()
        return Parts(
            self.direction(),
            BarzilaiBorwein(s["step_rule"], s["noise_correction"]),
            StepGuards(s["max_growth"], s["lr_bounds"], *(s[name] for name in _LENGTHS)),
            RestartGuard(
                s["restart_sigma"],
                s["initial_restart_ratio"],
                s["restart_window"],
                s["restart_formula"],
                noisy=s["noise_correction"] > 0,
            ),
        )

    def settings(self) -> dict[str, Any]:
        """Return the settings of this update.

        Unlike the factor of a scheduler, gradient decay is part of the direction: limits on the length of a step apply
        to the step that it has shortened already.
        """
        settings = self.param_groups[0]
        limits = {name: settings[name] for name in _LENGTHS if settings[name] is not None}
        return {**settings, **{name: value / self.gradient_decay for name, value in limits.items()}}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; besides ``params`` a group may set ``lr`` and ``weight_decay``."""
        lr = param_group.get("lr", self.defaults["lr"])
        others = {float(group.get("initial_lr", group["lr"])) for group in self.param_groups}
        if self.defaults["step_rule"] == "bb2" and others - {lr}:
            raise ConfigurationError(
                f"lr={lr!r} of a group cannot be used with step_rule='bb2', which takes ‖G‖² for the slope, as another "
                f"group has lr={max(others - {lr})!r}. Give all groups the same lr, or use step_rule='bb1'."
            )
        super().add_param_group(param_group)

    def _update(self, loss: Tensor | float | None, factors: list[float], evaluate: Any = None) -> None:
        if self.param_groups[0]["step_rule"] == "bb2" and max(factors) > min(factors):
            raise ConfigurationError(
                f"step_rule='bb2' cannot be used with several rates at once, but groups have {max(factors):g} and "
                f"{min(factors):g} times that of the optimizer: it takes ‖G‖² for the slope. Give all groups the same "
                "lr, also by a scheduler, or use step_rule='bb1'."
            )
        super()._update(loss, factors, evaluate)


def _check_settings(settings: dict[str, Any]) -> None:
    """Raise a ConfigurationError for the first setting that is of the wrong type, out of range or contradictory."""
    need = partial(need_number, settings)
    need("noise_correction", lambda v: v >= 0, "a number >= 0 (0.15 in the paper, 0 for noise-free problems)")
    need("max_growth", lambda v: v > 1, "a number > 1, the largest growth of the learning rate per update (try 10)")
    need("min_step_norm", lambda v: v >= 0, "a number >= 0 (0.1 for language models, 0 for none)")
    if settings["max_first_step"] is not None:
        need(
            "max_first_step", lambda v: v > 0, "a number > 0, a share of the parameters' norm, or None for no cropping"
        )
    if settings["max_step_norm"] is not None:
        need("max_step_norm", lambda v: v > 0, "a number > 0 (2 in the paper), or None for no cropping")
        if settings["min_step_norm"] > settings["max_step_norm"]:
            raise ConfigurationError(
                f"min_step_norm={settings['min_step_norm']!r} is above max_step_norm={settings['max_step_norm']!r}; "
                "lower the one or raise the other."
            )
    if settings["max_relative_step"] is not None:
        need(
            "max_relative_step",
            lambda v: v > 0,
            "a number > 0, a share of the parameters' norm, or None for no cropping",
        )
    need_flag(settings, "capturable")
    for name in ("foreach", "fused"):
        need_flag(settings, name, or_none=True)
    need_choice(settings, "step_rule", FORMULAS)
    need_choice(settings, "restart_formula", RESTART_FORMULAS)
    need_choice(settings, "memory", MEMORIES)
