"""Which updates ELRA makes in the kernels of ``triton.py``.

This is a mixin of ``ELRA``, which makes all other updates itself. How its numbers get to the device and back is in
``device_numbers.py``.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from hf_elra.errors import ConfigurationError, warn_user
from hf_elra.optim.base import shares
from hf_elra.optim.device_numbers import NumbersOnDevice
from hf_elra.optim.memory import MEMORIES, GradientMemory
from hf_elra.optim.tensors import is_dense, layout, squares_and_products

if TYPE_CHECKING:
    from hf_elra.optim.kernels.triton import FusedUpdate, Launch


class UpdatesOnDevice(NumbersOnDevice):
    """Makes ELRA's updates in kernels."""

    _kernels: FusedUpdate | None = None
    _kernel_error: str | None = None

    # ---- numbers ----

    @property
    def _there(self) -> FusedUpdate | None:
        return self._kernels

    @property
    def _is_replayed(self) -> bool:
        return bool(self.param_groups[0]["capturable"])

    def _push(self, device: torch.device) -> None:
        assert self._kernels is not None
        self._kernels.push(self.param_groups[0]["scalars"], device)

    def _pull(self) -> None:
        assert self._kernels is not None
        scalars = self.param_groups[0]["scalars"]
        self._kernels.pull(scalars)
        weights = shares([group["step_factor"] for group in self.param_groups])
        for group, weight in zip(self.param_groups, weights, strict=True):
            group["alpha"], group["step_size"] = scalars["alpha"], scalars["step_size"] * weight

    # ---- checkpoints ----

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but ``memory``, ``fused``, ``foreach``, ``capturable`` and ``stochastic_rounding`` stay.

        If the saved memory layout keeps something else, the last step is forgotten.
        """
        key = self._memory.key
        super().load_state_dict(state_dict)
        if any(key not in state for state in self.state.values() if state):
            self.state.clear()
            self._numbers_to_change()["previous_slope"] = None
        self._renew_numbers_on_device()

    # ---- what a training loop calls ----

    @property
    def asks_before_backward(self) -> bool:
        """Not where numbers are on the device, as asking would wait for it."""
        return super().asks_before_backward and self._kernels is None

    # ---- tensors ----

    @property
    def _memory(self) -> GradientMemory:
        """The memory layout, made when it is first needed, as copying and unpickling an optimizer make none."""
        if self._made_memory is None:
            settings = self.param_groups[0]
            self._made_memory = MEMORIES[settings["memory"]](copies=settings["capturable"], foreach=settings["foreach"])
        return cast(GradientMemory, self._made_memory)

    # ---- the update ----

    def _update_on_device(
        self,
        params: list[list[Tensor]],
        gradients: list[list[Tensor]],
        factors: list[float],
        loss: Tensor | float | None,
    ) -> bool:
        """Update in kernels if possible; after a restart ``p.grad`` holds the direction that is tried again."""
        if not self._takes_kernels(params, gradients):
            return False
        if self._looks_for_rounding and not self.param_groups[0]["capturable"]:  # with the size of the last step
            self._numbers()
            for group, group_params, group_gradients in zip(self.param_groups, params, gradients, strict=True):
                self._warn_of_rounding(group_params, group_gradients, group["step_size"])
        return self._update_with_kernels(params, gradients, factors, loss)

    def _takes_kernels(self, params: list[list[Tensor]], gradients: list[list[Tensor]]) -> bool:
        """Return whether this update can be made in kernels; the first one never can.

        Raises:
            ConfigurationError: ``fused=True``, and no update can be made in kernels.
            RuntimeError: a CUDA graph is being captured, and this update cannot be part of one.
        """
        settings = self.param_groups[0]
        used = [p for group in params for p in group]
        if not used or settings["fused"] is False or (settings["fused"] is None and not all(p.is_cuda for p in used)):
            return False
        reason = self._why_no_kernels(used)
        if reason is not None and settings["fused"]:
            raise ConfigurationError(f"fused=True cannot be done: {reason}. Leave fused out.")
        ready = (
            reason is None
            and settings["scalars"]["moved"]
            and all(
                (self._memory.key in self.state.get(p, {})) == (p.grad is not None)
                for group in self.param_groups
                for p in group["params"]
            )
            and all(
                p.dtype == g.dtype and is_dense(p)
                for p, g in zip(used, (g for group in gradients for g in group), strict=True)
            )
        )
        if used[0].is_cuda and torch.cuda.is_current_stream_capturing():
            in_force = self._kernels is not None and self._kernels.in_force
            if not (ready and in_force and self._memory.copies):
                raise RuntimeError(
                    f"ELRA cannot be captured in a CUDA graph now{f': {reason}' if reason else ''}. It needs "
                    "capturable=True, and two updates after the optimizer was made or changed."
                )
        return ready

    def _why_no_kernels(self, used: list[Tensor]) -> str | None:
        settings = self.param_groups[0]
        if not self.parts().direction.is_gradient:
            return "the direction is not the gradient"
        if settings["memory"] != "gradient":
            return f"memory={settings['memory']!r} has no kernels"
        if settings["restart_window"] is not None:
            return f"restart_window={settings['restart_window']} has no kernels"
        if self._kernel_error is None:
            try:
                from hf_elra.optim.kernels import triton

                return triton.why_not(used)
            except ImportError as error:  # do not try again
                self._kernel_error = str(error)
        return f"Triton is missing or failed ({self._kernel_error})"

    def _update_with_kernels(
        self,
        params: list[list[Tensor]],
        gradients: list[list[Tensor]],
        factors: list[float],
        loss: Tensor | float | None,
    ) -> bool:
        """Queue the update; return False, with nothing done, if kernels do not work on this machine."""
        from hf_elra.optim.kernels.triton import FusedUpdate

        settings = self.param_groups[0]
        if self._kernels is None:
            self._kernels = FusedUpdate()
        kernels = self._kernels
        device = next(p for group in params for p in group).device
        if not kernels.in_force:
            used = [p for group in params for p in group]
            settings["scalars"]["weight_square"] = squares_and_products(used, [None] * len(used))[0]
            self._push(device)
        launches = self._launches(params, gradients, factors)
        try:
            with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
                kernels.update(launches, loss, max(factors), self.settings(), self.process_group)
        except Exception as error:
            if settings["fused"] or kernels.has_worked or kernels.has_moved:
                raise
            text = (str(error).strip().splitlines() or [""])[-1]
            self._kernel_error, kernels.in_force = f"{type(error).__name__}: {text[:200]}", False
            warn_user(
                f"ELRA updates parameters without its Triton kernels, which is slower: {self._kernel_error}. "
                "Pass fused=False to do without them from the start."
            )
            return False
        kernels.has_worked = True
        for launch in launches:
            if not launch.copy:
                self._memory.adopt([self.state[p] for p in launch.params], launch.params, launch.gradients)
        for group, factor in zip(self.param_groups, factors, strict=True):
            group["step_factor"], group["step_decay"] = factor, group["weight_decay"] if factor != 0 else 0.0
        return True

    def _launches(
        self, params: list[list[Tensor]], gradients: list[list[Tensor]], factors: list[float]
    ) -> list[Launch]:
        """Sort tensors by group, by type, and by whether their gradients have to be copied."""
        from hf_elra.optim.kernels.triton import Launch

        memory, seen = self._memory, set()
        weights, last_weights = shares(factors), shares([group["step_factor"] for group in self.param_groups])
        launches = []
        for group, group_params, group_gradients, weight, last_weight, factor in zip(
            self.param_groups, params, gradients, weights, last_weights, factors, strict=True
        ):
            lots: dict[Any, list[tuple[Tensor, ...]]] = {}
            for p, g in zip(group_params, group_gradients, strict=True):
                if p.numel() == 0:
                    continue
                copy = memory.must_copy(g) or g.data_ptr() in seen  # two parameters may share a gradient
                seen.add(g.data_ptr())
                state = self.state[p]
                state[memory.key] = _like(p, state[memory.key])
                (kept,) = memory.tensors([state], [p], writable=copy)
                members = p, _like(p, g), kept
                aligned = p.numel() % 16 == 0 and all(t.data_ptr() % 16 == 0 for t in members)
                lots.setdefault((p.dtype, aligned, copy), []).append(members)
            for (_, aligned, copy), lot in lots.items():
                ps, gs, us = zip(*lot, strict=True)
                decay = group["weight_decay"] if factor != 0 else 0.0
                launches.append(Launch(ps, gs, us, aligned, copy, weight, last_weight, decay))
        return launches


def _like(p: Tensor, tensor: Tensor) -> Tensor:
    """Return a tensor in the memory order of ``p``: itself, or a copy."""
    return tensor if layout(tensor) == layout(p) else torch.empty_like(p).copy_(tensor)
