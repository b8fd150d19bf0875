"""The experiment on constant rates: its own loop walks as the optimizer does, and finds minima of lines."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_elra.optim.averaging import WeightAverage
from hf_elra.optim.rules.end_slopes import EndSlopes
from hf_elra.optim.spectral import ELRASpectral

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts" / "experiments"))
import rate_scan

UPDATES, BATCH = 12, 4


class Pairs(rate_scan.Task):
    """Rows of an embedding to be told apart; those of number 6 and above never come."""

    size = 32

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(0, 6, (self.size,), generator=generator)
        self.targets = torch.randn(self.size, 3, generator=generator)

    def model(self, seed):
        torch.manual_seed(seed)
        return nn.Sequential(rate_scan.Rows(8, 5), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))

    def losses(self, model, rows):
        return (model(self.ids[rows]) - self.targets[rows]).square().mean(1)

    def evaluate(self, model):
        return {"loss": self.losses(model, torch.arange(self.size)).mean().item()}


def test_a_lane_walks_as_elra_spectral_at_a_constant_rate(monkeypatch):
    monkeypatch.setattr(EndSlopes, "propose", lambda self, measured, alpha: alpha)
    monkeypatch.setattr(ELRASpectral, "_look_at_weights", lambda self: 0.0)
    task, rate = Pairs(), 0.01
    lane = rate_scan.Lane(task, task.model(0), BATCH, UPDATES)
    lane.reset([rate] * UPDATES, seed=3)
    model = task.model(0)
    optimizer = ELRASpectral(
        model.parameters(), rate, embeddings=[model[0].weight], warmup=0, soft_restart=False, state_dtype="float32"
    )
    average = WeightAverage(model, power=8)
    for rows in rate_scan.order(task.size, BATCH, UPDATES, seed=3):
        lane.update()
        loss = task.losses(model, rows).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(loss=loss)
        average.add()
    assert optimizer.alpha == rate
    for ours, theirs in zip(lane.params, model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    for ours, theirs in zip(lane.mean, average.mean.values(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert lane.evaluate(last=True)["last"]["loss"] == pytest.approx(task.evaluate(model)["loss"], abs=1e-5)


def test_a_lane_walks_as_adamw_with_clipping():
    task, rates = Pairs(), [0.01 * (1 - t / UPDATES) for t in range(UPDATES)]
    lane = rate_scan.Lane(task, task.model(0), BATCH, UPDATES, adamw=True)
    lane.reset(rates, seed=3, decay=0.1, beta2=0.95)
    model = task.model(0)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, betas=(0.9, 0.95), weight_decay=0.1)
    for rate, rows in zip(rates, rate_scan.order(task.size, BATCH, UPDATES, seed=3), strict=True):
        lane.update()
        optimizer.zero_grad()
        task.losses(model, rows).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    for ours, theirs in zip(lane.params, model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_line_leaves_nothing_behind_and_its_first_point_is_none():
    task = Pairs()
    lane = rate_scan.Lane(task, task.model(0), 1, UPDATES)
    before = [p.clone() for p in lane.params]
    found = rate_scan.line(task, lane, 0, [0.1], ["all", "vectors"])
    assert all(torch.equal(p, old) for p, old in zip(lane.params, before, strict=True))
    assert found["losses"]["all"][0] == found["losses"]["vectors"][0]
    assert found["losses"]["all"][1] != found["losses"]["vectors"][1]


@pytest.mark.parametrize("best", [1.3e-3, 2.1e-4])
def test_the_minimum_of_a_line_is_that_of_a_parabola_in_the_logarithm(best):
    points = torch.tensor(rate_scan.POINTS)
    losses = (points / best).log().square()[:, None].expand(-1, 16).tolist()
    assert rate_scan.minimum([0.0, *rate_scan.POINTS], [[9.0] * 16, *losses]) == pytest.approx(best, rel=1e-3)


def test_the_half_way_point_is_the_minimum_of_a_parabola_also_where_a_line_goes_down_again_far_out():
    best, points = 2e-3, torch.tensor([0.0, *rate_scan.POINTS], dtype=torch.float64)
    losses = (points / best - 1).square()
    losses[points > 0.05] = -1.0
    assert points[losses.argmin()] > 0.05
    found = rate_scan.half_point(points.tolist(), losses[:, None].expand(-1, 16).tolist())
    assert found == pytest.approx(best, rel=0.05)
