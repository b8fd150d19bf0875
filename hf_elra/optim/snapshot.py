"""Trial passes leave nothing behind: whatever they change in a model is restored.

Parameters are not restored, since the caller knows which ones it changes. ``averaging.py`` and ``trainer/trials.py``
make such passes.
"""

from __future__ import annotations

import contextlib
import functools
import random
import sys
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_HOOKS = tuple(name for name in sorted(_OF_EVERY_MODULE) if "_hooks" in name)


@contextlib.contextmanager
def unchanged(
    model: nn.Module, *, but: Collection[nn.Module] = (), random_state: bool = False
) -> Iterator[Callable[[], None]]:
    """Restore the buffers of a model after a ``with`` block, whatever passes are made in it.

    A module may register, drop, replace or resize its buffers meanwhile, as caches of positions do. The other
    attributes of such a module are restored too, so that a cache and its recorded length stay together.

    Args:
        model: the model that is called in the block.
        but: modules of it whose buffers are not restored.
        random_state: whether random numbers continue after the block as if it had drawn none: those of torch on the
            CPU and on the model's devices, of Python, and of NumPy if it is loaded.

    Yields:
        A function. If it is called, everything stays as the block made it.
    """
    keep: list[bool] = []
    kept: dict[int, tuple[Tensor, Tensor]] = {}
    modules: list[tuple[nn.Module, dict[str, Any], dict[str, Any], set[str]]] = []
    for module in model.modules():
        if module in but:
            continue
        buffers = dict(module._buffers)
        attributes = {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}
        modules.append((module, buffers, attributes, set(module._non_persistent_buffers_set)))
        for buffer in buffers.values():
            if buffer is not None and id(buffer) not in kept:
                kept[id(buffer)] = buffer, buffer.detach().clone()
    put_random_numbers_back = random_numbers_of(model) if random_state else None
    try:
        yield functools.partial(keep.append, True)
    finally:
        if put_random_numbers_back is not None and not keep:
            put_random_numbers_back()
        if keep:
            kept, modules = {}, []
        resized = {number for number, (buffer, values) in kept.items() if buffer.shape != values.shape}
        for buffer, values in kept.values():
            with torch.inference_mode(buffer.is_inference()), torch.no_grad():
                if buffer.shape != values.shape:
                    buffer.resize_(values.shape)
                buffer.copy_(values)
        for module, buffers, attributes, not_saved in modules:
            now = module._buffers
            same = now.keys() == buffers.keys() and all(now[name] is buffers[name] for name in buffers)
            if same and not any(id(buffer) in resized for buffer in buffers.values()):
                continue
            now.clear()
            now.update(buffers)
            module._non_persistent_buffers_set.clear()
            module._non_persistent_buffers_set.update(not_saved)
            for name in vars(module).keys() - _OF_EVERY_MODULE - attributes.keys():
                del vars(module)[name]
            vars(module).update(attributes)


@contextlib.contextmanager
def nothing_changes(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Restore a model after a ``with`` block, whatever passes forward and back are made in it.

    Restored are buffers with BatchNorm statistics, random numbers (:func:`unchanged`), gradients, hooks of modules, and
    whether modules are in training mode. The block begins without gradients.

    Args:
        model: the model that is called in the block.

    Yields:
        A function. If it is called, everything stays as the block made it.
    """
    keep: list[bool] = []
    gradients = [(p, p.grad) for p in model.parameters()]
    modules = [(m, m.training, [dict(getattr(m, name)) for name in _HOOKS]) for m in model.modules()]
    with unchanged(model, random_state=True) as keep_the_rest:

        def keep_all() -> None:
            keep.append(True)
            keep_the_rest()

        try:
            for p, _ in gradients:
                p.grad = None
            yield keep_all
        finally:
            for p, gradient in gradients if not keep else ():
                p.grad = gradient
            for module, mode, hooks in modules if not keep else ():
                module.training = mode
                for name, before in zip(_HOOKS, hooks, strict=True):
                    if (now := getattr(module, name)).keys() != before.keys():
                        now.clear()
                        now.update(before)


def random_numbers_of(model: nn.Module) -> Callable[[], None]:
    """Return a function that sets random numbers back to the present state whenever it is called.

    These are random numbers of torch on the CPU and on the model's devices, of Python, and of NumPy if it is loaded.
    """
    numpy = sys.modules.get("numpy")  # a library that is not loaded draws nothing
    of_python, of_torch = random.getstate(), torch.get_rng_state()
    of_numpy = None if numpy is None else numpy.random.get_state()
    of_devices = [(device, _of_device("get", device)) for device in _devices_with_generators(model)]

    def put_back() -> None:
        random.setstate(of_python)
        torch.set_rng_state(of_torch)
        if numpy is not None:
            numpy.random.set_state(of_numpy)
        for device, state in of_devices:
            _of_device("set", device, state)

    return put_back


def _devices_with_generators(model: nn.Module) -> set[torch.device]:
    """Return the devices of a model's tensors that have their own random numbers."""
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    return {device for device in devices if device.type not in ("cpu", "meta")}


def _of_device(what: str, device: torch.device, *state: Tensor) -> Any:
    """Get or set the state of the generator of a device; Apple's MPS has one device, which has no number."""
    function = getattr(torch.get_device_module(device.type), f"{what}_rng_state")
    return function(*state) if device.type == "mps" else function(*state, device)
