"""Memory layouts: what is kept of the last update, and where. It is one vector beside parameters and gradients.

A layout keeps the direction u_{t-1} of a step, gives it back, and takes the step back. ``tensors.py`` has the sums and
updates; ``guards.py`` decides when a step is taken back.

==========  ===================================  =================================================================
layout      keeps                                exact
==========  ===================================  =================================================================
gradient    u_{t-1}, the gradient tensor itself  scalar products in any type; the way back to the last rounding of x
point       x_{t-1}, after weight decay          the way back to x_{t-1} in any type; products of what rounding left
                                                 of the step, so that bfloat16 needs stochastic rounding
offload     u_{t-1}, in host memory              as ``gradient``
==========  ===================================  =================================================================
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_elra.errors import ConfigurationError, warn_user
from hf_elra.optim.tensors import descend, local, squares_and_products


class Part(NamedTuple):
    """The parameters of a group that take part in an operation.

    Attributes:
        params: the parameters.
        states: the state that the optimizer keeps for each.
        group: their group, with ``step_size`` and ``step_decay`` of the last step.
        rounding_seed: seed of stochastic rounding, as for ``tensors.descend``.
    """

    params: Sequence[Tensor]
    states: Sequence[dict[str, Any]]
    group: dict[str, Any]
    rounding_seed: int | None = None


class DirectionMemory:
    """Keeps the last direction, in tensors that nobody else has.

    Args:
        foreach: as for ``tensors.descend``.
    """

    key = "previous_direction"

    def __init__(self, *, foreach: bool | None = None) -> None:
        self.foreach = foreach

    def directions(self, part: Part) -> Iterator[Tensor | None]:
        """Yield u_{t-1} of every parameter, None for those that did not move."""
        for state in part.states:
            yield state.get(self.key)

    def products(self, part: Part, gradients: Sequence[Tensor]) -> tuple[float, float]:
        """Return ‖G_t‖² and ⟨G_t, u_{t-1}⟩ over these parameters."""
        return squares_and_products(gradients, self.directions(part))

    def overwritten(self, part: Part) -> bool:
        """Return whether somebody else has changed what is kept, or may have."""
        return False

    def advance(self, part: Part, directions: Sequence[Tensor]) -> None:
        """Take the step with the numbers of the group, and keep its direction."""
        self._descend(part, directions, part.group["step_size"], part.group["step_decay"])
        self._keep(part, directions)

    def _descend(self, part: Part, directions: Sequence[Tensor], step_size: float, decay: float) -> None:
        descend(part.params, directions, step_size, decay, foreach=self.foreach, rounding_seed=part.rounding_seed)

    def _keep(self, part: Part, directions: Sequence[Tensor]) -> None:
        for state, u in zip(part.states, directions, strict=True):
            state[self.key] = u

    def retrace(self, part: Part, new_step_size: float, kept: float) -> None:
        """Go back to x_{t-1} and step from there with ``new_step_size`` instead of the group's.

        x_t = (1 - d)·x_{t-1} - α·u and x' = (1 - d')·x_{t-1} - α'·u, so x' = k·x_t - (α' - k·α)·u with
        k = (1 - d')/(1 - d): one scaling and one addition.

        Args:
            part: parameters of the last step.
            new_step_size: α'.
            kept: k; 1 if weight decay does not depend on α.
        """
        moved = [(p, s[self.key]) for p, s in zip(part.params, part.states, strict=True) if self.key in s]
        params, directions = [p for p, _ in moved], [u for _, u in moved]
        back = new_step_size - kept * part.group["step_size"]
        self._descend(part._replace(params=params), directions, back, 1 - kept)

    def finish(self) -> None:
        """Wait until all copies have arrived."""

    def release_gradients(self, part: Part) -> None:
        """Copy what is kept of gradients that are about to be zeroed in place."""


class GradientMemory(DirectionMemory):
    """Keeps the last gradient, without a copy if the tensor itself can be kept.

    After ``zero_grad()``, which sets gradients to None, nobody else uses the tensor. If somebody does, for example
    because it lies in a bucket of DistributedDataParallel, it is copied. If a kept gradient turns out to have been
    written to, or the next one lies in the same memory, the last step is forgotten once, with a warning, and all
    gradients are copied from then on.

    Args:
        copies: whether to copy always.
        foreach: as for ``tensors.descend``.
    """

    def __init__(self, *, copies: bool = False, foreach: bool | None = None) -> None:
        super().__init__(foreach=foreach)
        self.copies = copies
        # For gradients that were kept without a copy, by the id of their parameter: a weak reference, and the version.
        self._versions: dict[int, tuple[Any, int]] = {}

    def overwritten(self, part: Part) -> bool:
        """Return whether a kept gradient was changed, or may have been; if so, all are copied from now on."""
        for state, p in zip(part.states, part.params, strict=True):
            kept = state.get(self.key)
            if kept is not None and self._is_used_by_others(p, kept):
                self._copy_from_now_on()
                return True
        return False

    def _is_used_by_others(self, p: Tensor, kept: Tensor) -> bool:
        """Return whether ``kept``, once the gradient of ``p``, was written to or shares memory with the new one."""
        reference, version = self._versions.get(id(p), (lambda: None, 0))
        if reference() is not kept:
            return False
        old, new = local(kept), None if p.grad is None else local(p.grad)
        if old._version != version:
            return True
        if new is None or old.numel() == 0 or old.data_ptr() != new.data_ptr():
            return False
        # The very same tensor, untouched: step() was called twice. On a GPU a CUDA graph may have written to it unseen.
        return p.grad is not kept or old.is_cuda

    def _copy_from_now_on(self) -> None:
        self.copies = True
        self._versions.clear()
        warn_user(
            "A gradient that ELRA had kept is in use after step(): by zero_grad(set_to_none=False), by gradients that "
            "always lie in the same memory, or by a second step() with the same ones. The last step is forgotten, and "
            "gradients are copied from now on. Let zero_grad() set them to None, or pass capturable=True."
        )

    def _keep(self, part: Part, directions: Sequence[Tensor]) -> None:
        lots: dict[bool, list[tuple[dict[str, Any], Tensor, Tensor]]] = {}
        for state, p, u in zip(part.states, part.params, directions, strict=True):
            lots.setdefault(self.must_copy(u), []).append((state, p, u))
        for copy, lot in lots.items():
            chosen, ps, us = zip(*lot, strict=True)
            if copy:
                targets = self.tensors(chosen, ps, writable=True)
                torch._foreach_copy_([local(t) for t in targets], [local(u) for u in us])
            else:
                self.adopt(chosen, ps, us)

    def must_copy(self, direction: Tensor) -> bool:
        """Return whether a direction has to be copied, as part of a larger piece of memory or of an autograd graph."""
        return self.copies or local(direction).requires_grad or _is_part(direction)

    def adopt(self, states: Sequence[dict[str, Any]], params: Sequence[Tensor], directions: Sequence[Tensor]) -> None:
        """Keep these tensors themselves."""
        for state, p, u in zip(states, params, directions, strict=True):
            state[self.key] = u
            self._versions[id(p)] = (weakref.ref(u), local(u)._version)

    def tensors(
        self, states: Sequence[dict[str, Any]], params: Sequence[Tensor], *, writable: bool = False
    ) -> list[Tensor]:
        """Return the kept tensors; with ``writable``, copies or new tensors in place of those that we were given."""
        kept = []
        for state, p in zip(states, params, strict=True):
            if writable and self._versions.pop(id(p), None) is not None and self.key in state:
                state[self.key] = state[self.key].clone()
            if self.key not in state:
                state[self.key] = torch.empty_like(p, memory_format=torch.preserve_format)
            kept.append(state[self.key])
        return kept

    def release_gradients(self, part: Part) -> None:
        """Copy what is kept of gradients that are about to be zeroed in place."""
        for state, p in zip(part.states, part.params, strict=True):
            if p.grad is not None and state.get(self.key) is p.grad:
                state[self.key] = state[self.key].clone()
                self._versions.pop(id(p), None)

    def retrace(self, part: Part, new_step_size: float, kept: float) -> None:
        """Return the products of the base class, one parameter at a time."""
        back = new_step_size - kept * part.group["step_size"]
        for p, u in zip(part.params, self.directions(part), strict=True):
            if u is not None:
                self._descend(part._replace(params=[p]), [u.to(p.device)], back, 1 - kept)


class PointMemory(GradientMemory):
    """Keeps the last point x_{t-1} (ELRA, section 3.6), so that the way back is exact in any type.

    Weight decay comes first and the decayed point is kept. The direction is the step that was really taken,
    (x_{t-1} - x_t)/α: in float64 that of the gradient to rounding, in bfloat16 what rounding left of it. Nothing
    can be learnt from a step that rounding removed, so bfloat16 parameters need stochastic rounding.
    """

    key = "previous_point"
    _warned = False

    def directions(self, part: Part) -> Iterator[Tensor | None]:
        """Yield u_{t-1}, made one at a time."""
        step_size = part.group["step_size"]
        for state, p in zip(part.states, part.params, strict=True):
            if self.key not in state or step_size == 0:
                yield None
                continue
            x, start = local(p), local(state[self.key])
            wide = torch.promote_types(x.dtype, torch.float32)
            yield (start.to(wide) - x.to(wide)).div_(step_size)

    def products(self, part: Part, gradients: Sequence[Tensor]) -> tuple[float, float]:
        """Return ‖G_t‖² and ⟨G_t, u_{t-1}⟩, the latter from differences of points (ELRA, section 3.6)."""
        step_size = part.group["step_size"]
        kept = [state.get(self.key) if step_size != 0 else None for state in part.states]
        square, product = squares_and_products(gradients, kept, minus=part.params)
        return square, product / step_size if step_size != 0 else 0.0

    def overwritten(self, part: Part) -> bool:
        """Return False, since the point is a copy."""
        return False

    def advance(self, part: Part, directions: Sequence[Tensor]) -> None:
        """Decay the weights, keep the point, then take the step."""
        if not part.params:
            return
        rounded = part.rounding_seed is None and any(p.dtype == torch.bfloat16 for p in part.params)
        if rounded and not self._warned:
            self._warned = True
            warn_user(
                "memory='point' finds the last step by what it did to the parameters, and rounding to bfloat16 leaves "
                "little of a short step. Pass stochastic_rounding=True."
            )
        self._descend(part, directions, 0.0, part.group["step_decay"])
        kept = self.tensors(part.states, part.params)
        torch._foreach_copy_([local(x) for x in kept], [local(p) for p in part.params])
        self._descend(part, directions, part.group["step_size"], 0.0)

    def release_gradients(self, part: Part) -> None:
        """Do nothing, since no gradient is kept."""

    def retrace(self, part: Part, new_step_size: float, kept: float) -> None:
        """x ← k·(1 - d)·x_{t-1} - new_step_size·u, of which (1 - d)·x_{t-1} is what is kept."""
        for state, p, u in zip(part.states, part.params, self.directions(part), strict=True):
            if u is None:
                continue
            local(p).copy_(local(state[self.key]))
            self._descend(part._replace(params=[p]), [u], new_step_size, 1 - kept)


class OffloadMemory(GradientMemory):
    """Keeps the last direction in host memory, pinned for a GPU, which holds nothing beside the model.

    The direction is copied back one parameter at a time; the next copy runs while one is used. It is written while the
    next forward pass runs, or at once if gradients always lie in the same memory. Sharded parameters are refused, since
    their state must be sharded like them.
    """

    def __init__(self, *, copies: bool = False, foreach: bool | None = None) -> None:
        super().__init__(copies=True, foreach=foreach)
        self._streams: dict[torch.device, Any] = {}
        self._waits = False

    def overwritten(self, part: Part) -> bool:
        """Return whether a gradient was written to during its copy; if so, copies are waited for from now on."""
        for p in part.params:
            reference, _ = self._versions.get(id(p), (lambda: None, 0))
            source = reference()
            if source is not None and not self._waits and self._is_used_by_others(p, source):
                self._waits = True
                self._copy_from_now_on()
                return True
        return False

    def finish(self) -> None:
        """Wait for the copies to the host."""
        for stream in self._streams.values():
            stream.synchronize()

    def release_gradients(self, part: Part) -> None:
        """Make zeroing in place wait for the running copies."""
        for device, stream in self._streams.items():
            torch.cuda.current_stream(device).wait_stream(stream)
        self._versions.clear()

    def _stream(self, device: torch.device) -> Any:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]

    def directions(self, part: Part) -> Iterator[Tensor | None]:
        """Yield u_{t-1} on the device of the parameters, while the next one is copied."""
        waiting: Tensor | None = None
        pairs = list(zip(part.states, part.params, strict=True))
        for index, (state, p) in enumerate(pairs):
            current = waiting if index else self._fetch(state, p)
            if p.is_cuda:
                torch.cuda.current_stream(p.device).wait_stream(self._stream(p.device))
                if current is not None:
                    current.record_stream(torch.cuda.current_stream(p.device))
            waiting = self._fetch(*pairs[index + 1]) if index + 1 < len(pairs) else None
            yield current

    def _fetch(self, state: dict[str, Any], p: Tensor) -> Tensor | None:
        kept = state.get(self.key)
        if kept is None or not p.is_cuda:
            return kept
        with torch.cuda.stream(self._stream(p.device)):
            return kept.to(p.device, non_blocking=True)

    def _keep(self, part: Part, directions: Sequence[Tensor]) -> None:
        for state, p, u in zip(part.states, part.params, directions, strict=True):
            if isinstance(p, DTensor):
                raise ConfigurationError(
                    "memory='offload' cannot be used with sharded parameters (DTensor, as from FSDP2), whose state "
                    "must be sharded like them. Use memory='gradient' or 'point'."
                )
            kept = state.get(self.key)
            if kept is None or kept.device.type != "cpu" or kept.is_pinned() != p.is_cuda:  # this is so after loading
                state[self.key] = kept = torch.empty(p.shape, dtype=p.dtype, pin_memory=p.is_cuda)
            if not p.is_cuda:
                kept.copy_(u)
                continue
            stream, main = self._stream(p.device), torch.cuda.current_stream(p.device)
            stream.wait_stream(main)
            with torch.cuda.stream(stream):
                kept.copy_(u, non_blocking=True)
            u.record_stream(stream)
            if self._waits or _is_part(u):
                main.wait_stream(stream)
            else:
                self._versions[id(p)] = (weakref.ref(u), u._version)


def _is_part(tensor: Tensor) -> bool:
    """Return whether a tensor is part of a larger piece of memory, to which somebody else may write."""
    own = local(tensor)
    return own._is_view() or own.untyped_storage().nbytes() > own.numel() * own.element_size()


MEMORIES: dict[str, type[GradientMemory]] = {
    "gradient": GradientMemory,
    "point": PointMemory,
    "offload": OffloadMemory,
}
