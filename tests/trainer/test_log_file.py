"""The log history as a file that grows with the run, and what is told of single updates."""

import json
from itertools import pairwise

import pytest
import torch

from hf_elra.report.names import LOG_FILE
from tests.conftest import trainer


def lines(folder):
    return [json.loads(line) for line in (folder / LOG_FILE).read_text().splitlines()]


def spiking(*at, by=1000):
    """A loss over tokens that is ``by`` times as high in the passes ``at``."""
    calls = []

    def loss(outputs, labels, num_items_in_batch=None):
        calls.append(1)
        flat = torch.nn.functional.cross_entropy(outputs["logits"].flatten(0, 1), labels.flatten())
        return flat * (by if len(calls) in at else 1)

    return loss


@pytest.mark.filterwarnings("ignore:ELRASpectral")
@pytest.mark.parametrize("optim", ["elra", "elra_spectral"])
def test_the_first_updates_are_told_however_rare_logs_are(tmp_path, optim):
    run = trainer(tmp_path, optim=optim, max_steps=24, logging_steps=1000, seed=3)
    run.train()
    first, *entries = lines(tmp_path)
    assert (first["elra"], first["optim"], first["seed"], first["model"]) == (
        "run",
        optim,
        3,
        "LlamaForCausalLM",
    )
    assert first["pretrained"] is False
    assert first["parameters"] == sum(p.numel() for p in run.model.parameters())
    assert entries == run.state.log_history
    told = [entry for entry in entries if entry.get("elra") == "first"]
    assert [entry["step"] for entry in told] == list(range(1, 21))
    assert told[0]["ratio"] is None
    for before, after in pairwise(told):  # a step is judged one update later
        if after["ratio"] is not None and not before["taken_back"]:
            assert after["tried"] == pytest.approx(before["rate"])
    assert sum(entry["ratio"] is not None for entry in told) >= 18


def test_an_update_that_was_taken_back_has_an_entry_and_limits_are_counted(tmp_path):
    run = trainer(
        tmp_path, max_steps=24, logging_steps=8, compute_loss_func=spiking(9, 23), elra_batch_control="off",
        optim_args="max_step_norm=0.01,min_step_norm=0",
    )  # fmt: skip
    run.train()
    entries = lines(tmp_path)[1:]
    told = [entry for entry in entries if entry.get("taken_back")]
    assert [(entry["elra"], entry["step"]) for entry in told] == [("first", 9), ("restart", 23)]
    assert all(entry["loss_of_update"] > 1000 for entry in told)
    logs = [entry for entry in entries if "loss" in entry]
    # The first rates are short, and a retry is no step that a limit decides.
    assert [entry["cropped"] for entry in logs[:2]] == [6, 7]


def test_logs_say_how_far_the_run_is(tmp_path):
    run = trainer(tmp_path, max_steps=4, elra_batch_control="off")
    run.train()
    logs = [entry for entry in run.state.log_history if "loss" in entry]
    assert [entry["samples_seen"] for entry in logs] == [8, 16, 24, 32]
    assert [entry["tokens_seen"] for entry in logs] == [128, 256, 384, 512]
    assert [entry["share"] for entry in logs] == [0.25, 0.5, 0.75, 1.0]
    seconds = [entry["seconds"] for entry in logs]
    assert 0 < seconds[0] <= seconds[-1]


def test_a_run_that_goes_on_keeps_what_its_checkpoint_holds(tmp_path):
    given = {"save_strategy": "steps", "save_steps": 4, "max_steps": 10}
    trainer(tmp_path, **given).train()
    again = trainer(tmp_path, **given)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    entries = lines(tmp_path)[1:]
    assert entries == again.state.log_history
    assert [entry["step"] for entry in entries if "loss" in entry] == list(range(1, 11))
    seconds = [entry["seconds"] for entry in entries if "loss" in entry]
    assert seconds == sorted(seconds)


def test_a_log_that_cannot_be_written_is_told_once_and_ends_nothing(tmp_path, caplog_warnings):
    (tmp_path / LOG_FILE).mkdir()
    trainer(tmp_path, max_steps=3).train()
    told = [record for record in caplog_warnings.records if LOG_FILE in record.getMessage()]
    assert len(told) == 1
