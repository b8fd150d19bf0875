"""hf_elra.optim.ELRA: the paper's problems, the twin in reference/, and what users' loops do to an optimizer."""

import copy
import io
import itertools
import math
import statistics
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_elra import ELRA
from hf_elra.errors import ConfigurationError
from hf_elra.optim.directions import Direction
from hf_elra.optim.reference.elra import ReferenceELRA


@pytest.mark.parametrize("step_rule", ["bb1", "bb2"])
def test_path_turns_with_the_coordinates(step_rule):
    torch.manual_seed(1)
    rotation, _ = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64))
    curvature = torch.logspace(-1, 1, 20, dtype=torch.float64)
    start = torch.randn(20, dtype=torch.float64)

    def function(x):
        return (curvature * x**2).sum() + x.cos().sum()

    def path(turn):
        x = (turn.T @ start).requires_grad_()
        optimizer = ELRA([x], step_rule=step_rule)
        points = []
        for _ in range(60):
            optimizer.zero_grad()
            loss = function(turn @ x)
            loss.backward()
            optimizer.step(loss=loss)
            points.append(turn @ x.detach())
        return torch.stack(points)

    plain, turned = path(torch.eye(20, dtype=torch.float64)), path(rotation)
    assert (plain - turned).abs().max() < 1e-7


# ---- the twin ----

faults = ["spike", "small_spike", "nan_loss", "inf_gradient", "nan_gradient", "zero_gradient", "nothing"]
events = st.sampled_from(["plain"] * 6 + ["end_cycle", *faults])
arguments = st.fixed_dictionaries(
    {
        "lr": st.sampled_from([1e-5, 1e-3, 1.0]),
        "step_rule": st.sampled_from(["bb1", "bb2"]),
        "noise_correction": st.sampled_from([0.0, 0.15]),
        "max_growth": st.sampled_from([1.5, 10.0, 1e6]),
        "min_step_norm": st.sampled_from([0.0, 0.1]),
        "max_step_norm": st.sampled_from([None, 0.5, 2.0]),
        "max_relative_step": st.sampled_from([None, 0.03, 0.3]),
        "max_first_step": st.sampled_from([None, 0.01, 0.5]),
        "weight_decay": st.sampled_from([0.0, 3e-4]),
        "soft_restart": st.booleans(),
        "initial_restart_ratio": st.sampled_from([None, 1.1]),
        "restart_window": st.sampled_from([None, 2, 7]),
        "restart_formula": st.sampled_from(["derived", "paper"]),
    }
)


@settings(max_examples=150, deadline=None, derandomize=True)  # 1,500 random ones pass too
@given(arguments=arguments, sequence=st.lists(events, min_size=5, max_size=25), seed=st.integers(0, 2**31))
def test_walks_with_the_reference(arguments, sequence, seed):
    walk_beside_the_reference(arguments, sequence, seed)


@pytest.mark.parametrize("how", [{"memory": "point"}, {"memory": "offload"}, {"foreach": False}, {"capturable": True}])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(arguments=arguments, sequence=st.lists(events, min_size=5, max_size=25), seed=st.integers(0, 2**31))
def test_every_way_to_update_walks_with_the_reference(how, arguments, sequence, seed):
    walk_beside_the_reference({**arguments, **how}, sequence, seed)


STAYS_HIGH = ["plain"] * 3 + ["spike"] * 25 + ["plain"] * 2 + ["spike"] * 2 + ["plain"] * 5
STAYS_HIGH_AFTER_A_CYCLE = ["plain"] * 3 + ["end_cycle"] + STAYS_HIGH
TROUBLE = (
    ["plain"] * 12
    + ["spike"]
    + ["plain"] * 4
    + ["spike"] * 2
    + ["plain"] * 3
    + ["nan_gradient"] * 3
    + ["plain"] * 6
    + ["spike", "plain", "spike", "plain"] * 3
    + ["plain"] * 60
    + ["small_spike", "nan_loss"] * 2
    + ["plain"] * 5
)


@pytest.mark.parametrize(
    "sequence", [STAYS_HIGH, STAYS_HIGH_AFTER_A_CYCLE, TROUBLE], ids=["first cycle", "later", "trouble"]
)
@pytest.mark.parametrize("how", [{}, {"memory": "point"}, {"restart_window": 7}])
def test_accepting_what_stays_high_walks_with_the_reference(how, sequence):
    walk_beside_the_reference(how, sequence, seed=0)


