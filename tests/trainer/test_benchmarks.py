"""The benchmark scripts still run, measure both sides, and write what they print. Speeds are not tested."""

import json

import pytest

from tests.conftest import finish


def measurements(path):
    header, *entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert header["command"].startswith("python ")
    assert {"machine", "versions"} <= header.keys()
    return entries


def test_images(tmp_path):
    file = tmp_path / "images.jsonl"
    words = ["--output", str(file), "--networks", "mnist-mlp", "--batches", "64", "--updates", "2", "--rounds", "2"]
    code, output, error = finish("benchmark_images.py", *words)
    assert code == 0, error
    kinds = [entry["kind"] for entry in measurements(file)]
    assert sorted(kinds) == sorted(["ready batch", "pipeline", "pipeline and boosting"] * 2)
    assert output.splitlines()[-1].split("|")[1].strip() == "mnist-mlp"


def test_step(tmp_path):
    file = tmp_path / "step.jsonl"
    words = ["--output", str(file), "--models", "resnet18", "--rounds", "1", "--updates", "1"]
    code, output, error = finish("benchmark_step.py", *words)
    assert code == 0, error
    entries = measurements(file)
    state = {entry["optimizer"]: entry["state_bytes"] for entry in entries if "state_bytes" in entry}
    parameters = entries[0]["parameters"]
    assert state["ELRA"] == 4 * parameters
    assert state["AdamW, fused"] == pytest.approx(8 * parameters, rel=1e-3)
    timed = {entry["optimizer"] for entry in entries if "seconds_per_update" in entry}
    assert timed == state.keys()
    assert all(name in output for name in timed)


def test_training(tmp_path):
    file = tmp_path / "training.jsonl"
    words = ["--output", str(file), "--preset", "tiny", "--batches", "2", "--rounds", "1", "--updates", "1"]
    code, output, error = finish("benchmark_training.py", *words)
    assert code == 0, error
    timed = {entry["case"]: entry["seconds"] for entry in measurements(file)}
    assert len(timed) == 5
    assert all(len(seconds) == 1 for seconds in timed.values())
    assert all(name in output for name in timed)
