"""Devices without float64, of which Apple's MPS is one: nothing of that type is made on them."""

import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from hf_elra import ELRA, ELRASpectral
from hf_elra.optim import base, tensors
from hf_elra.trainer import accounting, micro_batches
from tests.conftest import llama, trainer


class OnFakeMPS(torch.Tensor):
    """A tensor of the CPU that says it lies on mps, where float64 is an error."""

    device = property(lambda self: torch.device("mps"))

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(torch.device, lambda device: torch.device("cpu"), (args, kwargs or {}))
        out = super().__torch_function__(func, types, args, kwargs)
        tree_map_only(torch.Tensor, refuse_float64, out)
        return out


def refuse_float64(tensor):
    if tensor.dtype == torch.float64:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")


def on_fake_mps(shape, generator):
    return torch.nn.Parameter(torch.randn(shape, generator=generator).as_subclass(OnFakeMPS))


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        (ELRA, {}),
        (ELRA, {"memory": "point", "weight_decay": 1e-2, "foreach": False}),
        (ELRA, {"restart_window": 5}),
        (ELRASpectral, {"warmup": 5, "weight_decay": 0.1}),
        (ELRASpectral, {"warmup": 5, "momentum": 0.0}),
    ],
)
def test_an_update_makes_no_float64_on_the_device_and_is_that_of_the_cpu(kind, given):
    paths = []
    for fake in (True, False):
        generator = torch.Generator().manual_seed(0)
        make = on_fake_mps if fake else lambda s, g: torch.nn.Parameter(torch.randn(s, generator=g))
        params = [make(shape, generator) for shape in [(6, 4), (5,), (8, 4)]]
        more = {"embeddings": params[2:]} if kind is ELRASpectral else {}
        optimizer = kind([{"params": params[:2]}, {"params": params[2:], "lr": 5e-4}], **given, **more)
        rates = []
        for number in range(14):
            for p in params:
                p.grad = make(p.shape, generator).detach()
            if number == 9:
                params[0].grad = None
            loss = torch.tensor(1e4 if number in (3, 11) else 1.0)
            optimizer.step(loss=loss.as_subclass(OnFakeMPS) if fake else loss)
            rates.append(optimizer.alpha)
        assert optimizer.restarts > 0
        paths.append((rates, [p.detach().as_subclass(torch.Tensor) for p in params]))
    assert paths[0][0] == pytest.approx(paths[1][0], rel=1e-4)
    torch.testing.assert_close(paths[0][1], paths[1][1], rtol=1e-3, atol=1e-5)


def test_the_noise_scale_makes_no_float64_on_the_device():
    p = on_fake_mps((3, 2), torch.Generator().manual_seed(0))
    p.grad = torch.full((3, 2), 2.0).as_subclass(OnFakeMPS)
    assert float(micro_batches._gradient_square(types.SimpleNamespace(parameters=lambda: [p]))) == pytest.approx(24)


class NoFloat64(TorchDispatchMode):
    """Fails at whatever makes a float64 tensor."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, refuse_float64, out)
        return out


@pytest.mark.parametrize(
    "given",
    [
        {"optim": "elra", "elra_boost": True, "elra_control_cycle": "4ba"},
        {"optim": "elra_spectral"},
        {"optim": "elra", "elra_batch_control": "noise", "gradient_accumulation_steps": 2, "elra_control_cycle": "4ba"},
    ],
)
def test_a_trainer_makes_no_float64_on_a_device_without(tmp_path, given, monkeypatch):
    """The CPU stands in for that device; the host's own numbers are no tensors."""
    for module in (tensors, base, accounting, micro_batches):
        monkeypatch.setattr(module, "accumulates_in", lambda device: torch.float32)
    run = trainer(tmp_path, model=llama(), max_steps=12, **given)
    with NoFloat64():
        run.train()
    assert run.state.global_step == 12


def test_which_type_a_device_adds_up_in():
    assert tensors.accumulates_in(torch.device("mps", 0)) == torch.float32
    assert tensors.accumulates_in("cpu") == tensors.accumulates_in("cuda") == torch.float64