def walk_beside_the_reference(arguments, sequence, seed):
    generator = torch.Generator().manual_seed(seed)
    curvature = torch.rand(9, generator=generator, dtype=torch.float64) * 4 - 0.5
    start = torch.randn(9, generator=generator, dtype=torch.float64)
    a, b = start[:6].reshape(2, 3).clone().requires_grad_(), start[6:].clone().requires_grad_()
    fast = ELRA([{"params": [a]}, {"params": [b]}], **arguments)
    only_fast = ("memory", "foreach", "fused", "capturable")
    reference = ReferenceELRA(start, **{name: value for name, value in arguments.items() if name not in only_fast})
    for event in sequence:
        point = torch.cat([a.detach().reshape(-1), b.detach()])
        noise = torch.randn(9, generator=generator, dtype=torch.float64)
        gradient = curvature * point + 0.1 * noise
        loss = float((curvature * point**2).sum() / 2 + 0.1 * noise[0])
        if event == "spike":
            loss += 1e6
        elif event == "small_spike":
            loss += 10
        elif event == "nothing":
            loss, gradient = math.nan, torch.zeros(9, dtype=torch.float64)
        elif event == "nan_loss":
            loss = math.nan
        elif event == "inf_gradient":
            gradient[3] = math.inf
        elif event == "nan_gradient":
            gradient.fill_(math.nan)
        elif event == "zero_gradient":
            gradient.zero_()
        elif event == "end_cycle":
            fast.end_cycle()
            reference.end_cycle()
        a.grad, b.grad = gradient[:6].reshape(2, 3).clone(), gradient[6:].clone()
        fast.step(loss=loss)
        reference.step(loss, gradient)
        point = torch.cat([a.detach().reshape(-1), b.detach()])
        assert torch.isfinite(point).all()
        assert fast.restarts == reference.restarts
        counts = reference.skipped, reference.accepted_levels, reference.restarts_in_a_row
        assert tuple(fast.metrics[n] for n in ("skipped", "accepted_levels", "consecutive_restarts")) == counts
        # Curvature is a difference of products: where it is nearly zero the two may differ by more than rounding.
        assert fast.alpha == pytest.approx(reference.alpha, rel=1e-6)
        torch.testing.assert_close(point, reference.x, rtol=1e-6, atol=1e-9)
        with torch.no_grad():  # so that such differences do not add up
            a.copy_(reference.x[:6].reshape(2, 3))
            b.copy_(reference.x[6:])
        fast._numbers()["alpha"] = reference.alpha


# ---- the loss ----


def quadratic_step(optimizer, x, how):
    optimizer.zero_grad()
    if how == "closure":

        def closure():
            loss = (x**2).sum()
            loss.backward()
            return loss

        return optimizer.step(closure)
    loss = (x**2).sum()
    loss.backward()
    if how == "observe":
        optimizer.observe_loss(loss.item())
        return optimizer.step()
    return optimizer.step(loss=loss)


def test_three_ways_to_tell_the_loss_agree():
    points = []
    for how in ("closure", "keyword", "observe"):
        x = torch.tensor([1.0, -2.0, 3.0], requires_grad=True)
        optimizer = ELRA([x], lr=2.0, max_step_norm=None, max_relative_step=None, max_first_step=None)
        for _ in range(10):
            quadratic_step(optimizer, x, how)
        assert optimizer.restarts > 0
        points.append(x.detach().clone())
    assert torch.equal(points[0], points[1])
    assert torch.equal(points[0], points[2])


def test_step_returns_the_closures_loss():
    x = torch.tensor([1.0], requires_grad=True)
    assert quadratic_step(ELRA([x]), x, "closure").item() == 1.0


def test_without_a_loss_it_steps_and_warns_once():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    optimizer = ELRA([x], lr=0.1)
    (x**2).sum().backward()
    with pytest.warns(UserWarning, match="not told the loss") as warned:
        optimizer.step()
    assert warned[0].filename == __file__  # the line to mend
    assert x[0].item() != 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def test_loss_that_is_no_number_is_refused():
    optimizer = ELRA([torch.zeros(2, requires_grad=True)])
    with pytest.raises(ConfigurationError, match=r"shape \(2,\)"):
        optimizer.observe_loss(torch.zeros(2))
    with pytest.raises(ConfigurationError, match="not str"):
        optimizer.observe_loss("1.0")
    with pytest.raises(ConfigurationError, match="one of them"):
        optimizer.step(lambda: 1.0, loss=1.0)
    with pytest.raises(ConfigurationError, match=r"tell a loss as step\(loss=loss\)"):
        optimizer.step(torch.tensor(1.0))


# ---- restarts ----


def test_restart_goes_back_and_steps_shorter():
    x = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    optimizer = ELRA([x], lr=1.5, max_step_norm=None, max_relative_step=None, max_first_step=None, noise_correction=0)
    quadratic_step(optimizer, x, "keyword")  # 1 - 1.5·2 = -2, where the loss is 4 > 1.1
    assert x.item() == pytest.approx(-2)
    quadratic_step(optimizer, x, "keyword")
    # The parabola through f(1) = 1 with slope 2 and f(-2) = 4 has its minimum at 0, α = ½.
    assert optimizer.restarts == 1
    assert optimizer.alpha == pytest.approx(0.5)
    assert x.item() == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("formula", ["derived", "paper"])
