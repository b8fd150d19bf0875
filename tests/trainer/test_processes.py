"""Several processes: the path of one, whatever is broken, sharded or resumed."""

import pytest
import torch

from lib import many_processes
from lib.many_processes import apart
from lib.ready import together
from tests import workers
from tests.conftest import llama, logged, trainer


def test_data_parallel_walks_the_path_of_one():
    """1 x 8, 2 x 4 and 4 x 2, with restarts, cropped steps, growing batches and a NaN on one process."""
    found = {number: together(many_processes.data_parallel, number, batch=8 // number) for number in (1, 2, 4)}
    one = found[1]
    assert one["updates"] == 50
    assert one["non_finite"] == 1
    assert one["restarts"] >= 2
    norm = torch.tensor(one["weights"]).norm().item()
    assert one["longest_step"] == pytest.approx(0.03 * norm, rel=0.1)  # cropped
    assert max(one["batches"]) > min(one["batches"])
    for processes in (2, 4):
        other = found[processes]
        assert other["differing"] == 0
        assert other["reductions"] == 50  # one an update, however many micro-batches
        for name in ("restarts", "non_finite", "batches"):
            assert other[name] == one[name]
        assert apart(one["weights"], other["weights"]) < 1e-5


def test_a_process_that_reads_garbage_alone_does_not_part_ways():
    plain, kernels = together(workers.one_reads_garbage, 2)
    assert plain == kernels == {"differing": 0, "finite": True, "non_finite": 3}


def test_bare_loops_decide_alike_once_they_are_told_the_group():
    """An outlier that one process meets alone is taken back on both; without the group a warning says what happens."""
    found = together(workers.bare_loops, 2)
    for name in ("ELRA", "ELRASpectral"):
        told, alone = found[f"{name}, told the group"], found[f"{name}, alone"]
        assert told["differing"] == told["warnings"] == 0
        assert told["restarts"] > 0
        assert alone["differing"] > 0
        assert alone["warnings"] == 1


@pytest.mark.filterwarnings("ignore:elra_spectral")
def test_what_happens_to_one_process_costs_no_rate():
    """Twenty updates later α is where it is without, and processes are alike."""
    for name, found in together(workers.events_on_one, 2).items():
        alpha = found["plain"]["alpha"]
        for event, result in found.items():
            assert result["differing"] == 0, (name, event)
            assert 0.5 < result["alpha"] / alpha < 2, (name, event)
            assert result["restarts"] > found["plain"]["restarts"] or event == "plain", (name, event)


@pytest.mark.filterwarnings("ignore:elra_spectral")
def test_a_process_without_labels_goes_by_the_loss_of_the_others(tmp_path):
    """Its own is NaN and its gradients are zero: the update is a shorter one, and nothing is wrong with the step."""
    for optim, found in together(workers.one_without_labels, 2, folder=str(tmp_path)).items():
        assert found["non_finite"] == found["skipped"] == 0, optim
        assert found["mean"] == pytest.approx(found["own"]), optim  # of the first process, which has labels
        assert found["same"], optim


@pytest.mark.parametrize(
    ("processes", "cases"),
    [
        (2, [([2], "data", "gradient"), ([2], "data", "point"), ([2], "tensor", "gradient"), ([2], "tensor", "point")]),
        (4, [([2, 2], "data", "gradient")]),
    ],
    ids=["FSDP2 and tensor parallel", "HSDP"],
)
def test_shards_walk_the_path_of_one_process(processes, cases):
    for case, found in zip(cases, together(many_processes.sharded, processes, cases=cases), strict=True):
        assert found["restarts"][0] == found["restarts"][1] > 1, case
        assert found["apart"] < (1e-8 if case[2] == "point" else 1e-12), case


def test_shards_cannot_be_offloaded():
    error = together(workers.sharded_offload, 2)
    assert "memory='offload' cannot be used with sharded parameters" in error


@pytest.mark.parametrize(("state", "then"), [("SHARDED_STATE_DICT", 4), ("FULL_STATE_DICT", 2)])
def test_fsdp_through_accelerate_and_its_checkpoints(tmp_path, state, then):
    """The path of one process; sharded checkpoints go on on another number of processes."""
    run = trainer(tmp_path / "one", llama().double(), elra_control_cycle="2ba")
    run.train()
    two = together(workers.fsdp_trainer, 2, folder=str(tmp_path), state=state)
    assert two["sharded"] == "DTensor"
    assert two["loss"] == pytest.approx(logged(run, "loss"), rel=1e-6)  # logged in float32
    assert two["alpha"] == pytest.approx(logged(run, "alpha"), rel=1e-9)
    assert two["batches"] == logged(run, "batch_size")
    checkpoint = str(tmp_path / f"{state}-2" / "checkpoint-5")
    again = together(workers.fsdp_trainer, then, folder=str(tmp_path), resume=checkpoint, state=state)
    assert again["alpha"] == pytest.approx(two["alpha"], rel=1e-9)
    assert again["restarts"] == two["restarts"]


def test_the_noise_scale_is_that_of_all_processes(tmp_path):
    found = together(workers.noise_scale, 2, folder=str(tmp_path))
    assert found["equal"]
    assert found["signal"] == pytest.approx(found["square"], rel=0.5)  # of five updates
    assert len(found["batches"]) == 5


def test_whole_matrices_cannot_be_had_of_shards(tmp_path):
    with pytest.raises(RuntimeError, match="fsdp cannot be used with optim=elra_spectral, which needs whole matrices"):
        together(workers.fsdp_trainer, 2, folder=str(tmp_path), optim="elra_spectral")
