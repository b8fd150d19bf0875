"""Updates of ``elra_spectral`` that do not wait: measurements, decision and step are queued on the device.

What is decided is in ``decisions.py``, how numbers get to the device and back in ``device_numbers.py``. Here is what
belongs to tensors, in plain operations of torch, for any device: scalar products that stay there, the step that is
made, or taken back, or neither, by factors of the device, and the state that a batch which is not to count leaves as it
is.

In an update the products with the last direction come first, then the decision about the last step and α, then the new
direction. Its slope is needed by the next update only, so that under a process group there is one all-reduce an update.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_elra.errors import ConfigurationError
from hf_elra.optim import many_tensors
from hf_elra.optim.base import LastUpdate, Parts, shares
from hf_elra.optim.decisions import NAMES, OF_RATIOS, Measured, Verdict, cycle_ended, decide
from hf_elra.optim.device_numbers import Numbers, NumbersOnDevice
from hf_elra.optim.directions.spectral import Spectral
from hf_elra.optim.guards import StepGuards
from hf_elra.optim.rules.end_slopes import EndSlopes
from hf_elra.optim.shards import reduced
from hf_elra.optim.tensors import (
    flat,
    local,
    mean_over_processes,
    seed_of_part,
    shard_groups,
    stochastically_rounded,
    wide,
)

OF_GROUP = ("step_size", "step_factor", "step_decay")
"""What follows for every parameter group, of the last step. Then, for every parameter, whether it made that step."""

MOST_NOTES = 1000
"""Of so many updates something is kept to be told."""


class DeviceUpdate(Numbers):
    """The numbers of ``elra_spectral`` on the device, and what the host knows of them without waiting.

    Attributes:
        moved: the parameters that made the last step; None where the host does not know.
        decayed: of every group, whether its last step may have had weight decay.
        calls: updates with those that were skipped; the seed of stochastic rounding.
        lost: the largest share of a bfloat16 parameter that a step did not move; None where nobody looked.
        notes: of the last updates, what ``read_updates`` tells, and whether the batch was skipped.
        is_captured: an update is part of a CUDA graph.
    """

    names = NAMES

    def __init__(self) -> None:
        super().__init__()
        self.moved: frozenset[Tensor] | None = None
        self.decayed: list[bool] = []
        self.calls = 0
        self.lost: Tensor | None = None
        self.notes: deque[Tensor] = deque(maxlen=MOST_NOTES)
        self.is_captured = False

    def read(self, scalars: dict[str, Any]) -> dict[str, Any]:
        """Return the host's numbers by name."""
        rule = scalars["rule"]
        plain = {name: rule[name] for name in ("warms_up", "first", "natural", "began", "walked")}
        of_rule = {**plain, **dict(zip(OF_RATIOS, rule["ratios"], strict=True))}
        uncounted = scalars.get("previous_uncounted", 0.0)
        return {**super().read(scalars), "previous_uncounted": uncounted, **of_rule, "rule_update": rule["update"]}

    def write(self, scalars: dict[str, Any], found: dict[str, Any]) -> None:
        """Put numbers by name in their place on the host."""
        super().write(scalars, found)
        scalars["previous_uncounted"] = found["previous_uncounted"]
        scalars["rule"].update(
            warms_up=int(found["warms_up"]),
            first=found["first"],
            natural=found["natural"],
            began=found["began"],
            walked=found["walked"],
            update=int(found["rule_update"]),
            ratios=[int(found["ratios_count"]), found["ratios_mean"], found["ratios_squares"]],
        )