def test_restart_at_least_halves(formula):
    x = torch.tensor([5.0], requires_grad=True)
    optimizer = ELRA([x], lr=2.0, restart_formula=formula, noise_correction=0)
    quadratic_step(optimizer, x, "keyword")
    before = optimizer.alpha
    optimizer.step(loss=1e9)
    assert optimizer.restarts == 1
    assert optimizer.alpha <= before / 2


def test_initial_rule_works_for_negative_losses_and_can_be_dropped():
    for ratio, expected in ((1.1, 1), (None, 0)):
        x = torch.tensor([1.0], requires_grad=True)
        x.grad = torch.tensor([1.0])
        optimizer = ELRA([x], initial_restart_ratio=ratio)
        optimizer.step(loss=-10.0)
        optimizer.step(loss=-9.5)  # higher, but within a tenth of |f_0|
        assert optimizer.restarts == 0
        optimizer.step(loss=-8.5)
        assert optimizer.restarts == expected


def test_cycle_statistics_replace_the_initial_rule():
    x = torch.tensor([1.0], requires_grad=True)
    x.grad = torch.tensor([1e-3])
    optimizer = ELRA([x], lr=1e-3)
    for loss in (10.0, 1.0, 1.2, 0.8, 1.0):
        optimizer.step(loss=loss)
    optimizer.end_cycle()
    mean, std = statistics.fmean([10, 1, 1.2, 0.8, 1]), statistics.pstdev([10, 1, 1.2, 0.8, 1])
    optimizer.step(loss=mean + 5 * std - 1e-3)
    assert optimizer.restarts == 0
    optimizer.step(loss=mean + 5 * std + 1e-3)
    assert optimizer.restarts == 1


def test_noise_of_the_first_losses_raises_the_initial_limit():
    x = torch.tensor([1.0], requires_grad=True)
    x.grad = torch.tensor([1e-3])
    optimizer = ELRA([x])
    losses = [1.0, 0.5, 1.05, 0.4, 1.0, 0.6, 0.5, 1.0, 0.45, 0.9]
    for loss in losses:
        optimizer.step(loss=loss)
    limit = statistics.fmean(losses) + 5 * statistics.pstdev(losses)
    assert limit > 1.1
    optimizer.step(loss=limit - 1e-3)
    assert optimizer.restarts == 0
    optimizer.step(loss=2 * limit)
    assert optimizer.restarts == 1


def test_floor_never_undoes_a_restart():
    x = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    x.grad = torch.tensor([1.0], dtype=torch.float64)
    optimizer = ELRA([x], min_step_norm=0.1)
    optimizer.step(loss=1.0)
    assert optimizer.alpha == pytest.approx(0.1)  # the floor
    optimizer.step(loss=1e6)
    assert x.item() == pytest.approx(0.99)  # a tenth of the step, not the floor
    optimizer.step(loss=1e6)
    assert x.item() == pytest.approx(0.999)


def batches_of_noise(optimizer, x, losses):
    """Updates along gradients that are nothing but noise, so that the rule leaves α where it is; return every α."""
    generator = torch.Generator().manual_seed(optimizer._numbers()["updates"])
    rates = []
    for loss in losses:
        x.grad = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        optimizer.step(loss=loss)
        rates.append(optimizer.alpha)
    return rates


def noisy_losses(count, mean=1.0, seed=0):
    return (mean * (1 + 0.02 * torch.randn(count, generator=torch.Generator().manual_seed(seed)))).tolist()


def noisy_optimizer(**given):
    x = torch.ones(2000, dtype=torch.float64, requires_grad=True)
    return ELRA([x], lr=1e-4, noise_correction=1e-9, max_first_step=None, **given), x


def test_one_high_loss_shortens_a_step_and_not_the_rate():
    optimizer, x = noisy_optimizer()
    batches_of_noise(optimizer, x, noisy_losses(30))
    before, alpha = x.detach().clone(), optimizer.alpha
    step = optimizer.metrics["step_norm"]
    batches_of_noise(optimizer, x, [50.0])
    assert optimizer.restarts == 1
    assert optimizer.alpha == alpha
    assert optimizer.metrics["step_norm"] == pytest.approx(step / 10)
    assert (x - before).norm().item() == pytest.approx(0.9 * step)
    after = batches_of_noise(optimizer, x, noisy_losses(5, seed=1))
    assert after[0] == alpha  # the retry was too short for the rule
    assert after[-1] == pytest.approx(alpha, rel=0.3)


def test_only_a_second_failure_reduces_the_rate_which_then_goes_back():
    for losses in ([50.0, 50.0], [50.0, 1.0, 50.0]):  # the retry fails too; the full step after a retry fails
        optimizer, x = noisy_optimizer()
        batches_of_noise(optimizer, x, noisy_losses(30))
        alpha = optimizer.alpha
        batches_of_noise(optimizer, x, losses)
        assert optimizer.alpha == pytest.approx(alpha, rel=0.2)
        after = batches_of_noise(optimizer, x, noisy_losses(8, seed=1))
        assert after[0] == pytest.approx(alpha / 10, rel=0.3)
        assert all(later < 2.5 * earlier for earlier, later in itertools.pairwise(after))
        assert after[-1] == pytest.approx(alpha, rel=0.4)


