"""hf_elra.optim: methods of other papers, each against a closed form, a problem that it solves, and rates by chance.

What every optimizer must do is in ``contract/``; here is what makes each method that method.
"""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_elra import ElraTrainer
from hf_elra.errors import ConfigurationError
from hf_elra.optim import (
    GOLS,
    LABPALNSGD,
    LABPALSGD,
    NTLR,
    NTLRSGD,
    PAL,
    PLS,
    SLS,
    SPS,
    ELRAC2Min,
    ELRAP2Min,
    Guarded,
    HypergradientAdamW,
    HypergradientSGD,
    NTLRAdamW,
)
from hf_elra.optim.rules import Measurement
from hf_elra.optim.rules.newton import Newton
from hf_elra.optim.rules.probabilistic import SplineProcess, within
from hf_elra.trainer.batch_control import labpal_schedule
from tests.conftest import arguments, llama, token_rows, trainer, weights


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


# ---- NTLR ----


def test_newton_with_gamma_1_goes_to_the_minimum_of_the_line():
    x, loss_of = quadratic([4.0, 4.0], [3.0, -2.0])
    optimizer = NTLRSGD([x], lr=1e-2, gamma=1.0, every=1)
    walk(optimizer, x, loss_of, 2)
    assert optimizer.alpha == pytest.approx(1 / 4)
    assert x.abs().max() < 1e-12


def test_every_k_updates_by_mean_directions():
    """Eq. 8, from points alone: D_k is the way of K updates over K·α."""
    x, loss_of = quadratic([1.0, 3.0], [1.0, 2.0])
    optimizer, points, rates = NTLRSGD([x], lr=0.05, gamma=0.33, every=3, momentum=0.5), [], []
    for _ in range(8):
        points.append(x.detach().clone())
        update(optimizer, x, loss_of)
        rates.append(optimizer.alpha)
    assert rates[:7] == [0.05] * 7  # a window begins after the first step; two of them are compared
    first, second = (points[1] - points[4]) / 0.15, (points[4] - points[7]) / 0.15
    factor = 1 + 0.33 * (first @ second) / (first @ (first - second))
    assert rates[7] == pytest.approx(0.05 * factor.item())


@pytest.mark.parametrize(
    ("n", "d", "factor"),
    [(1.0, 1.0, 1.0), (1.0, 2.0, 1.0), (1.0, 1 - 1e-9, 100.0), (1.0, -1e9, 0.67), (1.0, 0.5, 1.33), (-1.0, -2.0, 1.0)],
)
def test_newtons_factor_is_guarded_as_the_paper_says(n, d, factor):
    """A denominator that is not positive keeps the rate; the factor is at most 100, and never below 1 - γ."""
    assert Newton(0.33).propose(Measurement(2, previous_slope=n, current_slope=d), 1.0) == pytest.approx(factor)


@pytest.mark.parametrize("make", [
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.01),
    lambda p: torch.optim.Adadelta(p, lr=0.1),
], ids=["SGD", "AdamW", "Adadelta"])  # fmt: skip
def test_around_another_optimizer_its_path_is_the_same_while_the_rate_stays(make):
    """And the state that it was saved with goes on, in another object too."""
    ends = []
    for wraps, resumes in ((False, False), (True, False), (True, True)):
        x, loss_of = quadratic([1.0, 3.0], [1.0, 2.0])
        optimizer = NTLR(make([x]), every=100) if wraps else make([x])
        for number in range(12):
            if resumes and number == 6:
                saved = optimizer.state_dict()
                optimizer = NTLR(make([x]), every=100)
                optimizer.load_state_dict(saved)
            optimizer.zero_grad()
            loss_of().backward()
            optimizer.step(**({"loss": loss_of().item()} if wraps else {}))
        ends.append(x.detach())
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-12, atol=1e-12)
    assert torch.equal(ends[2], ends[1])


