"""scripts/experiments/compare.py: what it counts, that it goes on, what its table says."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import compare

SMALL = replace(compare.PROBLEMS["digits"], epochs=1)


@pytest.fixture(scope="module")
def data():
    return compare.Images.load("digits")


def test_passes_are_counted(data):
    """Those along a line too: one for PAL, and 40 batches at three points for LABPAL's measurement."""
    counted = {}
    for method in ("adamw", "elra", "pal", "labpal_sgd"):
        result = compare.run(SMALL, data, method, None, 0)
        counted[method] = result["forwards"]
        assert result["backwards"] == result["updates"] == 44
        assert result["samples"] == 44 * 32
        assert result["failed"] is None
    assert counted == {"adamw": 44, "elra": 44, "pal": 88, "labpal_sgd": 44 + 3 * 40}


def test_batches_that_are_looked_at_are_trained_on():
    rows = compare.LookAhead(compare.batches(10, 3, 0))
    waiting = [lot.tolist() for lot in rows.peek(4)]
    assert [rows.take().tolist() for _ in range(4)] == waiting
    seen = [row for lot in waiting[:3] for row in lot]
    assert len(seen) == len(set(seen)) == 9


def test_it_goes_on_and_tells(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(compare.PROBLEMS, "digits", SMALL)
    words = ["compare.py", "--output", str(tmp_path / "runs.jsonl"), "--problems", "digits", "--methods", "sgd", "sps",
             "--rates", "none", "0.01"]  # fmt: skip
    for seeds in ("1", "2"):
        monkeypatch.setattr("sys.argv", [*words, "--seeds", seeds])
        compare.main()
    head, *lines = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert head["machine"]
    runs = [(line["method"], line["rate"], line["seed"]) for line in lines]
    assert runs == [("sgd", None, 0), ("sgd", 0.01, 0), ("sps", None, 0), ("sgd", None, 1), ("sgd", 0.01, 1),
                    ("sps", None, 1)]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["compare.py", "--table", str(tmp_path / "runs.jsonl")])
    compare.main()
    text = capsys.readouterr().out
    assert "`sps`" in text
    assert "no α_0" in text
    assert "not by all" in text  # one epoch is not enough


def test_an_encoder_needs_its_bundle(tmp_path, monkeypatch, capsys):
    words = ["--output", str(tmp_path / "a.jsonl"), "--problems", "encoder", "--bundle", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["compare.py", *words])
    with pytest.raises(SystemExit):
        compare.main()
    assert "has no sst2.npz" in capsys.readouterr().err


def test_without_noise(tmp_path, monkeypatch, capsys):
    file = tmp_path / "runs.jsonl"
    monkeypatch.setattr("sys.argv", ["compare.py", "--output", str(file), "--problems", "two_d", "--methods", "elra",
                                     "pal", "--rates", "none", "--seeds", "1"])  # fmt: skip
    compare.main()
    lines = [json.loads(line) for line in file.read_text().splitlines()][1:]
    assert len(lines) == 10
    saddle = next(line for line in lines if line["method"] == "elra" and line["problem"].startswith("saddle"))
    assert saddle["updates"] == saddle["backwards"] == saddle["forwards"] - 1 > 0
    monkeypatch.setattr("sys.argv", ["compare.py", "--table", str(file)])
    compare.main()
    assert f"{saddle['updates']}" in capsys.readouterr().out


class Few:
    """A few rows for a network with BatchNorm."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.rows, self.labels = torch.randn(32, 4, generator=generator), torch.arange(32) % 2

    def __len__(self):
        return len(self.rows)

    def loss(self, model, rows):
        return nn.functional.cross_entropy(model(self.rows[rows]), self.labels[rows])

    def test(self, model):
        return 0.5, 0.5


@pytest.mark.parametrize("method", ["pal", "labpal_nsgd"])
def test_looks_along_a_line_leave_batch_norm_alone(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    problem = replace(SMALL, batch=8, epochs=2, looks=1)
    found = compare.train(problem, Few(), model, compare.METHODS[method].make(model, 8, None), 0)
    assert found["forwards"] > found["updates"] == 8
    assert model[1].num_batches_tracked == 8


@pytest.mark.parametrize("method", ["ntlr_sgd", "elra"])
def test_what_is_never_finite_has_failed_and_ends_nothing(method):
    """Also where numbers are read at the end alone."""
    torch.manual_seed(0)
    data, model = Few(), nn.Linear(4, 2)
    data.rows = data.rows * torch.nan
    optimizer = compare.METHODS[method].make(model, 8, None)
    found = compare.train(replace(SMALL, batch=8, epochs=8, looks=1), data, model, optimizer, 0)
    assert "non-finite" in found["failed"]
    assert found["accuracy"] == 0.0
