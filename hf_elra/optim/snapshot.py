"""Trial passes leave nothing behind: what passes change of a model comes back.

Parameters are not looked after: whoever changes them knows which. Who makes trial passes, and why, is not here
(``averaging.py``, ``trainer/trials.py``).
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
    """Let a model's buffers be after a ``with`` block what they were before it, whatever passes are made in it.

    A module may register, drop, replace or resize its buffers meanwhile, as caches of positions grow. Such a module
    gets back its other attributes too, so that a cache and what is noted about it (how long it is) stay together.

    Args:
        model: what is called in the block.
        but: modules of it whose buffers are not looked after.
        random_state: whether random numbers go on after the block as if it had drawn none: those of torch on the CPU
            and on the model's devices, of Python, and of NumPy where it is loaded.

    Yields:
        a function to call where everything shall stay as the block made it.
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
    """Let a model be after a ``with`` block what it was before it, whatever passes forward and back are made in it.

    That is: buffers with BatchNorm statistics, random numbers (:func:`unchanged`), gradients, which there are none of
    at the beginning of the block, hooks of modules, and whether modules are in training mode.

    Args:
        model: what is called in the block.

    Yields:
        a function to call where everything shall stay as the block made it.
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
    """Return a function that lets random numbers go on from where they are now, as often as it is called.

    Those of torch on the CPU and on the model's devices, of Python, and of NumPy where it is loaded.
    """
    numpy = sys.modules.get("numpy")  # what is not loaded draws nothing
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
    """Devices of a model's tensors that draw random numbers of their own."""
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    return {device for device in devices if device.type not in ("cpu", "meta")}


def _of_device(what: str, device: torch.device, *state: Tensor) -> Any:
    """Get or set the state of a device's generator; Apple's MPS has one device and takes no number of it."""
    function = getattr(torch.get_device_module(device.type), f"{what}_rng_state")
    return function(*state) if device.type == "mps" else function(*state, device)