def test_a_scheduler_on_the_inner_optimizer_is_refused():
    x, _ = quadratic([1.0], [1.0])
    inner = torch.optim.SGD([x], lr=0.1)
    wrapped = NTLR(inner, every=2)
    torch.optim.lr_scheduler.StepLR(inner, 1)
    with pytest.raises(ConfigurationError, match="inner=SGD has a scheduler"):
        NTLR(inner)
    x.grad = torch.ones(1, dtype=torch.float64)
    with pytest.raises(ConfigurationError, match="inner=SGD has a scheduler"):
        wrapped.step(loss=1.0)
    schedule_free = torch.optim.SGD([x], lr=0.1)
    schedule_free.train = schedule_free.eval = lambda: None
    with pytest.raises(ConfigurationError, match="inner=SGD trains other parameters than it evaluates"):
        NTLR(schedule_free)
    for wrong in (torch.optim.LBFGS([x]), NTLRSGD([x]), 3):
        with pytest.raises(ConfigurationError, match="inner=.* must be an optimizer"):
            NTLR(wrong)


def test_directions_are_those_of_torch():
    """At a rate that stays: SGD with momentum, and AdamW with decoupled weight decay."""
    pairs = [
        (lambda p: NTLRSGD(p, lr=0.1, momentum=0.9, every=100), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
        (
            lambda p: NTLRAdamW(p, lr=0.1, weight_decay=0.1, every=100),
            lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
        ),
    ]
    for ours, stock in pairs:
        ends = []
        for make in (ours, stock):
            x, loss_of = quadratic([1.0, 3.0], [1.0, 2.0])
            optimizer = make([x])
            for _ in range(10):
                optimizer.zero_grad()
                loss = loss_of()
                loss.backward()
                optimizer.step(**({"loss": loss.item()} if make is ours else {}))
            ends.append(x.detach())
        torch.testing.assert_close(*ends, rtol=1e-10, atol=1e-10)


def test_k_is_a_share_of_an_epoch(tmp_path):
    """64 rows, 2 an update: 32 updates an epoch. A bare loop tells how many there are. It is at least 20."""
    run = trainer(tmp_path, optim="ntlr_sgd", optim_args="share=0.75", per_device_train_batch_size=2, max_steps=3)
    run.train()
    assert run.elra_optimizer.every == 24
    bare = NTLRSGD([nn.Parameter(torch.ones(1))], share=0.1)
    assert bare.every == 100
    bare.updates_per_epoch = 500
    assert bare.every == 50
    bare.updates_per_epoch = 30
    assert bare.every == 20


def test_around_another_optimizer_in_a_trainer(tmp_path):
    """Passed in as it is; a resumed run goes on with the state of both."""

    def make(folder):
        model = llama()
        optimizer = NTLR(torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1), every=2)
        given = arguments(folder, max_steps=10, save_strategy="steps", save_steps=5)
        return ElraTrainer(model, given, train_dataset=token_rows(), optimizers=(optimizer, None))

    run = make(tmp_path)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert run.elra_optimizer.alpha != 1e-2
    again = make(tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert torch.equal(weights(again.model), weights(run.model))
    assert again.elra_optimizer.alpha == run.elra_optimizer.alpha


# ---- guards around stock optimizers ----


def test_adam_forgets_the_gradient_of_a_step_that_is_taken_back():
    """Its averages are what they were, and the step is tried again shorter from where it began."""
    x, loss_of = quadratic([1.0, 3.0], [1.0, 2.0])
    optimizer = Guarded(torch.optim.AdamW([x], lr=0.1))
    walk(optimizer, x, loss_of, 5)
    before = x.detach().clone()
    update(optimizer, x, loss_of)
    taken = x.detach() - before
    kept = {name: value.clone() for name, value in optimizer.inner.state[x].items()}
    x.grad = torch.full_like(x, 1e3)
    optimizer.step(loss=1e6)
    assert optimizer.restarts == 1
    assert all(torch.equal(optimizer.inner.state[x][name], value) for name, value in kept.items())
    share = (x.detach() - before).norm() / taken.norm()
    assert 0.09 < share < 0.51
    assert optimizer.alpha == 0.1


def test_a_crop_shortens_one_step_alone():
    x = nn.Parameter(torch.ones(1))
    optimizer = Guarded(torch.optim.SGD([x], lr=0.5), max_step_norm=0.1)
    for gradient, step in ((0.1, 0.05), (100.0, 0.1), (0.1, 0.05)):
        x.grad = torch.full_like(x, gradient)
        before = x.item()
        optimizer.step(loss=1.0)
        assert before - x.item() == pytest.approx(step, rel=1e-4)


def test_guards_around_a_stock_optimizer_in_a_trainer(tmp_path):
    """Same path as without them while nothing happens, with the stock schedule and clipping; resumed bit for bit."""
    ends = []
    for number, flags in enumerate([{}, {"elra_soft_restart": True, "elra_max_step_norm": 10.0}]):
        given = dict(optim="adamw_torch", learning_rate=1e-2, lr_scheduler_type="linear", warmup_steps=2,
                     max_grad_norm=0.5, max_steps=8, save_strategy="steps", save_steps=4, elra_batch_control="off",
                     weight_decay=0.1, **flags)  # fmt: skip
        run = trainer(tmp_path / str(number), **given)
        run.train()
        ends.append(weights(run.model))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-6)
    assert isinstance(run.elra_optimizer, Guarded)
    assert run.elra_optimizer.metrics["restarts"] == 0
    again = trainer(tmp_path / "again", **given)
    again.train(resume_from_checkpoint=str(tmp_path / "1" / "checkpoint-4"))
    assert torch.equal(weights(again.model), ends[1])


