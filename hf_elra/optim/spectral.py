"""ELRASpectral: ELRA's way of learning a learning rate, over a direction that suits language models.

What is different from ``elra.py``: the direction (``directions.py``), with momentum; the rule for α
(``step_size.py``), with a search at the beginning whose updates are taken back; and the length of a step, which is
relative to the weights. Soft restarts are the same (``guards.py``). The mean of the points, which belongs to it, is in
``averaging.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_elra.errors import ConfigurationError, warn_user
from hf_elra.optim.directions import KINDS, freeze_inactive, restack, spectral_direction, unstack
from hf_elra.optim.guards import (
    RestartGuard,
    new_loss_statistics,
    new_setbacks,
    step_was_good,
    take_back,
    way_back,
)
from hf_elra.optim.loss_aware import LossAwareOptimizer, check_weight_decay, need_lr_bounds, need_number, shares
from hf_elra.optim.step_size import KestenGain
from hf_elra.optim.tensors import descend, dot, squares_and_products

SIGMA, GAIN = 0.2, 2.5
"""Constants of the rule for α, see :class:`~hf_elra.optim.step_size.KestenGain`."""
MOMENTUM_OF_THE_SEARCH = 0.9
"""Where there is none otherwise."""
LEAST_FOUND = 1e-3
"""A search ends with an α of at least this share of the matrices' root mean square."""
NOT_FOUND = 1e-2
"""Where a search has found nothing, α is this share of the matrices' root mean square."""
LONGEST_SEARCH = 2
"""A search that is not sure goes on, to at most so many times its updates."""