def test_a_rate_that_is_really_too_large_falls():
    """Every full step fails: α is not tried again and again."""
    optimizer, x = noisy_optimizer()
    batches_of_noise(optimizer, x, noisy_losses(30))
    first, failures = optimizer.alpha, 0
    losses = iter(noisy_losses(400, seed=1))
    for _ in range(300):
        too_far = optimizer.metrics["step_norm"] > 0.011 * first * 2000**0.5
        failures += too_far
        batches_of_noise(optimizer, x, [next(losses) + 50 * too_far])
    assert optimizer.alpha < first / 50
    assert failures < 60


def test_losses_that_stay_high_are_accepted_after_three_retries():
    for closes in (False, True):
        optimizer, x = noisy_optimizer()
        batches_of_noise(optimizer, x, noisy_losses(30))
        if closes:
            optimizer.end_cycle()
        alpha = optimizer.alpha
        rates = batches_of_noise(optimizer, x, noisy_losses(60, mean=100.0, seed=1))
        assert optimizer.restarts == 3  # and never again for this level
        assert optimizer.metrics["accepted_levels"] == 1
        assert rates[-1] == pytest.approx(alpha, rel=0.5)


def test_outliers_that_come_often_are_soon_ordinary():
    """One batch of twelve, as with 1 % wrong labels at batch 8."""
    optimizer, x = noisy_optimizer()
    losses = noisy_losses(600)
    rates = batches_of_noise(optimizer, x, [50.0 if k > 30 and k % 12 == 0 else loss for k, loss in enumerate(losses)])
    assert 1 <= optimizer.restarts < 12
    assert min(rates) > 0.2 * rates[30]


def test_a_single_spike_does_not_end_the_guard():
    optimizer, x = noisy_optimizer()
    batches_of_noise(optimizer, x, noisy_losses(30))
    batches_of_noise(optimizer, x, [1e6, *noisy_losses(100, seed=1)])
    assert optimizer.restarts == 1
    batches_of_noise(optimizer, x, [10.0])
    assert optimizer.restarts == 2


@pytest.mark.parametrize("no_gradient", [False, True])
def test_a_batch_without_information_is_skipped(no_gradient):
    optimizer, x = noisy_optimizer()
    batches_of_noise(optimizer, x, noisy_losses(30))
    before, control = x.detach().clone(), copy.deepcopy(optimizer._numbers())
    x.grad = None if no_gradient else torch.zeros_like(x)
    optimizer.step(loss=math.nan)
    assert torch.equal(x, before)
    assert optimizer.metrics["skipped"] == 1
    assert optimizer.restarts == 0
    untouched = {"alpha", "step_size", "previous_slope", "previous_loss", "loss_statistics", "direction_norm"}
    assert {name: optimizer._numbers()[name] for name in untouched} == {name: control[name] for name in untouched}
    batches_of_noise(optimizer, x, noisy_losses(1))
    assert not torch.equal(x, before)


def test_rounding_is_no_divergence():
    """A surrogate loss that is zero but for rounding, and losses near zero that differ in their last digits."""
    for losses in ([1e-8, *(1e-7 * (-1) ** k for k in range(30))], [1e-4] * 30 + [1e-4 * (1 + 1e-7)] * 5):
        x = torch.ones(50, dtype=torch.float64, requires_grad=True)
        optimizer = ELRA([x], lr=1e-3, max_first_step=None)
        batches_of_noise(optimizer, x, losses)
        assert optimizer.restarts == 0


def test_a_loss_that_climbs_back_in_the_first_cycle_is_noticed():
    optimizer, x = noisy_optimizer()
    batches_of_noise(optimizer, x, [1.0 - 0.005 * k for k in range(40)])  # to 0.8
    batches_of_noise(optimizer, x, noisy_losses(60, mean=0.8))
    batches_of_noise(optimizer, x, [1.6])
    assert optimizer.restarts == 1


def test_an_outlier_after_an_easy_batch_is_no_steep_rise():
    """A rise is measured from the recent mean."""
    lengths = []
    for easy in (1.0, 1e-3):
        optimizer, x = noisy_optimizer()
        batches_of_noise(optimizer, x, noisy_losses(60))
        optimizer._numbers()["previous_loss"] = easy
        optimizer._numbers()["previous_slope"] = 1.5 / optimizer._numbers()["step_size"]  # the step promised 1.5
        batches_of_noise(optimizer, x, [2.0])
        lengths.append(optimizer._numbers()["length"])
    assert lengths[0] == pytest.approx(lengths[1], rel=0.05)


