"""scripts/experiments/reproduce.py from end to end, as a user starts it."""

import gzip
import json
import sys

import pytest

import reproduce
from lib import babyllama_comparison
from tests.conftest import finish


def test_tables_of_networks_are_printed_beside_the_papers(tmp_path, capsys):
    given = ["--data", "digits", "--seeds", "2", "--epochs", "1", "--output", str(tmp_path), "--processes", "1"]
    code, output, error = finish("experiments/reproduce.py", "mnist", *given, "--columns", "elra", "adam")
    assert code == 0, error
    table = [[cell.strip() for cell in line.split("|")[1:]] for line in output.splitlines() if line.startswith("|")]
    rows = {name: cells for name, *cells in table}
    assert rows["ELRA"][:3] == ["94.25 ± 0.21", "2", "1"]
    assert "±" in rows["ELRA"][3]
    assert rows["Adam"][1] == "2"
    assert "not run" in rows["Lion"]
    assert sorted(p.name for p in (tmp_path / "mnist").glob("*.jsonl")) == [
        *("adam-seed0.jsonl", "adam-seed1.jsonl", "elra-seed0.jsonl", "elra-seed1.jsonl")
    ]
    given[5] = "2"
    assert reproduce.main(["mnist", *given, "--columns", "elra"]) == 2
    error = capsys.readouterr().err
    assert "holds a finished run of 1 epochs on digits, not of 2" in error
    with pytest.raises(SystemExit, match="2"):
        sys.exit(reproduce.main(["mnist", *given, "--columns", "eve"]))
    error = capsys.readouterr().err
    assert "--columns eve is unknown. Choose from elra, elra-ft, adam" in error


def test_learning_rates_of_the_first_updates_are_kept_and_drawn(tmp_path):
    given = ["--data", "digits", "--seeds", "1", "--epochs", "1", "--output", str(tmp_path), "--processes", "1"]
    code, output, error = finish("experiments/reproduce.py", "alpha0", *given)
    assert code == 0, error
    assert "α_0 = 1e-08" in output
    assert (tmp_path / "alpha0" / "first_updates.png").read_bytes().startswith(b"\x89PNG")
    _, *lines = (tmp_path / "alpha0" / "first_epoch.jsonl").read_text().splitlines()
    ends = []
    for line in map(json.loads, lines):
        assert line["alphas"][0] == line["first"]
        ends.append(line["alphas"][-1])
    assert len(ends) == 9
    assert max(ends) / min(ends) < 100  # they began eight decades apart


def test_elra_and_adamw_on_equal_numbers_of_sequences(tmp_path):
    text = "\n<|endoftext|>\n".join(f"The cat {i} sat on the mat. The dog {i} ran home." for i in range(120))
    for split in ("train", "validation"):
        with gzip.open(tmp_path / f"{split}.txt.gz", "wt") as file:
            file.write(text)
    small = ["--hidden_size", "16", "--num_layers", "1", "--num_heads", "2", "--intermediate_size", "32"]
    words = ["babyllama", "--data", str(tmp_path), "--sequences", "320", "--output", str(tmp_path / "out")]
    words += ["--columns", "elra", "adamw-16-3e-3", *small, "--block_size", "16", "--vocab_size", "300", "--use_cpu"]
    code, output, error = finish("experiments/reproduce.py", *words, folder=tmp_path)
    assert code == 0, error
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in output.splitlines()[2:]]
    assert len(rows) == 8
    assert (rows[0][0], rows[4][0]) == ("ELRA, batch from 16", "AdamW, batch 16, rate 3e-3")
    assert 320 <= int(rows[-1][1]) < 336
    assert (tmp_path / "out" / "babyllama" / "curves.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((tmp_path / "out" / "babyllama" / "elra.json").read_text())
    points = babyllama_comparison.curve(results)
    assert [point.tokens for point in points] == [16 * point.sequences for point in points]
    assert 0 < points[0].seconds < points[-1].seconds <= results["train_seconds"]
    assert points[-1].loss == results["validation_loss"]
    before = (tmp_path / "out" / "babyllama" / "elra.json").stat().st_mtime_ns
    assert finish("experiments/reproduce.py", *words, folder=tmp_path)[0] == 0
    words[words.index("320")] = "640"
    code, _, error = finish("experiments/reproduce.py", *words, folder=tmp_path)
    assert code == 2
    assert "elra.json holds a run with other settings" in error
    assert (tmp_path / "out" / "babyllama" / "elra.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["babyllama", "--data", "nowhere"], "--data nowhere: it lacks train.txt.gz"),
        (["babyllama", "--columns", "elra", "adam"], "--columns adam is unknown. Choose from elra, adamw-512"),
        (["mnist", "--epoch", "3", "--colums", "adam"], "--colums adam: unknown"),
        (["mnist", "--epochs", "0"], "--epochs 0 must be at least 1"),
        (["mnist", "--data", "./nowhere"], "dataset='./nowhere' does not exist"),
        (["mnist", "--sequences", "9"], "--sequences does nothing for mnist"),
        (["2d", "--seeds", "4"], "--seeds does nothing for 2d"),
    ],
)
def test_wrong_input_is_named(tmp_path, capsys, words, message):
    with pytest.raises(SystemExit, match="2"):
        sys.exit(reproduce.main([*words, "--output", str(tmp_path)]))
    assert message in capsys.readouterr().err


def test_a_device_that_is_not_there_is_named(tmp_path):
    """In a process of its own: asking for a device changes what torch says of it later."""
    words = ["mnist", "--data", "digits", "--device", "cuda:99", "--output", str(tmp_path)]
    code, _, error = finish("experiments/reproduce.py", *words)
    assert code == 2
    assert "--device cuda:99 cannot be used" in error
