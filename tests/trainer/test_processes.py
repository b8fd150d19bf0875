"""Several processes: the path of one, whatever is broken, sharded or resumed."""

import math

import pytest
import torch

from lib import many_processes
from lib.many_processes import apart
from lib.ready import together
from tests import workers
from tests.conftest import llama, logged, token_rows, trainer, weights


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


@pytest.mark.parametrize(
    ("processes", "cases"),
    [
        (2, [
            ([2], "rows", 0.5), ([2], "rows", 0.0), ([2], "columns", 0.5), ([2], "tensor", 0.5),
            ([2], "copies", 0.5, True), ([2], "rows", 0.5, True),
        ]),
        (4, [([4], "rows", 0.5), ([2, 2], "rows", 0.5), ([2, 2], "tensor and rows", 0.5)]),
    ],
    ids=["FSDP2 and tensor parallel", "FSDP2, HSDP, FSDP2 and tensor parallel"],
)  # fmt: skip
def test_polar_factors_of_shards_are_those_of_whole_matrices(processes, cases):
    """The path of one process, with restarts and a NaN on one of them, bit by bit the same on all; some have no part
    of a tensor. Decided on the host, or on the device with one reduction an update where there are copies."""
    for case, found in zip(cases, together(workers.spectral_on_shards, processes, cases=cases), strict=True):
        assert found["differing"] == 0, case
        one, other = found["numbers"]
        assert other == pytest.approx(one, rel=1e-9), case
        assert one[1:] == [4, 1], case  # restarts, one of them for the NaN
        assert found["apart"] < 1e-10, case
        if case[1] == "copies":
            assert found["reductions"] == [1]


def test_pairs_of_lora_beside_split_weights_walk_the_path_of_one_process():
    """Beside weights that look trained, and hardly so: their bounds are read off all parts."""
    for found, times in zip(together(workers.adapters_on_shards, 2, stretches=[0.1, 0.0]), (2, 32), strict=True):
        assert found["split"] == "DTensor"
        assert found["room"] == [times, times]
        assert found["alpha"][1] == pytest.approx(found["alpha"][0], rel=1e-9)
        assert found["apart"] < 1e-10


def test_copies_share_polar_factors_bit_by_bit_and_send_what_the_docs_say():
    """As if every process took all of them; the formula is that of docs/guides/devices.md."""
    alike = {(64, 64): 5, (160, 64): 1, (64, 160): 2, (8, 8): 7}  # matrices of a shape, the last in a stack of experts
    shapes = [*[shape for shape, number in alike.items() for _ in range(number)][:-7], (7, 8, 8), (9,)]
    processes, widths = 3, {("float32", "auto"): 2, ("float32", "float32"): 4, ("bfloat16", "auto"): 2}
    all_of_them = together(workers.copies_share_polar_factors, processes, shapes=shapes, types=list(widths))
    numbers = sum(processes * math.ceil(k / processes) * math.prod(shape) for shape, k in alike.items())
    for (types, width), found in zip(widths.items(), all_of_them, strict=True):
        assert found == {"differing": 0, "moved": [numbers * width, 0]}, types


def test_where_gloo_joins_accelerators_each_process_does_all():
    """gloo gathers from the host's memory alone, which ends a process that gives it a GPU's."""
    found = together(workers.gloo_stays_on_the_host, 2)
    assert found["able"] == [True, False]
    assert found["copies"] == {"differing": 0, "moved": [0, 0]}
    assert "use the backend of these devices, as nccl for cuda" in found["error"]


@pytest.mark.parametrize("processes", [2, 3])
def test_split_matrices_are_sent_as_the_docs_say(processes):
    numbers, rows, columns, widths = [1, 3, 4], 5, 7, {"auto": 2, "float32": 4}
    given = dict(numbers=numbers, rows=rows, columns=columns, types=list(widths))
    sent = [2 * k * rows * columns * b for k in numbers for b in widths.values()]
    assert together(workers.split_matrices_are_sent, processes, **given) == sent