class DecidesOnDevice(NumbersOnDevice):
    """Makes updates without waiting for the device, from the second on."""

    _device_update: DeviceUpdate | None = None

    # ---- numbers ----

    @property
    def _there(self) -> DeviceUpdate | None:
        return self._device_update

    @property
    def _is_replayed(self) -> bool:
        return self._device_update is not None and self._device_update.is_captured

    def _push(self, device: torch.device) -> None:
        there, key = self._device_update, self._memory.key
        assert there is not None
        scalars, params = self.param_groups[0]["scalars"], self._all_params()
        flags = [key in self.state.get(p, {}) for p in params]
        of_groups = [float(group[name]) for group in self.param_groups for name in OF_GROUP]
        there.push(scalars, device, [*of_groups, *map(float, flags)])
        there.moved = frozenset(p for p, flag in zip(params, flags, strict=True) if flag)
        there.decayed = [group["step_decay"] != 0 for group in self.param_groups]
        there.calls = scalars["updates"] + scalars["skipped"]

    def _pull(self) -> None:
        there, key = self._device_update, self._memory.key
        assert there is not None
        scalars = self.param_groups[0]["scalars"]
        more = iter(there.pull(scalars))
        for group in self.param_groups:
            group.update({name: next(more) for name in OF_GROUP}, alpha=scalars["alpha"])
        moved = {p for p, flag in zip(self._all_params(), more, strict=True) if flag}
        if not there.is_captured:  # whose tensors have to stay
            there.moved = frozenset(moved)
            for p in self._all_params():
                if p not in moved and p in self.state:  # it did not move, so there is nothing of it to take back
                    self.state[p].pop(key, None)
                    if not self.state[p]:
                        del self.state[p]
        if there.lost is not None:
            lost, there.lost = float(there.lost), None
            self._warn_of_lost_steps(lost)

    def _all_params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch; a captured CUDA graph sees the new numbers, too."""
        super().load_state_dict(state_dict)
        self._renew_numbers_on_device()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; besides ``params`` a group may set ``lr`` and ``weight_decay``."""
        if self._device_update is not None:
            self._numbers_to_change()
        super().add_param_group(param_group)

    @property
    def asks_before_backward(self) -> bool:
        """Not where updates are decided on the device, as asking would wait for it."""
        return super().asks_before_backward and not self._wants_device()

    @torch.no_grad()
    def end_cycle(self) -> None:
        """Declare an epoch or control cycle over: mean and σ of its losses judge the losses of the next one."""
        there = self._device_update
        if there is None or not there.in_force or there.numbers is None:
            super().end_cycle()
            return
        named = dict(zip(NAMES, there.numbers[: len(NAMES)].unbind(), strict=True))
        for name, value in cycle_ended(named).items():
            named[name].copy_(value)
        there.was_read = False

    @property
    def unread_updates(self) -> int:  # type: ignore[override]
        """How many updates :meth:`read_updates` would tell of."""
        return 0 if self._device_update is None else len(self._device_update.notes)

    def read_updates(self) -> list[tuple[LastUpdate | None, float, int]]:
        """What updates on the device have seen and done since this was asked last, with α and the restarts after each.

        That waits for the device. For skipped batches it is None. Of a CUDA graph nothing is noted.
        """
        if not self.unread_updates:
            return []
        assert self._device_update is not None
        notes = torch.stack(list(self._device_update.notes)).tolist()
        self._device_update.notes.clear()
        found: list[tuple[LastUpdate | None, float, int]] = []
        for loss, tried, ratio, taken_back, limit, skipped, alpha, restarts in notes:
            name = {-1: "ceiling", 0: None, 1: "floor"}[int(limit)]
            last = LastUpdate(loss, tried, None if math.isnan(ratio) else ratio, bool(taken_back), name)
            found.append((None if skipped else last, alpha, int(restarts)))
        return found

    # ---- which updates ----

    def _wants_device(self) -> bool:
        """Whether updates are to be decided on the device, but for the first one."""
        asked = self.param_groups[0]["on_device"]
        if asked is not None:
            return bool(asked)
        return all(p.is_cuda for p in self._all_params()) and self._why_not_there() is None

    def _why_not_there(self) -> str | None:
        """Return why updates cannot be decided on the device; None if they can."""
        parts = self.parts()
        devices = {p.device for p in self._all_params()}
        if len(devices) != 1:
            return f"parameters lie on several devices ({', '.join(sorted(map(str, devices)))})"
        if type(parts.direction) is not Spectral:
            return f"the direction is {type(parts.direction).__name__}"
        if type(parts.rule) is not EndSlopes:
            return f"the rule is {type(parts.rule).__name__}"
        bounds = parts.step_guards
        known = StepGuards(
            lr_bounds=bounds.lr_bounds,
            max_relative_alpha=bounds.max_relative_alpha,
            max_drift=bounds.max_drift,
            total_updates=bounds.total_updates,
        )
        if bounds != known:
            return "steps have other limits than bounds on α"
        if parts.restart_guard.window is not None or not parts.restart_guard.noisy:
            return "losses are judged by a window"
        return None

    def _update_on_device(
        self,
        params: list[list[Tensor]],
        gradients: list[list[Tensor]],
        factors: list[float],
        loss: Tensor | float | None,
    ) -> bool:
        """Queue the update if it can be; the first one, which looks at the weights, cannot."""
        if not self._wants_device():
            return False
        if (reason := self._why_not_there()) is not None:
            raise ConfigurationError(f"on_device=True cannot be done: {reason}. Leave on_device out.")
        device = self._all_params()[0].device
        there = self._device_update
        ready = bool(self.param_groups[0]["scalars"]["moved"])
        if device.type == "cuda" and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            rounds = self.param_groups[0]["stochastic_rounding"]
            if rounds or there is None or not there.in_force:
                raise RuntimeError(
                    f"{type(self).__name__} cannot be captured in a CUDA graph now: "
                    + ("stochastic_rounding=True needs new random numbers in every replay."
                       if rounds else "make two updates first, after it was made or changed.")
                )  # fmt: skip
            there.is_captured = True
        if not ready:
            return False
        if there is None:
            there = self._device_update = DeviceUpdate()
        if not there.in_force:
            self._push(device)
        there.was_read = False
        there.calls += 1
        self._queue(there, params, gradients, factors, loss)
        return True

    # ---- the update ----

    def _queue(
        self,
        there: DeviceUpdate,
        params: list[list[Tensor]],
        gradients: list[list[Tensor]],
        factors: list[float],
        loss: Tensor | float | None,
    ) -> None:
        """Measure, judge, choose α, choose u, move: all of it on the device."""
        parts, settings, numbers = self.parts(), self.param_groups[0], there.numbers
        assert numbers is not None
        number_named, number_of_groups = len(NAMES), len(OF_GROUP) * len(self.param_groups)
        named = dict(zip(NAMES, numbers[:number_named].unbind(), strict=True))
        of_groups = numbers[number_named:][:number_of_groups].view(-1, len(OF_GROUP))
        moved = numbers[number_named + number_of_groups :]
        measured = self._measured_there(parts, named, of_groups, params, gradients, loss)
        after, verdict = decide(
            named,
            measured,
            parts,
            soft_restart=settings["soft_restart"],
            scale=max(factors),
            number_sized=self._number_sized(parts, params),
        )
        if not there.is_captured:
            there.notes.append(_note(named, after, measured, verdict))
        directions = self._directions_there(parts, verdict, params, gradients)
        self._note_direction(after, verdict, params, gradients, directions, factors)
        self._keep_there(verdict, params, directions)
        new_of_groups = self._step_there(there, verdict, after, of_groups, moved, params, factors)
        has_moved = self._makes_step(moved, params)
        known = frozenset(p for group in params for p in group)
        there.moved = known if there.moved == known else None
        moved.copy_(torch.where(verdict.stands, has_moved, moved))
        of_groups.copy_(new_of_groups)
        numbers[:number_named].copy_(torch.stack([after[name] for name in NAMES]))

    def _measured_there(
        self,
        parts: Parts,
        named: dict[str, Tensor],
        of_groups: Tensor,
        params: list[list[Tensor]],
        gradients: list[list[Tensor]],
        loss: Tensor | float | None,
    ) -> Measured:
        """The numbers of this update over all tensors, agreed over processes.

        With them go those of the last direction, which are of this process alone; ``named`` gets their mean.
        """
        key, one = self._memory.key, named["alpha"]
        squares = [(g, g) for group in gradients for g in group]
        sized = [(p, p) for lot in parts.direction.sized(self.param_groups, params) for p in lot]
        kept = [
            [(p, (g, self.state[p][key])) for p, g in zip(*of_group, strict=True) if key in self.state.get(p, {})]
            for of_group in zip(params, gradients, strict=True)
        ]
        pairs = [
            pair
            for group, of_group in zip(self.param_groups, kept, strict=True)
            for pair in self._by_count(group, of_group)
        ]
        square, size, *of_pairs = _sums([squares, sized, *pairs], beside=one)
        whole = torch.where(named["step_size"] > 0, named["step_size"], math.inf)  # nothing is learnt from no step
        current, uncounted = _weighted([of_group[0] / whole for of_group in of_groups], of_pairs)
        told = [square, current, uncounted, size]
        told += [named[name] for name in ("previous_slope", "previous_uncounted", "direction_norm")]
        if loss is not None:
            told.append(_on(loss, one))
        if self.process_group is not None:
            told = list(mean_over_processes(torch.stack(told), self.process_group).unbind())
        for name, value in zip(("previous_slope", "previous_uncounted", "direction_norm"), told[4:], strict=False):
            named[name] = value
        was_full = of_groups[:, 1].amax() >= 1
        square, current, uncounted, size = told[:4]
        return Measured(square, current, uncounted, size, None if loss is None else told[7], was_full)

    def _directions_there(
        self, parts: Parts, verdict: Verdict, params: list[list[Tensor]], gradients: list[list[Tensor]]
    ) -> list[list[Tensor]]:
        """Return u_t, group by group; a gradient that is not to count leaves averages as they are.

        A direction that comes of a gradient that is not to count means nothing.
        """
        direction = parts.direction
        assert isinstance(direction, Spectral)
        direction.waits, direction.counts = False, verdict.stands
        return direction.apply(self.param_groups, params, gradients, self.state)

    def _note_direction(
        self,
        after: dict[str, Tensor],
        verdict: Verdict,
        params: list[list[Tensor]],
        gradients: list[list[Tensor]],
        directions: list[list[Tensor]],
        factors: list[float],
    ) -> None:
        """Note slope and norm of u_t, as the step will be made of it."""
        lots: list[list[tuple[Tensor, Tensor]]] = []
        for group, *of_group in zip(self.param_groups, params, gradients, directions, strict=True):
            lots += self._by_count(group, [(p, (u, g)) for p, g, u in zip(*of_group, strict=True)])
            lots.append([(u, u) for u in of_group[2]])
        sums = _sums(lots, beside=after["alpha"])
        weights = shares(factors)
        slope, uncounted = _weighted(weights, [product for i, product in enumerate(sums) if i % 3 != 2])
        norm = torch.stack([w * w * square for w, square in zip(weights, sums[2::3], strict=True)]).sum().sqrt()
        # A frozen update goes nowhere: there is nothing to take back and nothing to learn from it.
        noted = {
            "previous_slope": slope if max(factors) > 0 else torch.full_like(slope, math.nan),
            "previous_uncounted": uncounted,
            "direction_norm": norm,
            "step_norm": after["step_size"] * norm,
        }
        for name, value in noted.items():
            after[name] = torch.where(verdict.stands, value, after[name])

    def _by_count(self, group: dict[str, Any], things: list[tuple[Tensor, Any]]) -> tuple[list[Any], list[Any]]:
        """Return what belongs to parameters of a group in two lists, of those whose slopes count and of others.

        Args:
            group: the group.
            things: parameters of it, each with its thing.
        """
        params = [p for p, _ in things]
        out = {p for p, _ in self._uncounted(group, params, params)}
        return [thing for p, thing in things if p not in out], [thing for p, thing in things if p in out]

    def _keep_there(self, verdict: Verdict, params: list[list[Tensor]], directions: list[list[Tensor]]) -> None:
        """Keep u_t where the last step stands; what has no gradient does not move then."""
        key, used = self._memory.key, [p for group in params for p in group]
        new = [u for group in directions for u in group]
        for p, u in zip(used, new, strict=True):
            if key not in self.state[p]:
                self.state[p][key] = torch.zeros_like(u)
        pairs = [(local(self.state[p][key]), local(u)) for p, u in zip(used, new, strict=True)]
        if many_tensors.pays([kept for kept, _ in pairs]):
            many_tensors.replace(pairs, verdict.stands)
        else:
            for kept, u in pairs:
                torch.where(verdict.stands, u.to(kept.dtype), kept, out=kept)
        for p in set(self._all_params()).difference(used):
            if key in self.state.get(p, {}):
                local(self.state[p][key]).masked_fill_(verdict.stands, 0.0)

    def _step_there(
        self,
        there: DeviceUpdate,
        verdict: Verdict,
        after: dict[str, Tensor],
        of_groups: Tensor,
        moved: Tensor,
        params: list[list[Tensor]],
        factors: list[float],
    ) -> Tensor:
        """x ← k·x + c·u along what is kept: the step, the last one taken back and made shorter, or nothing.

        Returns:
            What groups remember of it.
        """
        key, stands = self._memory.key, verdict.stands
        goes = stands | verdict.goes_back
        used = {p for group in params for p in group}
        uniform = there.moved == used
        step, rows, index, lost = after["alpha"] * after["length"], [], 0, []
        looks, rounds = self._looks_for_rounding, self.param_groups[0]["stochastic_rounding"]
        for number, (group, factor, before) in enumerate(zip(self.param_groups, factors, of_groups, strict=True)):
            wanted, decay = step * factor, float(group["weight_decay"])
            there.decayed[number] |= decay != 0
            loses = (wanted * decay).clamp(max=0.5)  # as in _decay
            kept = (1 - loses) / (1 - before[2])
            back = before[0] * kept - wanted
            along = torch.where(stands, -wanted, torch.where(verdict.goes_back, back, 0.0))
            rows.append(torch.where(goes, torch.stack([wanted, torch.full_like(wanted, factor), loses]), before))
            rest = torch.where(stands, 1 - loses, torch.where(verdict.goes_back, kept, 1.0))
            generator: torch.Generator | None = None
            if rounds and any(local(p).dtype == torch.bfloat16 for p in group["params"]):
                generator = torch.Generator(before.device).manual_seed(there.calls)
            in_type = {dtype: (rest.to(dtype), along.to(dtype)) for dtype in {wide(p.dtype) for p in group["params"]}}
            together: list[tuple[Tensor, Tensor]] = []
            alike = generator is None and (uniform or not there.decayed[number])
            for p in group["params"]:
                index += 1
                if key not in self.state.get(p, {}):
                    continue
                x, u = local(p), local(self.state[p][key])
                of_p, by = in_type[wide(x.dtype)]
                if there.decayed[number] and not uniform:  # only what makes a step loses something, or gets it back
                    flag = moved[index - 1]
                    now = torch.where(stands, 1 - loses if p in used else 1.0, 1 + flag * (rest - 1))
                    of_p = now.to(of_p.dtype)
                if looks and p in used and x.dtype == torch.bfloat16:
                    lost.append(_share_lost(x, u, by))
                if alike and x.device.type in many_tensors.DEVICES:
                    together.append((x, u))
                    continue
                own = generator
                if generator is not None and isinstance(p, DTensor):
                    own = torch.Generator(before.device).manual_seed(seed_of_part(p, there.calls, index))
                _move(x, u, of_p if there.decayed[number] else None, by, own)
            if together:
                many_tensors.move(together, rest if there.decayed[number] else None, along)
        if lost:
            there.lost = torch.stack(lost).amax()
        return torch.stack(rows)

    def _makes_step(self, moved: Tensor, params: list[list[Tensor]]) -> Tensor:
        """Return for every parameter whether it makes a step, if one is made."""
        flags, used = torch.ones_like(moved), {p for group in params for p in group}
        for index, p in enumerate(self._all_params()):
            if p not in used:
                flags[index].zero_()
        return flags


