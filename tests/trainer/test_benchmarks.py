"""The benchmark scripts still run, measure both sides, and write what they print. Speeds are not tested."""

import json
import math
import statistics

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

import benchmark_lm
from hf_elra.recipes.text_data import train_tokenizer
from tests.conftest import ROOT, finish


@pytest.fixture
def here(monkeypatch, capsys):
    """Run ``benchmark_lm.py`` once more, in this process, which has imported everything: code, output, errors."""
    monkeypatch.setattr(benchmark_lm.transformers.utils.logging, "set_verbosity_error", lambda: None)

    def run(*words):
        capsys.readouterr()
        try:
            code = benchmark_lm.main(list(words))
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr()

    return run


def measurements(path):
    header, *entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert header["command"].startswith("python ")
    assert {"machine", "versions"} <= header.keys()
    return entries


def test_images(tmp_path):
    file = tmp_path / "images.jsonl"
    words = ["--output", str(file), "--networks", "mnist-mlp", "--batches", "64", "--updates", "2", "--rounds", "2"]
    code, output, error = finish("experiments/benchmark_images.py", *words)
    assert code == 0, error
    kinds = [entry["kind"] for entry in measurements(file)]
    assert sorted(kinds) == sorted(["ready batch", "pipeline", "pipeline and boosting"] * 2)
    assert output.splitlines()[-1].split("|")[1].strip() == "mnist-mlp"


def test_step(tmp_path):
    file = tmp_path / "step.jsonl"
    words = ["--output", str(file), "--models", "resnet18", "--rounds", "1", "--updates", "1"]
    code, output, error = finish("experiments/benchmark_step.py", *words)
    assert code == 0, error
    entries = measurements(file)
    state = {entry["optimizer"]: entry["state_bytes"] for entry in entries if "state_bytes" in entry}
    parameters = entries[0]["parameters"]
    assert state["ELRA"] == state["elra_spectral"] == 4 * parameters
    assert state["elra_spectral, momentum=0"] == 2 * parameters
    assert state["elra_spectral, all in float32"] == 8 * parameters
    assert state["AdamW, fused"] == pytest.approx(8 * parameters, rel=1e-3)
    timed = {entry["optimizer"] for entry in entries if "seconds_per_update" in entry}
    assert timed == state.keys()
    assert all(name in output for name in timed)


def test_training(tmp_path):
    file = tmp_path / "training.jsonl"
    words = ["--output", str(file), "--preset", "tiny", "--batches", "2", "--rounds", "1", "--updates", "1"]
    code, output, error = finish("experiments/benchmark_training.py", *words)
    assert code == 0, error
    timed = {entry["case"]: entry["seconds"] for entry in measurements(file)}
    assert len(timed) == 7
    assert all(len(seconds) == 1 for seconds in timed.values())
    assert all(name in output for name in timed)


def test_language_models(tmp_path, here):
    """Every row of another kind, in few updates; what is finished is not repeated."""
    text = tmp_path / "texts" / "input.txt"
    text.parent.mkdir()
    text.write_text("\n".join(p.read_text(encoding="utf-8") for p in sorted(ROOT.glob("hf_elra/report/*.py"))))
    words = ["--train_file", str(text), "--tokens", "5120", "--output", str(tmp_path), "--batches", "2", "--seeds", "0"]
    words += ["--rows", "0", "8", "18", "19", "20", "23", "25", "35"]
    code, output, error = finish("experiments/benchmark_lm.py", *words)
    assert code == 0, error
    files = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "texts-5120").iterdir()}
    assert len(files) == 8
    for result in files.values():
        assert result["updates"] == 20
        assert result["row"] in output
        assert f"{result['validation_loss']:.3f}" in output
        assert "benchmark_lm.py --train_file" in result["command"]
        assert result["log_history"][-1]["step"] == 20
    (muon,) = (result for result in files.values() if result["row"] == "Muon, cosine, rate 1e-2")
    rates = [entry["learning_rate"] for entry in muon["log_history"] if "learning_rate" in entry]
    assert max(rates) == pytest.approx(1e-2, rel=0.02)
    assert rates[-1] < 2e-4
    code, again, error = here(*words)
    assert code == 0, error
    assert again.strip() == output[output.index("texts, llama, 5,120 tokens") :].strip()
    code, _, error = here(*words[:-8], "99")
    assert code == 2
    assert "--rows 99 is no row" in error
    code, _, error = here(*words[:-8], "0", "26", "--model", "mixture")
    assert code == 0, error
    results = [json.loads(path.read_text()) for path in (tmp_path / "texts-mixture-5120").iterdir()]
    assert {result["row"] for result in results} == {"elra_spectral", "elra_spectral, experts as one matrix"}
    assert results[0]["validation_loss"] != results[1]["validation_loss"]


def test_language_models_trained_further(tmp_path, here):
    """From a saved model: with its tokenizer, its losses before and after, and wrong starts refused."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (tmp_path / "input.txt").write_text(text * 3)
    tokenizer = train_tokenizer([text], 300)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes)).save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    words = ["--train_file", str(tmp_path / "input.txt"), "--tokens", "5120", "--output", str(tmp_path)]
    words += ["--batches", "2", "--seeds", "0", "1", "--rows", "0", "30", "--name", "readme"]
    start = ["--start", str(tmp_path / "saved"), "--kept_file", str(ROOT / "README.md")]
    code, output, error = finish("experiments/benchmark_lm.py", *words, *start)
    assert code == 0, error
    results = [json.loads(path.read_text()) for path in (tmp_path / "readme-from-saved-5120").iterdir()]
    assert len(results) == 4
    assert {result["row"] for result in results} == {"elra_spectral", "AdamW, linear, rate 3e-3"}
    for result in results:
        assert result["validation_loss_before"] == pytest.approx(math.log(300), rel=0.02)
        assert result["kept_loss_before"] == results[0]["kept_loss_before"]
        assert result["kept_loss"] < result["kept_loss_before"]
        assert f" {result['validation_loss_before']:.3f} | " in output
    kept = statistics.fmean(result["kept_loss"] for result in results if result["row"] == "elra_spectral")
    assert f" {kept:.3f} ± " in output
    code, again, error = here(*words, *start)
    assert code == 0, error
    assert again[again.index("readme, from saved") :].strip() in output
    other = LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes))
    other.lm_head.weight.data *= 30  # by chance two untrained models may have one loss, ln 300
    other.save_pretrained(tmp_path / "other" / "saved")
    for path in (tmp_path / "saved").glob("tokenizer*"):
        (tmp_path / "other" / "saved" / path.name).write_bytes(path.read_bytes())
    another = ["--start", str(tmp_path / "other" / "saved")]
    for wrong in ([*another, *start[2:]], start[:2]):  # its runs have the same names; those have a kept text
        code, _, error = here(*words, *wrong)
        assert code == 2
        assert "holds runs of another saved model or kept text" in error
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text("{}")
    for wrong, message in (
        (["--start", str(tmp_path / "bare")], "has no tokenizer saved beside the model"),
        (["--start", str(tmp_path)], f"--start {tmp_path} is no folder of a saved model"),
        ([*start, "--model", "mixture"], "--model mixture is for new models"),
        (start[2:], "--kept_file needs --start"),
    ):
        code, _, error = here(*words, *wrong)
        assert code == 2
        assert message in error
