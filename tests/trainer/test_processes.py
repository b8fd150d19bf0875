"""Several processes: the path of one, whatever is broken, sharded or resumed."""

import pytest
import torch

from tests import workers
from tests.conftest import llama, logged, trainer
from tests.workers import together


def test_data_parallel_walks_the_path_of_one(tmp_path):
    """1 × 8, 2 × 4 and 4 × 2, with restarts, cropped steps, growing batches and a NaN on one process."""
    found = {
        processes: together(workers.data_parallel, processes, tmp_path, batch=8 // processes) for processes in (1, 2, 4)
    }
    one = found[1]
    assert one["updates"] == 50
    assert one["finite"]
    assert one["non_finite"] == 1
    assert one["restarts"] >= 3
    assert one["longest_step"] == pytest.approx(2.0)
    assert max(one["batches"]) > min(one["batches"])
    weights = {processes: torch.load(tmp_path / f"weights-{processes}.pt") for processes in found}
    for processes in (2, 4):
        other = found[processes]
        assert other["differing"] == 0
        assert other["reductions"] == 50  # one an update, however many micro-batches
        for name in ("restarts", "non_finite", "batches", "finite"):
            assert other[name] == one[name]
        assert (weights[processes] - weights[1]).norm() / weights[1].norm() < 1e-5


def test_a_process_that_reads_garbage_alone_does_not_part_ways(tmp_path):
    plain, kernels = together(workers.one_reads_garbage, 2, tmp_path)
    assert plain == kernels == {"differing": 0, "finite": True, "non_finite": 3}


def test_shards_walk_the_path_of_one_process(tmp_path):
    """FSDP2 and tensor parallelism over 2 processes, HSDP over 2 x 2."""
    cases = [([2], "data", "gradient"), ([2], "data", "point"), ([2], "tensor", "gradient"), ([2], "tensor", "point")]
    apart, error = together(workers.meshes, 2, tmp_path, cases=cases)
    assert "memory='offload' cannot be used with sharded parameters" in error
    found = dict(zip(map(str, cases), apart, strict=True))
    case = ([2, 2], "data", "gradient")
    found[str(case)] = together(workers.meshes, 4, tmp_path, cases=[case])[0][0]
    for name, (apart, restarts, same_restarts) in found.items():
        assert restarts == same_restarts > 1, name
        assert apart < (1e-8 if "point" in name else 1e-12), name


@pytest.mark.parametrize(("state", "then"), [("SHARDED_STATE_DICT", 4), ("FULL_STATE_DICT", 2)])
def test_fsdp_through_accelerate_and_its_checkpoints(tmp_path, state, then):
    """The path of one process; sharded checkpoints go on on other numbers of processes."""
    run = trainer(tmp_path / "one", llama().double(), elra_control_cycle="2ba")
    run.train()
    two = together(workers.fsdp_trainer, 2, tmp_path, state=state)
    assert two["sharded"] == "DTensor"
    assert two["loss"] == pytest.approx(logged(run, "loss"), rel=1e-6)  # logged in float32
    assert two["alpha"] == pytest.approx(logged(run, "alpha"), rel=1e-9)
    assert two["batches"] == logged(run, "batch_size")
    checkpoint = str(tmp_path / f"{state}-2" / "checkpoint-5")
    again = together(workers.fsdp_trainer, then, tmp_path, resume=checkpoint, state=state)
    assert again["alpha"] == pytest.approx(two["alpha"], rel=1e-9)
    assert again["restarts"] == two["restarts"]