@pytest.mark.parametrize("split", [False, True])
def test_transfers_are_under_way_while_something_is_computed(split):
    """Parts of the next batch are sent before a batch is computed; results arrive after the next one was computed."""
    found = together(workers.transfers_go_on_meanwhile, 2, split=split)
    assert found["right"]
    sends, order = 2 if split else 1, [tuple(event) for event in found["events"]]
    computed = [place for place, (what, _) in enumerate(order) if what == "computed"]
    assert len(computed) == 5
    assert len([event for event in order if event[0] == "sent"]) == 5 * sends == len(order) - 5 - 5 * sends
    back = [number for place, (what, number) in enumerate(order) if what == "sent" and place - 1 in computed]
    for batch in range(4):
        assert order.index(("arrived", back[batch])) > computed[batch + 1]  # a result, after the next batch
        if split:
            there = [number for what, number in order if what == "sent" and number not in back]
            assert order.index(("sent", there[batch + 1])) < computed[batch]


def test_experts_may_be_split_between_processes_and_within_themselves():
    assert max(together(workers.experts_split_twice, 4)) < 1e-12


def test_a_sharded_checkpoint_keeps_the_narrow_state(tmp_path):
    found = together(workers.checkpoint_of_shards, 2, folder=str(tmp_path))
    assert found == {"same": True, "types": ["DTensor torch.bfloat16"]}


@pytest.mark.parametrize("on_device", [False, True])
def test_stochastic_rounding_is_alike_where_processes_have_the_same_and_right_on_average(on_device):
    found = together(workers.bfloat16_on_shards, 2, on_device=on_device)
    assert found["copies"]
    assert found["resumed"]
    assert found["moved"] == pytest.approx([found["moved"][1]] * 3, rel=0.2)
    assert found["moved"][0] > 5e-4  # steps of 2e-4, where bfloat16 has 4e-3
    assert found["alike"] == pytest.approx(found["chance"], abs=0.05)  # parts are not rounded by the same numbers


def test_shards_cannot_be_offloaded():
    error = together(workers.sharded_offload, 2)
    assert "memory='offload' cannot be used with sharded parameters" in error


@pytest.mark.parametrize(
    ("optim", "state", "then"),
    [("elra", "SHARDED_STATE_DICT", 4), ("elra", "FULL_STATE_DICT", 2), ("elra_spectral", "SHARDED_STATE_DICT", 4)],
)
@pytest.mark.filterwarnings("ignore:elra_spectral")
def test_fsdp_through_accelerate_and_its_checkpoints(tmp_path, optim, state, then):
    """The path of one process; sharded checkpoints go on on another number of processes."""
    run = trainer(tmp_path / "one", llama().double(), elra_control_cycle="2ba", optim=optim)
    run.train()
    two = together(workers.fsdp_trainer, 2, folder=str(tmp_path), state=state, optim=optim)
    assert two["sharded"] == "DTensor"
    assert two["loss"] == pytest.approx(logged(run, "loss"), rel=1e-6)  # logged in float32
    assert two["alpha"] == pytest.approx(logged(run, "alpha"), rel=1e-9)
    assert two["batches"] == logged(run, "batch_size")
    assert two["weights"] == pytest.approx(weights(run.model).norm().item(), rel=1e-9)  # of elra_spectral the mean's
    assert two["evaluation"] == pytest.approx(run.evaluate(token_rows(8))["eval_loss"], rel=1e-6)
    checkpoint = str(tmp_path / f"{state}-2" / "checkpoint-5")
    again = together(workers.fsdp_trainer, then, folder=str(tmp_path), resume=checkpoint, state=state, optim=optim)
    for name in ("alpha", "weights", "evaluation"):
        assert again[name] == pytest.approx(two[name], rel=1e-6 if name == "evaluation" else 1e-9)
    assert again["restarts"] == two["restarts"]


def test_the_noise_scale_is_that_of_all_processes(tmp_path):
    found = together(workers.noise_scale, 2, folder=str(tmp_path))
    assert found["equal"]
    assert found["signal"] == pytest.approx(found["square"], rel=0.5)  # of five updates
    assert len(found["batches"]) == 5