def test_soft_restarts_are_a_flag_for_methods_whose_papers_have_none(tmp_path):
    assert trainer(tmp_path, optim="sps", elra_soft_restart=True).create_optimizer().param_groups[0]["soft_restart"]
    with pytest.raises(ConfigurationError, match="elra_max_step_norm=1 cannot be used with optim=sps"):
        trainer(tmp_path, optim="sps", elra_max_step_norm=1.0)


def test_no_shards_around_another_optimizer(tmp_path):
    run = trainer(tmp_path, optim="adamw_torch", elra_soft_restart=True)
    run.is_fsdp_enabled = True
    with pytest.raises(ConfigurationError, match="fsdp cannot be used with Guarded"):
        run.prepare_elra()


# ---- hypergradients ----


def test_additive_hypergradients():
    """α_1 = α_0 + η·⟨G_1, G_0⟩, on a quadratic."""
    x, loss_of = quadratic([2.0], [3.0])
    optimizer = HypergradientSGD([x], lr=0.1, hyper_lr=1e-3)
    walk(optimizer, x, loss_of, 2)
    assert optimizer.alpha == pytest.approx(0.1 + 1e-3 * 6.0 * 6.0 * (1 - 0.1 * 2))


def test_multiplicative_hypergradients_by_the_update_and_every_k():
    x, loss_of = quadratic([2.0], [3.0])
    optimizer = HypergradientSGD([x], lr=0.01, formula="multiplicative", hyper_lr=0.1)
    walk(optimizer, x, loss_of, 3)
    assert optimizer.alpha == pytest.approx(0.01 * 1.1**2)
    x, loss_of = quadratic([2.0], [3.0])
    optimizer = HypergradientSGD([x], lr=0.01, formula="multiplicative", hyper_lr=0.1, every=2)
    walk(optimizer, x, loss_of, 8)  # one dimension: parallel; windows are compared after updates 6 and 8
    assert optimizer.alpha == pytest.approx(0.01 * 1.1**2)


# ---- SPS, SLS, PAL ----