def test_a_first_batch_of_zeros_does_not_stop_training():
    """Its low loss makes every other one too high, until the limit is lifted."""
    x = torch.nn.Parameter(torch.full((20,), 3.0))
    optimizer = ELRA([x])
    losses = []
    for number in range(100):
        optimizer.zero_grad()
        loss = ((0 if number == 0 else 1) * x).square().sum()
        loss.backward()
        optimizer.step(loss=loss + 1e-3)
        losses.append(loss.item())
    assert optimizer.restarts == 3
    assert losses[-1] < losses[1] / 100


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["loss", "element", "gradient"])
@pytest.mark.parametrize("when", [0, 3])
def test_non_finite_never_reaches_the_weights(bad, where, when):
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    optimizer = ELRA([x], lr=1e-2, soft_restart=False)
    for step in range(8):
        optimizer.zero_grad()
        loss = (x**2).sum()
        loss.backward()
        if step == when:
            if where == "loss":
                loss = loss * bad
            elif where == "element":
                x.grad[1] = bad
            else:
                x.grad.fill_(bad)
        optimizer.step(loss=loss)
        assert torch.isfinite(x).all()
        assert torch.isfinite(optimizer.state[x].get("previous_direction", torch.zeros(1))).all()
    assert optimizer.restarts == 1
    assert (x**2).sum() < 5


def test_staying_non_finite_ends_with_a_clear_error():
    x = torch.tensor([1.0], requires_grad=True)
    x.grad = torch.tensor([1.0])
    optimizer = ELRA([x])
    optimizer.step(loss=1.0)

    def keep_trying():
        for _ in range(200):
            optimizer.step(loss=math.nan)

    with pytest.raises(RuntimeError, match="non-finite over 20 updates in a row"):
        keep_trying()
    assert optimizer.restarts == 19
    assert torch.isfinite(x).all()


# ---- guards ----


def test_step_norm_is_cropped_and_floored():
    x = torch.zeros(4, requires_grad=True)
    optimizer = ELRA([x], lr=1.0, min_step_norm=0.5, max_step_norm=2.0, max_relative_step=None)
    x.grad = torch.full((4,), 100.0)
    before = x.detach().clone()
    optimizer.step(loss=1.0)
    assert (x - before).norm().item() == pytest.approx(2.0)
    assert optimizer.metrics["step_norm"] == pytest.approx(2.0)
    small = torch.zeros(4, requires_grad=True)
    optimizer = ELRA([small], lr=1e-3, min_step_norm=0.5)
    small.grad = torch.full((4,), 0.1)
    optimizer.step(loss=1.0)
    assert small.norm().item() == pytest.approx(0.5)


def test_growth_is_bounded_on_negative_curvature():
    x = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    optimizer = ELRA([x], lr=1e-3, max_growth=4, max_relative_step=None)
    rates = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = -(x**2).sum()
        loss.backward()
        optimizer.step(loss=loss)
        rates.append(optimizer.alpha)
    assert rates == pytest.approx([1e-3, 4e-3, 16e-3, 64e-3])


# ---- groups, schedulers, weight decay, gradient decay ----


def decayed_path(how, settings, updates=9):
    """Points, rates and step norms on a quadratic, with spikes; a scheduler or gradient decay shortens steps."""
    x = torch.tensor([101.0, 99.0, 100.5], dtype=torch.float64, requires_grad=True)
    optimizer = ELRA([x], lr=1e-2, max_first_step=None, **settings)
    found = []
    for number in range(updates):
        decay = 1.0 if number < 2 else 0.4 if number < 6 else 0.25
        optimizer.zero_grad()
        loss = (torch.tensor([1.0, 3.0, 7.0], dtype=torch.float64) * (x - 100) ** 2).sum() / 2
        loss.backward()
        if how == "gradient decay":
            optimizer.gradient_decay = decay
        else:
            optimizer.param_groups[0]["lr"] = 1e-2 * decay
        optimizer.step(loss=loss.item() + 3 * (number in (3, 6)))
        found.append((*x.tolist(), optimizer.alpha, optimizer.metrics["step_norm"]))
    assert optimizer.restarts > 0
    return torch.tensor(found, dtype=torch.float64)


def test_gradient_decay_shortens_the_step_and_leaves_the_slope_as_it_is():
    """As a scheduler's factor does: rule and parabola see ⟨G, step⟩, and not the square of what is left of G."""
    settings = dict(max_step_norm=None, max_relative_step=None, noise_correction=0.0)
    paths = [decayed_path(how, settings) for how in ("gradient decay", "scheduler")]
    torch.testing.assert_close(*paths)


def test_limits_on_the_step_are_limits_on_what_gradient_decay_leaves_of_it():
    lengths = decayed_path("gradient decay", dict(min_step_norm=0.05, max_step_norm=0.05))[:, -1]
    assert lengths[[2, 4, 5, 7]].tolist() == pytest.approx([0.05] * 4)


@pytest.mark.parametrize("memory", ["gradient", "point"])
def test_gradient_decay_of_every_layout_is_the_same(memory):
    paths = [decayed_path("gradient decay", dict(memory=layout)) for layout in ("gradient", memory)]
    torch.testing.assert_close(*paths)


