"""The batch-size controller and the noise scale: conditions at their thresholds, cascade, limits, state. No torch."""

import json
import math
import random

import pytest

from hf_elra.control import NoiseScale
from hf_elra.control.batch_size import BatchSchedule, BatchSizeController, linear_factor
from hf_elra.errors import ConfigurationError


def only(condition, means, last_std=0.0, **given):
    """The last decision of a controller for which only one condition counts."""
    controller = BatchSizeController(conditions=(condition,), **given)
    for mean in means[:-1]:
        assert controller.end_cycle(mean, 0.0).change == "keep"
    return controller.end_cycle(means[-1], last_std)


@pytest.mark.parametrize(
    ("mean", "std", "condition"),
    [(2.0, 0.0, None), (2.0000001, 0.0, "rise"), (2.5, 5.0, None), (2.5000001, 5.0, "rise"), (1.0, 0.0, None)],
)
def test_rise_is_more_than_a_tenth_of_a_standard_deviation(mean, std, condition):
    assert only("rise", [2.0, mean], std).condition == condition


def test_rise_needs_a_cycle_before():
    assert only("rise", [2.0]).condition is None


@pytest.mark.parametrize(
    ("mean", "std", "condition"),
    [(2.0, 1.0, None), (2.0, 1.0000001, "noise"), (-2.0, 1.5, "noise"), (-2.0, 1.0, None), (0.0, 1.0, None)],
)
def test_noise_is_more_than_half_the_mean(mean, std, condition):
    assert only("noise", [mean], std).condition == condition


@pytest.mark.parametrize(
    ("means", "condition"),
    [
        ([1.0, 2.0, 3.0, 4.0], "stall"),
        ([1.0, 2.0, 3.0, 1.0], None),
        ([1.0, 1.0, 3.0, 4.0], None),
        ([1.0, 2.0, 1.0, 4.0], None),
        ([1.0, 1.0000001, 1.0000001, 1.0000001], "stall"),
        ([2.0, 3.0, 4.0], None),
    ],
)
def test_stall_is_three_cycles_without_a_better_mean(means, condition):
    assert only("stall", means).condition == condition


def test_conditions_are_looked_at_in_the_papers_order():
    controller = BatchSizeController()
    controller.end_cycle(1.0, 0.0)
    assert controller.end_cycle(5.0, 4.0).condition == "rise"
    assert BatchSizeController().end_cycle(5.0, 4.0).condition == "noise"


def test_cascade_divides_at_every_third_change():
    controller = BatchSizeController(initial_accumulation=2, conditions=("noise",))
    decisions = [controller.end_cycle(1.0, 1.0) for _ in range(7)]
    assert [d.change for d in decisions] == ["grow", "grow", "shrink", "grow", "grow", "shrink", "grow"]
    assert [d.accumulation for d in decisions] == [3, 5, 3, 5, 7, 5, 7]
    assert controller.exact == pytest.approx(2 * 1.5**3)


def test_never_below_the_first_nor_above_the_limit():
    controller = BatchSizeController(initial_accumulation=4, max_accumulation=5, conditions=("noise",))
    decisions = [controller.end_cycle(1.0, 1.0) for _ in range(8)]
    assert [d.accumulation for d in decisions] == [5, 5, 5, 5, 5, 5, 5, 5]
    assert [d.change for d in decisions][:2] == ["grow", "keep"]
    with pytest.raises(ConfigurationError, match="max_accumulation=3 is below the first one"):
        BatchSizeController(initial_accumulation=4, max_accumulation=3)


def test_m_follows_what_is_wanted_by_one_change_a_cycle():
    controller = BatchSizeController(initial_accumulation=2, max_accumulation=10)
    decisions = [
        controller.follow(wanted, 1.0, 0.1) for wanted in (None, 2.4, 100, 100, math.inf, math.inf, 5.0, 0, 0, 0)
    ]
    assert [d.accumulation for d in decisions] == [2, 2, 4, 5, 8, 10, 7, 4, 3, 2]
    assert [d.change for d in decisions] == ["keep", *["grow"] * 5, *["shrink"] * 4]
    assert [d.condition for d in decisions] == [None, *["noise_scale"] * 9]
    assert controller.follow(0, 1.0, 0.1).change == "keep"


def test_a_batch_that_grows_linearly_does_so_after_as_many_updates_every_time():
    data, updates = 0, []
    while data < 4200:
        factor = linear_factor(data)
        updates.append(factor)
        data += factor
    assert updates == [factor for factor in range(1, 7) for _ in range(200)]
    assert linear_factor(199.9) == 1
    assert linear_factor(10**6 * (10**6 + 1) / 2 * 200) == 10**6 + 1


def test_noise_scale_is_the_trace_of_the_covariance_over_the_squared_gradient():
    """Gradients of ten numbers with mean 0.3 and, for one sample, variance 4: tr/|G|^2 = 40/0.9."""
    chance, scale = random.Random(0), NoiseScale()
    assert scale.value is None

    def square(samples):
        return sum((0.3 + chance.gauss(0, 2 / math.sqrt(samples))) ** 2 for _ in range(10))

    for _ in range(2000):
        scale.add(4, square(4), 64, square(64))
    assert scale.value == pytest.approx(40 / 0.9, rel=0.3)
    before = scale.value
    scale.add(4, math.nan, 64, 1.0)
    assert scale.value == before
    assert NoiseScale(**json.loads(json.dumps(scale.state_dict()))) == scale
    exact = NoiseScale()
    exact.add(1, 5.0, 3, 3.0)  # 5 = G + S, 3 = G + S/3
    assert exact.value == pytest.approx(3.0 / 2.0)
    exact.add(1, 500.0, 3, 1.0)  # no signal in it
    assert exact.value == math.inf


def test_gradient_decay_is_the_first_over_the_present():
    controller = BatchSizeController(initial_accumulation=2, conditions=("noise",))
    assert controller.gradient_decay(2) == 1
    controller.end_cycle(1.0, 1.0)
    assert controller.gradient_decay(3) == pytest.approx(2 / 3)


def test_state_is_json_and_continues():
    means = [3.0, 3.5, 2.0, 2.5, 2.6, 2.7, 1.0, 4.0]
    whole, first, second = BatchSizeController(), BatchSizeController(), BatchSizeController()
    for mean in means:
        whole.end_cycle(mean, 0.1)
    for mean in means[:4]:
        first.end_cycle(mean, 0.1)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for mean in means[4:]:
        second.end_cycle(mean, 0.1)
    assert second == whole


def test_bad_arguments_are_named():
    with pytest.raises(ConfigurationError, match="initial_accumulation=0"):
        BatchSizeController(initial_accumulation=0)
    with pytest.raises(ConfigurationError, match=r"growth=1\.0"):
        BatchSizeController(growth=1.0)
    with pytest.raises(ConfigurationError, match="'rize' is unknown. Did you mean 'rise'"):
        BatchSizeController(conditions=("rize",))


def test_schedule_is_piecewise_constant():
    schedule = BatchSchedule.parse("0:1,0.5:2,0.75:4")
    assert [schedule.factor(at) for at in (0, 0.49, 0.5, 0.74, 0.75, 1)] == [1, 1, 2, 2, 4, 4]


@pytest.mark.parametrize("text", ["", "0.1:1", "0:1,0.5:2,0.5:3", "0:1,0.8:2,0.5:4", "0:1,1:2", "0:0", "0:1;1:2", "0"])
def test_bad_schedules_name_the_flag(text):
    with pytest.raises(ConfigurationError, match="elra_batch_schedule="):
        BatchSchedule.parse(text, "elra_batch_schedule")