class ELRASpectral(LossAwareOptimizer):
    r"""A learning rate that finds itself, over polar factors of averaged gradients.

    x_{t+1} = x_t - α_t·u_t, where every tensor's u_t has a mean square of one, so that α is the root mean square of a
    step's elements: hidden matrices go along U·Vᵀ of their averaged gradient (as in Muon), rows of embeddings and
    vectors along their own. There is one α. During the first ``search`` updates it is found, from any ``lr``, by the
    slopes at both ends of every step; then the parameters go back to where they began, and only α is kept. From then on
    it follows the slopes ever more slowly. A step after which the loss is too high is taken back (ELRA's soft restart).

    The loss has to be told, as to :class:`~hf_elra.optim.ELRA`. Evaluate the mean of the points, weighted towards the
    last ones: with no schedule to bring α down, it stands in for one. In a Trainer that is on by default; in a bare
    loop :class:`~hf_elra.optim.averaging.WeightAverage` with ``power=8`` is that mean (add points once
    :attr:`search_finished`).

    Args:
        params (iterable of Tensor, or of dict): parameters, or groups of them. A group may set its own ``lr`` (its
            share relative to the ``lr`` below) and its own ``weight_decay``.
        lr (float): α_0, with which the search begins. Default: 1e-3.
        momentum (float): share of the averaged gradient that is kept at an update (Nesterov's form). 0 for none, which
            saves a state: gradients are then averaged only during the search and as many updates after it, and from
            then on α is constant. Noise has to be averaged by batches that grow then, as a Trainer makes them by
            itself. Default: 0.9.
        embeddings (iterable of Tensor): parameters whose rows are taken one by one: embeddings, and the output layer
            of a language model; see :func:`~hf_elra.optim.directions.embeddings_of`. Default: none.
        experts (iterable of Tensor): parameters that are several matrices in one, along their first dimension, as the
            experts of a mixture; see :func:`~hf_elra.optim.directions.experts_of`. Default: none.
        search (int): updates of the search, which are taken back; 0 for none, which trusts ``lr``. A search that is not
            sure goes on to at most twice as many updates: from a tenth of α where slopes are mostly noise, or until α
            has been both too small and too large. If slopes are noise to the end, α is a hundredth of the matrices'
            root mean square, and a warning says so, as it does where it ends at its floor, a thousandth. Default: 10.
        max_relative_step (float): α is at most this share of the root mean square of all matrices. Default: 0.5.
        lr_bounds (tuple of 2 floats): smallest and largest α. Default: (1e-9, 1).
        weight_decay (float): d in x ← (1 - α·d)·x, once per update, scaled by α and a scheduler's factor as in AdamW
            and Muon, whose usual values (0.1) fit. Default: 0.
        stochastic_rounding (bool): round bfloat16 parameters up or down at random, right on average, so that steps
            below their precision are not lost. The same on every process and in a resumed run. Default: False.
        soft_restart, restart_sigma, initial_restart_ratio: as of :class:`~hf_elra.optim.ELRA`.

    Raises:
        ConfigurationError: an argument cannot be used, or parameters are sharded (DTensor), whose polar factors are not
            those of their shards; the message names it, its value and the remedy.
        RuntimeError: from :meth:`step`, when a gradient is sparse, or when loss or gradient stay non-finite with α at
            its lower bound.

    State per parameter: the averaged gradient (with momentum), the last direction, and during the search the point
    where it began. Numbers are decided on the host, which waits for the device several times an update.

    Source: of this project; see docs/papers.md. ELRA (2024) for the restarts and for one learning rate from
    neighbouring gradients; K. Jordan et al., "Muon" (2024) for the direction.

    Example:
        >>> optimizer = ELRASpectral(model.parameters(), embeddings=embeddings_of(model))
        >>> for epoch in range(epochs):
        ...     for inputs, targets in batches:
        ...         loss = loss_function(model(inputs), targets)
        ...         loss.backward()
        ...         optimizer.step(loss=loss)
        ...         optimizer.zero_grad()
        ...     optimizer.end_cycle()
    """

    takes_shards = False
    scales_weight_decay = True
    _kinds: dict[str, dict[int, bool]] = {}  # noqa: RUF012 - of a copy, whose parameters are others

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        momentum: float = 0.9,
        embeddings: Iterable[Tensor] = (),
        experts: Iterable[Tensor] = (),
        search: int = 10,
        max_relative_step: float = 0.5,
        lr_bounds: tuple[float, float] = (1e-9, 1.0),
        weight_decay: float = 0.0,
        stochastic_rounding: bool = False,
        soft_restart: bool = True,
        restart_sigma: float = 5.0,
        initial_restart_ratio: float | None = 1.1,
    ) -> None:
        settings = {n: v for n, v in locals().items() if n not in (*KINDS, "self", "params", "__class__")}
        _check_settings(settings)
        self._kinds = {"embeddings": _identities("embeddings", embeddings), "experts": _identities("experts", experts)}
        super().__init__(params, {**settings, "base_lr": lr, "alpha": lr})
        self.param_groups[0]["scalars"] = {
            "alpha": float(lr), "step_size": 0.0, "slope": None, "previous_loss": None, "gradient_norm": None,
            "direction_norm": None, "step_norm": 0.0, "cosine": None, "updates": 0, **new_setbacks(),
            "rule": KestenGain.new_memory(searches=search > 0), "loss_statistics": new_loss_statistics(),
            "searched": None if search > 0 else 0,
        }  # fmt: skip
        for kind, identities in self._kinds.items():
            if any(identities.values()) and not any(any(group[kind]) for group in self.param_groups):
                warn_user(
                    f"{kind}: none of these {len(identities)} parameters is among params, so that none is taken for "
                    f"one; pass {kind}={kind}_of(model) of the model that is trained."
                )

    @property
    def search_updates_left(self) -> int:
        """How many updates of the search are still to come, at least."""
        control = self._scalars
        return 0 if control["searched"] is not None else max(1, self.param_groups[0]["search"] - control["updates"])

    # ---- the update ----

    def _take_step(self, loss: Tensor | float | None, factors: list[float]) -> None:
        searches = not self.search_finished
        if searches:  # a schedule that begins low would be made up for by an α that is too large afterwards
            factors = [float(g.get("initial_lr", g["lr"])) / g["base_lr"] for g in self.param_groups]
        self._scalars["updates"] += 1
        self._update(loss, factors)
        if searches:
            self._look_at_the_search()

    def _update(self, loss: Tensor | float | None, factors: list[float]) -> None:
        control = self._scalars
        params, gradients = self._gather()
        told = [] if loss is None else [float(loss)]
        square, current_slope, *told = self._agreed(*self._slopes(params, gradients), *told)
        value = told[0] if told else None
        control["gradient_norm"] = math.sqrt(square) if square >= 0 else math.nan
        if self._skips(value, square):
            control["updates"] -= 1
            return
        settings = self.param_groups[0]
        guard = RestartGuard(settings["restart_sigma"], settings["initial_restart_ratio"], None, "derived")
        shorter = self._judge(guard, value, square, control["slope"])
        if shorter is not None:
            self._restart(shorter)
            return
        if value is not None and control["searched"] is None:
            KestenGain(SIGMA, GAIN).take_loss(control["rule"], value, late=2 * control["updates"] > settings["search"])
        before, known = control["alpha"], control["slope"] is not None
        was_full = step_was_good(control, known=known, lowest=settings["lr_bounds"][0])
        alpha, momentum = control["alpha"], self._momentum()
        if alpha < before:
            KestenGain.restarted(control["rule"])
        if known and control["slope"] > 0:  # else the last gradient says nothing
            if was_full:  # a retry is too short for the rule
                if momentum > 0:
                    alpha *= KestenGain(SIGMA, GAIN).factor(control["rule"], current_slope / control["slope"])
                if self.search_finished:
                    alpha = max(alpha, way_back(control, control["slope"], current_slope))
            product = control["gradient_norm"] * control["direction_norm"]
            control["cosine"] = current_slope / product if product > 0 else 0.0
        self._set_alpha(self._bounded(alpha))
        self._descend(params, gradients, factors, value)

    def _slopes(self, params: list[list[Tensor]], gradients: list[list[Tensor]]) -> tuple[float, float]:
        """‖G_t‖² and ⟨G_t, u_{t-1}⟩, the latter as the step was made of it."""
        squares = slope = 0.0
        for group, group_params, group_gradients in zip(self.param_groups, params, gradients, strict=True):
            last = [self.state[p].get("direction") if p in self.state else None for p in group_params]
            square, product = squares_and_products(group_gradients, last)
            squares += square
            slope += group.get("share", 0.0) * product
        return squares, slope

    def _bounded(self, alpha: float) -> float:
        """α within its bounds and below its share of the matrices' size."""
        settings, size = self.param_groups[0], self._size()
        low, high = settings["lr_bounds"]
        if size > 0:
            high = min(high, settings["max_relative_step"] * size)
        return max(min(alpha, high), low)

    def _size(self) -> float:
        """Root mean square of all matrices; of all parameters without any."""
        weights = [p for group in self.param_groups for p in group["params"]]
        matrices = [
            p
            for group in self.param_groups
            for p, is_embedding in zip(group["params"], group["embeddings"], strict=True)
            if p.dim() > 1 and not is_embedding
        ]
        counted = [p for p in matrices or weights if p.numel() > 0]
        (square,) = self._agreed(dot(counted, counted))
        return math.sqrt(square / sum(p.numel() for p in counted)) if square > 0 else 0.0

    def _descend(
        self, params: list[list[Tensor]], gradients: list[list[Tensor]], factors: list[float], loss: float | None
    ) -> None:
        """x ← (1 - α·factor·d)·x - α·factor·u; remember u."""
        control = self._scalars
        slope = norm_squared = 0.0
        all_directions = self._directions(params, gradients)
        for group, group_params, group_gradients, directions, factor, share in zip(
            self.param_groups, params, gradients, all_directions, factors, shares(factors), strict=True
        ):
            used = set(group_params)
            for p in group["params"]:
                if p not in used:  # it does not move, so there is nothing of it to take back; its average stays
                    self.state.get(p, {}).pop("direction", None)
            if not group_params:
                continue
            square, product = squares_and_products(directions, group_gradients)
            slope += share * product
            norm_squared += share * share * square
            if control["searched"] is None:
                for p in group_params:
                    self.state[p].setdefault("start", p.detach().clone())
            step_size = self.alpha * factor
            self._warn_of_rounding(group_params, directions, step_size)
            descend(
                group_params, directions, step_size, _decay(group, step_size), foreach=None, rounding_seed=self._seed()
            )
            for p, u in zip(group_params, directions, strict=True):
                self.state[p]["direction"] = u
            group["share"], group["factor"] = share, factor
        scale = max(factors)
        slope, norm_squared = self._agreed(slope, norm_squared)
        control["step_size"] = self.alpha * scale
        control["direction_norm"] = math.sqrt(norm_squared)
        control["step_norm"] = control["step_size"] * control["direction_norm"]
        control["previous_loss"] = loss
        control["slope"] = slope if scale > 0 else None

    def _directions(self, params: list[list[Tensor]], gradients: list[list[Tensor]]) -> list[list[Tensor]]:
        """What those parameters that have a gradient step along, group by group."""
        momentum, directions = self._momentum(), []
        of_all: list[list[Any]] = [[], [], [], []]
        for group, group_params, group_gradients in zip(self.param_groups, params, gradients, strict=True):
            places = {p: index for index, p in enumerate(group["params"])}
            embeddings, experts = ([group[kind][places[p]] for p in group_params] for kind in KINDS)
            matrices = unstack(self._averaged(group_params, group_gradients, momentum), experts)
            counts = [len(p) if is_expert else 1 for p, is_expert in zip(group_params, experts, strict=True)]
            embeddings = [
                is_embedding for is_embedding, count in zip(embeddings, counts, strict=True) for _ in range(count)
            ]
            along = spectral_direction(matrices, embeddings)
            for kept, found in zip(
                of_all, (along, matrices, unstack(group_gradients, experts), embeddings), strict=True
            ):
                kept.extend(found)
            directions.append((along, group_params, experts))
        if momentum > 0:
            freeze_inactive(*of_all)
        return [restack(*group) for group in directions]

    def _momentum(self) -> float:
        """The momentum of this update."""
        control = self._scalars
        finding = control["searched"] is None or control["updates"] <= 2 * control["searched"]
        return float(self.param_groups[0]["momentum"] or (MOMENTUM_OF_THE_SEARCH if finding else 0.0))

    def _averaged(self, params: list[Tensor], gradients: list[Tensor], momentum: float) -> list[Tensor]:
        """Nesterov's average of the gradients, from zero on: its size does not matter to the direction."""
        if momentum == 0 or not params:
            for p in params:
                self.state[p].pop("momentum", None)
            return gradients
        for p in params:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        averages = [self.state[p]["momentum"] for p in params]
        torch._foreach_lerp_(averages, gradients, 1 - momentum)
        return list(torch._foreach_lerp(averages, gradients, 1 - momentum))

    def _restart(self, factor: float) -> None:
        """Go back to x_{t-1} and step again along the old direction, ``factor`` times as long."""
        control = self._scalars
        before = control["length"]
        take_back(control, factor, lowest=self.param_groups[0]["lr_bounds"][0])
        if control["slope"] is None:  # no step behind us
            return
        shorter = control["length"] / before
        self._step_again(self.alpha * before, self.alpha * control["length"])
        control["step_size"] *= shorter
        control["step_norm"] *= shorter

    def _step_again(self, before: float, after: float) -> None:
        """Make the last step, which was taken with α = ``before``, one with ``after``.

        x_{t-1} = (x_t + a·u)/(1 - a·d), with which the step is taken anew: one scaling of x_t and one addition of u.
        """
        for group in self.param_groups:
            taken = [p for p in group["params"] if "direction" in self.state.get(p, {})]
            old, new = (alpha * group.get("factor", 0.0) for alpha in (before, after))
            kept = (1 - _decay(group, new)) / (1 - _decay(group, old))
            directions = [self.state[p]["direction"] for p in taken]
            descend(taken, directions, new - kept * old, 1 - kept, foreach=None, rounding_seed=self._seed())

    def _seed(self) -> int | None:
        """Of stochastic rounding: the same on every process, another one in every update."""
        return int(self._scalars["updates"]) if self.param_groups[0]["stochastic_rounding"] else None

    def _look_at_the_search(self) -> None:
        """End the search if it is sure of what it has found, or if it has lasted long enough."""
        control, search = self._scalars, self.param_groups[0]["search"]
        rule = control["rule"]
        has_measured = rule["count"] >= search - 1  # a step that is taken back tells nothing, nor does its retry
        if control["updates"] >= LONGEST_SEARCH * search or (has_measured and KestenGain.is_sure(rule)):
            self._end_search()
        elif has_measured and not rule["clear"] and rule["found"] is None:
            KestenGain.search_again(rule, self.alpha)
            self._set_alpha(self._bounded(self.alpha / 10))

    def _end_search(self) -> None:
        """Back to where the search began; only α is kept of it."""
        control = self._scalars
        control["searched"] = control["updates"]
        for group in self.param_groups:
            for p in group["params"]:
                start = self.state.pop(p, {}).get("start")
                if start is not None:
                    p.copy_(start)
        size = self._size()
        if KestenGain(SIGMA, GAIN).has_found_nothing(control["rule"], self.alpha):
            self._set_default(NOT_FOUND * size, "has found none, as slopes are mostly noise")
        elif self.alpha < LEAST_FOUND * size:
            self._set_default(LEAST_FOUND * size, f"ended below the least one, at {self.alpha:.2g}")
        KestenGain.end_search(control["rule"])
        control["slope"] = control["previous_loss"] = None
        control["loss_statistics"] = new_loss_statistics()
        control.update(on_trial=0, proven=None, level=None, consecutive_restarts=0, length=1.0)

    def _set_default(self, alpha: float, why: str) -> None:
        """Take an α that was not found, and say so."""
        if alpha > 0:
            self._set_alpha(self._bounded(alpha))
        warn_user(
            f"elra_spectral: the search for a learning rate {why}, and training goes on with {self.alpha:.2g}, which "
            "comes from the size of the weights alone. A larger batch makes a search surer; search=0 trusts lr."
        )

    # ---- groups ----

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; besides ``params`` a group may set ``lr`` and ``weight_decay``."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for kind in KINDS:
            group[kind] = [id(p) in self._kinds.get(kind, ()) for p in group["params"]]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # of an older state
            group.setdefault("experts", [False] * len(group["params"]))
            group.setdefault("stochastic_rounding", False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but ``stochastic_rounding`` stays."""
        own = self.param_groups[0]["stochastic_rounding"]
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            group["stochastic_rounding"] = own

    def _check_parameter(self, parameter: Tensor) -> None:
        super()._check_parameter(parameter)
        if isinstance(parameter, DTensor):
            raise ConfigurationError(
                "params: elra_spectral cannot take sharded parameters (DTensor, as from FSDP2): the polar factor of a "
                "matrix is not that of its shards. Use DDP, or optim=elra."
            )


def _decay(group: dict[str, Any], step_size: float) -> float:
    """The share of its parameters that a group loses in a step; at most half, so that the way back stays open."""
    return min(float(step_size * group["weight_decay"]), 0.5)


def _identities(name: str, given: Any) -> dict[int, bool]:
    """Which parameters an argument tells, and whether each is trained; raise a ConfigurationError if it is no list."""
    is_list = isinstance(given, Iterable) and not isinstance(given, (nn.Module, Tensor))
    listed = list(given) if is_list else []
    if not is_list or not all(isinstance(p, Tensor) for p in listed):
        what = type(given).__name__
        raise ConfigurationError(f"{name} must be a list of parameters, not {what}; pass {name}={name}_of(model).")
    return {id(p): p.requires_grad for p in listed}


def _check_settings(settings: dict[str, Any]) -> None:
    """Raise a ConfigurationError for the first setting that cannot be used."""
    need = partial(need_number, settings)
    need("lr", lambda v: v > 0, "a number > 0, the first learning rate (any from 1e-7 to 1e-1 will do)")
    need("momentum", lambda v: 0 <= v < 1, "a number in [0, 1), e.g. 0.9")
    need("search", lambda v: v >= 0 and v == int(v), "a whole number >= 0, in updates (10)")
    need("max_relative_step", lambda v: v > 0, "a number > 0, a share of the weights' root mean square (0.5)")
    check_weight_decay(settings, scaled=True)
    need("restart_sigma", lambda v: v > 0, "a number > 0, in standard deviations (5)")
    if settings["initial_restart_ratio"] is not None:
        need("initial_restart_ratio", lambda v: v > 1, "a number > 1 (1.1), or None to drop the rule")
    for name in ("soft_restart", "stochastic_rounding"):
        if not isinstance(settings[name], bool):
            raise ConfigurationError(f"{name}={settings[name]!r} must be True or False.")
    need_lr_bounds(settings, "(1e-9, 1)")
