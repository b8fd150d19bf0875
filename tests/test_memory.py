"""hf_elra.optim.memory: what is kept of the last step, and that nobody's tensors are relied on or written to."""

import copy
import warnings

import pytest
import torch

from hf_elra import ELRA

KEY = {"gradient": "previous_direction", "point": "previous_point", "offload": "previous_direction"}


def problem(dtype=torch.float64, **settings):
    torch.manual_seed(0)
    x = torch.nn.Parameter(torch.randn(6, dtype=dtype))
    y = torch.nn.Parameter(torch.randn(2, 3, dtype=dtype))
    return [x, y], ELRA([x, y], **settings)


def loss_of(params, number=0):
    noise = torch.Generator().manual_seed(number)
    return sum(((p - torch.randn(p.shape, generator=noise).to(p.dtype)) ** 2).sum() for p in params)


def train(params, optimizer, updates, zero=None, first=0):
    for number in range(first, first + updates):
        (zero or optimizer.zero_grad)()
        loss = loss_of(params, number)
        loss.backward()
        optimizer.step(loss=loss)


def test_the_gradient_itself_is_kept():
    params, optimizer = problem()
    train(params, optimizer, 1)
    for p in params:
        assert optimizer.state[p]["previous_direction"] is p.grad


@pytest.mark.parametrize("memory", ["gradient", "point", "offload"])
def test_one_vector_is_kept(memory):
    params, optimizer = problem(torch.float32, memory=memory)
    train(params, optimizer, 3)
    for p in params:
        tensors = [value for value in optimizer.state[p].values() if isinstance(value, torch.Tensor)]
        assert [(t.shape, t.dtype) for t in tensors] == [(p.shape, torch.float32)]


def accumulating_zero(params):
    def zero():
        for p in params:
            if p.grad is not None:
                p.grad.detach_().zero_()

    return zero


def test_zeroing_in_place_through_the_optimizer_changes_nothing():
    params, optimizer = problem()
    others, other = problem()
    train(params, optimizer, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(others, other, 8, zero=lambda: other.zero_grad(set_to_none=False))
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)


def test_an_overwritten_gradient_is_noticed_and_copied_from_then_on():
    params, optimizer = problem()
    with pytest.warns(UserWarning, match="is in use after step"):
        train(params, optimizer, 2, zero=accumulating_zero(params))
    others, other = problem(capturable=True)  # which always copies
    with torch.no_grad():
        for p, q in zip(params, others, strict=True):
            q.copy_(p)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(params, optimizer, 5, zero=accumulating_zero(params), first=2)
    train(others, other, 5, first=2)
    assert optimizer.alpha == other.alpha
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)


def test_gradients_in_a_bucket_are_copied():
    """DistributedDataParallel(gradient_as_bucket_view=True) reduces the next gradients into the same memory."""
    params, optimizer = problem()
    others, other = problem()
    bucket = torch.zeros(12, dtype=torch.float64)
    for number in range(5):
        loss = loss_of(params, number)
        for p, part in zip(params, bucket.split(6), strict=True):
            part.copy_(torch.autograd.grad(loss, p, retain_graph=True)[0].reshape(-1))
            p.grad = part.view(p.shape)
        optimizer.step(loss=loss)
        train(others, other, 1, first=number)
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)


def test_a_copied_optimizer_does_not_share_its_memory():
    params, optimizer = problem()
    train(params, optimizer, 3)
    twins, twin = copy.deepcopy((params, optimizer))
    train(params, optimizer, 3, first=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(twins, twin, 3, first=3)
    for p, q in zip(params, twins, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_point_layout_goes_back_to_the_very_point(dtype):
    """A restart at the lower bound of α, where the new step is nothing, gives back every bit."""
    x = torch.nn.Parameter(torch.linspace(-1, 1, 50).to(dtype))
    optimizer = ELRA([x], lr=1e-2, lr_bounds=(1e-12, 1.0), memory="point", max_first_step=None)
    x.grad = torch.full_like(x, 1.7)
    optimizer.step(loss=1.0)
    moved = x.detach().clone()
    start = optimizer.state[x]["previous_point"].clone()
    assert not torch.equal(moved, start)
    for _ in range(12):
        x.grad = torch.full_like(x, float("nan"))
        optimizer.step(loss=1.0)
    assert optimizer.restarts == 12
    assert torch.equal(x, start)


@pytest.mark.parametrize("memory", ["gradient", "point", "offload"])
def test_layouts_and_weight_decay_take_the_same_path_after_a_schedule_and_spikes(memory):
    ends = []
    for how in ({}, {"memory": memory}):
        params, _ = problem()
        optimizer = ELRA([{"params": params[:1], "weight_decay": 1e-2}, {"params": params[1:], "lr": 3e-4}], **how)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t / 3))
        for number in range(40):
            optimizer.zero_grad()
            loss = loss_of(params, number)
            loss.backward()
            optimizer.step(loss=loss * (100 if number % 9 == 8 else 1))
            scheduler.step()
        assert optimizer.restarts > 2
        ends.append(torch.cat([p.detach().reshape(-1) for p in params]))
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-12)