def test_a_step_is_cropped_to_a_share_of_the_weights():
    """... which count as not smaller than 0.01; or to the floor, if that is more."""
    for start, arguments, length in (
        (1.0, {}, 0.2),
        (1.0, {"max_relative_step": 0.3}, 0.6),
        (1.0, {"max_relative_step": None}, 2.0),
        (1.0, {"min_step_norm": 0.5}, 0.5),
        (0.0, {}, 0.002),
    ):
        x = torch.full((4,), start, requires_grad=True)
        optimizer = ELRA([x], lr=1.0, max_first_step=None, **{"max_relative_step": 0.1, **arguments})
        x.grad = torch.full((4,), 100.0)
        before = x.detach().clone()
        optimizer.step(loss=1.0)
        assert (x - before).norm().item() == pytest.approx(length, rel=1e-5)


def test_weight_decay_is_a_factor_per_update_and_group():
    decayed, plain = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    optimizer = ELRA([{"params": [decayed], "weight_decay": 3e-4}, {"params": [plain]}])
    decayed.grad, plain.grad = torch.zeros(2), torch.zeros(2)
    for _ in range(10):
        optimizer.step(loss=1.0)
    assert decayed[0].item() == pytest.approx(0.9997**10)
    assert plain[0].item() == 1.0


@pytest.mark.parametrize("fused", [False, True])
def test_bb2_with_several_rates_is_refused(fused):
    """It takes ‖G‖² for the slope along the step, which is that only where all shares are equal."""
    x, y = (torch.ones(2, requires_grad=True) for _ in range(2))
    groups = [{"params": [x], "lr": 0.1}, {"params": [y], "lr": 0.2}]
    with pytest.raises(ConfigurationError, match=r"lr=0.2 of a group cannot be used with step_rule='bb2'.*lr=0.1"):
        ELRA(groups, step_rule="bb2", fused=fused)
    optimizer = ELRA([{"params": [x]}, {"params": [y]}], step_rule="bb2", fused=fused)
    with pytest.raises(ConfigurationError, match="lr=0.5 of a group"):
        optimizer.add_param_group({"params": [torch.ones(1, requires_grad=True)], "lr": 0.5})
    assert len(optimizer.param_groups) == 2
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda k: 1 - k / 4, lambda k: 1 - k / 4 * (k > 1)])
    x.grad, y.grad = torch.ones(2), torch.ones(2)
    optimizer.step(loss=1.0)
    schedule.step()
    with pytest.raises(ConfigurationError, match="step_rule='bb2' cannot be used with .* groups have 1 and 0.75 times"):
        optimizer.step(loss=1.0)

    class SignDirection(Direction):
        is_gradient = False

        def apply(self, groups, params, gradients, state):
            return [[g.sign() for g in group] for group in gradients]

    class Signs(ELRA):
        def direction(self):
            return SignDirection()

    with pytest.raises(ConfigurationError, match="step_rule='bb2' is only for steps along the gradient"):
        Signs([x], step_rule="bb2")


def test_scheduler_acts_as_a_factor_and_zero_freezes():
    x = torch.tensor([1.0, -1.0], dtype=torch.float64, requires_grad=True)
    optimizer = ELRA([x], lr=1e-2, noise_correction=0, max_step_norm=None)
    factors = [0.0, 0.5, 1.0, 0.0, 0.0, 1.0, 0.5]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factors[min(step, 6)])
    curvature = torch.tensor([1.0, 3.0], dtype=torch.float64)
    for factor in factors:
        optimizer.zero_grad()
        loss = (curvature * x**2).sum() / 2
        loss.backward()
        before, gradient = x.detach().clone(), x.grad.clone()
        optimizer.step(loss=loss)
        torch.testing.assert_close(before - x.detach(), optimizer.alpha * factor * gradient)
        scheduler.step()
    assert math.isfinite(optimizer.alpha)
    assert optimizer.param_groups[0]["alpha"] == optimizer.alpha


def test_without_noise_the_rule_makes_up_for_a_factor():
    """On a parabola one measured step gives the exact step 1/h, whatever factor it is scaled by."""
    x = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    optimizer = ELRA([x], lr=0.1, noise_correction=0, max_growth=1e6, max_step_norm=None, max_relative_step=None)
    optimizer.param_groups[0]["lr"] = 0.01
    for _ in range(3):
        optimizer.zero_grad()
        loss = (2 * x**2).sum()
        loss.backward()
        optimizer.step(loss=loss)
    assert optimizer.alpha * 0.1 == pytest.approx(0.25)
    assert x.item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("decays", [False, True])
def test_under_noise_alone_a_factor_does_not_add_up(decays):
    """Gradients that have nothing to do with one another say nothing, so α stays where it is."""
    x = torch.zeros(1000, dtype=torch.float64, requires_grad=True)
    optimizer = ELRA([x], lr=1e-3, noise_correction=0)
    noise = torch.Generator().manual_seed(0)
    for update in range(100):
        optimizer.param_groups[0]["lr"] = 1e-3 * (0.99 - 0.0098 * update if decays else 0.5)
        x.grad = torch.randn(1000, dtype=torch.float64, generator=noise)
        optimizer.step(loss=1.0)
    assert 0.1 < optimizer.alpha / 1e-3 < 10


