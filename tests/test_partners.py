"""scripts/experiments/lib/partners.py: every partner trains, on the schedule that it is known for."""

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import no_rate_cost
from lib.partners import PARTNERS, Together, Training

PACKAGES = {
    "SOAP": "pytorch_optimizer", "schedule-free": "schedulefree", "Prodigy, cosine": "prodigyopt",
    "Prodigy, schedule-free": "prodigyplus", "MomoAdam": "momo", "Mechanic": "mechanic_pytorch",
}  # fmt: skip


@pytest.mark.parametrize("name", PARTNERS)
def test_a_partner_lowers_the_loss(name):
    for begins, package in PACKAGES.items():
        if name.startswith(begins):
            pytest.importorskip(package, reason=f"{package}, of the extra peers, is not installed")
    if name.startswith("Muon") and not hasattr(torch.optim, "Muon"):
        pytest.skip("this PyTorch has no Muon")
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)), torch.randn(64, 8)
    targets = inputs[:, :4].clone()
    training = Training(PARTNERS[name], model, 3e-2, 300)
    first = mse_loss(model(inputs), targets).item()
    for _ in range(300):
        training.step(mse_loss(model(inputs), targets))
    training.to_evaluate()
    assert mse_loss(model(inputs), targets).item() < 0.7 * first
    assert training.state_bytes() >= 4 * sum(p.numel() for p in model.parameters())


def test_schedules():
    cosine, constant = PARTNERS["AdamW, cosine"], PARTNERS["AdamW, constant"]
    factors = [cosine.factor(update, 100) for update in range(100)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert factors[-1] < 1e-3
    assert PARTNERS["Prodigy, cosine"].factor(0, 100) == 1
    assert {constant.factor(update, 100) for update in range(100)} == {1.0}


def test_optimizers_together_are_one_for_a_schedule():
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    both = Together([torch.optim.SGD([first], lr=0.5), torch.optim.SGD([second], lr=0.1)])
    schedule = torch.optim.lr_scheduler.LambdaLR(both, lambda update: 1 / (update + 1))
    for _ in range(2):
        both.zero_grad()
        (first.sum() + second.sum()).backward()
        both.step()
        schedule.step()
    assert first.tolist() == pytest.approx([0.25] * 2)
    assert second.tolist() == pytest.approx([0.85] * 3)


def test_costs_are_told_beside_those_of_adamw():
    def line(row, seconds, state):
        return {"task": "one", "row": row, "seconds": seconds, "state_bytes": state, "parameters": 10}

    lines = [line("AdamW, cosine", s, 80) for s in (0.1, 0.2, 0.3)] + [line("elra_spectral", s, 84) for s in (0.2, 0.3)]
    row = no_rate_cost.table(lines).splitlines()[-1]
    assert [cell.strip() for cell in row.strip("|").split("|")] == ["one", "200", "1.00, 8.0", "1.25, 8.4"]
