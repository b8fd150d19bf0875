"""hf_elra.optim.base: an optimizer of other parts than ours, in a bare loop; losses along the line; loss scaling."""

import pytest
import torch

from hf_elra import ConfigurationError
from hf_elra.optim import ELRA, OPTIMIZERS, PAL, LossAwareOptimizer
from hf_elra.optim.base import Parts
from hf_elra.optim.directions import Direction
from hf_elra.optim.guards import RestartGuard, StepGuards
from hf_elra.optim.rules import Rule


class Normalised(Direction):
    is_gradient = False

    def apply(self, groups, params, gradients, state):
        norm = torch.cat([g.flatten() for group in gradients for g in group]).norm()
        return [[g / norm for g in group] for group in gradients]


class LineMinimum(Rule):
    """The minimum of the parabola through the loss, its slope and the loss one step ahead."""

    def propose(self, measured, alpha):
        rise = measured.line_loss(alpha) - measured.loss
        curvature = 2 * (rise + alpha * measured.slope) / alpha**2
        return measured.slope / curvature


class LineSearch(LossAwareOptimizer):
    needs_line_loss = True

    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr})

    def parts(self):
        return Parts(Normalised(), LineMinimum(), StepGuards(), RestartGuard())


def test_a_new_rule_and_a_new_direction_are_an_optimizer():
    """On a round bowl the minimum of the line is that of the bowl; parameters are not moved by looking."""
    x = torch.tensor([3.0, 4.0], dtype=torch.float64, requires_grad=True)
    optimizer, seen = LineSearch([x]), []

    def evaluate():
        seen.append(x.detach().clone())
        return x.square().sum() / 2

    for _ in range(2):
        optimizer.zero_grad()
        loss = x.square().sum() / 2
        loss.backward()
        before = x.detach().clone()
        optimizer.step(loss=loss, evaluate=evaluate)
    torch.testing.assert_close(seen, [before - 1e-3 * before / before.norm()])
    assert optimizer.alpha == pytest.approx(5 - 1e-3)
    assert x.abs().max() < 1e-6
    other = LineSearch([torch.zeros(2, dtype=torch.float64, requires_grad=True)])
    other.load_state_dict(optimizer.state_dict())
    assert other.alpha == optimizer.alpha


def test_a_rule_that_looks_ahead_says_what_it_needs():
    x = torch.ones(2, requires_grad=True)
    x.grad = torch.ones(2)
    with pytest.raises(ConfigurationError, match=r"call step\(loss=loss, evaluate=function\)"):
        LineSearch([x]).step(loss=1.0)


def test_parts_are_asked_for():
    class Nothing(LossAwareOptimizer):
        pass

    with pytest.raises(NotImplementedError, match="Nothing must say what its parts are"):
        Nothing([torch.ones(2, requires_grad=True)], {})


@pytest.mark.parametrize(
    ("proposal", "norm", "expected"),
    [
        (0.5, 1.0, (0.5, None)),
        (0.5, 0.1, (1.0, "floor")),
        (5.0, 0.01, (4.0, "ceiling")),
        (3.0, 2.0, (1.0, "crop")),
        (1e-4, 2.0, (0.05, "floor")),
    ],
)
def test_guards_say_which_limit_decided(proposal, norm, expected):
    guards = StepGuards(lr_bounds=(0.01, 4.0), min_step_norm=0.1, max_step_norm=2.0)
    assert guards.apply(proposal, proposal, norm) == pytest.approx(expected)


# ---- with a GradScaler ----


def scaled_update(optimizer, scaler, loss, told=None):
    """As a loop in half precision makes it."""
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer, loss=loss.detach() if told is None else told)
    scaler.update()


@pytest.mark.parametrize("name", ["elra", "elra_spectral", "ntlr_adamw", "sps", "gols"])
def test_a_grad_scaler_changes_nothing_where_nothing_overflows(name):
    """Every number is multiplied and divided by a power of two."""
    ends = []
    for enabled in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
        optimizer, inputs = OPTIMIZERS[name](model.parameters()), torch.randn(8, 4)
        scaler = torch.amp.GradScaler("cpu", enabled=enabled)
        for _ in range(6):
            scaled_update(optimizer, scaler, (model(inputs) - 1).square().mean())
        ends.append([optimizer.alpha, *(p.detach() for p in model.parameters())])
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=0)


def test_an_overflow_of_the_scale_makes_no_update():
    """The loss is finite, so the point is no worse than others; α is what it was, and the scale is halved."""
    x = torch.nn.Parameter(torch.tensor([3.0]))
    optimizer, scaler = ELRA([x], max_relative_step=None), torch.amp.GradScaler("cpu")
    for _ in range(3):
        scaled_update(optimizer, scaler, x.square().sum())
    before, alpha, updates = x.item(), optimizer.alpha, optimizer.param_groups[0]["scalars"]["updates"]
    scaled_update(optimizer, scaler, x.square().sum() * float("inf"), told=before**2)
    assert (x.item(), optimizer.alpha, optimizer.restarts) == (before, alpha, 0)
    assert optimizer.param_groups[0]["scalars"]["updates"] == updates
    assert scaler.get_scale() == 2**15
    scaled_update(optimizer, scaler, x.square().sum())
    assert x.item() < before


