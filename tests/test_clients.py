"""scripts/experiments/clients.py: what it makes of stories, what it runs, what its table says."""

import gzip
import json

import pytest

import clients

WORDS = "one two three four five six seven eight nine ten eleven twelve thirteen"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "stories").mkdir()
    text = ". ".join(f"{WORDS} number {number}" for number in range(30)) + ". Too short."
    for part in ("train", "validation"):
        (tmp_path / "stories" / f"{part}.txt.gz").write_bytes(gzip.compress(text.encode()))
    return tmp_path


def test_what_is_rejected_has_the_words_of_what_is_chosen(folder, monkeypatch):
    monkeypatch.setattr(clients, "TRAINED", 20)
    train, test = clients.halves(folder)
    assert (len(train), len(test)) == (20, 10)
    for begins, ends, other in train + test:
        assert (begins + ends).startswith(WORDS)
        assert sorted(ends.split()) == sorted(other.split())
    assert any(ends != other for _, ends, other in train)
    assert clients.halves(folder) == (train, test)
    labels = [row["label"] for row in clients.ROWS_OF["kto"](train)]
    assert labels == [False, True] * 10


def test_the_best_rate_is_that_of_the_client_s_own_metric(tmp_path, capsys):
    def line(client, optim, rate, seed=0, **found):
        return json.dumps({"client": client, "optim": optim, "rate": rate, "seed": seed, **found})

    file = tmp_path / "runs.jsonl"
    lines = [
        line("TRL DPO", clients.OURS, None, loss=0.1, accuracy=0.9),
        line("TRL DPO", clients.OURS, None, 1, loss=0.3, accuracy=0.9),
        line("TRL DPO", "adamw_torch", None, loss=0.01),
        line("TRL DPO", "adamw_torch", 1e-3, loss=0.5),
        line("TRL DPO", "adamw_torch", 3e-3, loss=0.4),
        line("sentence-transformers", "adamw_torch", 2e-5, mrr=0.8),
        line("sentence-transformers", "adamw_torch", 1e-4, mrr=0.6),
    ]
    file.write_text("\n".join(lines))
    assert clients.main(["--output", str(file), "--print"]) == 0
    table = capsys.readouterr().out
    assert "| TRL DPO | loss 0.200, accuracy 90.0%; 2 seeds | loss 0.010 | loss 0.400 (0.003) |" in table
    assert "| sentence-transformers | – | – | MRR 0.800 (2e-05) |" in table


def test_what_was_run_is_left_out(folder, monkeypatch, capsys):
    made = []

    def run(given, client, wanted):
        made.append((wanted["optim"], wanted["rate"]))
        return {"loss": 1.0}

    monkeypatch.setitem(clients.CLIENTS, "TRL SFT", clients.Client(run, grid=(1e-3,)))
    words = ["--output", str(folder / "a" / "runs.jsonl"), "--data", str(folder), "--seeds", "0", "--only", "TRL SFT"]
    clients.main([*words, "--optim", clients.OURS])
    clients.main(words)
    assert made == [(clients.OURS, None), ("adamw_torch", None), ("adamw_torch", 1e-3)]
    monkeypatch.setitem(clients.CLIENTS, "TRL SFT", clients.Client(run, grid=(1e-2, 1e-3)))
    made.clear()
    more = [*words[:5], "1", *words[6:], "--optim", "adamw_torch", "--best"]
    clients.main(more)
    clients.main(more)
    assert made == [("adamw_torch", None), ("adamw_torch", 1e-3)]  # the only one of the grid that was run
    with pytest.raises(SystemExit):
        clients.main([*words[:-1], "sentence-transformers"])
    assert "needs --minilm" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        clients.main([*words[:2], "--data", str(folder / "nowhere"), *words[4:]])
    assert "has no stories/train.txt.gz" in capsys.readouterr().err
