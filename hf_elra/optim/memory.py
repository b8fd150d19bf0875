"""Memory layouts: what is kept of the last update, and where. One vector beside parameters and gradients, not two.

A layout knows how to keep a step's direction u_{t-1}, to give it back, and to take the step back. Sums and updates are
those of ``tensors.py``; when a step is taken back is decided in ``guards.py``.

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
    """The parameters of a group that take part in something.

    Attributes:
        params: the parameters.
        states: the optimizer's state of each.
        group: their group; of the last step ``step_size`` and ``step_decay`` are used.
        rounding_seed: of stochastic rounding, as for ``tensors.descend``.
    """

    params: Sequence[Tensor]
    states: Sequence[dict[str, Any]]
    group: dict[str, Any]
    rounding_seed: int | None = None


class DirectionMemory:
    """Keeps the last direction, whose tensors nobody else has.

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
        """Whether what is kept was changed since by somebody else, or may be."""
        return False

    def advance(self, part: Part, directions: Sequence[Tensor]) -> None:
        """Take the step that the group tells, and keep it."""
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
            part: of the last step.
            new_step_size: α'.
            kept: k; 1 where weight decay does not depend on α.
        """
        moved = [(p, s[self.key]) for p, s in zip(part.params, part.states, strict=True) if self.key in s]
        params, directions = [p for p, _ in moved], [u for _, u in moved]
        back = new_step_size - kept * part.group["step_size"]
        self._descend(part._replace(params=params), directions, back, 1 - kept)

    def finish(self) -> None:
        """Wait until all that is kept is where it belongs."""

    def release_gradients(self, part: Part) -> None:
        """Copy what is kept of gradients that are about to be zeroed in place."""


class GradientMemory(DirectionMemory):
    """Keeps the last gradient, which is not copied where the tensor itself can be kept.

    After ``zero_grad()`` (which sets gradients to None) nobody else uses it. Where somebody does, e.g. because the
    gradient lies in a bucket of DistributedDataParallel, it is copied. Where it turns out that a kept gradient was
    written to, or that the next one lies in the same memory, the last step is forgotten once, with a warning, and from
    then on all are copied.

    Args:
        copies: always copy.
        foreach: as for ``tensors.descend``.
    """

    def __init__(self, *, copies: bool = False, foreach: bool | None = None) -> None:
        super().__init__(foreach=foreach)
        self.copies = copies
        # Of gradients that were kept as they are, by the id of their parameter: a weak reference, and the version.
        self._versions: dict[int, tuple[Any, int]] = {}

    def overwritten(self, part: Part) -> bool:
        """Whether a kept gradient was changed since, or may be; then all are copied from now on."""
        for state, p in zip(part.states, part.params, strict=True):
            kept = state.get(self.key)
            if kept is not None and self._is_used_by_others(p, kept):
                self._copy_from_now_on()
                return True
        return False

    def _is_used_by_others(self, p: Tensor, kept: Tensor) -> bool:
        """Whether ``kept``, once the gradient of ``p``, was written to or lies where the new gradient lies."""
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
        """Whether a direction cannot be kept as it is: part of a larger piece of memory, or of an autograd graph."""
        return self.copies or local(direction).requires_grad or _is_part(direction)

    def adopt(self, states: Sequence[dict[str, Any]], params: Sequence[Tensor], directions: Sequence[Tensor]) -> None:
        """Keep these tensors themselves."""
        for state, p, u in zip(states, params, directions, strict=True):
            state[self.key] = u
            self._versions[id(p)] = (weakref.ref(u), local(u)._version)

    def tensors(
        self, states: Sequence[dict[str, Any]], params: Sequence[Tensor], *, writable: bool = False
    ) -> list[Tensor]:
        """The kept tensors; with ``writable`` none that somebody else gave us, but copies of these or new ones."""
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
        """As of every memory, one parameter at a time."""
        back = new_step_size - kept * part.group["step_size"]
        for p, u in zip(part.params, self.directions(part), strict=True):
            if u is not None:
                self._descend(part._replace(params=[p]), [u.to(p.device)], back, 1 - kept)


class PointMemory(GradientMemory):
    """Keeps the last point x_{t-1} (ELRA, section 3.6), so that the way back is exact in any type.

    Weight decay comes first and the decayed point is kept. The direction is the step that was really taken,
    (x_{t-1} - x_t)/α: in float64 that of the gradient to rounding, in bfloat16 what rounding left of it. Where that is
    nothing, nothing is learnt, so that bfloat16 parameters need stochastic rounding.
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
        """Never: the point is a copy."""
        return False

    def advance(self, part: Part, directions: Sequence[Tensor]) -> None:
        """Decay, keep the point, then step."""
        if not part.params:
            return
        rounded = part.rounding_seed is None and any(p.dtype == torch.bfloat16 for p in part.params)
        if rounded and not self._warned:
            self._warned = True
            warn_user(
                "memory='point' finds the last step from what it did to the parameters; of bfloat16 ones rounding "
                "leaves little of a short step. Pass stochastic_rounding=True."
            )
        self._descend(part, directions, 0.0, part.group["step_decay"])
        kept = self.tensors(part.states, part.params)
        torch._foreach_copy_([local(x) for x in kept], [local(p) for p in part.params])
        self._descend(part, directions, part.group["step_size"], 0.0)

    def release_gradients(self, part: Part) -> None:
        """Nothing: no gradient is kept."""

    def retrace(self, part: Part, new_step_size: float, kept: float) -> None:
        """x ← k·(1 - d)·x_{t-1} - new_step_size·u, of which (1 - d)·x_{t-1} is what is kept."""
        for state, p, u in zip(part.states, part.params, self.directions(part), strict=True):
            if u is None:
                continue
            local(p).copy_(local(state[self.key]))
            self._descend(part._replace(params=[p]), [u], new_step_size, 1 - kept)


