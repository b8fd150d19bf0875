"""hf_elra.optim.base: an optimizer of other parts than ours, in a bare loop; losses along the line."""

import pytest
import torch

from hf_elra import ConfigurationError
from hf_elra.optim import LossAwareOptimizer
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