def test_polyaks_step_and_its_growth():
    """On ½·c·x², f/(½·‖G‖²) is 1/c: the minimum in one step. Later α may only grow slowly."""
    x, loss_of = quadratic([4.0], [3.0])
    optimizer = SPS([x])
    walk(optimizer, x, loss_of, 1)
    assert optimizer.alpha == pytest.approx(1 / 4)
    assert x.abs().item() < 1e-12
    x, loss_of = quadratic([0.01], [3.0])
    optimizer = SPS([x], growth=2.0)
    optimizer.updates_per_epoch = 10
    update(optimizer, x, loss_of)
    assert optimizer.alpha == 1.0  # 100 would be the minimum
    walk(optimizer, x, loss_of, 10)
    assert optimizer.alpha == pytest.approx(2.0)


def test_a_loss_below_f_star_leaves_polyaks_step_as_it_is():
    x, loss_of = quadratic([4.0], [3.0])
    optimizer = SPS([x], f_star=1.0)
    update(optimizer, x, loss_of)
    before = optimizer.alpha
    x.grad = torch.ones_like(x)
    optimizer.step(loss=0.5)
    assert optimizer.alpha == before


def test_armijos_condition():
    """On ½·c·x², s·c ≤ 2·(1 - share): the first of 1, 0.9, 0.81, … that is short enough."""
    x, loss_of = quadratic([4.0], [3.0])
    optimizer = SLS([x], c=0.1)
    walk(optimizer, x, loss_of, 1)
    most = 2 * (1 - 0.1) / 4
    tries = [0.9**number for number in range(100)]
    assert optimizer.alpha == pytest.approx(next(s for s in tries if s <= most))


@pytest.mark.parametrize("name", ["sls", "pal"])
def test_who_looks_along_the_line_has_to_be_told_how(name):
    x, _ = quadratic([4.0], [3.0])
    optimizer = {"sls": SLS, "pal": PAL}[name]([x])
    x.grad = torch.ones_like(x)
    with pytest.raises(ConfigurationError, match=r"step\(loss=loss, evaluate=function\)"):
        optimizer.step(loss=1.0)


@pytest.mark.parametrize(
    ("curvature", "start", "length"), [(4.0, 0.5, 0.5), (4.0, 3.0, 1.0), (-4.0, 0.5, 0.1)],
    ids=["to the minimum", "at most so far", "where there is none, to where it was measured"],
)  # fmt: skip
def test_pal_goes_to_the_minimum_of_its_parabola(curvature, start, length):
    x, loss_of = quadratic([curvature], [start])
    optimizer = PAL([x], adaptation=1.0, max_step=1.0)
    before = x.detach().clone()
    walk(optimizer, x, loss_of, 1)
    assert (x.detach() - before).abs().item() == pytest.approx(length)


def test_pal_does_not_step_where_the_line_goes_up():
    """As where momentum still points the old way."""
    x, loss_of = quadratic([4.0], [-0.5])
    optimizer = PAL([x], momentum=0.9)
    optimizer.state[x]["momentum"] = torch.full_like(x, 100.0)
    before = x.detach().clone()
    update(optimizer, x, loss_of)
    torch.testing.assert_close(x.detach(), before)


