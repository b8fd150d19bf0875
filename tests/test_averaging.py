"""hf_elra.optim.averaging: parameters and buffers that change on the way; means in a Trainer are in trainer/."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_elra import ConfigurationError
from hf_elra.optim.averaging import WeightAverage, at_the_mean, power_after_first_pass, recompute_batch_norm
from tests.test_snapshot import Rotary


def two(first=True, second=True):
    model = nn.ModuleDict({"a": nn.Linear(1, 1, bias=False), "b": nn.Linear(1, 1, bias=False)}).double()
    model.a.weight.requires_grad_(first)
    model.b.weight.requires_grad_(second)
    return model


def go_to(model, a, b):
    model.a.weight.data.fill_(a)
    model.b.weight.data.fill_(b)


def values(model):
    return model.a.weight.item(), model.b.weight.item()


def test_what_is_trained_only_later_has_a_mean_that_begins_with_it(tmp_path):
    model = two(second=False)
    mean = WeightAverage(model)
    go_to(model, 1.0, 10.0)
    mean.add()
    assert list(mean.mean) == ["a.weight"]
    mean.save(str(tmp_path))
    model.b.weight.requires_grad_(True)
    for a, b in ((3.0, 20.0), (5.0, 40.0)):
        go_to(model, a, b)
        mean.add()
    with mean.in_place():
        assert values(model) == (3.0, 30.0)
    assert values(model) == (5.0, 40.0)

    # the second stage is another run
    stage = two()
    resumed = WeightAverage(stage)
    assert resumed.load(str(tmp_path))
    for a, b in ((3.0, 20.0), (5.0, 40.0)):
        go_to(stage, a, b)
        resumed.add()
    resumed.save(str(tmp_path))
    assert json.loads((tmp_path / "boosting.json").read_text())["joined"] == {"b.weight": 1}
    again = WeightAverage(stage)
    again.load(str(tmp_path))
    go_to(stage, 7.0, 60.0)
    again.add()
    with again.in_place():
        assert values(stage) == (4.0, 40.0)
    again.end_cycle()
    again.add()
    with again.in_place():
        assert values(stage) == (7.0, 60.0)


def test_what_is_frozen_later_stays_in_the_mean_and_what_is_gone_leaves_it(tmp_path):
    model = two()
    mean = WeightAverage(model, power=0)
    go_to(model, 1.0, 10.0)
    mean.add()
    mean.save(str(tmp_path))
    model.a.weight.requires_grad_(False)
    go_to(model, 1.0, 20.0)
    mean.add()
    with mean.in_place():
        assert values(model) == (1.0, 15.0)
    stage = two(first=False)
    resumed = WeightAverage(stage, power=0)
    resumed.load(str(tmp_path))
    assert list(resumed.mean) == ["a.weight", "b.weight"]
    model.b = nn.Linear(2, 1, bias=False)  # as an embedding that is resized
    with mean.in_place():
        assert model.b.weight.shape == (1, 2)
    mean.add()
    assert torch.equal(mean.mean["b.weight"], model.b.weight)
    del model.b
    mean.add()
    assert list(mean.mean) == ["a.weight"]
    with pytest.raises(ConfigurationError, match="the mean of another model, with no parameter of this one"):
        WeightAverage(nn.Linear(3, 3), power=0).load(str(tmp_path))
    with pytest.raises(ConfigurationError, match="power=8: the mean in .* was made with power=0; pass that"):
        WeightAverage(stage, power=8).load(str(tmp_path))
    stage.b = nn.Linear(5, 1, bias=False)
    with pytest.raises(ConfigurationError, match=r"b.weight has shape \(1, 5\), and \(1, 1\) in the mean"):
        WeightAverage(stage, power=0).load(str(tmp_path))


def test_a_point_may_have_a_power_of_its_own():
    model = two()
    mean = WeightAverage(model, power=8)
    go_to(model, 0.0, 0.0)
    mean.add()
    go_to(model, 4.0, 40.0)
    mean.add(0)  # as many as there were before
    with mean.in_place():
        assert values(model) == (2.0, 20.0)
    for wrong in (-1, 0.5, True):
        with pytest.raises(ConfigurationError, match=f"power={wrong} must be a whole number >= 0"):
            mean.add(wrong)
    assert mean.count == 2


def test_a_fine_tuned_model_has_a_wider_mean_after_the_first_pass():
    assert power_after_first_pass(SimpleNamespace(fine_tunes=True)) == 2
    assert power_after_first_pass(SimpleNamespace(fine_tunes=False)) == 8
    assert power_after_first_pass(torch.optim.SGD(two().parameters(), lr=1.0)) == 8


def test_a_model_that_is_moved_takes_its_mean_with_it():
    model = two()
    mean = WeightAverage(model)
    go_to(model, 1.0, 1.0)
    mean.add()
    model.float()
    go_to(model, 3.0, 5.0)
    mean.add()
    with mean.in_place():
        assert values(model) == (2.0, 3.0)


@pytest.mark.parametrize("how", ["registers", "resizes", "replaces", "expands", "shrinks"])
def test_a_forward_pass_at_the_mean_may_change_buffers(how):
    model = nn.Sequential(nn.BatchNorm1d(1), Rotary(how))
    mean = WeightAverage(model)
    mean.add()
    for length in (4, 9, 6):
        with at_the_mean(mean, model, [torch.randn(5, 1)]):
            model(torch.ones(length, 1))
        model(torch.ones(length, 1))


def test_statistics_are_those_of_the_batches_and_nothing_else_changes():
    torch.manual_seed(0)
    frozen = nn.BatchNorm1d(2, momentum=0.3)
    frozen.running_mean.fill_(5.0)
    frozen.train = lambda mode=True: frozen  # as of a backbone that is not to be trained
    frozen.training = False
    model = nn.Sequential(frozen, nn.BatchNorm1d(2, momentum=0.3), nn.Dropout(0.5), nn.BatchNorm1d(2))
    model(7 + torch.randn(9, 2))
    model[3].eval()
    state = torch.get_rng_state()
    inputs = torch.randn(64, 2)
    torch.set_rng_state(state)
    recompute_batch_norm(model, [inputs[:32], inputs[32:]])
    assert torch.equal(torch.get_rng_state(), state)
    assert frozen.running_mean.tolist() == [5.0, 5.0]
    torch.testing.assert_close(model[1].running_mean, (inputs.mean(0) - 5) / (1 + 1e-5) ** 0.5)
    assert [m.training for m in model] == [False, True, True, False]
    assert model[1].momentum == 0.3

    before = model[1].running_mean.clone()
    recompute_batch_norm(model, [])  # no data say nothing
    assert torch.equal(model[1].running_mean, before)
    with pytest.raises(RuntimeError):
        recompute_batch_norm(model, [torch.randn(4, 3)])
    assert model[1].momentum == 0.3
