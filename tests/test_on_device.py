"""hf_elra.optim.on_device, decisions and device_numbers: elra_spectral without waiting for the device."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from hf_elra import ConfigurationError, ELRASpectral

SHAPES = [(4, 6), (5,), (3, 5, 4), (7, 4), (0, 3), ()]
"""A matrix, a vector, stacked experts, a table, an empty parameter, a number."""
EVENTS = [
    *["plain"] * 6, "spike", "small_spike", "nothing", "nan_loss", "nan_gradient", "inf_gradient", "other_level",
    "end_cycle", "no_loss", "half_rate", "frozen_group", "all_frozen", "missing", "all_missing", "resting",
]  # fmt: skip
arguments = st.fixed_dictionaries(
    {
        "lr": st.sampled_from([1e-7, 1e-3, 0.1]),
        "momentum": st.sampled_from([0.0, 0.9]),
        "warmup": st.sampled_from([0, 3]),
        "max_correction": st.sampled_from([1.0, 4.0]),
        "max_relative_step": st.sampled_from([0.5, 0.01]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "soft_restart": st.booleans(),
        "initial_restart_ratio": st.sampled_from([None, 1.1]),
    }
)


class Walker:
    """An optimizer over parameters of all kinds, in two groups."""

    def __init__(self, start, arguments, on_device):
        self.params = [nn.Parameter(x.clone()) for x in start]
        groups = [{"params": self.params[:2]}, {"params": self.params[2:], "lr": 0.5 * arguments["lr"]}]
        tables, experts = self.params[3:4], self.params[2:3]
        self.on_device = on_device
        self.made = ELRASpectral(
            groups, embeddings=tables, experts=experts, on_device=on_device,
            lr_bounds=(1e-9, 1.0), **arguments,
        )  # fmt: skip

    def step(self, loss, gradients, rates):
        for p, g in zip(self.params, gradients, strict=True):
            p.grad = None if g is None else g.clone()
        for group, rate in zip(self.made.param_groups, rates, strict=True):
            group["lr"] = rate * group["base_lr"]
        self.made.step(**({} if loss is None else {"loss": torch.tensor(loss, dtype=torch.float64)}))

    def numbers(self):
        """Everything that is remembered as a number, flat."""
        scalars = self.made._numbers()

        def flat(value):
            if isinstance(value, dict):
                return [x for key in sorted(value) for x in flat(value[key])]
            return [x for v in value for x in flat(v)] if isinstance(value, list) else [value]

        of_groups = [[group[name] for name in ("step_size", "step_factor", "step_decay", "alpha")]
                     for group in self.made.param_groups]  # fmt: skip
        return flat({**scalars, "groups": of_groups})


def same_numbers(ours, others):
    for one, other in zip(ours, others, strict=True):
        if isinstance(other, float) and not math.isnan(other):
            assert one == pytest.approx(other, rel=1e-7, abs=1e-12)
        elif not isinstance(other, float):
            assert one == other


@settings(max_examples=60, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate))
@given(
    arguments=arguments,
    sequence=st.lists(st.sampled_from(EVENTS), min_size=5, max_size=50),
    noise=st.sampled_from([0.1, 3.0]),
    epoch=st.sampled_from([None, 20]),
    seed=st.integers(0, 2**31),
)
@pytest.mark.filterwarnings("ignore:ELRASpectral was not told the loss")
def test_both_paths_are_one(arguments, sequence, noise, epoch, seed):
    """Also where numbers are read, changed or saved, and loaded by the other one, at any moment."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    start = [random(*shape) for shape in SHAPES]
    curvatures = [torch.rand(shape, generator=generator, dtype=torch.float64) + 0.1 for shape in SHAPES]
    host, device = (Walker(start, arguments, on_device) for on_device in (False, True))
    host.made.updates_per_epoch = device.made.updates_per_epoch = epoch
    level = 0.0
    for number, event in enumerate(sequence):
        points = [p.detach() for p in host.params]
        gradients = [c * x + noise * random(*x.shape) for c, x in zip(curvatures, points, strict=True)]
        level += 1e3 * (event == "other_level")
        loss = level + sum(float((c * x.square()).sum() / 2) for c, x in zip(curvatures, points, strict=True))
        loss += {"spike": 1e6, "small_spike": 30.0, "nothing": math.nan, "nan_loss": math.nan}.get(event, 0.0)
        if event == "nothing":
            gradients = [torch.zeros_like(g) for g in gradients]
        if event.endswith("_gradient"):
            gradients[2][1, 1] = math.nan if event == "nan_gradient" else -math.inf
        if event == "resting":
            gradients[0].zero_()
            gradients[2][1], gradients[3][2] = 0.0, 0.0
        if event == "missing":
            gradients[number % 3] = None
        if event == "all_missing":
            gradients = [None] * len(gradients)
        rates = {"half_rate": (0.5, 0.5), "frozen_group": (1.0, 0.0), "all_frozen": (0.0, 0.0)}.get(event, (1.0, 1.0))
        for walker in (host, device):
            if event == "end_cycle":
                walker.made.end_cycle()
            walker.step(None if event == "no_loss" else loss, gradients, rates)
        for p, q in zip(device.params, host.params, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
        if number % 4 == 3:
            same_numbers(device.numbers(), host.numbers())
            assert device.made.state_dict()["state"].keys() == host.made.state_dict()["state"].keys()
    same_numbers(device.numbers(), host.numbers())