def test_a_groups_own_lr_is_its_share():
    a, b = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = ELRA([{"params": [a]}, {"params": [b], "lr": 1e-2}], lr=1e-3, max_relative_step=None)
    a.grad, b.grad = torch.ones(1), torch.ones(1)
    optimizer.step(loss=1.0)
    assert a.item() == pytest.approx(-1e-3)
    assert b.item() == pytest.approx(-1e-2)


def test_one_rate_for_all_groups_whatever_the_grouping():
    torch.manual_seed(0)
    start = torch.randn(6, dtype=torch.float64)
    curvature = torch.rand(6, dtype=torch.float64)

    def run(cuts):
        parts = [p.clone().requires_grad_() for p in start.split(cuts)]
        optimizer = ELRA([{"params": [p]} for p in parts])
        for _ in range(20):
            optimizer.zero_grad()
            loss = (curvature * torch.cat(parts) ** 2).sum()
            loss.backward()
            optimizer.step(loss=loss)
        return torch.cat(parts).detach()

    torch.testing.assert_close(run([6]), run([1, 2, 3]), rtol=1e-12, atol=1e-14)


# ---- parameters of all kinds ----


def test_frozen_unused_empty_and_scalar_parameters():
    frozen = torch.ones(2)
    unused, empty = torch.ones(3, requires_grad=True), torch.empty(0, 4, requires_grad=True)
    scalar, matrix = torch.tensor(2.0, requires_grad=True), torch.ones(2, 3).t().requires_grad_()
    optimizer = ELRA([frozen, unused, empty, scalar, matrix], lr=0.01, max_relative_step=None)
    for _ in range(30):
        optimizer.zero_grad()
        loss = scalar**2 + (matrix**2).sum() + empty.sum()
        loss.backward()
        optimizer.step(loss=loss)
    assert torch.equal(unused, torch.ones(3))
    assert torch.equal(frozen, torch.ones(2))
    assert loss.item() < 1e-3


def test_parameter_that_is_used_only_sometimes():
    a, b = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    optimizer = ELRA([a, b], lr=0.01)
    for step in range(40):
        optimizer.zero_grad()
        loss = (a**2).sum() + ((b**2).sum() if step % 3 else 0)
        loss.backward()
        before = b.detach().clone()
        restarts = optimizer.restarts
        optimizer.step(loss=loss)
        if step % 3 == 0 and optimizer.restarts == restarts:
            assert torch.equal(b, before)
    assert torch.isfinite(a).all()
    assert (a**2).sum() < 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtypes_keep_wide_control_numbers(dtype):
    torch.manual_seed(0)
    x = torch.randn(3000).to(dtype).requires_grad_()
    optimizer = ELRA([x], lr=1e-3, max_step_norm=None, max_relative_step=None)
    norms = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = (x.float() ** 2).mean() * 100
        loss.backward()
        norms.append(x.grad.double().norm().item())
        optimizer.step(loss=loss)
    assert x.dtype == dtype
    assert loss.item() < 10
    # A bfloat16 sum of 3,000 squares would be off by percents.
    assert optimizer.param_groups[0]["scalars"]["direction_norm"] == pytest.approx(norms[-1], rel=1e-5)


def test_sparse_and_complex_are_refused():
    embedding = torch.nn.Embedding(10, 3, sparse=True)
    optimizer = ELRA(embedding.parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        optimizer.step(loss=1.0)
    with pytest.raises(ConfigurationError, match="complex"):
        ELRA([torch.zeros(2, dtype=torch.complex64, requires_grad=True)])


# ---- state ----


def noisy_run(model, optimizer, generator, steps):
    for _ in range(steps):
        inputs = torch.randn(8, 5, generator=generator)
        optimizer.zero_grad()
        loss = (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()
        if torch.rand((), generator=generator) < 0.1:
            loss = loss * 50
        loss.backward()
        optimizer.step(loss=loss)
        optimizer.end_cycle() if optimizer.param_groups[0]["scalars"]["updates"] % 7 == 0 else None


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_state_continues_bit_for_bit(window, dtype):
    def fresh():
        torch.manual_seed(3)
        model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 1)).to(torch.float32)
        if dtype == torch.bfloat16:
            model = torch.nn.Sequential(model.bfloat16())
            model.forward = lambda x, m=model: m[0](x.bfloat16()).float()
        return model, ELRA(model.parameters(), restart_window=window, min_step_norm=0.05)

    model, optimizer = fresh()
    noisy_run(model, optimizer, torch.Generator().manual_seed(0), 20)
    noisy_run(model, optimizer, torch.Generator().manual_seed(1), 20)

    first, first_optimizer = fresh()
    noisy_run(first, first_optimizer, torch.Generator().manual_seed(0), 20)
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": first_optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second, second_optimizer = fresh()
    second.load_state_dict(saved["model"])
    second_optimizer.load_state_dict(saved["optimizer"])
    noisy_run(second, second_optimizer, torch.Generator().manual_seed(1), 20)

    assert optimizer.restarts > 0
    for expected, found in zip(model.parameters(), second.parameters(), strict=True):
        assert torch.equal(expected, found)
    assert optimizer.state_dict()["param_groups"] == second_optimizer.state_dict()["param_groups"]