def _weighted(weights: Sequence[Tensor | float], sums: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return Σ w·(old + new) and Σ w·new over groups.

    Args:
        weights: one a group.
        sums: of every group two, see :meth:`DecidesOnDevice._by_count`.
    """
    old = torch.stack([weight * of_group for weight, of_group in zip(weights, sums[::2], strict=True)]).sum()
    new = torch.stack([weight * of_group for weight, of_group in zip(weights, sums[1::2], strict=True)]).sum()
    return old + new, new


def _sums(lots: Sequence[Sequence[tuple[Tensor, Tensor]]], beside: Tensor) -> list[Tensor]:
    """Return Σ⟨l, r⟩ of every lot of pairs; over all shards of DTensors, those on the same processes by one call.

    Args:
        lots: each is a list of pairs of equal shapes, and may be empty.
        beside: a number, of the type and on the device that they shall have.
    """
    kinds: dict[Any, list[tuple[Tensor, Tensor]]] = {}
    for number, lot in enumerate(lots):
        for left, right in lot:
            kinds.setdefault((number, shard_groups(left)), []).append((local(left), local(right)))
    found = reduced(
        [_sum(pairs, beside.dtype) for pairs in kinds.values()], [kind[1] for kind in kinds], dist.ReduceOp.SUM
    )
    totals: list[list[Tensor]] = [[] for _ in lots]
    for (number, _), total in zip(kinds, found, strict=True):
        totals[number].append(total)
    return [torch.stack(of_lot).sum() if of_lot else torch.zeros_like(beside) for of_lot in totals]


def _sum(pairs: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype) -> Tensor:
    """Return Σ⟨l, r⟩ over pairs, added up in a type."""
    if many_tensors.pays([left for left, _ in pairs]):
        return many_tensors.sum_of_products(pairs, dtype)
    return torch.stack([_dot(left, right).to(dtype) for left, right in pairs]).sum()


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Return ⟨l, r⟩ in the wider of their types, but at least float32."""
    x, y = flat(left, right)
    if x.dtype == y.dtype and x.dtype in (torch.float32, torch.float64):
        return torch.dot(x, y)
    dtype = wide(torch.promote_types(x.dtype, y.dtype))
    return torch.dot(x.to(dtype), y.to(dtype))


def _on(loss: Tensor | float, beside: Tensor) -> Tensor:
    """Return the loss beside the numbers; what is there already is not waited for."""
    if isinstance(loss, DTensor):
        loss = loss.full_tensor()
    if isinstance(loss, Tensor) and loss.device.type != "cpu":
        return loss.reshape(()).to(beside.device, beside.dtype)
    if isinstance(loss, Tensor) and beside.device == loss.device:
        return loss.reshape(()).to(beside.dtype)
    return torch.full_like(beside, float(loss))


def _note(before: dict[str, Tensor], after: dict[str, Tensor], measured: Measured, verdict: Verdict) -> Tensor:
    """What ``read_updates`` tells of an update."""
    slope = before["previous_slope"]
    changes = [after[name] - before[name] for name in ("restarts", "skipped")]
    return torch.stack([
        torch.full_like(slope, math.nan) if measured.loss is None else measured.loss, before["step_size"],
        torch.where(slope > 0, measured.current / slope, math.nan), changes[0], verdict.limit, changes[1],
        after["alpha"], after["restarts"],
    ])  # fmt: skip


def _move(x: Tensor, u: Tensor, kept: Tensor | None, along: Tensor, generator: torch.Generator | None) -> None:
    """x ← kept·x + along·u, in place and rounded once; None for 1. With a generator bfloat16 is rounded at random."""
    moved = x.to(along.dtype)  # x itself, where it is not of half precision
    if kept is not None:
        moved = moved.mul_(kept)
    moved = moved.addcmul_(u.to(along.dtype), along)
    if x.dtype == torch.bfloat16 and generator is not None:
        moved = stochastically_rounded(moved, generator)
    if moved is not x:
        x.copy_(moved)


def _share_lost(x: Tensor, u: Tensor, along: Tensor) -> Tensor:
    """``tensors.lost_in_rounding`` of one tensor."""
    moves = u != 0
    stays = (x.float() + along * u.float()).to(x.dtype) == x
    return (moves & stays).sum() / moves.sum().clamp(min=1)