def test_a_loss_that_is_not_finite_takes_the_step_back_although_the_scaler_saw_an_overflow():
    """Skipping these updates would leave the weights where they are for ever."""
    x = torch.nn.Parameter(torch.tensor([3.0]))
    optimizer, scaler = ELRA([x], lr=0.1, max_relative_step=None, max_first_step=None), torch.amp.GradScaler("cpu")
    scaled_update(optimizer, scaler, x.square().sum())
    beyond = x.item()
    scaled_update(optimizer, scaler, x.square().sum() * float("nan"))
    assert optimizer.restarts == optimizer.metrics["non_finite"] == 1
    assert beyond < x.item() < 3


def test_gradients_that_no_scale_makes_finite_are_an_error():
    x = torch.nn.Parameter(torch.tensor([3.0]))
    optimizer, scaler = ELRA([x]), torch.amp.GradScaler("cpu", init_scale=4.0)
    scaled_update(optimizer, scaler, x.square().sum())
    for _ in range(3 + 19):  # at scales of 4, 2 and 1, then taken back
        scaled_update(optimizer, scaler, x.square().sum() * float("inf"), told=9.0)
    assert optimizer.metrics["non_finite"] == 19
    with pytest.raises(RuntimeError, match="non-finite over 20 updates"):
        scaled_update(optimizer, scaler, x.square().sum() * float("inf"), told=9.0)


def test_gradients_that_were_unscaled_for_clipping_are_not_divided_again():
    x = torch.nn.Parameter(torch.tensor([3.0]))
    optimizer, scaler = ELRA([x]), torch.amp.GradScaler("cpu")
    loss = x.square().sum()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer, loss=loss)
    assert optimizer.metrics["grad_norm"] == 6


def test_what_a_grad_scaler_cannot_do_is_refused():
    x = torch.nn.Parameter(torch.tensor([3.0]))
    for optimizer, words, message in (
        (PAL([x]), {"loss": 9.0, "evaluate": lambda: 9.0}, "PAL cannot be used with a GradScaler"),
        (ELRA([x]), {"loss": None}, "closure=.*cannot be used with a GradScaler"),
    ):
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(x.square().sum()).backward()
        with pytest.raises(ConfigurationError, match=message):
            scaler.step(optimizer, *([] if words["loss"] else [lambda: 9.0]), **words)
    half = torch.nn.Parameter(torch.tensor([3.0], dtype=torch.float16))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(half.square().sum()).backward()
    with pytest.raises(ConfigurationError, match="a float16 parameter"):
        scaler.step(ELRA([half]), loss=9.0)


# ---- what a loop does wrong ----


@pytest.mark.parametrize("kind", ["elra", "elra_spectral"])
def test_a_step_without_gradients_is_told_once(kind, recwarn):
    matrix = torch.nn.Parameter(torch.randn(4, 4))
    optimizer = OPTIMIZERS[kind]([matrix])
    for _ in range(3):
        optimizer.step(loss=1.0)
    (told,) = recwarn.list
    assert "no parameter has a gradient, so that nothing moves" in str(told.message)


@pytest.mark.parametrize("kind", ["elra", "elra_spectral"])
def test_a_scheduler_that_goes_up_is_told_once(kind, recwarn):
    matrix = torch.nn.Parameter(torch.randn(4, 4))
    optimizer = OPTIMIZERS[kind]([{"params": [matrix], "lr": 2e-3}], lr=1e-3)  # of a group that is no schedule
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=40, cycle_momentum=False)
    for _ in range(5):
        matrix.grad = torch.eye(4)
        optimizer.step(loss=1.0)
        scheduler.step()
    told = [str(warning.message) for warning in recwarn.list]
    assert len(told) == 1
    assert "times what it was when its scheduler was made" in told[0]


def test_settings_that_a_loaded_state_replaces_are_told(recwarn):
    def made(**given):
        matrix = torch.nn.Parameter(torch.randn(4, 4))
        optimizer = OPTIMIZERS["elra_spectral"]([{"params": [matrix], "weight_decay": 0.1}], **given)
        matrix.grad = torch.eye(4)
        return optimizer

    first = made(momentum=0.5)
    first.step(loss=1.0)
    made(momentum=0.5, lr=1e-2, polar_batch=2**20).load_state_dict(first.state_dict())
    assert recwarn.list == []  # a rate is found anew, and the rest says how, not what
    made(max_drift=0.2).load_state_dict(first.state_dict())
    (told,) = recwarn.list
    assert "which replace momentum=0.9 by 0.5, max_drift=0.2 by None. To change them" in str(told.message)
    recwarn.clear()
    trusted = made(momentum=0.5, lr=1e-3, warmup=0)
    trusted.step(loss=1.0)
    made(momentum=0.5, lr=2e-3, warmup=0).load_state_dict(trusted.state_dict())
    (told,) = recwarn.list
    assert "which replace lr=0.002 by 0.001. To change them" in str(told.message)


@pytest.mark.parametrize("name", ["updates_per_epoch", "total_updates"])
@pytest.mark.parametrize("value", [0, -3, "all", True, float("nan")])
def test_lengths_that_a_loop_tells_are_checked_at_once(name, value):
    optimizer = OPTIMIZERS["elra_spectral"]([torch.nn.Parameter(torch.zeros(3))])
    with pytest.raises(ConfigurationError, match=f"optimizer.{name}={value!r} must be a number > 0"):
        setattr(optimizer, name, value)
    assert getattr(optimizer, name) is None
    setattr(optimizer, name, 7)
    assert getattr(optimizer, name) == 7
