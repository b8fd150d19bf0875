"""What the optimizers of this package have in common.

They are told the loss, as ``step(closure)``, ``step(loss=value)`` or ``observe_loss(value)``; there is one learning
rate α for all groups; restarts are counted; what they did can be read; several processes decide alike. What is made of
gradients and losses is settled in the classes (``elra.py``, ``spectral.py``).
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from hf_elra.errors import ConfigurationError, warn_user
from hf_elra.optim.guards import MOST_NON_FINITE, SHORTEST_RETRY, RestartGuard
from hf_elra.optim.tensors import accumulates_in, lost_in_rounding, mean_over_processes

COUNTED = ("restarts", "non_finite", "skipped", "accepted_levels", "consecutive_restarts")
PER_GROUP = ("lr", "weight_decay")
"""What a parameter group may set for itself."""
FIRST_LOOK, UPDATES_BETWEEN_LOOKS = 20, 100
"""When it is looked whether steps are lost in rounding: once α has found itself, and as it falls."""


class LossAwareOptimizer(torch.optim.Optimizer):
    """An optimizer that has to know the loss of every update, and says what it did with it.

    Subclasses implement :meth:`_take_step`, and keep their numbers in ``param_groups[0]["scalars"]``.
    """

    takes_shards = True
    """Whether parameters may be sharded (DTensor)."""
    scales_weight_decay = False
    """Whether weight decay is multiplied by α; if not, it is the same share of the weights in every update."""
    process_group: dist.ProcessGroup | None = None
    """Processes whose losses and scalar products are averaged; not part of the state."""
    gradient_decay: float = 1.0
    """m_0/m of the next update (ELRA, section 3.4), by which its step is shorter; to be set before every update, no
    part of the state. Gradients themselves stay as they are, since slopes are measured with them."""
    _observed_loss: Tensor | float | None = None
    _warned_no_loss = False
    _warned_of_processes = False
    _warned_of_rounding = False
    _steps = 0  # of this object

    # ---- what a user reads ----

    @property
    def alpha(self) -> float:
        """The learning rate in force, α_t. Where updates are made on the device, reading it or one of the next two
        waits for it."""
        return float(self._numbers()["alpha"])

    @property
    def restarts(self) -> int:
        """How many steps were taken back so far, for a too high loss or for anything not finite."""
        return int(self._numbers()["restarts"])

    @property
    def metrics(self) -> dict[str, float]:
        """Numbers of the last update: ``alpha``, ``step_norm`` (‖x_{t+1} - x_t‖ without weight decay), ``grad_norm``
        and, once two gradients are known, ``cosine`` (between G_t and the last direction). Counted so far are
        ``restarts`` (steps taken back, for whatever reason), ``non_finite`` (those for a loss or gradient that was not
        finite), ``skipped`` (batches without information) and ``accepted_levels`` (of losses that stayed high);
        ``consecutive_restarts`` came just before."""
        control = self._numbers()
        self._check_tries(control)
        metrics = {name: control[name] for name in ("alpha", "step_norm", *COUNTED)}
        for name, key in (("grad_norm", "gradient_norm"), ("cosine", "cosine")):
            if control[key] is not None:
                metrics[name] = control[key]
        return metrics

    @property
    def search_updates_left(self) -> int:
        """How many of the updates to come are taken back at their end, as those of a search for α are."""
        return 0

    @property
    def search_finished(self) -> bool:
        """Whether the points of training are there to stay."""
        return self.search_updates_left == 0

    # ---- what a training loop calls ----

    def observe_loss(self, loss: Tensor | float) -> None:
        """Tell the loss of the batch that gave the gradients, for the :meth:`step` that follows.

        Args:
            loss (Tensor with one element, or float): the mean over the batch; over all micro-batches where gradients
                are accumulated. On several processes that of this process's part, with :attr:`process_group` set.
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

    def end_cycle(self) -> None:
        """Declare an epoch or control cycle over: its losses' mean and σ judge the losses of the next one."""
        RestartGuard.end_cycle(self._numbers_to_change()["loss_statistics"])

    @torch.compiler.disable  # in a compiled training step this is left as it is: every size of tensor would be compiled
    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], Tensor | float] | None = None, *, loss: Tensor | float | None = None
    ) -> Tensor | float | None:
        """Make one update.

        Args:
            closure (callable, optional): computes loss and gradients and returns the loss; called once.
            loss (Tensor or float, optional): the loss, if gradients are there already. Not together with ``closure``.

        Returns:
            What the closure returned, else ``loss``.
        """
        if closure is not None and not callable(closure):
            raise ConfigurationError(f"closure={closure!r} cannot be called; tell a loss as step(loss=loss).")
        if closure is not None and loss is not None:
            raise ConfigurationError("step() got both closure and loss; give one of them.")
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if loss is not None:
            self.observe_loss(loss)
        observed, self._observed_loss = self._observed_loss, None
        factors = [float(group["lr"]) / group["base_lr"] * self.gradient_decay for group in self.param_groups]
        if observed is None and not self._warned_no_loss and max(factors) > 0:
            self._warned_no_loss = True
            warn_user(
                f"{type(self).__name__} was not told the loss, so it cannot take back a step that went too far. Call "
                "step(closure), step(loss=loss) or observe_loss(loss) before step() (where Accelerate has wrapped it, "
                "observe_loss of what was wrapped). In a Hugging Face Trainer import hf_elra first, and name the "
                "optimizer by optim=... or pass it as optimizers=(optimizer, None); what an overridden "
                "create_optimizer makes is seen too late."
            )
        if observed is not None and self.process_group is None and not self._warned_of_processes and _are_several():
            self._warned_of_processes = True
            warn_user(
                f"{type(self).__name__} decides by the loss of this process alone, so that the weights of several "
                "processes come to differ. Set optimizer.process_group = torch.distributed.group.WORLD, or to the "
                "group that trains together."
            )
        self._steps += 1
        self._take_step(observed, factors)
        return loss

    def _take_step(self, loss: Tensor | float | None, factors: list[float]) -> None:
        """Update the parameters; ``factors`` are what schedulers and gradient decay multiply α by, group by group."""
        raise NotImplementedError

    # ---- what the classes are made of ----

    def _numbers(self) -> dict[str, Any]:
        """What the optimizer knows besides tensors."""
        control: dict[str, Any] = self.param_groups[0]["scalars"]
        return control

    @property
    def _scalars(self) -> dict[str, Any]:
        """The same; who changes anything of it says so beforehand, by :meth:`_numbers_to_change`."""
        return self._numbers()

    def _numbers_to_change(self) -> dict[str, Any]:
        """The same, about to be changed."""
        return self._numbers()

    def _set_alpha(self, alpha: float) -> None:
        self._numbers_to_change()["alpha"] = alpha
        for group in self.param_groups:
            group["alpha"] = alpha

    def _skips(self, loss: float | None, gradient_norm_squared: float) -> bool:
        """Whether a batch has no information, and is left out: as one without targets, its loss is not finite, but no
        gradient is anything but zero."""
        skips = loss is not None and not math.isfinite(loss) and gradient_norm_squared == 0
        if skips:
            self._numbers_to_change()["skipped"] += 1
        return skips

    def _judge(
        self, guard: RestartGuard, loss: float | None, gradient_norm_squared: float, previous_slope: float | None
    ) -> float | None:
        """Return how many times as long the last step is to be tried again; None where it stands.

        Args:
            guard: of the losses.
            loss: f_t.
            gradient_norm_squared: ‖G_t‖².
            previous_slope: of the last step where it began; None without a step that could be taken back.

        Raises:
            RuntimeError: shorter steps have not helped against a loss or gradients that are not finite.
        """
        control = self._numbers_to_change()
        memory, failures = control["loss_statistics"], control["consecutive_restarts"]
        if not math.isfinite(gradient_norm_squared) or not (loss is None or math.isfinite(loss)):
            control["non_finite"] += 1
            control["non_finite_in_a_row"] += 1
            self._check_tries(control)
            return SHORTEST_RETRY
        control["non_finite_in_a_row"] = 0
        if loss is None:
            return None
        if self.param_groups[0]["soft_restart"] and previous_slope is not None:
            step_size, previous_loss = control["step_size"], control["previous_loss"]
            decrease = step_size * previous_slope
            if guard.is_too_high(memory, loss, decrease=decrease, previous_loss=previous_loss):
                if not guard.is_a_new_level(memory, loss, retries=failures):
                    base = guard.base(memory, previous_loss)
                    if not guard.noisy:
                        guard.record(memory, min(loss, guard.limit(memory)[0]))
                    elif failures == 0 and not control["on_trial"]:
                        memory["suspect"] = loss
                    return guard.shrink(step_size, previous_slope, loss, base)
                guard.accept_level(memory)
                control["accepted_levels"] += 1
                control["consecutive_restarts"] = control["on_trial"] = failures = 0
                memory["suspect"] = None
        if failures == 0 and memory["suspect"] is not None:  # it was the batch
            guard.record(memory, memory["suspect"])
        if failures != 1 or control["on_trial"]:
            memory["suspect"] = None
        memory["row"] = [0, 0.0, 0.0]
        guard.record(memory, loss)
        return None

    def _check_tries(self, control: dict[str, Any]) -> None:
        if control["non_finite_in_a_row"] >= MOST_NON_FINITE:
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
        given = state_dict["param_groups"][0].get("scalars")
        if given is None or not given.keys() <= self._numbers().keys():  # fewer: those of an older version
            raise ConfigurationError(
                f"state_dict: it was not written by {type(self).__name__}. To go on with another optimizer, load the "
                "weights alone (from_pretrained) and begin a new run."
            )
        params = [p for group in self.param_groups for p in group["params"]]
        for number, p in zip((i for g in state_dict["param_groups"] for i in g["params"]), params, strict=False):
            for name, kept in state_dict["state"].get(number, {}).items():
                if isinstance(kept, Tensor) and kept.shape != p.shape:
                    raise ConfigurationError(
                        f"state_dict: {name} of parameter {number} has shape {tuple(kept.shape)}, but that parameter "
                        f"has {tuple(p.shape)}; it is the state of another model."
                    )
        new = self._numbers()
        super().load_state_dict(state_dict)
        for name, value in new.items():
            self.param_groups[0]["scalars"].setdefault(name, value)

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
        due = self._steps % UPDATES_BETWEEN_LOOKS == FIRST_LOOK and self.search_finished
        return due and not self._warned_of_rounding and not self.param_groups[0]["stochastic_rounding"]

    def _warn_of_rounding(self, params: Sequence[Tensor], directions: Sequence[Tensor], step_size: float) -> None:
        """Warn once, if it is time to look, where steps are too short for bfloat16 parameters to move.

        Args:
            params, directions: before a step.
            step_size: of this step.
        """
        lost = lost_in_rounding(params, directions, step_size) if self._looks_for_rounding else 0.0
        if lost > 0.5:
            self._warned_of_rounding = True
            warn_user(
                f"In a bfloat16 parameter {lost:.0%} of the numbers stay where they are, as a step of "
                f"{type(self).__name__} is less than half of their precision. Pass stochastic_rounding=True "
                "(--optim_args stochastic_rounding=true), or keep the weights in float32 (--bf16 computes in bfloat16 "
                "all the same)."
            )

    def _agreed(self, *values: float) -> Sequence[float]:
        """The same numbers, averaged over :attr:`process_group`."""
        if self.process_group is None:
            return values
        device = next((p.device for group in self.param_groups for p in group["params"]), "cpu")
        told = torch.tensor(values, dtype=accumulates_in(device), device=device)
        return cast(list[float], mean_over_processes(told, self.process_group).tolist())


