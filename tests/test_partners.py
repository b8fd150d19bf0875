"""scripts/experiments/lib/partners.py: every partner trains, on the schedule that it is known for."""

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from lib.partners import PARTNERS, Training

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
