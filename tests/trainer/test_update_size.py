"""hf_elra.trainer.update_size, alone: how many micro-batches an update has."""

import pytest

from hf_elra.control import BatchSizeController
from hf_elra.control.batch_size import BatchSchedule
from hf_elra.control.progress import TrainingProgress
from hf_elra.trainer.batch_control import BatchControl
from hf_elra.trainer.update_size import UpdateSize


def size(mode="elra", first=2, schedule=None, measures_noise=False):
    made = UpdateSize()
    controller = BatchSizeController(first, conditions=("noise",))
    made.prepare(BatchControl(controller, mode, schedule, False, None, None, None, measures_noise))
    return made


def progress(**given):
    return TrainingProgress(**{"samples_per_batch": 4, "samples_per_epoch": 80, **given})


def test_it_grows_with_noise_up_to_a_cycle_an_epoch_or_the_most_that_is_wanted():
    for cycle, most, sizes in (("1ep", None, [3, 5, 3, 5, 7, 5]), ("16sp", None, [3, 4, 3]), ("1ep", 16, [3, 4, 3])):
        changed, run = size(), progress()
        changed.begin(cycle, run, most)
        decisions = [changed.end_cycle(1.0, 9.0, run) for _ in sizes]
        assert [decision.accumulation for decision in decisions] == sizes
    changed = size(first=15)
    changed.begin("1ep", run, None)
    changed.end_cycle(1.0, 9.0, run)
    assert changed.accumulation(run) == 20


def test_a_training_does_not_change_what_was_asked_for():
    changed, run = size(), progress()
    for _ in range(2):
        changed.begin("1ep", run, None)
        assert changed.accumulation(run) == 2
        changed.end_cycle(1.0, 9.0, run)


@pytest.mark.parametrize(("share", "number"), [(0.0, 2), (0.5, 6)])
def test_a_schedule_goes_by_the_share_of_the_run(share, number):
    changed, run = size("schedule", schedule=BatchSchedule.parse("0:1,0.5:3", "x")), progress(max_samples=1000)
    changed.begin("1ep", run, None)
    run.count(updates=0, samples=int(1000 * share), tokens=0)
    assert changed.accumulation(run) == number
    assert changed.end_cycle(1.0, 9.0, run) is None


def test_noise_decides_by_the_noise_scale_and_goes_on_with_micro_batches_of_another_size():
    changed, run = size("noise", measures_noise=True), progress()
    changed.begin("1ep", run, None)
    changed.noise_scale.add(4, 10.0, 8, 8.0)
    changed.end_cycle(1.0, 0.1, run)
    again, larger = size("noise", measures_noise=True), progress(samples_per_batch=8)
    again.begin("1ep", larger, None)
    again.load_state_dict(changed.state_dict(run), larger)
    assert again.noise_scale == changed.noise_scale
    assert again.controller.exact == pytest.approx(max(2, changed.controller.exact / 2))