def test_deepcopy_continues_like_the_original():
    model = torch.nn.Linear(5, 1)
    optimizer = ELRA(model.parameters())
    noisy_run(model, optimizer, torch.Generator().manual_seed(0), 5)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    noisy_run(model, optimizer, torch.Generator().manual_seed(1), 5)
    noisy_run(twin, twin_optimizer, torch.Generator().manual_seed(1), 5)
    assert torch.equal(model.weight, twin.weight)
    assert optimizer.alpha == twin_optimizer.alpha
    with pytest.warns(UserWarning, match="not told the loss"):
        copy.deepcopy(optimizer).step()


# ---- bad input ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": 0}, r"lr=0 must be a number > 0"),
        ({"lr": "1e-3"}, r"lr='1e-3' must be"),
        ({"lr": 1e7}, r"lr=10000000.0 is outside lr_bounds"),
        ({"step_rule": "bb3"}, r"step_rule='bb3' must be one of 'bb1', 'bb2'. Did you mean"),
        ({"noise_correction": -1}, "noise_correction=-1"),
        ({"max_growth": 1.0}, "max_growth=1.0"),
        ({"lr_bounds": (1e6, 1e-8)}, "lr_bounds=.*low < high"),
        ({"lr_bounds": 3}, "lr_bounds=3"),
        ({"min_step_norm": 3.0}, "min_step_norm=3.0 is above max_step_norm=2.0"),
        ({"max_step_norm": 0}, "max_step_norm=0"),
        ({"max_first_step": 0}, "max_first_step=0"),
        ({"weight_decay": 1.5}, "weight_decay=1.5"),
        ({"soft_restart": "yes"}, "soft_restart='yes'"),
        ({"restart_sigma": math.nan}, "restart_sigma=nan"),
        ({"initial_restart_ratio": 0.9}, "initial_restart_ratio=0.9"),
        ({"restart_window": 1}, "restart_window=1"),
        ({"restart_formula": "papr"}, "Did you mean 'paper'"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        ELRA([torch.zeros(1, requires_grad=True)], **arguments)


def test_a_group_cannot_have_its_own_global_setting():
    with pytest.raises(ConfigurationError, match="one max_growth per optimizer"):
        ELRA([{"params": [torch.zeros(1, requires_grad=True)], "max_growth": 3.0}])
    with pytest.raises(ConfigurationError, match="weight_decay=2"):
        ELRA([{"params": [torch.zeros(1, requires_grad=True)], "weight_decay": 2}])


def test_a_far_too_large_first_rate_does_no_harm():
    """Only the very first step is cropped, to a share of the parameters' norm or to the floor."""
    for arguments, length in (({}, 0.05), ({"max_first_step": 0.1}, 0.5), ({"min_step_norm": 0.2}, 0.2)):
        x = torch.tensor([3.0, 4.0], requires_grad=True)  # of norm 5
        optimizer = ELRA([x], lr=100.0, noise_correction=0, max_relative_step=None, **arguments)
        losses = []
        for _ in range(4):
            losses.append(quadratic_step(optimizer, x, "keyword"))
            if len(losses) == 1:
                assert optimizer.metrics["step_norm"] == pytest.approx(length, rel=1e-5)
        assert losses[-1] < losses[0]
        assert optimizer.restarts == 0


def test_parameters_of_zero_have_no_norm_to_crop_the_first_step_by():
    x = torch.zeros(2, requires_grad=True)
    optimizer = ELRA([x], lr=0.5, max_step_norm=None, max_relative_step=None)
    x.grad = torch.ones(2)
    optimizer.step(loss=1.0)
    assert x.tolist() == [-0.5, -0.5]


def test_in_a_compiled_training_step(caplog):
    """The step is left out of the compiled graphs: same path, nothing compiled for every parameter."""

    def training_step(model, optimizer, inputs):
        loss = (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step(loss=loss.detach())
        optimizer.zero_grad()

    ends = []
    for way in (training_step, torch.compile(training_step, backend="eager")):
        torch.manual_seed(0)
        model = torch.nn.Sequential(*(torch.nn.Linear(n, n + 1) for n in range(2, 14)))
        optimizer = ELRA(model.parameters())
        for number in range(6):
            way(model, optimizer, torch.randn(4, 2, generator=torch.Generator().manual_seed(number)))
        ends.append((optimizer.alpha, [p.detach().clone() for p in model.parameters()]))
    assert ends[0][0] == ends[1][0]
    assert all(map(torch.equal, ends[0][1], ends[1][1]))
    assert "recompile_limit" not in caplog.text
