"""hf_elra.optim: methods of other papers, each against a closed form, a problem that it solves, and rates by chance.

What every optimizer must do is in ``contract/``; here is what makes each method that method.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_elra.optim import ELRAC2Min, ELRAP2Min


def quadratic(curvatures, start):
    """½·Σ c·x², and where it is walked from."""
    c = torch.tensor(curvatures, dtype=torch.float64)
    x = nn.Parameter(torch.tensor(start, dtype=torch.float64))
    return x, lambda: 0.5 * (c * x * x).sum()


def update(optimizer, x, loss_of):
    """One update; the loss before it."""
    optimizer.zero_grad()
    loss = loss_of()
    loss.backward()
    more = {"evaluate": lambda: loss_of().item()} if optimizer.needs_line_loss else {}
    optimizer.step(loss=loss.item(), **more)
    return loss.item()


def walk(optimizer, x, loss_of, number):
    """So many updates; all losses."""
    return [update(optimizer, x, loss_of) for _ in range(number)]


# ---- c2min, p2min ----


def test_p2min_goes_to_the_minimum_of_the_line():
    """Of a quadratic with one curvature in one step, whatever the first one was."""
    x, loss_of = quadratic([4.0, 4.0], [3.0, -2.0])
    optimizer = ELRAP2Min([x], lr=1e-2, momentum=0.0, max_growth=1e3, max_relative_step=None)
    walk(optimizer, x, loss_of, 2)
    assert optimizer.alpha == pytest.approx(1 / 4)
    assert x.abs().max() < 1e-12


@pytest.mark.parametrize(("start", "factor"), [(1e-3, 1.5), (0.25, 1.0), (0.4, 0.5)])
def test_c2min_follows_the_cosine(start, factor):
    """By half where gradients are parallel, not at all where they are orthogonal."""
    x, loss_of = quadratic([4.0], [1.0])
    optimizer = ELRAC2Min([x], lr=start, momentum=0.0, max_relative_step=None)
    walk(optimizer, x, loss_of, 2)
    assert optimizer.alpha == pytest.approx(start * factor)


def test_averages_are_those_of_the_paper():
    """u_t = (1 - β)·G_t + β·u_{t-1}, from u_0 = G_0."""
    x, loss_of = quadratic([1.0, 2.0], [1.0, 1.0])
    optimizer = ELRAC2Min([x], lr=0.1, momentum=0.8, max_relative_step=None)
    update(optimizer, x, loss_of)
    first = torch.tensor([1.0, 2.0])
    torch.testing.assert_close(x.detach().float(), torch.ones(2) - 0.1 * first)
    before, second = x.detach().clone(), torch.tensor([1.0, 2.0], dtype=torch.float64) * x.detach()
    update(optimizer, x, loss_of)
    u = 0.2 * second + 0.8 * first
    torch.testing.assert_close(x.detach(), before - optimizer.alpha * u)


# ---- all of them ----

CONVERGES = {
    "elra_c2min": lambda x: ELRAC2Min([x], max_relative_step=None),
    "elra_p2min": lambda x: ELRAP2Min([x], max_relative_step=None),
}
"""How each is made for a problem without noise."""


@pytest.mark.parametrize("name", CONVERGES)
def test_it_solves_a_problem_without_noise(name):
    x, loss_of = quadratic([1.0, 10.0], [-3.0, 2.0])
    losses = walk(CONVERGES[name](x), x, loss_of, 300)
    assert min(losses[-20:]) < 1e-4 * losses[0]


numbers = st.floats(-1e6, 1e6, allow_nan=False, width=32)


@pytest.mark.parametrize("name", CONVERGES)
@settings(max_examples=12, deadline=None)
@given(data=st.lists(st.tuples(numbers, numbers, numbers), min_size=6, max_size=12))
def test_the_rate_is_never_negative_nor_not_finite(name, data):
    """Whatever gradients and losses are."""
    x = nn.Parameter(torch.ones(2))
    optimizer = CONVERGES[name](x)
    for loss, *gradient in data:
        x.grad = torch.tensor(gradient)
        more = {"evaluate": lambda loss=loss: loss + float(x.sum())} if optimizer.needs_line_loss else {}
        optimizer.step(loss=loss, **more)
        assert 0 < optimizer.alpha < math.inf
        assert x.isfinite().all()
