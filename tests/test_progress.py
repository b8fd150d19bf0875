"""Progress of runs whose updates differ in size. No torch."""

import pytest

from hf_elra.control.progress import TrainingProgress


def walk(progress, sizes, tokens_per_sample=10):
    """Take updates of the given numbers of micro-batches; return (updates left, fraction) after each."""
    seen = []
    for number in sizes:
        if progress.epoch_is_over(number):
            progress.restart(progress.epoch + 1)
        left = number if progress.samples_per_epoch is None else progress._batches_after(progress.taken)
        samples = progress.samples + progress.take(min(number, left))
        progress.count(updates=progress.updates + 1, samples=samples, tokens=samples * tokens_per_sample)
        seen.append((progress.updates_left(number), progress.fraction()))
    return seen


def test_epochs_that_are_no_multiple_of_the_group():
    progress = TrainingProgress(num_epochs=2, samples_per_batch=2, samples_per_epoch=13)
    assert progress.updates_left(3) == 6  # 3 + 3 + 1, twice
    assert progress.total("samples", 3) == 26
    left = walk(progress, [3] * 6)
    assert [updates for updates, _ in left] == [5, 4, 3, 2, 1, 0]
    assert left[-1][1] == 1
    assert progress.epochs(3) == 2


def test_incomplete_groups_that_are_skipped_are_not_counted():
    progress = TrainingProgress(
        num_epochs=2, samples_per_batch=2, samples_per_epoch=15, drops_last=True, skips_incomplete=True
    )
    assert progress.updates_left(3) == 4
    assert progress.total("samples", 3) == 24
    assert progress.total("samples", 1) == 28
    walk(progress, [3, 3])
    assert progress.epochs(3) == 1
    assert progress.epochs(1) == pytest.approx(6 / 7)
    assert progress.fraction(3) == 0.5
    assert progress.fraction() == pytest.approx(3 / 7)
    walk(progress, [3, 3])
    assert progress.fraction(3) == 1


def test_a_fractional_epoch_ends_with_a_whole_group():
    progress = TrainingProgress(num_epochs=1.5, samples_per_batch=1, samples_per_epoch=10)
    assert progress.updates_left(4) == 5  # 4 + 4 + 2 in the first epoch, 4 + 4 in the second, where 5 were asked for
    assert progress.total("samples", 4) == 18


@pytest.mark.parametrize(("limit", "unit"), [({"max_samples": 21}, "samples"), ({"max_tokens": 205}, "tokens")])
def test_budgets_end_with_the_update_that_reaches_them(limit, unit):
    progress = TrainingProgress(**limit, samples_per_epoch=200, samples_per_batch=2, tokens_per_sample=10)
    assert progress.unit(1) == unit
    assert [updates for updates, _ in walk(progress, [1, 2, 2, 3, 3])] == [10, 4, 3, 1, 0]
    assert progress.fraction() == 1
    assert progress.total(unit, 3) == getattr(progress, unit)


def test_of_several_limits_the_first_one_reached_counts():
    progress = TrainingProgress(max_updates=4, max_samples=100, samples_per_batch=2)
    assert progress.updates_left(1) == 4
    assert progress.unit(1) == "updates"
    assert progress.unit(20) == "samples"
    progress.count(updates=2, samples=80, tokens=0)
    assert progress.fraction() == 0.8
    assert progress.updates_left(20) == 1


def test_number_of_epochs_shown_for_a_run_limited_in_updates():
    progress = TrainingProgress(max_updates=10, samples_per_epoch=5)
    walk(progress, [1] * 5)
    assert progress.total_epochs(1) == 2


def test_data_of_unknown_length():
    progress = TrainingProgress(max_updates=10)
    walk(progress, [3, 3])
    assert progress.epochs(3) is None
    assert progress.fraction() == 0.2
    assert not progress.epoch_is_over(3)


@pytest.mark.parametrize(("drops_last", "updates", "samples"), [(False, 13, 200), (True, 12, 192)])
def test_a_position_is_one_in_samples_whatever_the_batch(drops_last, updates, samples):
    before = TrainingProgress(samples_per_batch=8, samples_per_epoch=400)
    assert before.take(25) == 200
    after = TrainingProgress(samples_per_batch=16, samples_per_epoch=400, drops_last=drops_last)
    after.restart(**before.state_dict())
    assert after.epochs(1) == after.fraction() == 0.5
    assert after.updates_left(1) == updates
    assert after.total("samples", 1) == samples
    walk(after, [1] * updates)
    assert after.epochs(1) == after.fraction() == 1
    assert after.samples == samples
