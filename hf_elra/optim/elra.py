"""ELRA as a ``torch.optim.Optimizer``: knows torch and nothing of Hugging Face.

The class decides. What it does with the numbers is put together from pieces that live next door: a direction
(``directions.py``), a step-size rule (``step_size.py``), guards on the step and on the loss (``guards.py``), a memory
of the last step (``memory.py``), sums and updates of tensors (``tensors.py``). ``on_device.py`` and ``fused.py`` make
the same update on a GPU, without the host. ``reference.py`` is the same method in plain float64, equation by equation;
tests hold all of them against it at every step.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_elra.errors import ConfigurationError, nearest
from hf_elra.optim.directions import Direction, gradient_direction
from hf_elra.optim.guards import (
    RestartGuard,
    StepGuards,
    new_loss_statistics,
    new_setbacks,
    norm_to_crop_by,
    step_was_good,
    take_back,
    way_back,
)
from hf_elra.optim.loss_aware import LossAwareOptimizer, check_weight_decay, need_lr_bounds, need_number, shares
from hf_elra.optim.memory import MEMORIES
from hf_elra.optim.on_device import UpdatesOnDevice
from hf_elra.optim.step_size import STEP_RULES, LineMeasurement
from hf_elra.optim.tensors import dot, squares_and_products

_HOW = ("memory", "fused", "foreach", "capturable", "stochastic_rounding")
_LENGTHS = ("min_step_norm", "max_step_norm", "max_relative_step", "max_first_step")  # limits on a step
_NO_STEP = {"step_size": 0.0, "step_factor": 1.0, "step_decay": 0.0}  # a group's part in the step last taken
RESTART_FORMULAS = ("derived", "paper")


def elra_alpha(
    line: LineMeasurement,
    *,
    alpha: float,
    step_size: float,
    step_rule: str,
    noise_correction: float,
    guards: StepGuards,
    direction_norm: float,
    weight_norm: float,
    at_least: float = 0.0,
) -> float:
    """Return α_t from α_{t-1}, the step that was taken and the two gradients at its ends (ELRA, eq. 4).

    Args:
        line: the scalar products at both ends of the last step.
        alpha: α_{t-1}.
        step_size: the step really taken, α_{t-1} times the scheduler's factor.
        step_rule: key of ``STEP_RULES``.
        noise_correction: 0.15 in κ = 1 + 0.15/(1 + α²).
        guards: bounds on the result.
        direction_norm: norm of the direction about to be followed.
        weight_norm: norm of the parameters, for the relative crop.
        at_least: what α goes back to after trouble, whatever the rule says; still bounded by the guards.
    """
    if line.previous_slope > 0:
        correction = 1 + noise_correction / (1 + step_size * step_size)
        proposal = alpha * STEP_RULES[step_rule](line) * correction  # not of step_size: noise makes the ratio near 1
    else:  # the last gradient was zero: it says nothing
        proposal = alpha
    return guards.apply(max(proposal, at_least), alpha, direction_norm, weight_norm)


class ELRA(UpdatesOnDevice, LossAwareOptimizer):
    r"""Exponential Learning Rate Adaption: momentum-free descent whose one learning rate α finds itself.

    x_{t+1} = x_t - α_t·G_t, where α_t comes from the scalar products of neighbouring gradients over *all* parameters of
    *all* groups. That estimate is the long Barzilai-Borwein step times a noise correction κ. If a loss turns out too
    high, the step that led there is taken back and tried again shorter (soft restart). α itself is reduced only if that
    does not help, or if the next full step fails too, and it goes back when the trouble ends; a level of losses that
    stays high whatever the step is accepted, and a batch without information (a loss that is not finite, with
    gradients of zero) is skipped.

    ELRA has to know the loss. Give it as ``step(closure)``, as ``step(loss=value)`` or as ``observe_loss(value)``
    before ``step()``. Without any it steps all the same, with no restarts, and warns once.

    Args:
        params (iterable of Tensor, or of dict): parameters, or groups of them. A group may set its own ``lr`` (its
            share relative to the ``lr`` below) and its own ``weight_decay``; everything else is one per optimizer.
        lr (float): α_0, the first learning rate; it is adapted exponentially fast. Default: 1e-3.
        step_rule (str): ``"bb1"`` (eq. 4) for training, ``"bb2"`` for deterministic problems, and only with one rate in
            all groups. Default: ``"bb1"``.
        noise_correction (float): 0.15 in κ = 1 + 0.15/(1 + α²). 0 for deterministic problems: then a high loss is
            never that of its batch, and a step that is taken back reduces α at once. Default: 0.15.
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
        soft_restart (bool): take steps back that led to a too high loss. What is not finite always restarts.
            Default: True.
        restart_sigma (float): a loss above mean + ``restart_sigma``·σ is too high. Default: 5.
        initial_restart_ratio (float or None): while no mean is known, a loss above f_0 + (ratio - 1)·|f_0| is. None
            drops this rule, for a pre-trained start. Default: 1.1.
        restart_window (int or None): mean and σ over the last so many losses; None: over the last cycle, as declared
            by :meth:`end_cycle`. Default: None.
        restart_formula (str): ``"derived"`` or ``"paper"``: section 3.2's formula with or without the square that its
            print lost. Default: ``"derived"``.
        memory (str): what is kept of the last step, one number per parameter: ``"gradient"`` keeps the old gradient
            tensor itself, ``"point"`` the last point (exact retraces in any type), ``"offload"`` the gradient in host
            memory. See ``memory.py``. Default: ``"gradient"``.
        fused (bool, optional): True to make updates in Triton kernels, with nothing that waits for the host; None to do
            so where it can be done: on one CUDA device, with ``memory="gradient"``. The first update, and one in which
            other parameters have a gradient than before, is made without them. Default: None.
        foreach (bool, optional): where kernels are not used, False for one tensor at a time. Default: None, all
            together.
        capturable (bool): gradients are copied instead of kept, so that :meth:`step` can be captured in a CUDA graph,
            which needs kernels, and at least two updates before. A graph keeps the settings of all groups, the ``lr``
            of a scheduler among them, as they were at its capture. For gradients that lie in the static memory of
            somebody else's graph too. Default: False.
        stochastic_rounding (bool): round bfloat16 parameters up or down at random, right on average, so that steps
            below their precision are not lost. The same on every process and in a resumed run. Default: False.

    Raises:
        ConfigurationError: an argument cannot be used; the message names it, its value and the remedy.
        RuntimeError: from :meth:`step`, when a gradient is sparse, or when loss or gradient stay non-finite however
            short the steps are (with kernels: from :attr:`metrics`, as nothing is known before it is read).

    The learning rate in force is :attr:`alpha` and every group's ``"alpha"``. A scheduler that writes ``group["lr"]``
    acts as a factor: the step taken is α·lr/initial_lr. The rule sees that step, and where noise does not dominate it
    makes up for the factor. A factor of 0 freezes the parameters and leaves α alone.

    Several processes that keep the same parameters (DDP) must decide alike, and every one of them sees a loss of its
    own. Set the attribute :attr:`process_group` (the Trainer does): losses and scalar products are then averaged over
    it, in small all-reduces, so that processes take the same step also on different hardware, and where one of them
    reads a gradient that is not finite. Of DTensors (FSDP2, tensor parallelism) the sums are taken over all shards in
    any case.

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

    direction: Direction = staticmethod(gradient_direction)

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
        settings = {name: value for name, value in locals().items() if name not in ("self", "params", "__class__")}
        _check_settings(settings)
        if step_rule == "bb2" and self.direction is not gradient_direction:
            raise ConfigurationError("step_rule='bb2' is only for steps along the gradient; use step_rule='bb1'.")
        settings["lr_bounds"] = tuple(float(bound) for bound in lr_bounds)
        # ``base_lr`` remembers α_0 beside ``lr``, which schedulers rewrite.
        super().__init__(params, {**settings, "base_lr": lr, "alpha": lr, **_NO_STEP})
        self.param_groups[0]["scalars"] = {
            "alpha": float(lr),
            "step_size": 0.0,
            "previous_slope": None,
            "previous_loss": None,
            "gradient_norm": None,
            "direction_norm": None,
            "step_norm": 0.0,
            "cosine": None,
            "weight_square": None,
            "moved": False,
            "updates": 0,
            **new_setbacks(),
            "loss_statistics": new_loss_statistics(restart_window),
        }

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

    # ---- checkpoints ----

    def state_dict(self) -> dict[str, Any]:
        """As in torch; checkpoints do not depend on whether kernels are used."""
        self._numbers()
        self._memory.finish()
        return super().state_dict()

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles hold."""
        self._numbers()
        self._memory.finish()
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a pickled or saved state; what an older one lacks gets its default."""
        super().__setstate__(state)
        if self._kernels is not None:
            self._kernels.in_force = False
        for group in self.param_groups:
            for name, value in self.defaults.items():
                if name != "differentiable":  # torch puts that into the defaults here
                    group.setdefault(name, value)
        control = self.param_groups[0]["scalars"]
        control.setdefault("moved", True)
        control["loss_statistics"]["last_cycle"] = control["loss_statistics"]["last_cycle"] or [None, None]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but ``memory``, ``fused``, ``foreach``, ``capturable`` and ``stochastic_rounding`` stay.

        Where the saved memory layout keeps something else, the last step is forgotten.
        """
        own = {name: self.param_groups[0][name] for name in _HOW}
        key = self._memory.key
        super().load_state_dict(state_dict)
        self._made_memory = None
        for group in self.param_groups:
            group.update(own)
        if any(key not in state for state in self.state.values() if state):
            self.state.clear()
            self._numbers_to_change()["previous_slope"] = None
        self._renew_numbers_on_device()

    # ---- what a training loop calls ----

    def end_cycle(self) -> None:
        """As of every loss-aware optimizer; a captured CUDA graph sees it too."""
        super().end_cycle()
        self._renew_numbers_on_device()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; with ``set_to_none=False`` what is kept of the gradients is copied first."""
        if not set_to_none:
            for group in self.param_groups:
                self._memory.release_gradients(self._part(group, group["params"]))
        super().zero_grad(set_to_none)

    def _take_step(self, loss: Tensor | float | None, factors: list[float]) -> None:
        """Update; with kernels a restart leaves the direction of the step that is tried again in ``p.grad``."""
        if self.param_groups[0]["step_rule"] == "bb2" and max(factors) > min(factors):
            raise ConfigurationError(
                f"step_rule='bb2' cannot be used with several rates at once, but groups have {max(factors):g} and "
                f"{min(factors):g} times that of the optimizer: it takes ‖G‖² for the slope. Give all groups the same "
                "lr, also by a scheduler, or use step_rule='bb1'."
            )
        params, gradients = self._gather()
        self._forget_what_was_overwritten()
        self._look_for_rounding(params, gradients)
        if not (self._takes_kernels(params, gradients) and self._update_with_kernels(params, gradients, factors, loss)):
            self._update(params, gradients, factors, None if loss is None else float(loss))

    # ---- the update, decided on the host ----

    def _update(
        self, params: list[list[Tensor]], gradients: list[list[Tensor]], factors: list[float], loss: float | None
    ) -> None:
        control, settings = self._numbers_to_change(), self._settings()
        control["updates"] += 1
        scale = max(factors)
        weights = shares(factors)
        directions = [self.direction(group) for group in gradients]
        # Products along the new direction (weighted as it will be stepped) and along the last one. Where the direction
        # is the gradient itself, one product serves for all three.
        gradient_norm_squared = slope = norm_squared = current_slope = weight_square = 0.0
        crops = settings["max_relative_step"] is not None or not control["moved"]
        for weight, group, group_params, gradient, direction in zip(
            weights, self.param_groups, params, gradients, directions, strict=True
        ):
            square, product = self._memory.products(self._part(group, group_params), gradient)
            if control["step_size"] > 0:
                current_slope += group["step_size"] / control["step_size"] * product
            same = direction is gradient
            gradient_norm_squared += square
            slope += weight * (square if same else dot(gradient, direction))
            norm_squared += weight * weight * (square if same else dot(direction, direction))
            if crops:
                weight_square += squares_and_products(group_params, [None] * len(group_params))[0]
        told = [] if loss is None else [loss]
        gradient_norm_squared, slope, norm_squared, current_slope, weight_square, *told = self._agreed(
            gradient_norm_squared, slope, norm_squared, current_slope, weight_square, *told
        )
        loss = told[0] if told else None
        control["gradient_norm"] = math.sqrt(gradient_norm_squared) if gradient_norm_squared >= 0 else math.nan
        control["weight_square"] = weight_square

        if self._skips(loss, gradient_norm_squared):
            return
        guard = RestartGuard(
            settings["restart_sigma"],
            settings["initial_restart_ratio"],
            settings["restart_window"],
            settings["restart_formula"],
            noisy=settings["noise_correction"] > 0,
        )
        shorter = self._judge(guard, loss, gradient_norm_squared, control["previous_slope"])
        if shorter is not None:
            self._restart(shorter, factors, noisy=guard.noisy)
            return
        can_retrace = control["previous_slope"] is not None
        was_full = step_was_good(control, known=can_retrace, lowest=settings["lr_bounds"][0], noisy=guard.noisy)

        direction_norm = math.sqrt(norm_squared)
        weight_norm = norm_to_crop_by(weight_square, sum(p.numel() for group in params for p in group))
        guards = StepGuards(
            settings["max_growth"],
            settings["lr_bounds"],
            settings["min_step_norm"],
            settings["max_step_norm"],
            settings["max_relative_step"],
        )
        if can_retrace:
            line = LineMeasurement(control["previous_slope"], current_slope, gradient_norm_squared)
            product = math.sqrt(gradient_norm_squared) * control["direction_norm"]
            control["cosine"] = current_slope / product if product > 0 else 0.0
        if can_retrace and was_full:
            alpha = elra_alpha(
                line,
                alpha=control["alpha"],
                step_size=control["step_size"],
                step_rule=settings["step_rule"],
                noise_correction=settings["noise_correction"],
                guards=guards,
                direction_norm=direction_norm,
                weight_norm=weight_norm,
                at_least=way_back(control, control["previous_slope"], current_slope),
            )
        else:  # a retry is too short for the rule: α stays
            alpha = guards.apply(control["alpha"], control["alpha"], direction_norm, weight_norm)
            is_first = not can_retrace and not control["moved"]
            if is_first and settings["max_first_step"] is not None and direction_norm > 0 and weight_square > 0:
                longest = max(settings["max_first_step"] * math.sqrt(weight_square), settings["min_step_norm"])
                alpha = min(alpha, longest / direction_norm)
        self._set_alpha(alpha)
        self._descend(params, directions, factors)
        control["step_size"] = alpha * scale
        control["step_norm"] = alpha * scale * direction_norm
        control["moved"] = control["moved"] or control["step_norm"] > 0
        control["previous_loss"] = loss
        # A frozen update goes nowhere: there is nothing to take back and nothing to learn from it.
        control["previous_slope"] = slope if scale > 0 else None
        control["direction_norm"] = direction_norm

    def _look_for_rounding(self, params: list[list[Tensor]], gradients: list[list[Tensor]]) -> None:
        """Now and then look, with the last step's size, whether bfloat16 parameters move; this waits for a device."""
        looks = self._looks_for_rounding and not self.param_groups[0]["capturable"]
        if looks and any(p.dtype == torch.bfloat16 for group in params for p in group):
            self._numbers()
            for group, group_params, group_gradients in zip(self.param_groups, params, gradients, strict=True):
                self._warn_of_rounding(group_params, group_gradients, group["step_size"])

    def _settings(self) -> dict[str, Any]:
        """The settings of this update.

        Unlike a scheduler's factor, gradient decay is part of the direction: limits on the length of a step are limits
        on the step that it has shortened already.
        """
        settings = self.param_groups[0]
        limits = {name: settings[name] for name in _LENGTHS if settings[name] is not None}
        return {**settings, **{name: value / self.gradient_decay for name, value in limits.items()}}

    def _forget_what_was_overwritten(self) -> None:
        """Where a kept gradient was changed by somebody else, the last step is unknown."""
        if any(self._memory.overwritten(self._part(group, group["params"])) for group in self.param_groups):
            self.state.clear()
            self._numbers_to_change()["previous_slope"] = None

    def _descend(self, params: list[list[Tensor]], directions: list[list[Tensor]], factors: list[float]) -> None:
        """x ← (1 - d)·x - α·factor·u, and remember u."""
        for group, group_params, group_directions, factor in zip(
            self.param_groups, params, directions, factors, strict=True
        ):
            used = set(group_params)
            for p in group["params"]:
                if p not in used:  # it does not move, so there is nothing of it to take back
                    self.state.pop(p, None)
            group["step_size"], group["step_factor"] = self.alpha * factor, factor
            group["step_decay"] = group["weight_decay"] if factor != 0 else 0.0
            self._memory.advance(self._part(group, group_params, to_write=True), group_directions)

    def _restart(self, factor: float, factors: list[float], *, noisy: bool) -> None:
        """Go back to x_{t-1} and step again along the old direction, ``factor`` times as long.

        The floor under the step norm does not apply here: it would undo the restart.
        """
        control = self._numbers_to_change()
        take_back(control, factor, lowest=self.param_groups[0]["lr_bounds"][0], noisy=noisy)
        self._set_alpha(control["alpha"])
        if control["previous_slope"] is None:  # no step behind us
            return
        step_size = control["alpha"] * control["length"]
        for group, group_factor in zip(self.param_groups, factors, strict=True):
            self._memory.retrace(self._part(group, group["params"]), step_size * group_factor)
            group["step_size"], group["step_factor"] = step_size * group_factor, group_factor
        control["step_size"] = step_size * max(factors)
        control["step_norm"] = control["step_size"] * control["direction_norm"]
        if control["step_size"] == 0:  # back where the last step began, and nothing moves
            control["previous_slope"] = None


