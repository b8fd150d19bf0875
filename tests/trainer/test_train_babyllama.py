"""``hf-elra babyllama`` and scripts/train_babyllama.py from end to end, as a user starts them."""

import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from lib import ready

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "scripts" / "train_babyllama.py")
SMALL = [
    *("--hidden_size", "32", "--num_layers", "1", "--num_heads", "2", "--intermediate_size", "64"),
    *("--block_size", "32", "--vocab_size", "300", "--per_device_train_batch_size", "4"),
    *("--max_steps", "30", "--logging_steps", "5", "--eval_steps", "15", "--save_steps", "10", "--use_cpu"),
]


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text("\n<|endoftext|>\n".join(f"The cat {i} sat on the mat. The dog {i} ran home." for i in range(120)))
    return str(path)


def start(*words):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, SCRIPT, *words], env=environment, text=True, **pipes)


def finish(*words, command=(SCRIPT,)):
    done = ready.command([*command, *words], environment={"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    return done.returncode, done.stdout, done.stderr


def test_run_writes_what_it_promises(tmp_path, story):
    folder, card = tmp_path / "run", tmp_path / "cards" / "card.md"
    words = [*SMALL, "--train_file", story, "--output_dir", str(folder), "--model_card", str(card)]
    code, output, error = finish(*words, command=("-m", "hf_elra.cli", "babyllama"))
    assert code == 0, error
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["tokens_seen"] == 30 * 4 * 32
    assert metrics["updates"] == 30
    assert re.search(r"tokens/s  loss [\d.]+  learning rate", output)
    assert f"validation loss {metrics['validation_loss']:.4f}" in output
    assert f"unigram entropy {metrics['unigram_entropy']:.4f}" in output
    assert (folder / "sample.txt").read_text().startswith("The")
    assert (folder / "sample.txt").read_text().strip() in output
    assert f"{metrics['validation_loss']:.4f}" in card.read_text()
    for name in ("model.safetensors", "tokenizer.json", "training.md", "log_history.json"):
        assert (folder / name).stat().st_size > 0

    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert AutoModelForCausalLM.from_pretrained(folder).num_parameters() == metrics["parameters"]
    assert len(AutoTokenizer.from_pretrained(folder)) == 300

    code, _, error = finish(*SMALL, "--train_file", story, "--output_dir", str(folder))
    assert code == 2
    assert "holds a finished run; pass --overwrite" in error
    code, output, _ = finish(*SMALL, "--train_file", story, "--output_dir", str(folder), "--resume", "--overwrite")
    assert code == 0
    assert "holds this run, finished" in output
    assert json.loads((folder / "metrics.json").read_text()) == metrics


def test_interrupted_run_saves_and_its_command_resumes_it(tmp_path, story):
    """Ctrl-C in mid-run, then the printed command: the end is the same as without."""
    words = [*SMALL, "--max_steps", "120", "--save_steps", "1000", "--train_file", story, "--output_dir"]
    process = start(*words, str(tmp_path / "cut"))
    for line in process.stdout:
        if "update     15 " in line:
            break
    process.send_signal(signal.SIGINT)
    output, error = process.communicate(timeout=120)
    assert process.returncode == 130, error
    command = shlex.split(re.search(r"Go on with:\n  (.+)", output)[1])
    assert command[-1] == "--resume"
    resumed = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert resumed.returncode == 0, resumed.stderr
    assert "going on from" in resumed.stdout
    code, _, error = finish(*words, str(tmp_path / "whole"))
    assert code == 0, error
    results = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("cut", "whole")]
    assert results[0]["validation_loss"] == results[1]["validation_loss"]
    assert results[0]["tokens_seen"] == results[1]["tokens_seen"]


def test_a_signal_to_one_of_two_processes_stops_both(tmp_path, story):
    """Started by accelerate launch; the printed command goes on with both."""
    words = [*SMALL, "--max_steps", "5000", "--save_steps", "5000", "--train_file", story]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", SCRIPT]
    process = subprocess.Popen(
        [*launch, *words, "--output_dir", str(tmp_path / "run")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if "update     15 " in line:
            break
    (second,) = (p.pid for p in psutil.Process(process.pid).children() if p.environ().get("RANK") == "1")
    os.kill(second, signal.SIGTERM)
    output = process.stdout.read()
    assert process.wait(120) != 0
    assert "exitcode  : 143" in output
    command = shlex.split(re.search(r"Go on with:\n  (.+)", output)[1])
    assert command[:3] == ["torchrun", "--nproc_per_node", "2"]
    saved = int(re.search(r"interrupted at update ([\d,]+)", output)[1].replace(",", ""))
    command[0:1] = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    more = ["--max_steps", str(saved + 10)]
    again = subprocess.run([*command, *more], capture_output=True, text=True, timeout=300, check=False)
    if "tagged with cpu:0" in again.stderr:  # after all that is ours was tested
        pytest.skip("Transformers before 5.23 may not load an optimizer on several processes of a CPU")
    assert again.returncode == 0, again.stderr
    assert f"checkpoint-{saved}" in again.stdout
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["updates"] == saved + 10
    assert metrics["tokens_seen"] == (saved + 10) * 2 * 4 * 32


def test_stock_optimizer_from_the_same_script(tmp_path, story):
    code, output, error = finish(
        *SMALL, "--train_file", story, "--output_dir", str(tmp_path / "run"), "--optim", "adamw_torch"
    )
    assert code == 0, error
    assert "step norm" not in output
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["settings"]["learning_rate"] == 3e-3


@pytest.mark.parametrize(("rate", "perplexity"), [("40", "inf"), ("1e12", "nan")])
def test_a_run_that_diverged_ends_with_results_too(tmp_path, story, rate, perplexity):
    code, output, error = finish(
        *(*SMALL, "--train_file", story, "--output_dir", str(tmp_path / "run")),
        *("--model_card", str(tmp_path / "card.md"), "--max_steps", "10", "--optim", "adamw_torch"),
        *("--learning_rate", rate, "--lr_scheduler_type", "constant", "--weight_decay", "0"),
    )
    assert code == (1 if perplexity == "nan" else 0)
    assert ("error: the run diverged: its validation loss is nan." in error) == (perplexity == "nan")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert str(metrics["perplexity"]) == perplexity
    assert math.isfinite(metrics["validation_loss"]) == (perplexity == "inf")
    assert f"(perplexity {perplexity})" in output
    assert f"| perplexity on held-out data | {perplexity} |" in (tmp_path / "card.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--optim", "elar"], "--optim elar is unknown. Did you mean 'elra'?"),
        (
            ["--optim", "elra", "--optim_args", "min_norm=1"],
            "optim_args: 'min_norm' is not an argument of ELRA. Did you mean 'min_step_norm'?",
        ),
        (["--train_file", "no_such_file.txt"], "train_file='no_such_file.txt' does not exist"),
        (["--dataset", "wiki"], "--dataset and --train_file are two texts; give one of them."),
        (["--per_device_train_batch_size", "9999", "--optim", "elra"], "the first update takes 9999 samples, but the"),
        (["--block_size", "100000"], "fewer than one block of 100000; give more text or lower --block_size."),
    ],
)
def test_wrong_input_is_one_line_exit_code_2_and_leaves_nothing(tmp_path, story, command_here, words, message):
    words = [*SMALL, "--train_file", story, "--output_dir", str(tmp_path / "run"), *words]
    code, output, error = command_here("babyllama", *words)
    assert code == 2
    assert message in error
    assert sum(line.startswith("error:") for line in error.splitlines()) == 1
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()
    assert output == ""
