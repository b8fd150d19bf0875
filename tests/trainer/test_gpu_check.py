"""scripts/gpu_check.py in its tiny form, on the CPU: every part runs, is cut, fails alone and goes on."""

import json

import numpy as np
import pytest

from tests.conftest import ROOT, finish

PARTS = ("correctness", "update_cost", "language_model", "pictures", "memory")


def check(folder, *words, **more):
    return finish("gpu_check.py", "--output", str(folder), "--tiny", "--device", "cpu", *words, **more)


def entries(folder, part):
    return [json.loads(line) for line in (folder / f"{part}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder in which all parts were measured, and what was printed."""
    folder = tmp_path_factory.mktemp("gpu")
    for part in PARTS:  # as the script starts them, but without waiting for imports
        code, output, error = check(folder, "--part", part, "--seconds", "300")
        assert code == 0, output + error
    code, output, error = check(folder, "--print")
    assert code == 0, output + error
    return folder, output


def test_every_row_of_every_part_is_measured(finished):
    folder, output = finished
    assert "not measured" not in output
    assert "failed" not in output.lower().replace("0 failed", "")
    for part in PARTS:
        header = entries(folder, part)[0]
        assert header["command"] == f"python scripts/gpu_check.py --only {part} --tiny"
        assert {"machine", "versions"} <= header.keys()
    updates = {e["row"]: e for e in entries(folder, "update_cost") if "state_bytes" in e}
    state = {name.removeprefix("2 M, "): e["state_bytes"] / e["parameters"] for name, e in updates.items()}
    assert state["ELRA"] == 4
    assert state["elra_spectral"] == 4
    losses = {e["row"]: e["validation_loss"] for e in entries(folder, "language_model") if "validation_loss" in e}
    assert len(losses) == 5
    assert all(np.isfinite(loss) for loss in losses.values())
    tokens = {e["tokens"] for e in entries(folder, "language_model") if "tokens" in e and "seconds of" not in e["row"]}
    assert len(tokens) == 1


def test_what_is_done_is_not_repeated(finished, tmp_path):
    folder, _ = finished
    lines = (folder / "correctness.jsonl").read_text().splitlines()
    rows = [json.loads(line).get("row") for line in lines]
    missing = rows[4]
    kept = [line for line, row in zip(lines, rows, strict=True) if row != missing]
    (tmp_path / "correctness.jsonl").write_text("\n".join(kept) + "\n" + lines[4][: len(lines[4]) // 2])
    code, output, error = check(tmp_path, "--only", "correctness", "--minutes", "10")
    assert code == 0, error
    cut, *added = (tmp_path / "correctness.jsonl").read_text().splitlines()[len(kept) :]
    assert lines[4].startswith(cut)
    assert [json.loads(line).get("row") for line in added] == [None, missing, "the part as a whole"]
    assert "| tests/test_fused.py and test_on_device.py |" in " ".join(output.split())


def test_a_part_is_cut_at_the_end_of_its_time(tmp_path):
    """However fast it is: here it never begins."""
    (tmp_path / "sitecustomize.py").write_text("import sys, time\nif '--part' in sys.orig_argv: time.sleep(120)\n")
    words = ["--only", "language_model", "--minutes", "0.02"]
    code, output, error = check(tmp_path / "out", *words, path=tmp_path)
    assert code == 0, error
    assert "language_model: stopped, its time is over" in output
    table = output[output.index("## BabyLlama") : output.index("## ResNet")]
    assert table.count("not measured") == 5


def test_a_part_that_fails_does_not_stop_the_next_one(tmp_path):
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "text.npz").write_bytes(b"no archive")
    code, output, _ = check(
        tmp_path / "out", "--only", "language_model", "pictures", "--minutes", "10", "--bundle", str(bundle)
    )
    assert code == 1
    assert "Failed: the part as a whole: " in output
    pictures = output[output.index("## ResNet") : output.index("## Memory")]
    assert "not measured" not in pictures


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--minutes", "0"], "--minutes 0 must be above 0"),
        (["--bundle", "nowhere"], "--bundle nowhere is no folder; make one with: python scripts/gpu_bundle.py"),
        (["--only", "picture"], "invalid choice: 'picture'"),
    ],
)
def test_wrong_input(tmp_path, words, message):
    code, _, error = check(tmp_path / "out", *words)
    assert code == 2
    assert message in error
    assert not (tmp_path / "out").exists()


def test_a_bundle_of_the_text_in_every_python(tmp_path, capsys, monkeypatch):
    code, output, error = finish("gpu_bundle.py", "--output", str(tmp_path / "bundle"), "--vocab_size", "300")
    assert code == 0, error
    with np.load(tmp_path / "bundle" / "text.npz", allow_pickle=False) as arrays:
        assert arrays["pieces"] == 300
        assert arrays["train"].dtype == np.uint16
        assert arrays["train"].size % 256 == 0
        assert 0 < arrays["validation"].size < arrays["train"].size
        assert arrays["train"].max() < 300
    assert "MiB" in output
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import gpu_bundle

    assert gpu_bundle.main(["--output", str(tmp_path / "other"), "--text", "missing.txt"]) == 2
    assert "missing.txt" in capsys.readouterr().err
