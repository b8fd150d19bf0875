"""scripts/experiments/other_papers.py: steps are batches drawn, runs go on, tables say what the files hold."""

import gzip
import json
from itertools import pairwise

import pytest
import torch

import compare
import other_papers
from lib.small_networks import Captions, Pictures


class FewPictures(Pictures):
    """Small ones, dark or bright."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.arange(64) % 2
        self.images = torch.randn(64, 3, 4, 4, generator=generator) + self.labels.view(-1, 1, 1, 1)
        self.test_images, self.test_labels = self.images, self.labels


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(other_papers, "MEASURED", 16)
    return FewPictures()


def run(method, few, **settings):
    return other_papers.labpal_run(other_papers.Run("labpal", method, {"steps": 24, **settings}, 8, 0), few)


def test_batches_of_a_measurement_are_spent(few, monkeypatch):
    """Two a measurement, at three points; updates have one batch, from the half of training on two, then four."""
    monkeypatch.setattr(other_papers, "LOOKS", 24)  # one after every update
    result = run("labpal_sgd", few, every=100)
    measurements, rest = divmod(result["forwards"] - result["backwards"], 3 * 2)
    assert measurements >= 1
    assert rest == 0
    assert result["batches"] == result["backwards"] + 2 * measurements
    drawn = [row[0] for row in result["curve"]]
    assert len(drawn) == result["updates"]
    assert all(after - before == (4 if before >= 18 else 2) for before, after in pairwise(drawn) if before >= 12)


def test_looks_along_the_line_take_no_batch(few):
    result = run("pal", few)
    assert (result["batches"], result["backwards"], result["forwards"]) == (24, 24, 48)
    assert result["failed"] is None


def test_the_piecewise_rate_falls_twice(few):
    rates = [row[-1] for row in run("sgd_piecewise", few, lr=0.1, momentum=0.9)["curve"]]
    assert rates[0] == 0.1
    assert rates[5] == pytest.approx(0.01)
    assert rates[-1] == pytest.approx(0.001)


def test_a_translator_learns_captions(tmp_path):
    """Every noun has its translation; what a caption ends in is foreseen, and no word after it counts."""
    nouns = [("hund", "dog"), ("mann", "man"), ("ball", "ball")]
    for part in ("train", "val"):
        for which, language in enumerate(("de", "en")):
            with gzip.open(tmp_path / f"{part}.{language}.gz", "wt") as file:
                file.write("".join(f"{('ein', 'a')[which]} {nouns[i % 3][which]} .\n" for i in range(36)))
    data = Captions(tmp_path)
    assert len(data) == 36
    assert data.target[0, :6].tolist() == [data.BEGINS, 5, 7, 4, data.ENDS, data.NO_WORD]  # ".", "a", then the nouns
    run = other_papers.Run("translation", "adamw", {"lr": 1e-2, "epochs": 6}, 12, 0)
    result = other_papers.translation_run(run, data)
    assert result["failed"] is None
    assert result["loss"] < 1.5 < result["curve"][0][2]
    assert 0.6 < result["accuracy"] <= 1


def test_runs_go_on_and_tables_say_what_they_hold(tmp_path, monkeypatch, capsys):
    digits = compare.Images.load("digits")
    monkeypatch.setattr(compare.Images, "load", lambda source: digits)
    monkeypatch.setattr(other_papers, "OF_BATCHES", (0.1, 0.01))
    monkeypatch.setattr(other_papers, "BATCHES", (64, 128))
    monkeypatch.setitem(other_papers.HIDDEN, "batches", 8)
    file = tmp_path / "runs.jsonl"
    words = ["other_papers.py", "batches", "--output", str(file), "--epochs", "1"]
    for more in (["--methods", "sgd"], []):
        monkeypatch.setattr("sys.argv", [*words, *more])
        other_papers.main()
    head, *lines = map(json.loads, file.read_text().splitlines())
    assert head["machine"]
    assert [line["method"] for line in lines] == ["sgd"] * 4 + ["ntlr_sgd"] * 4
    assert "1 of 8" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["other_papers.py", "--table", str(file)])
    other_papers.main()
    lowest = min(line["accuracy"] for line in lines if (line["method"], line["batch"]) == ("sgd", 64))
    assert f"{100 * lowest:.1f}" in capsys.readouterr().out
