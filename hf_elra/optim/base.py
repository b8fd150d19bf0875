"""The one update, the same for every optimizer of this package: measure, judge, choose u, choose α, move.

An optimizer is told the loss, as ``step(closure)``, ``step(loss=value)`` or ``observe_loss(value)``. It has one
learning rate α for all groups, counts its restarts, says what it did, and decides alike on several processes. All of
that is here. What it is made of is named by its class (``elra.py``, ``spectral.py``, …): a direction
(``directions/``), a rule for α (``rules/``), guards (``guards.py``), a memory of the last step (``memory.py``). Sums
and updates of tensors are in ``tensors.py``, checks of arguments in ``arguments.py``.
"""

from __future__ import annotations

import copy
import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from hf_elra.errors import ConfigurationError, warn_user
from hf_elra.optim.arguments import check_common, check_weight_decay, need_number
from hf_elra.optim.directions import Direction
from hf_elra.optim.guards import (
    MOST_NON_FINITE,
    RestartGuard,
    StepGuards,
    judge,
    new_loss_statistics,
    new_setbacks,
    step_was_good,
    take_back,
    way_back,
)
from hf_elra.optim.memory import DirectionMemory, GradientMemory, Part
from hf_elra.optim.rules import Measurement, Rule
from hf_elra.optim.tensors import (
    accumulates_in,
    dot,
    local,
    lost_in_rounding,
    mean_over_processes,
    squares_and_products,
)

COUNTED = ("restarts", "non_finite", "skipped", "accepted_levels", "consecutive_restarts")
PER_GROUP = ("lr", "weight_decay")
"""What a parameter group may set for itself."""
OF_THE_LAST_STEP = {"step_size": 0.0, "step_factor": 1.0, "step_decay": 0.0}
"""What a group keeps of the last step: α times the factor of a scheduler, that factor, and the share of its weights
that it lost."""
DEFAULTS: dict[str, Any] = {
    "lr": 1e-3, "lr_bounds": (1e-9, 1.0), "weight_decay": 0.0, "stochastic_rounding": False,
    "soft_restart": True, "restart_sigma": 5.0, "initial_restart_ratio": 1.1, "restart_window": None,
}  # fmt: skip
"""Arguments of every optimizer, with their values for a class that has no values of its own."""
FIRST_LOOK, UPDATES_BETWEEN_LOOKS = 20, 100
"""The first update at which lost steps are looked for (α is found by then), and the updates between two looks."""


class Parts(NamedTuple):
    """What an update is made of.

    Attributes:
        direction: chooses u.
        rule: proposes α.
        step_guards: bound α and the length of the step.
        restart_guard: judges losses.
    """

    direction: Direction
    rule: Rule
    step_guards: StepGuards
    restart_guard: RestartGuard


class LastUpdate(NamedTuple):
    """What the last update has seen and done, for logs; no part of the state.

    Attributes:
        loss: f_t, before its step.
        tried: how far the step before went, α times the factor of a scheduler.
        ratio: ⟨G_t, u_{t-1}⟩/⟨G_{t-1}, u_{t-1}⟩: near 1 that step was much too short, below 0 it went past the minimum
            of its line. None without such a step.
        taken_back: whether that step was taken back.
        limit: what decided α in place of the rule: ``"floor"``, ``"ceiling"``, ``"crop"``, or None.
    """

    loss: float | None
    tried: float
    ratio: float | None
    taken_back: bool
    limit: str | None = None


class Told:
    """An attribute that a Trainer or a bare loop sets: a number above 0, or None where nobody knows.

    Args:
        example: what it might be, for the message of the ConfigurationError that another value raises.
    """

    def __init__(self, example: str) -> None:
        self.example = example

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type | None = None) -> int | None:
        return None if instance is None else instance.__dict__.get(self.name)

    def __set__(self, instance: Any, value: int | None) -> None:
        if value is not None:
            name = f"optimizer.{self.name}"
            need_number({name: value}, name, lambda v: v > 0, f"a number > 0, as {self.example}, or None")
        instance.__dict__[self.name] = value