@pytest.mark.parametrize("name", ["sps", "sls", "pal"])
def test_looking_ahead_in_a_trainer(tmp_path, name):
    """With losses along the line of the update's own micro-batches; passes are counted."""
    run = trainer(tmp_path, optim=name, max_steps=4, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    counts = run.elra.trials.counts
    assert counts.backwards == 8
    assert counts.forwards == 8 if name == "sps" else counts.forwards >= 16


# ---- LABPAL ----


@pytest.mark.parametrize(("curvature", "factor"), [("formula", 1.0), ("released", 2.0)])
def test_labpal_measures_the_minimum_of_its_line(curvature, factor):
    """1/c, times 1.8; and keeps it. The released code's curvature is half of it."""
    x, loss_of = quadratic([4.0], [0.5])
    optimizer = LABPALSGD([x], curvature=curvature, every=3, adaptation=1.8, max_step=9.0)
    for _ in range(3):
        update(optimizer, x, loss_of)
        assert optimizer.alpha == pytest.approx(factor * 1.8 / 4, rel=1e-6)


def test_labpal_nsgd_keeps_the_length_of_the_step():
    x, loss_of = quadratic([4.0], [0.5])
    optimizer, points = LABPALNSGD([x], every=3, adaptation=0.5), []
    for _ in range(4):
        points.append(x.item())
        update(optimizer, x, loss_of)
    steps = [abs(a - b) for a, b in pairwise(points)]
    assert steps == pytest.approx([0.25] * 3)
    assert abs(points[3] - x.item()) == pytest.approx(0.125)  # measured anew, at a distance of 0.25


def test_labpal_keeps_what_it_has_where_there_is_no_minimum():
    x, loss_of = quadratic([-4.0], [0.5])
    optimizer = LABPALSGD([x], lr=0.01, every=3)
    update(optimizer, x, loss_of)
    assert optimizer.alpha == 0.01


def test_labpal_looks_at_batches_to_come_in_a_trainer(tmp_path):
    """1,280 samples of updates of 16: 80 batches, at three points; here an epoch has but 3 left."""
    run = trainer(tmp_path, optim="labpal_sgd", max_steps=2, elra_batch_control="off", per_device_train_batch_size=16)
    asked = []
    line_loss = run.elra.line_losses.line_loss
    run.elra.line_losses.line_loss = lambda s, u, **which: asked.append((s, which)) or line_loss(s, u, **which)
    run.train()
    assert len(asked) == 3
    assert all(which == {"batches": 80} for _, which in asked)
    counts = run.elra.trials.counts
    assert (counts.forwards, counts.backwards) == (2 + 3 * 3, 2)


@pytest.mark.parametrize(("batch", "rows", "schedule"), [
    (128, 40_000, "0.0:1,0.5:2,0.75:4"),
    (32, 60_000, "0.0:6,0.5:12,0.75:24"),
    (128, 15_000, "0.0:1,0.5:1,0.75:1"),
    (64, None, "0.0:2,0.5:4,0.75:8"),
])  # fmt: skip
def test_labpals_batch_follows_the_noise_factor(batch, rows, schedule):
    assert labpal_schedule(batch, rows) == schedule


def test_a_trainer_takes_labpals_schedule_where_none_is_given(tmp_path):
    given = dict(optim="labpal_nsgd", per_device_train_batch_size=4)
    assert trainer(tmp_path, **given).elra.size.control.schedule.steps == ((0.0, 1), (0.5, 1), (0.75, 1))
    own = trainer(tmp_path, **given, elra_batch_control="schedule", elra_batch_schedule="0:3")
    assert own.elra.size.control.schedule.steps == ((0.0, 3),)
    assert trainer(tmp_path, **given, elra_batch_control="off").elra.size.control.mode == "off"


# ---- GOLS-I ----


def test_gols_doubles_until_the_slope_turns():
    """On ½·4·x²: falling at α < 1/4, so that 1/64 is doubled to 1/2, where it rises; that is where it stays."""
    x, loss_of = quadratic([4.0], [1.0])
    optimizer, rates = GOLS([x], lr=1 / 64), []
    for _ in range(6):
        update(optimizer, x, loss_of)
        rates.append(optimizer.alpha)
    # At 1/4 the slope is zero, which does not fall: the search ends there.
    assert rates[:5] == [1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4]
    assert x.abs().item() < 1e-12


def test_gols_halves_until_the_slope_falls():
    x, loss_of = quadratic([4.0], [0.1])
    optimizer, points = GOLS([x], lr=1.0), []
    for _ in range(5):
        update(optimizer, x, loss_of)
        points.append(round(x.item(), 6))
    # 0.1·(1 - 4α): 1 rises by 3 times the first slope, 1/2 by as much as it, 1/4 by none, 1/8 falls: the search ends.
    assert points[:4] == [-0.3, -0.1, 0.0, 0.05]
    assert optimizer.alpha == 1 / 8


# ---- PLS ----


def test_the_probability_of_two_conditions():
    """Independent, far away, and wholly dependent ones."""
    assert within(0.0, 0.5, [[1.0, 0.0], [0.0, 1.0]], 1.0) == pytest.approx(0.5 * 0.38292, abs=1e-3)
    assert within(9.0, 0.5, [[1.0, 0.0], [0.0, 1.0]], 1e9) == pytest.approx(0.69146, abs=1e-3)
    assert within(0.0, 0.0, [[1.0, 1.0], [1.0, 1.0]], 1e9) == pytest.approx(0.5, abs=5e-3)
    assert within(-1.0, 0.5, [[0.0, 0.0], [0.0, 0.0]], 1.0) == 0.0
    assert within(1.0, 0.5, [[0.0, 0.0], [0.0, 0.0]], 1.0) == 1.0


def test_without_noise_the_process_goes_through_what_was_observed():
    """And is a cubic in between: that of the observations, wherever they come from one."""
    times, cubic = [0.0, 1.0, 3.0], lambda t: 1 - t + 0.25 * t**2 + 0.05 * t**3
    slopes = [-1 + 0.5 * t + 0.15 * t**2 for t in times]
    process = SplineProcess(times, [cubic(t) for t in times], slopes, 0.0, 0.0)
    at = torch.tensor([0.0, 0.4, 1.0, 2.2, 3.0], dtype=torch.float64)
    mean, deviation = process.losses(at)
    torch.testing.assert_close(mean, cubic(at), rtol=0, atol=1e-3)
    assert deviation[[0, 2, 4]].max() < 1e-3 < deviation[3]
    # Minimum at 1.3: far before it the slope is too steep, far beyond it the loss is too high.
    assert process.probability(1.3) > 0.5
    assert process.probability(0.2) < 0.1


@pytest.mark.parametrize("start", [1e-3, 0.2, 5.0])
def test_pls_finds_a_step_near_the_minimum_of_the_line(start):
    """Of 1/4, whatever α it begins with."""
    x, loss_of = quadratic([4.0], [10.0])
    optimizer = PLS([x], lr=start)
    losses = walk(optimizer, x, loss_of, 40)
    assert min(losses[-5:]) < 1e-6 * losses[0]
    assert max(losses[-5:]) < 1e-4 * losses[0]


# ---- all of them ----

CONVERGES = {
    "elra_c2min": lambda x: ELRAC2Min([x], max_relative_step=None),
    "elra_p2min": lambda x: ELRAP2Min([x], max_relative_step=None),
    "sps": lambda x: SPS([x]),
    "sls": lambda x: SLS([x]),
    "pal": lambda x: PAL([x]),
    "labpal_sgd": lambda x: LABPALSGD([x], every=1, adaptation=1.0),
    "labpal_nsgd": lambda x: LABPALNSGD([x], every=2, adaptation=1.0),
    "gols": lambda x: GOLS([x]),
    "pls": lambda x: PLS([x]),
    "ntlr": lambda x: NTLR(torch.optim.RMSprop([x], lr=1e-2), every=10),
    "ntlr_sgd": lambda x: NTLRSGD([x], lr=1e-3, every=5),
    "ntlr_adamw": lambda x: NTLRAdamW([x], lr=1e-2, every=10),
    "hypergradient_sgd": lambda x: HypergradientSGD([x], lr=1e-3, hyper_lr=1e-5),
    "hypergradient_adamw": lambda x: HypergradientAdamW([x], lr=1e-2, formula="multiplicative"),
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
