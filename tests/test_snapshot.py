"""hf_elra.optim.snapshot: passes through a model that leave nothing behind."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from hf_elra.optim.snapshot import nothing_changes, random_numbers_of, unchanged


class Rotary(nn.Module):
    """Positions in a buffer that grows with the longest input, as rotary embeddings keep them."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.longest = 0
        if how != "registers":
            self.register_buffer("cos", torch.empty(0), persistent=False)
        self.register_buffer("scale", torch.ones(2))
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        if x.shape[0] > self.longest or self.how == "shrinks":
            self.longest = self.noted = x.shape[0]
            table = torch.cos(torch.arange(float(x.shape[0])))
            if self.how == "resizes":
                self.cos.resize_(table.shape).copy_(table)
            elif self.how == "replaces":
                self.cos = table
            else:
                self.register_buffer("cos", table, persistent=False)
                self.register_buffer("scale", self.scale * 2, persistent=False)  # another tensor of the same shape
        return x * self.cos[: x.shape[0]].view(-1, *[1] * (x.dim() - 1)) * self.weight


def held(model):
    return {
        "buffers": [(name, id(b), b.clone()) for name, b in model.named_buffers()],
        "saved": list(model.state_dict()),
        "longest": model.longest,
        "has noted": hasattr(model, "noted"),
    }


@pytest.mark.parametrize("how", ["registers", "resizes", "replaces", "expands", "shrinks"])
@pytest.mark.parametrize("fails", [False, True])
def test_buffers_and_what_is_noted_about_them_come_back(how, fails):
    model = Rotary(how)
    for length in (None, 4):
        if length is not None:
            model(torch.ones(length))
        before = held(model)
        for other in (9, 2):
            try:
                with unchanged(model):
                    model(torch.ones(other))
                    model(torch.ones(11))
                    if fails:
                        raise KeyError
            except KeyError:
                pass
            after = held(model)
            assert [b[:2] for b in after["buffers"]] == [b[:2] for b in before["buffers"]]
            assert all(torch.equal(a[2], b[2]) for a, b in zip(after.pop("buffers"), before["buffers"], strict=True))
            assert after == {name: value for name, value in before.items() if name != "buffers"}
        model(torch.ones(6))  # goes on as if nothing had been


def test_values_shared_buffers_and_buffers_of_inference_come_back():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3), Rotary("replaces"))
    model[1].running_mean = model[0].running_mean
    with torch.inference_mode():
        model[2](torch.ones(3))
    assert model[2].cos.is_inference()
    before = {name: b.clone() for name, b in model.named_buffers()}
    with unchanged(model):
        model(torch.randn(5, 3))
        with torch.inference_mode():
            model[2].cos.zero_()
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    assert model[1].running_mean is model[0].running_mean
    with unchanged(model, but={model[0]}):
        model[:2](torch.randn(5, 3))
    assert model[0].num_batches_tracked == 1
    assert model[1].num_batches_tracked == 0


def test_random_numbers_go_on_as_if_nothing_had_been():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    model = nn.Linear(1, 1)
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    expected = draw()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    with unchanged(model, random_state=True):
        draw()
    assert draw() == expected
    with unchanged(model):
        draw()
    assert draw() != expected


@pytest.mark.parametrize("how", ["registers", "resizes", "replaces"])
def test_everything_stays_where_that_is_asked_for(how):
    kept, plain = Rotary(how), Rotary(how)
    torch.manual_seed(0)
    with unchanged(kept, random_state=True) as keep:
        kept(torch.randn(5))
        keep()
    drawn = torch.rand(3)
    torch.manual_seed(0)
    plain(torch.randn(5))
    assert torch.equal(torch.rand(3), drawn)
    assert kept.longest == plain.longest == 5
    for (name, buffer), (other, expected) in zip(kept.named_buffers(), plain.named_buffers(), strict=True):
        assert name == other
        assert torch.equal(buffer, expected)


class Everything(nn.Module):
    """Draws random numbers, and has BatchNorm statistics."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))

    def forward(self, x):
        self.layers[0].register_forward_hook(lambda *_: None)
        self.layers[0].register_full_backward_hook(lambda *_: None)
        return self.layers(x)


@pytest.mark.parametrize("kept", [False, True])
def test_a_trial_of_a_pass_and_back_leaves_nothing_behind(kept):
    torch.manual_seed(0)
    model = Everything()
    model.layers[2].eval()
    model.layers[0].weight.grad = torch.ones(3, 3)

    def state():
        return {
            "buffers": torch.cat([b.flatten().float() for b in model.buffers()]).tolist(),
            "gradients": [None if p.grad is None else p.grad.clone().tolist() for p in model.parameters()],
            "training": [m.training for m in model.modules()],
            "hooks": (len(model.layers[0]._forward_hooks), len(model.layers[0]._backward_hooks)),
            "random": torch.get_rng_state().tolist(),
        }

    before, gradient = state(), model.layers[0].weight.grad
    with nothing_changes(model) as keep:
        model.train()
        assert model.layers[0].weight.grad is None
        model(torch.randn(4, 3)).sum().backward()
        if kept:
            keep()
    after = state()
    assert [name for name in before if before[name] == after[name]] == ([] if kept else list(before))
    assert (model.layers[0].weight.grad is gradient) != kept


def test_random_numbers_go_on_from_one_point_as_often_as_wanted():
    put_back = random_numbers_of(nn.Linear(2, 2))
    drawn = []
    for _ in range(3):
        put_back()
        drawn.append((torch.rand(()).item(), random.random(), float(np.random.rand())))
    assert drawn[0] == drawn[1] == drawn[2]