def test_stochastic_rounding_keeps_small_steps_and_is_the_same_everywhere():
    ends = []
    for _ in range(2):
        p = torch.nn.Parameter(torch.ones(4000, dtype=torch.bfloat16))
        optimizer = ELRA([p], stochastic_rounding=True, max_growth=1.0001, noise_correction=0)
        for _ in range(10):
            p.grad = torch.ones_like(p)
            optimizer.step(loss=1.0)
        ends.append(p.detach().clone())
    assert torch.equal(*ends)
    assert 1 - p.float().mean().item() == pytest.approx(10e-3, rel=0.1)

    nearest = torch.nn.Parameter(torch.ones(4000, dtype=torch.bfloat16))
    optimizer = ELRA([nearest], max_growth=1.0001, noise_correction=0)
    for _ in range(10):
        nearest.grad = torch.ones_like(nearest)
        optimizer.step(loss=1.0)
    assert torch.equal(nearest, torch.ones_like(nearest))  # what the option is for


def test_gradients_that_always_lie_in_the_same_memory_are_noticed():
    """As those of torch.cuda.make_graphed_callables, which writes to them without a trace."""
    params, optimizer = problem()
    others, other = problem()
    buffers = [torch.zeros_like(p) for p in params]
    warned = []
    for number in range(6):
        loss = loss_of(params, number)
        for p, buffer, gradient in zip(params, buffers, torch.autograd.grad(loss, params), strict=True):
            buffer.numpy()[...] = gradient.numpy()
            p.grad = torch.from_numpy(buffer.numpy())  # another tensor, the same memory
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step(loss=loss)
        warned.append(len(caught))
        if number == 1:  # here the last step was forgotten
            with torch.no_grad():
                for p, q in zip(params, others, strict=True):
                    q.copy_(p)
            other = ELRA(others, capturable=True)
            for q, p in zip(others, params, strict=True):
                q.grad = p.grad.clone()
            other.load_state_dict(optimizer.state_dict())
        elif number > 1:
            for q, p in zip(others, params, strict=True):
                q.grad = p.grad.clone()
            other.step(loss=loss)
            assert all(map(torch.equal, params, others))
    assert warned == [0, 1, 0, 0, 0, 0]


def test_a_layout_may_change_on_resume_and_the_way_to_update_stays_the_users():
    params, optimizer = problem()
    train(params, optimizer, 4)
    for memory in ("point", "offload"):
        others, other = problem(memory=memory, foreach=False, stochastic_rounding=True)
        other.load_state_dict(optimizer.state_dict())
        settings = other.param_groups[0]
        assert (settings["memory"], settings["foreach"], settings["stochastic_rounding"]) == (memory, False, True)
        assert other.alpha == optimizer.alpha
        train(others, other, 2, first=4)
        assert all(KEY[memory] in other.state[p] for p in others)


def test_a_gradient_that_belongs_to_a_graph_is_copied():
    params, optimizer = problem()
    loss = loss_of(params)
    loss.backward(create_graph=True)
    optimizer.step(loss=loss.detach())
    assert not any(optimizer.state[p]["previous_direction"].requires_grad for p in params)
    for p in params:
        p.grad = None


def test_a_parameter_that_comes_and_goes_and_then_gets_a_part_of_a_buffer():
    (x, y), optimizer = problem()
    train([x, y], optimizer, 2)
    x.grad, y.grad = None, torch.ones_like(y)
    optimizer.step(loss=1.0)
    x.grad = torch.ones(12, dtype=torch.float64)[:6]
    optimizer.step(loss=1.0)
    assert torch.isfinite(x).all()


def test_a_restart_under_a_factor_of_zero_leaves_alpha_alone_afterwards():
    params, optimizer = problem()
    train(params, optimizer, 1)
    lr = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.zero_grad()
    loss = loss_of(params, 1)
    loss.backward()
    optimizer.step(loss=1e9)
    assert optimizer.restarts == 1
    alpha = optimizer.alpha
    for group, value in zip(optimizer.param_groups, lr, strict=True):
        group["lr"] = value
    train(params, optimizer, 1)
    assert optimizer.alpha >= alpha


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_rounding_swallows_are_warned_of(fused):
    x = torch.nn.Parameter(torch.ones(64).bfloat16())
    optimizer = ELRA([x], lr_bounds=(1e-8, 1e-3), fused=fused)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(130):
            x.grad = torch.ones(64).bfloat16()
            optimizer.step(loss=1.0)
    assert len(told) == 1
    assert "100% of the numbers stay where they are, as a step of ELRA is less" in str(told[0].message)


@pytest.mark.parametrize("memory", ["gradient", "point"])
def test_bfloat16_with_weight_decay_learns(memory):
    torch.manual_seed(0)
    x = torch.nn.Parameter(torch.randn(200).bfloat16())
    optimizer = ELRA([x], memory=memory, weight_decay=3e-4, stochastic_rounding=True)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = (x.float() ** 2).sum()
        loss.backward()
        optimizer.step(loss=loss)
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 100
