"""hf_elra.control: cycle lengths and loss statistics, without torch."""

import json
import math
import random
import statistics

import pytest

from hf_elra.control import BatchSizeController, ControlCycle, CycleLosses, LossLevels, LossStatistics
from hf_elra.errors import ConfigurationError


@pytest.mark.parametrize(
    ("text", "length", "unit"),
    [
        ("45000sp", 45000, "sp"),
        ("45000tok", 45000, "tok"),
        ("1ep", 1, "ep"),
        (" 0.25ep", 0.25, "ep"),
        ("1e3ba", 1000, "ba"),
    ],
)
def test_lengths_are_read(text, length, unit):
    cycle = ControlCycle.parse(text)
    assert (cycle.length, cycle.unit) == (length, unit)


@pytest.mark.parametrize(
    "text", ["", "45000", "45000 tokens", "ep", "-1ep", "0sp", "0.5ba", "1epoch", "nan sp", "1,000sp"]
)
def test_bad_lengths_name_the_flag(text):
    with pytest.raises(ConfigurationError, match="elra_control_cycle="):
        ControlCycle.parse(text, "elra_control_cycle")


def test_cycles_end_when_their_length_is_passed():
    cycle = ControlCycle.parse("10sp")
    ends = [cycle.advance(samples=s, tokens=0, epochs=0, updates=0) for s in (4, 8, 12, 16, 20, 55, 59, 60)]
    assert ends == [False, False, True, False, True, True, False, True]


def test_an_epochs_end_survives_rounding():
    cycle = ControlCycle.parse("0.1ep")
    ends = [cycle.advance(samples=0, tokens=0, epochs=sum([0.1] * n), updates=0) for n in range(1, 11)]
    assert ends == [True] * 10


def test_statistics_agree_with_the_standard_library_at_a_large_offset():
    losses = [1e9 + x for x in (0.1, -0.3, 0.25, 0.0, 0.7)]
    running = LossStatistics()
    assert running.std == 0
    for loss in losses:
        running.add(loss)
    assert running.mean == pytest.approx(statistics.fmean(losses), rel=1e-15)
    assert running.std == pytest.approx(statistics.pstdev(losses), rel=1e-6)


@pytest.mark.parametrize(
    ("path", "rises_to"),
    [
        (lambda n: 0.7 + n / 100, 1.8),  # steps that are too long, each by a little
        (lambda n: 2 - n / 100 if n < 100 else min(n / 100, 2), 2.2),  # down to 1, and back
        (lambda n: 2 + 2 * math.exp(-n / 30), None),
        (lambda n: 2.0, None),
        (lambda n: 3 - 2 * n / 100 if n < 100 else 1.4, None),  # other data, on which most of the gain is kept
        (lambda n: 2 + 1e6 * (n == 110), None),  # one outlier
        (lambda n: 1e-9 * math.sin(n), None),
        (lambda n: 4 - n % 50 / 20, None),  # rows grouped by their length
    ],
)
def test_losses_that_rise_again_are_noticed(path, rises_to):
    generator, levels = random.Random(0), LossLevels()
    for number in range(300):
        levels.add(path(number) * (1 + 0.2 * generator.gauss(0, 1)))
    assert (levels.risen is None) == (rises_to is None)
    assert rises_to is None or levels.risen.mean < rises_to  # early


def losses_near_two(number, seed=0):
    generator = random.Random(seed)
    return [2 + 0.2 * generator.gauss(0, 1) for _ in range(number)]


@pytest.mark.parametrize("where", [0, 1, 5, 9, 10, 100, 199])
@pytest.mark.parametrize("size", [20.0, 1e3, 1e30])
def test_one_outlier_says_nothing_about_the_batch_size(where, size):
    controller, seen = BatchSizeController(2), CycleLosses()
    for cycle in range(4):
        for number, loss in enumerate(losses_near_two(200, seed=cycle)):
            seen.add(size if cycle == (0 if where < 10 else 1) and number == where else loss - cycle / 10)
        found = seen.end_cycle()
        decision = controller.end_cycle(found.mean, found.std)
        assert decision.change == "keep"
        assert found.mean == pytest.approx(2 - cycle / 10, abs=0.05)
        assert found.std == pytest.approx(0.2, rel=0.15)


def test_ordinary_losses_are_taken_as_they_are_and_a_level_that_persists_is_followed():
    seen, exact = CycleLosses(), LossStatistics()
    losses = [10 * 0.97**number + 0.1 * loss for number, loss in enumerate(losses_near_two(150))]
    for number, loss in enumerate(losses):
        seen.add(loss)
        exact.add(loss)
        if number in (3, 60):  # also while the first ones are still looked at
            seen = CycleLosses.from_state(json.loads(json.dumps(seen.state_dict())))
        assert seen.so_far().count == number + 1
    found = seen.end_cycle()
    assert (found.mean, found.std) == pytest.approx((exact.mean, exact.std))
    for factor in (5, 100):
        for loss in losses_near_two(60):
            seen.add(factor * loss)
        seen.end_cycle()
        for loss in losses_near_two(200):
            seen.add(factor * loss)
        found = seen.end_cycle()
        assert (found.mean, found.std) == pytest.approx((2 * factor, 0.2 * factor), rel=0.2)
    seen = CycleLosses()
    for loss in [3.0] * 60 + [9.0] * 200:  # losses that do not vary at all
        seen.add(loss)
    assert seen.recent.mean == pytest.approx(9, rel=0.1)


def test_cycles_of_few_losses():
    seen = CycleLosses()
    for cycle in range(5):
        for loss in (1.0, 3.0):
            seen.add(loss + cycle)
        found = seen.end_cycle()
        assert (found.count, found.mean, found.std) == (2, pytest.approx(2 + cycle), pytest.approx(1))
    assert seen.end_cycle().count == 0