class LossAwareOptimizer(torch.optim.Optimizer):
    """An optimizer that has to know the loss of every update.

    A subclass checks its own arguments, passes all of them on as ``settings``, and names its parts in :meth:`parts`.
    Numbers are kept in ``param_groups[0]["scalars"]``, tensors in the state of their parameter.

    Args:
        params (iterable of Tensor, or of dict): parameters, or groups of them.
        settings: all other arguments by name, ``lr`` among them.
    """

    scales_weight_decay = False
    """Whether weight decay is multiplied by α; if not, it is the same share of the weights in every update."""
    needs_line_loss = False
    """Whether the rule asks for losses along the step to come; see :meth:`step` and :attr:`line_loss`."""
    stays_with_object: tuple[str, ...] = ("stochastic_rounding",)
    """Settings that loading a state does not change."""
    _step_supports_amp_scaling = True
    """A ``torch.amp.GradScaler`` reads this: it leaves gradients to :meth:`step`, which divides them, and never skips
    it. An update whose loss is not finite has to be seen here, as the step before is to be taken back for it."""
    process_group: dist.ProcessGroup | None = None
    """Processes whose losses and scalar products are averaged; not part of the state."""
    gradient_decay: float = 1.0
    """m_0/m of the next update (ELRA, section 3.4), by which its step is shorter; to be set before every update, no
    part of the state. Gradients themselves stay as they are, since slopes are measured with them."""
    line_loss: Callable[..., float] | None = None
    """Returns the loss at x - s·u, told s and u (group by group, of the parameters that have a gradient); a Trainer
    sets it for optimizers with :attr:`needs_line_loss`. Where the rule asks for other batches than that of this update,
    it is told ``batches``, of how many of the next updates."""
    updates_per_epoch = Told("len(loader)")
    """For rules that count in epochs; a Trainer sets it, no part of the state."""
    total_updates = Told("epochs * len(loader)")
    """How many updates there will be, for bounds on a whole run; a Trainer sets it, no part of the state."""
    samples_per_update: int | None = None
    """For rules that count samples; a Trainer sets it, no part of the state."""
    last_update: LastUpdate | None = None
    """None before the first update, after a batch that was skipped, and where updates are made on the device (see
    :meth:`read_updates`)."""
    grad_scale: Tensor | None
    found_inf: Tensor | float
    """Both are there only while a GradScaler calls :meth:`step`."""
    _observed_loss: Tensor | float | None = None
    _warned_of: frozenset[str] = frozenset()
    _steps = 0  # of this object
    _made_memory: Any = None

    def __init__(self, params: Any, settings: dict[str, Any]) -> None:
        settings = {**DEFAULTS, **settings}
        check_common(settings, scales_weight_decay=self.scales_weight_decay)
        if isinstance(params, torch.nn.Module):
            what = type(params).__name__
            raise ConfigurationError(f"params must be parameters, not a {what}; pass model.parameters().")
        settings["lr_bounds"], lr = tuple(float(bound) for bound in settings["lr_bounds"]), settings["lr"]
        # ``base_lr`` remembers α_0 beside ``lr``, which schedulers rewrite.
        super().__init__(params, {**settings, "base_lr": lr, "alpha": lr, **OF_THE_LAST_STEP})
        scalars: dict[str, Any] = {
            "alpha": float(lr), "step_size": 0.0, "previous_slope": None, "previous_uncounted": 0.0,
            "previous_loss": None, "gradient_norm": None,
            "direction_norm": None, "step_norm": 0.0, "cosine": None, "weight_square": None, "moved": False,
            "updates": 0, **new_setbacks(), "loss_statistics": new_loss_statistics(settings["restart_window"]),
        }  # fmt: skip
        self.param_groups[0]["scalars"] = scalars
        parts = self.parts()
        if state := parts.rule.new_state():  # torch's distributed checkpoints lose an empty dict
            scalars["rule"] = state
        scalars["parts"] = f"{type(parts.direction).__name__}, {type(parts.rule).__name__}"

    def parts(self) -> Parts:
        """Name the parts of an update, as the settings in ``param_groups[0]`` want them; to be implemented."""
        raise NotImplementedError(f"{type(self).__name__} must say what its parts are")

    def settings(self) -> dict[str, Any]:
        """The settings of this update."""
        return self.param_groups[0]

    # ---- what a user reads ----

    @property
    def alpha(self) -> float:
        """The learning rate in force, α_t. If updates are made on the device, reading this or one of the next two
        attributes waits for it."""
        return float(self._numbers()["alpha"])

    @property
    def restarts(self) -> int:
        """How many steps were taken back so far, for a loss that was too high or for a number that was not finite."""
        return int(self._numbers()["restarts"])

    @property
    def metrics(self) -> dict[str, float]:
        """Numbers of the last update: ``alpha``, ``step_norm`` (‖x_{t+1} - x_t‖ without weight decay), ``grad_norm``
        and, once two gradients are known, ``cosine`` (between G_t and the last direction). Counts since the beginning
        are ``restarts`` (steps taken back for any reason), ``non_finite`` (those for a loss or gradient that was not
        finite), ``skipped`` (batches without information) and ``accepted_levels`` (of losses that stayed high).
        ``consecutive_restarts`` counts the latest updates."""
        scalars = self._numbers()
        self._check_tries(scalars)
        metrics = {name: scalars[name] for name in ("alpha", "step_norm", *COUNTED)}
        for name, key in (("grad_norm", "gradient_norm"), ("cosine", "cosine")):
            if scalars[key] is not None:
                metrics[name] = scalars[key]
        return metrics

    # ---- what a training loop calls ----

    unread_updates = 0
    """How many updates :meth:`read_updates` would tell of."""

    def read_updates(self) -> list[tuple[LastUpdate | None, float, int]]:
        """What updates on the device have seen and done since this was asked last, with α and the restarts after each.

        That waits for the device. For skipped batches it is None. Of ELRA's kernels, and of a CUDA graph, nothing is
        noted.
        """
        return []

    def observe_loss(self, loss: Tensor | float) -> None:
        """Pass the loss of the batch that gave the gradients, for the :meth:`step` that follows.

        Args:
            loss (Tensor with one element, or float): the mean over the batch, or over all micro-batches if gradients
                are accumulated. With several processes, that over the part of this one; set :attr:`process_group`.
        """
        if isinstance(loss, Tensor):
            if loss.numel() != 1:
                raise ConfigurationError(
                    f"loss must be one number but has shape {tuple(loss.shape)}; reduce it first, e.g. loss.mean()."
                )
            self._observed_loss = loss.detach()
        elif isinstance(loss, numbers.Real):
            self._observed_loss = float(loss)
        else:
            raise ConfigurationError(f"loss must be a tensor or a float, not {type(loss).__name__} {loss!r}.")

    @property
    def reading_waits(self) -> bool:
        """Whether whoever reads α, counts or metrics now waits for the device."""
        return False

    @property
    def asks_before_backward(self) -> bool:
        """Whether :meth:`takes_back` can be asked at no cost, as losses are looked at on the host anyway."""
        return bool(self.param_groups[0]["soft_restart"]) and self.process_group is None

    def takes_back(self, loss: float) -> bool:
        """Whether an update with this finite loss takes the last step back, whatever its gradients are.

        Nothing is changed. If so, gradients need not be computed: ``step(loss=loss)`` without any takes it back.
        """
        scalars, parts = self._numbers(), self._current_parts()
        slope = scalars["previous_slope"]
        if not math.isfinite(loss) or slope is None or not self.param_groups[0]["soft_restart"]:
            return False
        guard, before = parts.restart_guard, scalars["previous_loss"]
        decrease = scalars["step_size"] * slope
        if not guard.is_too_high(scalars["loss_statistics"], loss, decrease=decrease, previous_loss=before):
            return False
        retries = scalars["consecutive_restarts"]
        return not guard.is_a_new_level(copy.deepcopy(scalars["loss_statistics"]), loss, retries=retries)

    def end_cycle(self) -> None:
        """Declare an epoch or control cycle over: mean and σ of its losses judge the losses of the next one."""
        RestartGuard.end_cycle(self._numbers_to_change()["loss_statistics"])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; with ``set_to_none=False`` what is kept of the gradients is copied first."""
        if not set_to_none:
            for group in self.param_groups:
                self._memory.release_gradients(self._part(group, group["params"]))
        super().zero_grad(set_to_none)

    @torch.compiler.disable  # in a compiled training step this is left as it is: every size of tensor would be compiled
    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], Tensor | float] | None = None,
        *,
        loss: Tensor | float | None = None,
        evaluate: Callable[[], Tensor | float] | None = None,
    ) -> Tensor | float | None:
        """Make one update.

        Args:
            closure (callable, optional): computes loss and gradients and returns the loss; called once.
            loss (Tensor or float, optional): the loss, if gradients exist already. Not together with ``closure``.
            evaluate (callable, optional): returns the loss of this update's batch at the present parameters, without
                gradients; for optimizers that look along the line before they step (:attr:`needs_line_loss`).

        A ``torch.amp.GradScaler`` calls it as ``scaler.step(optimizer, loss=loss)``, with the loss as it was before
        scaling. Gradients that are too large for its scale make no step, as with any optimizer, but may take one back.

        Returns:
            What the closure returned, else ``loss``.
        """
        if closure is not None and not callable(closure):
            raise ConfigurationError(f"closure={closure!r} cannot be called; tell a loss as step(loss=loss).")
        if closure is not None and loss is not None:
            raise ConfigurationError("step() got both closure and loss; give one of them.")
        if self.needs_line_loss and hasattr(self, "found_inf"):
            raise ConfigurationError(
                f"{type(self).__name__} cannot be used with a GradScaler: it compares losses at points close to one "
                "another, which in half precision differ by less than their rounding. Use torch.bfloat16 without one."
            )
        if closure is not None and hasattr(self, "found_inf"):
            raise ConfigurationError(
                f"closure={closure!r} cannot be used with a GradScaler, which looks at the gradients before it is "
                "called; make them first, and call scaler.step(optimizer, loss=loss)."
            )
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if loss is not None:
            self.observe_loss(loss)
        observed, self._observed_loss = self._observed_loss, None
        factors = [float(group["lr"]) / group["base_lr"] * self.gradient_decay for group in self.param_groups]
        if observed is None and max(factors) > 0:
            self._warn_once(
                "no loss",
                f"{type(self).__name__} was not told the loss, so it cannot take back a step that went too far. Call "
                "step(closure), step(loss=loss) or observe_loss(loss) before step() (where Accelerate has wrapped it, "
                "observe_loss of what was wrapped). In a Hugging Face Trainer import hf_elra first, and name the "
                "optimizer by optim=... or pass it as optimizers=(optimizer, None); what an overridden "
                "create_optimizer makes is seen too late.",
            )
        if observed is not None and self.process_group is None and _are_several():
            self._warn_once(
                "processes",
                f"{type(self).__name__} decides by the loss of this process alone, so that the weights of several "
                "processes come to differ. Set optimizer.process_group = torch.distributed.group.WORLD, or to the "
                "group that trains together.",
            )
        if self.needs_line_loss and evaluate is None and self.line_loss is None:
            raise ConfigurationError(
                f"{type(self).__name__} looks along the line before it steps, and needs to know how: call "
                "step(loss=loss, evaluate=function), where function() returns the loss of the same batch."
            )
        self._warn_of_misuse(observed)
        self._steps += 1
        if self._unscale():
            agreed = None if observed is None else self._agreed(float(observed))[0]
            if agreed is None or (math.isfinite(agreed) and not self.takes_back(agreed)):
                self.last_update = None
                return loss
            if math.isfinite(agreed):  # the loss alone takes the last step back
                self.zero_grad()
        self._update(observed, factors, evaluate)
        return loss

    def _warn_once(self, of: str, message: str) -> None:
        """Warn, unless this optimizer has warned of it."""
        if of not in self._warned_of:
            self._warned_of |= {of}
            warn_user(message)

    def _warn_of_misuse(self, observed: Tensor | float | None) -> None:
        """Warn once of a scheduler that makes steps longer, and of an update that nothing can come of."""
        raised = [g for g in self.param_groups if float(g["lr"]) > 1.0001 * float(g.get("initial_lr", math.inf))]
        if raised:
            factor = float(raised[0]["lr"]) / float(raised[0]["initial_lr"])
            self._warn_once(
                "factor",
                f"lr={float(raised[0]['lr']):g} is {factor:g} times what it was when its scheduler was made: for "
                f"{type(self).__name__} that is a factor on the rate that finds itself, and above 1 it makes steps too "
                "long. Leave out schedulers that go up, as OneCycleLR does; a warm-up there is already.",
            )
        has_any = any(p.grad is not None for group in self.param_groups for p in group["params"])
        can_do_without = observed is not None and self.asks_before_backward  # a loss alone may take the last step back
        if not has_any and not (can_do_without and self.takes_back(float(cast(float, observed)))):
            self._warn_once(
                "gradients",
                f"{type(self).__name__}: no parameter has a gradient, so that nothing moves. Call loss.backward() "
                "before step() and zero_grad() after it, with the model whose parameters are trained.",
            )

    def _unscale(self) -> bool:
        """Divide gradients by the scale of a GradScaler, if there is one.

        Returns:
            Whether the scale, which the GradScaler reduces then, was too large for them. With a scale below 1 it was
            not the scale that made them infinite.
        """
        if not hasattr(self, "found_inf"):
            return False
        scale: Tensor | None = self.grad_scale  # None where they are divided already, as for clipping
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if any(gradient.dtype == torch.float16 for gradient in gradients):
            raise ConfigurationError(
                "params: a float16 parameter cannot be trained with a GradScaler, as its gradient has no room for the "
                "scale; keep parameters in float32 and compute under torch.autocast."
            )
        if scale is not None and gradients:
            torch._foreach_mul_(gradients, 1 / float(scale))
        return float(self.found_inf) > 0 and (scale is None or float(scale) >= 1)

    # ---- the update ----

    def _update(
        self,
        loss: Tensor | float | None,
        factors: list[float],
        evaluate: Callable[[], Tensor | float] | None = None,
    ) -> None:
        """Measure, judge, choose u, choose α, move.

        Args:
            loss: f_t, of this process.
            factors: what schedulers and gradient decay multiply α by, group by group.
            evaluate: see :meth:`step`.
        """
        params, gradients = self._gather()
        self._forget_what_was_overwritten()
        self.last_update = None
        if self._update_on_device(params, gradients, factors, loss):
            return
        natural_rate = 0.0 if self._numbers()["moved"] else self._look_at_weights()
        parts = self._current_parts()
        measured = self._measure(parts, params, gradients, factors, None if loss is None else float(loss))
        measured.natural_rate = natural_rate
        if self._skips(measured):
            return
        retry = self._judge(parts, measured)
        slope, size = measured.previous_slope, measured.step_size
        ratio = measured.current_slope / slope if slope is not None and slope > 0 else None
        self.last_update = LastUpdate(measured.loss, size, ratio, retry is not None)
        if retry is not None:
            self._take_back(parts, retry, factors)
        elif (again := self._again(parts, measured)) is not None:
            self._step_again(parts, again, factors)
        else:
            directions = self._choose_direction(parts, measured, params, gradients, factors)
            if self.needs_line_loss:
                measured.line_loss = self._along(params, directions, shares(factors), evaluate)
            alpha = self._choose_alpha(parts, measured)
            self._move(parts, measured, params, directions, factors, alpha)

    def _look_at_weights(self) -> float:
        """Before the first step: the rate that suits the weights, for rules that ask for it."""
        return 0.0

    def _measure(
        self,
        parts: Parts,
        params: list[list[Tensor]],
        gradients: list[list[Tensor]],
        factors: list[float],
        loss: float | None,
    ) -> Measurement:
        """The loss, slopes at both ends of the last step, norms: agreed over processes."""
        scalars = self._numbers_to_change()
        scalars["updates"] += 1
        measured = Measurement(
            scalars["updates"],
            previous_slope=scalars["previous_slope"],
            previous_norm=scalars["direction_norm"] or 0.0,
            step_size=scalars["step_size"],
        )
        measured.was_full = max(group["step_factor"] for group in self.param_groups) >= 1
        norm_squared = uncounted = 0.0
        for weight, group, group_params, group_gradients in zip(
            shares(factors), self.param_groups, params, gradients, strict=True
        ):
            square, product = self._memory.products(self._part(group, group_params), group_gradients)
            measured.gradient_norm_squared += square
            if measured.step_size > 0:
                share = group["step_size"] / measured.step_size
                measured.current_slope += share * product
                for p, g in self._uncounted(group, group_params, group_gradients):
                    uncounted += share * self._memory.products(self._part(group, [p]), [g])[1]
            measured.slope += weight * square
            norm_squared += weight * weight * square
        if parts.step_guards.need_size(is_first=not scalars["moved"]):
            measured.size, measured.number = self._size(parts, params), self._number_sized(parts, params)
        losses = [] if loss is None else [loss]
        square, measured.current_slope, uncounted, measured.slope, norm_squared, measured.size, *losses = self._agreed(
            measured.gradient_norm_squared, measured.current_slope, uncounted, measured.slope, norm_squared,
            measured.size, *losses,
        )  # fmt: skip
        measured.current_slope_counted = measured.current_slope - uncounted
        if measured.previous_slope is not None:
            measured.previous_slope_counted = measured.previous_slope - scalars.get("previous_uncounted", 0.0)
        measured.gradient_norm_squared, measured.loss = square, losses[0] if losses else None
        measured.direction_norm = math.sqrt(norm_squared)
        scalars["gradient_norm"] = math.sqrt(square)
        scalars["weight_square"] = measured.size
        return measured

    def _skips(self, measured: Measurement) -> bool:
        """Whether a batch has no information, and is left out: as one without targets, its loss is not finite, but no
        gradient is anything but zero."""
        loss = measured.loss
        skips = loss is not None and not math.isfinite(loss) and measured.gradient_norm_squared == 0
        if skips:
            scalars = self._numbers_to_change()
            scalars["skipped"] += 1
            scalars["updates"] -= 1
        return skips

    def _judge(self, parts: Parts, measured: Measurement) -> float | None:
        """Return how many times as long the last step is to be tried again; None where it stands.

        Raises:
            RuntimeError: shorter steps have not helped against a loss or gradients that are not finite.
        """
        scalars = self._numbers_to_change()
        soft_restart = self.param_groups[0]["soft_restart"]
        retry = judge(scalars, parts.restart_guard, measured, soft_restart=soft_restart)
        self._check_tries(scalars)
        return retry

    def _choose_direction(
        self,
        parts: Parts,
        measured: Measurement,
        params: list[list[Tensor]],
        gradients: list[list[Tensor]],
        factors: list[float],
    ) -> list[list[Tensor]]:
        """Return u_t, group by group; its slope and norm, as the step will be made of it, are noted."""
        directions = parts.direction.apply(self.param_groups, params, gradients, self.state)
        if not parts.direction.is_gradient:
            slope = norm_squared = uncounted = 0.0
            for group, group_params, weight, group_directions, group_gradients in zip(
                self.param_groups, params, shares(factors), directions, gradients, strict=True
            ):
                square, product = squares_and_products(group_directions, group_gradients)
                slope += weight * product
                norm_squared += weight * weight * square
                out = self._uncounted(group, group_params, zip(group_directions, group_gradients, strict=True))
                uncounted += weight * sum(dot([u], [g]) for _, (u, g) in out)
            measured.slope, norm_squared, uncounted = self._agreed(slope, norm_squared, uncounted)
            self._numbers_to_change()["previous_uncounted"] = uncounted
            measured.direction_norm = math.sqrt(norm_squared)
        return directions

    def _choose_alpha(self, parts: Parts, measured: Measurement) -> float:
        """Return α_t: what the rule proposes, or where steps were taken back what they leave, within the guards."""
        scalars, rule, guard = self._numbers_to_change(), parts.rule, parts.restart_guard
        before, slope = scalars["alpha"], measured.previous_slope
        lowest = parts.step_guards.lr_bounds[0]
        rule.stands(measured)
        was_full = step_was_good(scalars, known=slope is not None, lowest=lowest, noisy=guard.noisy)
        alpha = proposal = scalars["alpha"]
        if alpha < before:
            rule.reduced()
        if slope is not None:
            product = scalars["gradient_norm"] * scalars["direction_norm"]
            scalars["cosine"] = measured.current_slope / product if product > 0 else 0.0
            measured.cosine = scalars["cosine"]
        if rule.looks_ahead:
            back = 0.0 if slope is None else way_back(scalars, slope, measured.current_slope)
            proposal = self._propose(parts, measured, max(alpha, back))
        elif slope is not None and was_full:  # a retry is too short for the rule: α stays
            proposal = self._propose(parts, measured, alpha)
            proposal = max(proposal, way_back(scalars, slope, measured.current_slope))
        is_first = slope is None and not scalars["moved"]
        if is_first:
            proposal = rule.begin(measured, proposal)
        norm, size, number = measured.direction_norm, measured.size, measured.number
        alpha, limit = parts.step_guards.apply(
            proposal, alpha, norm, size, number, is_first=is_first, began=rule.began, walked=rule.walked,
            update=measured.update,
        )  # fmt: skip
        if self.last_update is not None:
            self.last_update = self.last_update._replace(limit=limit)
        return alpha

    def _propose(self, parts: Parts, measured: Measurement, alpha: float) -> float:
        """Return the rule's α_t; a subclass may let it decide by more than the last step."""
        return parts.rule.propose(measured, alpha)

    def _move(
        self,
        parts: Parts,
        measured: Measurement,
        params: list[list[Tensor]],
        directions: list[list[Tensor]],
        factors: list[float],
        alpha: float,
    ) -> None:
        """x ← (1 - d)·x - α·factor·u, and remember u."""
        scalars, key = self._numbers_to_change(), self._memory.key
        self._set_alpha(alpha)
        for group, group_params, group_directions, factor in zip(
            self.param_groups, params, directions, factors, strict=True
        ):
            used = set(group_params)
            for p in group["params"]:
                if p not in used and p in self.state:  # it does not move, so there is nothing of it to take back
                    self.state[p].pop(key, None)
                    if not self.state[p]:
                        del self.state[p]
            self._warn_of_rounding(group_params, group_directions, alpha * factor)
            group["step_size"], group["step_factor"] = alpha * factor, factor
            group["step_decay"] = self._decay(group, alpha * factor) if factor != 0 else 0.0
            self._memory.advance(self._part(group, group_params, to_write=True), group_directions)
        scale = max(factors)
        scalars["step_size"] = alpha * scale
        scalars["step_norm"] = alpha * scale * measured.direction_norm
        scalars["moved"] = scalars["moved"] or scalars["step_norm"] > 0
        scalars["previous_loss"] = measured.loss
        # A frozen update goes nowhere: there is nothing to take back and nothing to learn from it.
        scalars["previous_slope"] = measured.slope if scale > 0 else None
        scalars["direction_norm"] = measured.direction_norm

    def _take_back(self, parts: Parts, retry: float, factors: list[float]) -> None:
        """Go back to x_{t-1} and step again along the old direction, ``retry`` times as long.

        The floor under the step norm does not apply here: it would undo the restart.
        """
        scalars = self._numbers_to_change()
        before = scalars["alpha"]
        take_back(scalars, retry, lowest=parts.step_guards.lr_bounds[0], noisy=parts.restart_guard.noisy)
        if scalars["alpha"] < before:
            parts.rule.reduced()
        self._set_alpha(scalars["alpha"])
        if scalars["previous_slope"] is not None:  # there is a step behind us
            self._retrace(scalars["alpha"] * scalars["length"], factors)

    def _again(self, parts: Parts, measured: Measurement) -> float | None:
        """Return α for the last step once more, as a rule wants it that searches along the line; else None."""
        scalars = self._numbers()
        if measured.previous_slope is None:
            return None
        return parts.rule.again(measured, scalars["alpha"] * scalars["length"])

    def _step_again(self, parts: Parts, alpha: float, factors: list[float]) -> None:
        """Go back to x_{t-1} and take the last step with another α, as a rule wants it that searches along the line."""
        scalars = self._numbers_to_change()
        number = self._number_sized(parts, [list(group["params"]) for group in self.param_groups])
        norm, square = scalars["direction_norm"], scalars["weight_square"]
        self._set_alpha(parts.step_guards.apply(alpha, alpha, norm, square, number)[0])
        scalars.update(length=1.0, consecutive_restarts=0)
        self._retrace(scalars["alpha"], factors)

    def _retrace(self, step_size: float, factors: list[float]) -> None:
        """Go back to x_{t-1}, and step from there along the old direction with another α, ``step_size``."""
        scalars = self._numbers_to_change()
        for group, factor in zip(self.param_groups, factors, strict=True):
            kept = 1.0
            if self.scales_weight_decay:
                decay = self._decay(group, step_size * factor)
                kept, group["step_decay"] = (1 - decay) / (1 - group["step_decay"]), decay
            self._memory.retrace(self._part(group, group["params"]), step_size * factor, kept)
            group["step_size"], group["step_factor"] = step_size * factor, factor
        scalars["step_size"] = step_size * max(factors)
        scalars["step_norm"] = scalars["step_size"] * scalars["direction_norm"]
        if scalars["step_size"] == 0:  # back where the last step began, and nothing moves
            scalars["previous_slope"] = None

    def _update_on_device(
        self,
        params: list[list[Tensor]],
        gradients: list[list[Tensor]],
        factors: list[float],
        loss: Tensor | float | None,
    ) -> bool:
        """Make the same update without the host, where a class can; False where it was not made."""
        return False

    def _along(
        self,
        params: list[list[Tensor]],
        directions: list[list[Tensor]],
        weights: list[float],
        evaluate: Callable[[], Tensor | float] | None,
    ) -> Callable[..., float]:
        """Return what tells the loss at x - s·u; parameters are afterwards what they were."""
        along = [
            group if weight == 1 else [weight * u for u in group]
            for group, weight in zip(directions, weights, strict=True)
        ]

        def loss_at(s: float, **which: int) -> float:
            if evaluate is None:
                return cast(Callable[..., float], self.line_loss)(s, along, **which)
            flat = [local(p) for group in params for p in group]
            kept = [p.detach().clone() for p in flat]
            try:
                torch._foreach_add_(flat, [local(u) for group in along for u in group], alpha=-s)
                return self._agreed(float(evaluate()))[0]
            finally:
                torch._foreach_copy_(flat, kept)

        return loss_at

    def _size(self, parts: Parts, params: list[list[Tensor]]) -> float:
        """Sum of the squares of the weights whose size limits a step."""
        lots = parts.direction.sized(self.param_groups, params)
        return sum((dot(lot, lot) for lot in lots), 0.0)

    def _number_sized(self, parts: Parts, params: list[list[Tensor]]) -> int:
        return sum(p.numel() for lot in parts.direction.sized(self.param_groups, params) for p in lot)

    # ---- what the update is made of ----

    def _uncounted(
        self, group: dict[str, Any], params: Sequence[Tensor], things: Iterable[Any]
    ) -> list[tuple[Any, Any]]:
        """Of some parameters of a group those whose slopes say nothing of the others' rate, each with its thing: what
        is new in a trained model, and tables that are whitened, whose steps go where their gradients are small."""
        out = {
            p
            for name in ("new", "whitened")
            for p, is_so in zip(group["params"], group.get(name, ()), strict=False)  # other optimizers have no flags
            if is_so
        }
        return [(p, thing) for p, thing in zip(params, things, strict=True) if p in out] if out else []

    def _current_parts(self) -> Parts:
        """The parts, with the rule's state."""
        parts = self.parts()
        parts.rule.state = self.param_groups[0]["scalars"].get("rule", {})
        return parts

    @property
    def _memory(self) -> DirectionMemory:
        """The memory of the last step; made when it is first needed, as neither copying nor unpickling an optimizer
        makes one."""
        if self._made_memory is None:  # of a gradient, whose tensor somebody else may write to, with care
            self._made_memory = GradientMemory() if self.parts().direction.is_gradient else DirectionMemory()
        return cast(DirectionMemory, self._made_memory)

    def _part(self, group: dict[str, Any], params: Sequence[Tensor], *, to_write: bool = False) -> Part:
        """Parameters of a group with their states; where these are only read, one that is not there is not made."""
        states = [self.state[p] if to_write else self.state.get(p, {}) for p in params]
        settings = self.param_groups[0]
        seed = settings["scalars"]["updates"] if settings["stochastic_rounding"] else None  # as on every process
        return Part(params, states, group, seed)

    def _decay(self, group: dict[str, Any], step_size: float) -> float:
        """The share of its parameters that a group loses in a step; where α scales it at most half, so that the way
        back stays open."""
        decay = float(group["weight_decay"])
        return min(step_size * decay, 0.5) if self.scales_weight_decay else decay

    def _forget_what_was_overwritten(self) -> None:
        """Where what is kept of the last step was changed by somebody else, that step is unknown."""
        if any(self._memory.overwritten(self._part(group, group["params"])) for group in self.param_groups):
            for state in self.state.values():
                state.pop(self._memory.key, None)
            self._numbers_to_change()["previous_slope"] = None

    def _numbers(self) -> dict[str, Any]:
        """What the optimizer knows besides tensors."""
        scalars: dict[str, Any] = self.param_groups[0]["scalars"]
        return scalars

    def _numbers_to_change(self) -> dict[str, Any]:
        """The same, about to be changed."""
        return self._numbers()

    def _set_alpha(self, alpha: float) -> None:
        self._numbers_to_change()["alpha"] = alpha
        for group in self.param_groups:
            group["alpha"] = alpha

    def _check_tries(self, scalars: dict[str, Any]) -> None:
        if scalars["non_finite_in_a_row"] >= MOST_NON_FINITE:
            raise RuntimeError(
                f"loss or gradient stayed non-finite over {MOST_NON_FINITE} updates in a row, each of which went back "
                "and tried a tenth of the step before: the cause is not the step. Look for NaN or inf in the data, in "
                "the loss or in the starting weights."
            )

    def _gather(self) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
        """Return, group by group, the parameters that have a gradient, and these gradients."""
        params, gradients = [], []
        for group in self.param_groups:
            used = [p for p in group["params"] if p.grad is not None]
            for p in used:
                if p.grad.is_sparse:
                    raise RuntimeError(
                        f"{type(self).__name__} does not support sparse gradients (parameter of shape "
                        f"{tuple(p.shape)}); build the embedding with sparse=False."
                    )
            params.append(used)
            gradients.append([p.grad for p in used])
        return params, gradients

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch.

        Raises:
            ConfigurationError: ``state_dict`` was written by another optimizer, or for parameters of other shapes.
        """
        groups = state_dict.get("param_groups") or [{}]
        given, ours = groups[0].get("scalars", {}).get("parts", "no part of ours"), self._numbers()["parts"]
        if given != ours:
            raise ConfigurationError(
                f"state_dict: it was not written by {type(self).__name__}, whose parts are {ours}, but by an optimizer "
                f"with {given}. "
                "To go on with another optimizer, load the weights alone (from_pretrained) and begin a new run."
            )
        params = [p for group in self.param_groups for p in group["params"]]
        for number, p in zip((i for g in state_dict["param_groups"] for i in g["params"]), params, strict=False):
            for name, kept in state_dict["state"].get(number, {}).items():
                if name != "step" and isinstance(kept, Tensor) and kept.shape != p.shape:
                    raise ConfigurationError(
                        f"state_dict: {name} of parameter {number} has shape {tuple(kept.shape)}, but that parameter "
                        f"has {tuple(p.shape)}; it is the state of another model."
                    )
        own = {name: self.param_groups[0][name] for name in self.stays_with_object}
        asked = self._settings_of_groups()
        super().load_state_dict(state_dict)
        self._made_memory = None
        for group in self.param_groups:
            group.update(own)
        loaded = self._settings_of_groups()
        replaced = [
            f"{name}={_one_or_all(values)} by {_one_or_all(loaded[name])}"
            for name, values in asked.items()
            if values != loaded[name]
        ]
        if replaced:
            warn_user(
                f"{type(self).__name__} goes on with the settings of the state that it loads, which replace "
                f"{', '.join(replaced)}. To change them, begin a new run from the weights, or set them in every one of "
                "optimizer.param_groups after loading."
            )

    def _settings_of_groups(self) -> dict[str, list[Any]]:
        """Arguments that a state brings along, by name: the values of all groups."""
        # ``lr`` is ``base_lr`` times what a scheduler says. That matters where it is trusted, and not found anew.
        left_out = {"lr", "alpha", *OF_THE_LAST_STEP, *self.stays_with_object}
        if self.defaults.get("warmup") != 0:
            left_out.add("base_lr")
        return {
            "lr" if name == "base_lr" else name: [
                tuple(v) if isinstance(v := group.get(name), list) else v for group in self.param_groups
            ]
            for name in self.defaults
            if name not in left_out
        }

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; besides ``params`` a group may set ``lr`` and ``weight_decay``."""
        name_of_class = type(self).__name__
        for name, value in self.defaults.items():
            given = param_group.get(name, value)
            if name not in PER_GROUP and given != value:
                raise ConfigurationError(
                    f"{name}={given!r} cannot be set for one group: {name_of_class} has one {name} per optimizer. "
                    f"Pass it to {name_of_class}(...) itself; a group may set lr and weight_decay."
                )
        if "lr" in param_group:
            need_number(param_group, "lr", lambda v: v >= 0, "a number >= 0, relative to that of the optimizer")
        if "weight_decay" in param_group:
            check_weight_decay(param_group, scaled=self.scales_weight_decay)
        given = param_group["params"]
        if not isinstance(given, (Tensor, set)):  # torch refuses sets
            param_group["params"] = given = list(given)
        for item in [given] if isinstance(given, Tensor) else given:
            parameter = item[1] if isinstance(item, tuple) else item
            if isinstance(parameter, Tensor):
                self._check_parameter(parameter)
        super().add_param_group(param_group)
        self.param_groups[-1]["alpha"] = self.param_groups[0]["alpha"]

    def _check_parameter(self, parameter: Tensor) -> None:
        """Raise a ConfigurationError for one that cannot be trained."""
        if parameter.is_complex():
            raise ConfigurationError(
                f"params: complex parameters are not supported (one of shape {tuple(parameter.shape)} is "
                f"{parameter.dtype}); optimise torch.view_as_real(parameter) instead."
            )

    @property
    def _looks_for_rounding(self) -> bool:
        """Whether it is time to look for steps that are lost in rounding."""
        due = self._steps % UPDATES_BETWEEN_LOOKS == FIRST_LOOK
        return due and "rounding" not in self._warned_of and not self.param_groups[0]["stochastic_rounding"]

    def _warn_of_rounding(self, params: Sequence[Tensor], directions: Sequence[Tensor], step_size: float) -> None:
        """Warn once, if it is time to look, where steps are too short for bfloat16 parameters to move.

        Args:
            params, directions: before a step.
            step_size: of this step.
        """
        if self._looks_for_rounding:
            self._warn_of_lost_steps(lost_in_rounding(params, directions, step_size))

    def _warn_of_lost_steps(self, lost: float) -> None:
        """Warn once, if more than half of the numbers of a bfloat16 parameter stayed where they were."""
        if lost > 0.5:
            self._warn_once(
                "rounding",
                f"In a bfloat16 parameter {lost:.0%} of the numbers stay where they are, as a step of "
                f"{type(self).__name__} is less than half of their precision. Pass stochastic_rounding=True "
                "(--optim_args stochastic_rounding=true), or keep the weights in float32 (--bf16 computes in bfloat16 "
                "all the same).",
            )

    def _agreed(self, *values: float) -> Sequence[float]:
        """The same numbers, averaged over :attr:`process_group`."""
        if self.process_group is None:
            return values
        device = next((p.device for group in self.param_groups for p in group["params"]), "cpu")
        sums = torch.tensor(values, dtype=accumulates_in(device), device=device)
        return cast(list[float], mean_over_processes(sums, self.process_group).tolist())


def _one_or_all(values: list[Any]) -> str:
    """Values of groups, as one where they are alike."""
    return repr(values[0]) if all(value == values[0] for value in values) else repr(values)


def _are_several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def shares(factors: list[float]) -> list[float]:
    """Every group's part in a step, of the largest."""
    scale = max(factors)
    return [factor / scale if scale > 0 else 0.0 for factor in factors]
