"""hf_elra.optim.on_device, decisions and device_numbers: elra_spectral without waiting for the device."""

import contextlib
import copy
import math
import pickle
from unittest import mock

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_elra import ConfigurationError, ELRASpectral
from hf_elra.optim import decisions, many_tensors, on_device
from hf_elra.optim.directions.momentum import Momentum
from lib.cuda_graphs import WARM_UP, captured

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
        "max_correction": st.sampled_from([1.0, 4.0, None]),
        "max_drift": st.sampled_from([None, 0.3, 0.02]),
        "max_relative_step": st.sampled_from([0.5, 0.01]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "soft_restart": st.booleans(),
        "initial_restart_ratio": st.sampled_from([None, 1.1]),
    }
)


PLAIN = {
    "lr": 1e-3, "momentum": 0.9, "warmup": 3, "max_correction": 4.0, "max_relative_step": 0.5, "weight_decay": 0.1,
    "soft_restart": True, "initial_restart_ratio": 1.1,
}  # fmt: skip


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


@settings(max_examples=15, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate))
@given(
    arguments=arguments,
    sequence=st.lists(st.sampled_from(EVENTS), min_size=5, max_size=50),
    noise=st.sampled_from([0.1, 3.0]),
    epoch=st.sampled_from([None, 20]),
    together=st.booleans(),
    seed=st.integers(0, 2**31),
)
@example(
    arguments=PLAIN,
    sequence=[*["plain"] * 12, "spike", "plain", "spike", *["plain"] * 5, *["spike"] * 3, *["plain"] * 60],
    noise=3.0,
    epoch=None,
    together=True,
    seed=0,
)
@example(
    arguments=PLAIN,
    sequence=[*["plain"] * 12, "end_cycle", *["plain"] * 3, "other_level", *["plain"] * 14, "spike", "plain"],
    noise=0.1,
    epoch=10,
    together=False,
    seed=1,
)
@pytest.mark.filterwarnings("ignore:ELRASpectral was not told the loss")
def test_both_paths_are_one(arguments, sequence, noise, epoch, together, seed):
    """Also with many tensors at once, and where numbers are read, changed, saved or loaded by the other one."""
    with taken_together(together):
        walk_on_both_paths(arguments, sequence, noise, epoch, seed)


@contextlib.contextmanager
def taken_together(together, at_once=40):
    """On a CPU, too, the operations of GPUs on many tensors, so many numbers at once."""
    devices = {"cpu"} if together else set()
    with mock.patch.multiple(many_tensors, DEVICES=devices, AT_ONCE=at_once):
        yield