class OffloadMemory(GradientMemory):
    """Keeps the last direction in host memory, pinned for a GPU: beside the model it holds nothing there.

    It is brought back one parameter at a time, the next one on its way while one is used, and it is written while the
    next forward pass runs. Gradients that always lie in the same memory are waited for instead. Not for sharded
    parameters, whose state must be sharded like them.
    """

    def __init__(self, *, copies: bool = False, foreach: bool | None = None) -> None:
        super().__init__(copies=True, foreach=foreach)
        self._streams: dict[torch.device, Any] = {}
        self._waits = False

    def overwritten(self, part: Part) -> bool:
        """Whether a gradient was written to while it was on its way; then these ways are waited for from now on."""
        for p in part.params:
            reference, _ = self._versions.get(id(p), (lambda: None, 0))
            source = reference()
            if source is not None and not self._waits and self._is_used_by_others(p, source):
                self._waits = True
                self._copy_from_now_on()
                return True
        return False

    def finish(self) -> None:
        """Wait for what is on its way to the host."""
        for stream in self._streams.values():
            stream.synchronize()

    def release_gradients(self, part: Part) -> None:
        """Let zeroing in place come after the copies that are on their way."""
        for device, stream in self._streams.items():
            torch.cuda.current_stream(device).wait_stream(stream)
        self._versions.clear()

    def _stream(self, device: torch.device) -> Any:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]

    def directions(self, part: Part) -> Iterator[Tensor | None]:
        """Yield u_{t-1} on the parameters' device, the next one on its way."""
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
            if kept is None or kept.device.type != "cpu" or kept.is_pinned() != p.is_cuda:  # as after loading
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
    """Whether a tensor is part of a larger piece of memory, which somebody else may write to."""
    own = local(tensor)
    return own._is_view() or own.untyped_storage().nbytes() > own.numel() * own.element_size()


MEMORIES: dict[str, type[GradientMemory]] = {
    "gradient": GradientMemory,
    "point": PointMemory,
    "offload": OffloadMemory,
}