def _are_several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def shares(factors: list[float]) -> list[float]:
    """Every group's part in a step, of the largest."""
    scale = max(factors)
    return [factor / scale if scale > 0 else 0.0 for factor in factors]


def need_number(settings: dict[str, Any], name: str, valid: Callable[[Any], bool], meaning: str) -> None:
    """Raise a ConfigurationError if a setting is no finite number or not ``valid``; ``meaning`` says what would be."""
    value = settings[name]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (is_number and math.isfinite(value) and valid(value)):
        raise ConfigurationError(f"{name}={value!r} must be {meaning}.")


def need_lr_bounds(settings: dict[str, Any], example: str) -> None:
    """Raise a ConfigurationError if ``lr_bounds`` are none, or ``lr`` is outside them."""
    bounds = settings["lr_bounds"]
    if not (
        isinstance(bounds, (tuple, list))
        and len(bounds) == 2
        and all(isinstance(b, (int, float)) and not isinstance(b, bool) and math.isfinite(b) for b in bounds)
        and 0 < bounds[0] < bounds[1]
    ):
        raise ConfigurationError(f"lr_bounds={bounds!r} must be two numbers with 0 < low < high, e.g. {example}.")
    if not bounds[0] <= settings["lr"] <= bounds[1]:
        raise ConfigurationError(f"lr={settings['lr']!r} is outside lr_bounds={tuple(bounds)!r}; move one of them.")


def check_weight_decay(settings: dict[str, Any], *, scaled: bool) -> None:
    """Raise a ConfigurationError if ``weight_decay``, which may be ``scaled`` by α, cannot be used."""
    if scaled:
        need_number(settings, "weight_decay", lambda v: v >= 0, "a number >= 0, which α multiplies (0.1 as of AdamW)")
        return
    meaning = "a number in [0, 1), e.g. 3e-4 for a factor of 0.9997 per update"
    need_number(settings, "weight_decay", lambda v: 0 <= v < 1, meaning)