def walk_on_both_paths(arguments, sequence, noise, epoch, seed):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    start = [random(*shape) for shape in SHAPES]
    curvatures = [torch.rand(shape, generator=generator, dtype=torch.float64) + 0.1 for shape in SHAPES]
    host, device = (Walker(start, arguments, on_device) for on_device in (False, True))
    host.made.updates_per_epoch = device.made.updates_per_epoch = epoch
    host.made.total_updates = device.made.total_updates = epoch and 2 * epoch
    level, seen = 0.0, []
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
        has_moved = host.made._numbers()["moved"]
        for walker in (host, device):
            if event == "end_cycle":
                walker.made.end_cycle()
            walker.step(None if event == "no_loss" else loss, gradients, rates)
        for p, q in zip(device.params, host.params, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
        assert not has_moved or device.made._device_update.in_force
        seen += [host.made.last_update] if has_moved else []
        if number % 4 == 3:
            same_numbers(device.numbers(), host.numbers())
        if number % 9 == 8:  # a checkpoint of the one is loaded by the other
            kept = [copy.deepcopy(walker.made.state_dict()) for walker in (host, device)]
            device.made.load_state_dict(kept[0])
            host.made.load_state_dict(kept[1])
    same_numbers(device.numbers(), host.numbers())
    for (told, *_), known in zip(device.made.read_updates(), seen, strict=True):
        assert (told is None) == (known is None)
        if known is not None:
            ours, others = ([math.nan if x is None else x for x in (u.loss, u.tried, u.ratio)] for u in (told, known))
            same_numbers(ours, others)
            assert (told.taken_back, told.limit) == (known.taken_back, known.limit)
    assert device.made.unread_updates == 0


@pytest.mark.parametrize("on_device", [False, True])
def test_steps_that_all_climb_up_again_leave_the_rate_that_suits_the_weights(on_device):
    """As without noise, where they go to and fro."""
    torch.manual_seed(0)
    weights, there = nn.Parameter(0.1 * torch.randn(24, 24)), torch.randn(24, 24)
    optimizer, rates = ELRASpectral([weights], on_device=on_device), []
    for update in range(60):
        weights.grad = there * (-1) ** update
        optimizer.step(loss=1.0)
        rates.append(optimizer.alpha * math.sqrt(update + 51))
    assert rates[-1] == pytest.approx(rates[12])


# ---- nothing waits ----


class OnlyThere(TorchDispatchMode):
    """Refuses tensors that are not on the meta device; numbers on that cannot be read by anybody."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            assert not isinstance(tensor, torch.Tensor) or tensor.device.type == "meta", function
        return result


@pytest.mark.parametrize(
    ("momentum", "group", "together"), [(0.0, False, False), (0.9, True, False), (0.9, True, True), (0.0, False, True)]
)
def test_no_number_is_read_and_none_is_sent_there(momentum, group, together, monkeypatch):
    """On a device without data, whose numbers cannot be read: from the second update on, whatever comes."""
    monkeypatch.setattr(many_tensors, "DEVICES", {"meta"} if together else set())
    if group:
        monkeypatch.setattr(on_device, "mean_over_processes", lambda numbers, group: numbers)
    with torch.device("meta"):
        params = [nn.Parameter(torch.ones(shape)) for shape in SHAPES]
        params[0].data = params[0].data.bfloat16()
        loss = torch.ones(())
    optimizer = ELRASpectral(
        [{"params": params[:2]}, {"params": params[2:], "lr": 1e-4}], embeddings=params[3:4], experts=params[2:3],
        weight_decay=0.1, momentum=momentum, on_device=True, distribute="off",
    )  # fmt: skip
    optimizer.process_group = object() if group else None
    known = ("previous_slope", "previous_loss", "direction_norm", "gradient_norm", "weight_square")
    optimizer._numbers().update(dict.fromkeys(known, 1.0), moved=True, updates=1)  # after a first update
    optimizer.param_groups[0]["new"][0] = True
    optimizer._steps = 17  # it looks for steps that are lost in rounding soon
    for number in range(5):
        for p in params:
            p.grad = torch.ones_like(p)
        if number == 3:
            params[0].grad = None
        optimizer.param_groups[0]["lr"] *= 0.9
        with OnlyThere() if number else contextlib.nullcontext():  # the numbers that the host has are sent there
            optimizer.step(loss=loss if number % 3 else 1.0)
            assert optimizer.looks_trained is False
    with pytest.raises(RuntimeError, match="meta"):
        optimizer.alpha  # noqa: B018 - this reads
    optimizer.param_groups[0]["on_device"] = False
    with pytest.raises(RuntimeError, match="meta"):
        optimizer.step(loss=loss)


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)


def train(model, optimizer, numbers, way=None):
    """Updates from a batch of each number, with a spike, a NaN, and what is not to count."""

    def training_step(inputs, number):
        optimizer.zero_grad()
        loss = (model(inputs) - inputs[:, :4] - 0.1).float().square().mean()
        loss.backward()
        if number == 14:
            model[0].weight.grad[1, 1] = math.nan
        optimizer.step(loss=loss.detach() * {8: 1e3, 9: 1e3, 20: math.nan}.get(number, 1.0))
        return loss

    losses = []
    for number in numbers:
        inputs = torch.randn(16, 6, generator=torch.Generator().manual_seed(number))
        inputs = inputs.to(next(model.parameters()).dtype)
        losses.append((way or (lambda step: step))(training_step)(inputs, number).detach())
    return losses


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def made(dtype=torch.float32, **given):
    model = network(dtype)
    return model, ELRASpectral(model.parameters(), **{"on_device": True, "weight_decay": 0.1, **given})


def test_reading_changes_nothing_and_a_change_on_the_host_counts():
    model, optimizer = made()
    train(model, optimizer, range(5))
    there = optimizer._device_update
    for number in (5, 6):
        before = there.numbers.clone()
        assert optimizer._numbers()["alpha"] == optimizer.alpha == optimizer.metrics["alpha"]
        optimizer.state_dict()
        assert there.in_force
        assert torch.equal(there.numbers.nan_to_num(), before.nan_to_num())
        train(model, optimizer, [number])
        assert not there.was_read
    optimizer._numbers_to_change()["loss_statistics"]["last_cycle"] = [1.0, 2.0]
    assert not there.in_force
    train(model, optimizer, [7])
    assert there.in_force
    assert optimizer._numbers()["loss_statistics"]["last_cycle"] == [1.0, 2.0]


COPIES = {
    "deep copy": copy.deepcopy,
    "pickle": lambda kept: pickle.loads(pickle.dumps(kept)),
    "state": lambda kept: loaded(kept[0].state_dict(), copy.deepcopy(kept[1].state_dict())),
}


def loaded(weights, state):
    model, optimizer = made()
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    return model, optimizer


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_goes_on_bit_by_bit(how):
    kept = made()
    for at in (8, 9, 15):  # a step stands, or was taken back
        train(*kept, range(at - (8 if at == 8 else 1), at))
        other = COPIES[how](kept)
        train(*kept, range(at, at + 4))
        train(*other, range(at, at + 4))
        assert torch.equal(weights(kept[0]), weights(other[0]))
        assert kept[1].metrics == other[1].metrics


def test_a_group_that_comes_later_is_trained():
    model, optimizer = made()
    train(model, optimizer, range(4))
    added = nn.Parameter(torch.eye(3))
    optimizer.add_param_group({"params": added, "weight_decay": 0.0})
    for _ in range(2):
        added.grad = torch.ones(3, 3)
        optimizer.step(loss=0.1)
    assert optimizer._device_update.in_force
    assert added[0, 1] == added[1, 0] < 0


def test_what_stays_not_finite_is_an_error_when_it_is_read():
    model, optimizer = made()
    train(model, optimizer, range(4))
    for _ in range(20):
        optimizer.step(loss=math.nan)
    assert weights(model).isfinite().all()
    with pytest.raises(RuntimeError, match="stayed non-finite over 20 updates in a row"):
        optimizer.metrics  # noqa: B018 - reading is the point


def test_in_a_compiled_training_step():
    """The step is left out of the compiled graphs, and the decision alone can be compiled whole."""
    plain, compiled = made(), made()
    train(*plain, range(3))
    torch.compiler.reset()
    train(*compiled, range(3), way=lambda step: torch.compile(step, backend="eager"))
    assert torch.equal(weights(plain[0]), weights(compiled[0]))
    stock = decisions.decide
    whole = torch.compile(stock, backend="eager", fullgraph=True, dynamic=False)
    on_device.decide = whole
    try:
        train(*compiled, range(3, 10))
    finally:
        on_device.decide = stock
    train(*plain, range(3, 10))
    assert torch.equal(weights(plain[0]), weights(compiled[0]))


@pytest.mark.filterwarnings("ignore:In a bfloat16 parameter")
@pytest.mark.parametrize("rounds", [False, True])
def test_bfloat16_is_trained_and_a_step_that_is_taken_back_leaves_nothing(rounds):
    ends = []
    for _ in range(2):
        model, optimizer = made(torch.bfloat16, stochastic_rounding=rounds)
        losses = train(model, optimizer, range(60))
        ends.append(weights(model))
        assert optimizer.restarts >= 4
    assert torch.equal(*ends)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    before = weights(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step(loss=math.nan)  # says nothing
    assert torch.equal(weights(model), before)


def test_steps_that_rounding_swallows_are_warned_of_when_numbers_are_read():
    x = nn.Parameter(torch.ones(400, 1, dtype=torch.bfloat16))
    optimizer = ELRASpectral([x], lr=1e-4, warmup=0, lr_bounds=(1e-9, 1e-4), on_device=True)
    for _ in range(25):
        x.grad = torch.ones_like(x)
        optimizer.step(loss=1.0)
    with pytest.warns(UserWarning, match="100% of the numbers stay where they are"):
        optimizer.alpha  # noqa: B018


def test_what_cannot_be_decided_there_is_refused_if_asked_for():
    class Other(ELRASpectral):
        def direction(self, momentum):
            return Momentum(momentum)

    x = nn.Parameter(torch.ones(3, 3))
    x.grad = torch.ones(3, 3)
    with pytest.raises(ConfigurationError, match="on_device=True cannot be done: the direction is Momentum. Leave on"):
        Other([x], on_device=True).step(loss=1.0)
    Other([x]).step(loss=1.0)
    assert ELRASpectral([x]).asks_before_backward  # on a CPU decisions are made on the host by default
    assert not ELRASpectral([x], on_device=True).asks_before_backward


# ---- on a GPU ----

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_gpu
def test_an_update_does_not_wait_for_the_gpu():
    model, optimizer = made(on_device=None)
    model.cuda()
    inputs = torch.randn(4, 6, device="cuda")
    for number in range(6):
        optimizer.zero_grad()
        loss = model(inputs).square().mean()
        loss.backward()
        if number > 1:
            torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step(loss=loss.detach())
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert optimizer._device_update.in_force


@needs_gpu
def test_captured_in_a_cuda_graph():
    inputs = torch.randn(4, 6, device="cuda")
    (plain, first), (fast, second) = made(), made()
    plain.cuda(), fast.cuda()

    def training_step(model, optimizer):
        loss = model(inputs).square().mean()
        loss.backward()
        optimizer.step(loss=loss.detach())

    graph = captured(lambda: training_step(fast, second), second.zero_grad)
    for _ in range(5):
        graph.replay()
    for _ in range(WARM_UP + 5):
        first.zero_grad()
        training_step(plain, first)
    assert first.alpha == pytest.approx(second.alpha, rel=1e-6)
    torch.testing.assert_close(weights(plain), weights(fast), rtol=1e-5, atol=1e-7)
