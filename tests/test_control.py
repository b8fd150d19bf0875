"""hf_elra.control: cycle lengths and loss statistics, without torch."""

import statistics

import pytest

from hf_elra.control import ControlCycle, LossStatistics
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