def _check_settings(settings: dict[str, Any]) -> None:
    """Raise a ConfigurationError for the first setting that is of the wrong type, out of range or contradictory."""
    need = partial(need_number, settings)
    need("lr", lambda v: v > 0, "a number > 0, the first learning rate (try 1e-3)")
    check_weight_decay(settings, scaled=False)
    need("noise_correction", lambda v: v >= 0, "a number >= 0 (0.15 in the paper, 0 for noise-free problems)")
    need("max_growth", lambda v: v > 1, "a number > 1, the largest growth of the learning rate per update (try 10)")
    need("min_step_norm", lambda v: v >= 0, "a number >= 0 (0.1 for language models, 0 for none)")
    need("restart_sigma", lambda v: v > 0, "a number > 0, in standard deviations (5 in the paper)")
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
    if settings["initial_restart_ratio"] is not None:
        need("initial_restart_ratio", lambda v: v > 1, "a number > 1 (1.1 in the paper), or None to drop the rule")
    window = settings["restart_window"]
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 2):
        raise ConfigurationError(f"restart_window={window!r} must be a whole number >= 2, or None for whole cycles.")
    need_lr_bounds(settings, "(1e-8, 1e6)")
    for name, more in (
        ("soft_restart", ()),
        ("stochastic_rounding", ()),
        ("capturable", ()),
        ("foreach", (None,)),
        ("fused", (None,)),
    ):
        if not isinstance(settings[name], bool) and settings[name] not in more:
            alternative = " (or None, to choose)" if more else ""
            raise ConfigurationError(f"{name}={settings[name]!r} must be True or False{alternative}.")
    for name, valid in (
        ("step_rule", tuple(STEP_RULES)),
        ("restart_formula", RESTART_FORMULAS),
        ("memory", tuple(MEMORIES)),
    ):
        value = settings[name]
        if value not in valid:
            raise ConfigurationError(
                f"{name}={value!r} must be one of {', '.join(map(repr, valid))}.{nearest(str(value), valid)}"
            )
