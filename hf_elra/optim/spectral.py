"""ELRASpectral: no learning rate to choose, over a direction that suits language models.

What is different from ``elra.py``: the direction (``directions/spectral.py``), with momentum; where α begins, which is
read off the weights (``natural_steps.py``); and the rule that corrects it (``rules/end_slopes.py``). The mean of the
points, which belongs to it, is in ``averaging.py``. Updates are made by ``base.py``, or without waiting for
the device by ``on_device.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.linalg import matrix_norm

from hf_elra.errors import ConfigurationError, warn_user
from hf_elra.optim.arguments import need_choice, need_flag, need_number, settings_of
from hf_elra.optim.base import Parts
from hf_elra.optim.directions import Direction
from hf_elra.optim.directions.spectral import KINDS, POLAR_BATCH, Spectral, kept_in, outputs_of
from hf_elra.optim.guards import RestartGuard, StepGuards
from hf_elra.optim.natural_steps import Pair, adapters_of, natural_steps, stands_out
from hf_elra.optim.on_device import DecidesOnDevice
from hf_elra.optim.rules import Measurement
from hf_elra.optim.rules.end_slopes import EndSlopes
from hf_elra.optim.shards import whole

USED_UP = 0.95
"""Of ``max_drift``, what is worth a warning."""
OF_A_MODEL: dict[str, Callable[[nn.Module], Any]] = {**KINDS, "outputs": outputs_of, "adapters": adapters_of}
"""Arguments that tell of parameters what they are in a model, and who finds out."""


class ELRASpectral(DecidesOnDevice):
    r"""A learning rate that finds itself, over polar factors of averaged gradients.

    x_{t+1} = x_t - α_t·s·u_t, where every tensor's u_t has a mean square of one: hidden matrices go along U·Vᵀ of their
    averaged gradient (as in Muon), rows of embeddings and vectors along their own, and rows of a new model's embeddings
    half along the polar factor of all rows. There is one α, and every tensor has a share s in it that does not change.
    Both come from the weights: a new matrix makes steps of one size in the spectral norm, whatever its width; a trained
    one steps in proportion to the size of trained weights, and a fresh head on top of it as a new matrix does, but
    shorter; the pairs of LoRA step so that their product does. α falls as 1/sqrt(t + 50), and slopes at the ends of
    steps correct it where they are significant. A step after which the loss is too high is taken back (ELRA's soft
    restart).

    The loss has to be told, as to :class:`~hf_elra.optim.ELRA`. Evaluate the mean of the points, weighted towards the
    last ones: with no schedule to bring α down, it stands in for one. In a Trainer that is on by default; in a bare
    loop :class:`~hf_elra.optim.averaging.WeightAverage` with ``power=8`` is that mean.
    Where a trained model goes over its data again more points are taken in
    (:data:`~hf_elra.optim.averaging.POWER_AGAIN`).

    Args:
        params (iterable of Tensor, or of dict): parameters, or groups of them. A group may set its own ``lr`` (its
            share relative to the ``lr`` below) and its own ``weight_decay``.
        lr (float): α_0, with which the warm-up begins, if what suits the weights is not less. Default: 1e-3.
        momentum (float): share of the averaged gradient that is kept at an update (Nesterov's form). 0 for none, which
            saves a state: α is then constant after the warm-up, but for corrections, and noise has to be averaged by
            batches that grow, as a Trainer makes them by itself. Default: 0.9.
        embeddings (iterable of Tensor): parameters whose rows are taken one by one: embeddings, and the output layer
            of a language model; see :func:`~hf_elra.optim.directions.embeddings_of`. Default: none.
        experts (iterable of Tensor): parameters that are several matrices in one, along their first dimension, as the
            experts of a mixture; see :func:`~hf_elra.optim.directions.experts_of`. Default: none.
        outputs (iterable of Tensor): those of ``embeddings`` that are an output layer, also if they are embeddings
            beside that: their steps depend on the size that they begin with, T5's being 50 times as large as a
            Llama's. See :func:`~hf_elra.optim.directions.outputs_of`. Default: none.
        adapters (iterable of (Tensor, Tensor, float, Tensor)): pairs A, B of LoRA, each with the factor of their
            product and the weights beside it, which may be left out; see
            :func:`~hf_elra.optim.natural_steps.adapters_of`. Default: none.
        weights (str): ``"auto"`` to see from the weights, before the first step, whether they are trained; ``"new"`` or
            ``"trained"`` to say so of all of them, as of a model 48 wide or less, whose trained weights may look like
            chance. With ``"trained"`` no matrix counts as a fresh head, and the model not as one that is hardly
            trained, which may go further. Default: ``"auto"``.
        warmup (int): updates in which α goes from ``lr`` to what suits the weights; 0 to trust ``lr``. Default: 10.
        max_correction (float, optional): corrections make α at most so many times what suits the weights, more than 4
            times only where a step leaves more than half of the slope; and only in the first pass over the data, after
            which up to 4 times are taken back. How long a pass is a bare loop tells as ``optimizer.updates_per_epoch =
            len(loader)``. A trained model that shall not forget needs less. Of a hardly trained model both bounds are
            eight times as far, with pairs of LoRA half as far otherwise, if this is None. Default: None.
        max_relative_step (float): α is at most this share of the root mean square of all matrices. Default: 0.5.
        max_drift (float, optional): how far matrices may go from where they began, as a share of their root mean square
            then: all α together are at most that, below ``lr_bounds`` if need be. It is spread over the run, whose
            length a bare loop tells as ``optimizer.total_updates = epochs * len(loader)``; without it a step is at most
            a twentieth of what is left, so that a long run soon stands still. Steps do not all go one way, so that the
            distance itself is less. A new head steps further than α, embeddings less; weight decay does not count. For
            a trained model that shall not forget; not with ``adapters``, whose frozen matrices do not move. None for no
            such bound. Default: None.
        lr_bounds (tuple of 2 floats): smallest and largest α. Default: (1e-9, 1).
        weight_decay (float): d in x ← (1 - α·d)·x, once per update, scaled by α and a scheduler's factor as in AdamW
            and Muon, whose usual values (0.1) fit. Default: 0.
        stochastic_rounding (bool): round bfloat16 parameters up or down at random, right on average, so that steps
            below their precision are not lost. The same on every process and in a resumed run. Default: False.
        distribute (str): with several processes that have the same parameters (:attr:`process_group`, as in DDP),
            ``"auto"`` takes every polar factor on one of them, which tells the others; ``"off"`` takes all of them on
            each, as both do where gloo joins CUDA devices. Parameters that are split (DTensor, as by FSDP2 or tensor
            parallelism) are always computed once each. Default: ``"auto"``.
        polar_batch (int): polar factors are taken of matrices of one shape together, of so many numbers at most, or of
            one larger matrix: the memory for them is a few times as many numbers in float32 (on a GPU half of that).
            Which are taken together changes nothing else. Default: 2^24.
        polar_dtype (str): what polar factors are computed in. ``"auto"`` takes bfloat16 on a CUDA device, and on a CPU
            that multiplies it faster (AMX, AVX512_BF16) for matrices that are not small, but of float64 parameters;
            else, and with ``"float32"``, it is the type of the state but at least float32. Default: ``"auto"``.
        state_dtype (str): what the averaged gradient and the last direction are kept in, and the step is taken from.
            ``"auto"`` takes bfloat16, but float64 for float64 parameters: with the weight average in float32 that is 8
            bytes a parameter, as much as AdamW's state. ``"float32"`` is at least that. A state that was saved in
            another type is converted as it is loaded. Default: ``"auto"``.
        on_device (bool, optional): True to make all decisions on the device of the parameters, so that no update but
            the first waits for it; False to make them on the host; None for the device where that is a CUDA device.
            The path does not depend on it, but for rounding. Default: None.
        soft_restart, restart_sigma, initial_restart_ratio: as of :class:`~hf_elra.optim.ELRA`; the last one counts only
            for a model that looks new.

    Raises:
        ConfigurationError: an argument cannot be used; the message names it, its value and the remedy.
        RuntimeError: from :meth:`step`, when a gradient is sparse, or when loss or gradient stay non-finite over 20
            updates.

    State per parameter: the averaged gradient (with momentum) and the last direction. With decisions on the device an
    update queues its work and returns; :attr:`alpha`, :attr:`metrics` and a checkpoint wait for it when they are read,
    and the error of what stays non-finite comes when :attr:`metrics` is. :meth:`step` can be captured in a CUDA graph
    then, after two updates and without stochastic rounding; a graph keeps the settings of all groups, the ``lr`` of a
    scheduler among them, as they were at its capture.

    Source: of this project; see docs/papers.md. ELRA (2024) for the restarts and for one learning rate from
    neighbouring gradients; K. Jordan et al., "Muon" (2024) for the direction.

    Example:
        >>> kinds = {"embeddings": embeddings_of(model), "outputs": outputs_of(model)}
        >>> optimizer = ELRASpectral(model.parameters(), **kinds)
        >>> for epoch in range(epochs):
        ...     for inputs, targets in batches:
        ...         loss = loss_function(model(inputs), targets)
        ...         loss.backward()
        ...         optimizer.step(loss=loss)
        ...         optimizer.zero_grad()
        ...     optimizer.end_cycle()
    """

    scales_weight_decay = True
    stays_with_object = ("stochastic_rounding", "distribute", "polar_batch", "polar_dtype", "state_dtype", "on_device")
    _kinds: dict[str, dict[int, bool]] = {}  # noqa: RUF012 - of a copy, whose parameters are others
    _adapters: dict[int, list[float]] = {}  # noqa: RUF012

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        momentum: float = 0.9,
        embeddings: Iterable[Tensor] = (),
        experts: Iterable[Tensor] = (),
        outputs: Iterable[Tensor] = (),
        adapters: Iterable[tuple[Tensor, Tensor, float] | Pair] = (),
        weights: str = "auto",
        warmup: int = 10,
        max_correction: float | None = None,
        max_relative_step: float = 0.5,
        max_drift: float | None = None,
        lr_bounds: tuple[float, float] = (1e-9, 1.0),
        weight_decay: float = 0.0,
        stochastic_rounding: bool = False,
        distribute: str = "auto",
        polar_batch: int = POLAR_BATCH,
        polar_dtype: str = "auto",
        state_dtype: str = "auto",
        on_device: bool | None = None,
        soft_restart: bool = True,
        restart_sigma: float = 5.0,
        initial_restart_ratio: float | None = 1.1,
    ) -> None:
        settings = settings_of(locals(), *OF_A_MODEL)
        _check_settings(settings)
        pairs = list(adapters) if isinstance(adapters, Iterable) else [adapters]
        self._adapters = _pairs(pairs)
        if self._adapters and settings["max_drift"] is not None:
            raise ConfigurationError(
                f"max_drift={settings['max_drift']!r} bounds the way of trained matrices, and those beside adapters do "
                "not move; leave max_drift out. max_correction=1 keeps the steps of adapters short."
            )
        told = {"embeddings": embeddings, "experts": experts, "outputs": outputs}
        self._kinds = {kind: _identities(kind, given) for kind, given in told.items()}
        if self._kinds["outputs"].keys() - self._kinds["embeddings"].keys():
            raise ConfigurationError("outputs must be among embeddings; pass embeddings=embeddings_of(model) too.")
        super().__init__(params, settings)
        for kind, identities in self._kinds.items():
            if any(identities.values()) and not any(any(group[kind]) for group in self.param_groups):
                warn_user(
                    f"{kind}: none of these {len(identities)} parameters is among params, so that none is taken for "
                    f"one; pass {kind}={kind}_of(model) of the model that is trained."
                )

        are_trained = any(p.requires_grad for pair in pairs for p in pair[:2])
        if are_trained and not any(any(group["adapters"]) for group in self.param_groups):
            warn_user(
                f"adapters: none of these {len(pairs)} pairs is among params, so that none is taken for "
                "one; pass adapters=adapters_of(model) of the model that is trained."
            )

    def parts(self) -> Parts:
        """Polar factors, a rate from the weights that slopes correct, and α below a share of the matrices' size."""
        s = self.param_groups[0]
        fresh, falls = self.updates_per_epoch, s["momentum"] > 0
        rule = EndSlopes(
            s["warmup"],
            max_correction=s["max_correction"],
            room=s.get("room", 1.0),
            fresh=fresh,
            falls=falls,
        )
        return Parts(
            self.direction(float(s["momentum"])),
            rule,
            StepGuards(
                lr_bounds=s["lr_bounds"],
                max_relative_alpha=s["max_relative_step"],
                max_drift=s.get("max_drift"),
                total_updates=self.total_updates,
            ),
            # The paper, section 3.2, drops the first rule for a start that was trained before: losses begin low there,
            # and differ by more than a tenth.
            RestartGuard(s["restart_sigma"], None if s.get("is_trained") else s["initial_restart_ratio"]),
        )

    def direction(self, momentum: float) -> Direction:
        """Polar factors of averages with this momentum; a subclass may choose another one."""
        s = self.settings()
        return Spectral(
            momentum,
            group=self.process_group if s["distribute"] == "auto" else None,
            batch=s["polar_batch"],
            polar_dtype=s["polar_dtype"],
            state_dtype=s["state_dtype"],
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; besides ``params`` a group may set ``lr`` and ``weight_decay``."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for kind in (*KINDS, "outputs"):
            group[kind] = [id(p) in self._kinds.get(kind, ()) for p in group["params"]]
        group["adapters"] = [self._adapters.get(id(p), 0) for p in group["params"]]
        group["shares"] = [1.0] * len(group["params"])
        group["new"], group["whitened"] = ([False] * len(group["params"]) for _ in range(2))
        group["is_trained"], group["room"] = False, 1.0  # read of the first group

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but that the state keeps the type that ``state_dtype`` says, not that of the parameters.

        Raises:
            ConfigurationError: ``state_dict`` was written by another optimizer, or for parameters of other shapes.
        """
        super().load_state_dict(state_dict)
        saved = (number for group in state_dict["param_groups"] for number in group["params"])
        params = (p for group in self.param_groups for p in group["params"])
        for number, p in zip(saved, params, strict=True):
            for name, kept in state_dict["state"].get(number, {}).items():
                if isinstance(kept, Tensor):
                    self.state[p][name] = kept.to(p.device, kept_in(p, self.settings()["state_dtype"]))

    def _look_at_weights(self) -> float:
        """Find out what suits them, as they are before the first step; a group that comes later goes with α."""
        s = self.settings()
        found = natural_steps(self.param_groups, s.get("weights", "auto"))
        if s.get("max_drift") is not None and not found.is_trained:
            warn_user(
                f"max_drift={s['max_drift']!r} is for trained models, and these weights look new: what a model begins "
                "with is hardly worth keeping, and tables go further than matrices. If they are trained, pass "
                "weights='trained'; if not, leave max_drift out."
            )
        for group, *of_params in zip(self.param_groups, found.shares, found.new, found.whitened, strict=True):
            group["shares"], group["new"], group["whitened"] = of_params
        self.param_groups[0].update(is_trained=found.is_trained, room=found.room)
        return found.rate

    @property
    def looks_trained(self) -> bool | None:
        """Whether the weights were taken for trained ones; None before the first step."""
        s = self.settings()
        return bool(s["is_trained"]) if s["scalars"]["moved"] else None

    @property
    def fine_tunes(self) -> bool:
        """Whether a trained model is tuned near where it is: its weights look trained, and slopes have not brought α to
        more than 4 times what suits them, as they do for a text in another language. If updates are made on the device,
        reading this waits for it."""
        if not self.looks_trained:
            return False
        alpha, rule = self.alpha, self._current_parts().rule  # in this order: the first may read from the device
        return isinstance(rule, EndSlopes) and rule.is_near(alpha)

    @property
    def metrics(self) -> dict[str, float]:
        """As of every optimizer of this package."""
        found = super().metrics
        self._warn_of_drift()
        return found

    def _choose_alpha(self, parts: Parts, measured: Measurement) -> float:
        alpha = super()._choose_alpha(parts, measured)
        self._warn_of_drift()
        return alpha

    def _warn_of_drift(self) -> None:
        """Warn once, where the length of the run is not known, that the model will hardly move any more."""
        allowed = self.settings().get("max_drift")
        if allowed is None:
            return
        numbers = self._numbers()
        rule = numbers["rule"]
        if self.total_updates is not None and numbers["updates"] <= self.total_updates:
            return
        if rule["walked"] > USED_UP * allowed * rule["began"] > 0:
            self._warn_once(
                "drift",
                f"max_drift={allowed!r} is used up to {USED_UP:.0%} after {numbers['updates']} updates, so that from "
                "now on the model hardly moves. Tell the length of the run before it begins, as a Trainer does: "
                "optimizer.total_updates = epochs * len(loader); max_drift is spread over all of it then.",
            )


def _identities(name: str, given: Any) -> dict[int, bool]:
    """Which parameters an argument tells, and whether each is trained; raise a ConfigurationError if it is no list."""
    is_list = isinstance(given, Iterable) and not isinstance(given, (nn.Module, Tensor))
    listed = list(given) if is_list else []
    if not is_list or not all(isinstance(p, Tensor) for p in listed):
        what = type(given).__name__
        raise ConfigurationError(f"{name} must be a list of parameters, not {what}; pass {name}={name}_of(model).")
    return {id(p): p.requires_grad for p in listed}


def _pairs(given: list[Any]) -> dict[int, list[float]]:
    """Of every parameter of a pair its number, from 1, and what a change of it is multiplied by in the product: that is
    the factor times the norm of A, as B is zero at first; how many weights stand beside the pair, and whether no
    singular value of them stands out. Raise a ConfigurationError for what is no pair."""
    found = {}
    for number, pair in enumerate(given, 1):
        is_pair = isinstance(pair, (tuple, list)) and len(pair) in (3, 4)
        is_pair = is_pair and all(isinstance(p, Tensor) for p in (*pair[:2], *(p for p in pair[3:] if p is not None)))
        if not is_pair:
            raise ConfigurationError(
                f"adapters must be a list of (A, B, factor) or (A, B, factor, weights), not of {type(pair).__name__}; "
                "pass adapters=adapters_of(model)."
            )
        norm = max(float(matrix_norm(whole(p.detach()).flatten(1).float(), 2)) for p in pair[:2])
        beside = [
            whole(p.detach()).flatten(1).float() for p in pair[3:] if p is not None and p.dim() > 1 and p.numel() > 0
        ]
        size, is_plain = sum(p.numel() for p in beside), all(not stands_out(p) for p in beside)
        for p in pair[:2]:
            found[id(p)] = [float(number), abs(float(pair[2])) * norm, float(size), float(is_plain)]
    return found


def _check_settings(settings: dict[str, Any]) -> None:
    """Raise a ConfigurationError for the first setting that cannot be used."""
    need = partial(need_number, settings)
    need("momentum", lambda v: 0 <= v < 1, "a number in [0, 1), e.g. 0.9")
    need("warmup", lambda v: isinstance(v, int) and v >= 0, "a whole number of updates >= 0, 0 to trust lr (10)")
    if settings["max_correction"] is not None:
        need("max_correction", lambda v: v >= 1, "a number >= 1, or None for what suits the model")
    need("max_relative_step", lambda v: v > 0, "a number > 0, a share of the weights' root mean square (0.5)")
    if settings["max_drift"] is not None:
        need("max_drift", lambda v: v > 0, "a number > 0, a share of the weights' root mean square (0.2), or None")
    need_choice(settings, "weights", ("auto", "new", "trained"))
    need_choice(settings, "distribute", ("auto", "off"))
    for name in ("polar_dtype", "state_dtype"):
        need_choice(settings, name, ("auto", "float32", "bfloat16"))
    need_flag(settings, "on_device", or_none=True)
    need("polar_batch", lambda v: isinstance(v, int) and v > 0, "a whole number of numbers, e.g. 2**24")
