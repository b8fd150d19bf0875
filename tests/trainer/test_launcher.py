"""``hf-elra run``: unmodified scripts, flags they do not know, and the same through Accelerate."""

import importlib
import json
import os
import subprocess
import sys
import textwrap

import pytest

from hf_elra.trainer.launcher import run
from lib import ready
from tests.conftest import ROOT

PLAIN = """
import json, sys
import torch
from transformers import HfArgumentParser, {trainer}, {arguments}
from tests.conftest import classifier, llama, logged, token_rows

{extra}

if __name__ == "__main__":
    (args,) = HfArgumentParser({arguments}).parse_args_into_dataclasses()
    torch.manual_seed(0)
    trainer = {build}({model}, args, train_dataset={rows})
    trainer.train()
    seen = {{
        "alpha": logged(trainer, "alpha"),
        "loss": logged(trainer, "loss"),
        "optimizer": type(getattr(trainer.optimizer, "optimizer", trainer.optimizer)).__name__,
        "class": type(trainer).__name__,
        "floor": trainer.optimizer.param_groups[0].get("min_step_norm"),
        "argv": sys.argv[1:],
    }}
    if trainer.is_world_process_zero():
        open(args.output_dir + "/seen.json", "w").write(json.dumps(seen))
"""
FROM_A_LIBRARY = """
class LibraryTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(input_ids=inputs["input_ids"])
        logits, labels = outputs.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten()
        loss = torch.nn.functional.cross_entropy(logits, labels)
        return (loss, outputs) if return_outputs else loss
"""


def write_script(folder, kind="Trainer", model="llama()", rows="token_rows()"):
    arguments = "Seq2SeqTrainingArguments" if kind == "Seq2SeqTrainer" else "TrainingArguments"
    trainer = "Trainer" if kind == "LibraryTrainer" else kind
    extra = FROM_A_LIBRARY if kind == "LibraryTrainer" else ""
    script = folder / "unmodified_script.py"
    text = PLAIN.format(trainer=trainer, arguments=arguments, extra=extra, build=kind, model=model, rows=rows)
    script.write_text(textwrap.dedent(text))
    return script


def flags(folder, *more):
    return [
        *("--output_dir", str(folder), "--max_steps", "4", "--logging_steps", "1", "--report_to", "none"),
        *("--use_cpu", "true", "--save_strategy", "no", "--disable_tqdm", "true"),
        *more,
    ]


def seen(folder):
    return json.loads((folder / "seen.json").read_text())


@pytest.fixture(autouse=True)
def _own_arguments(monkeypatch):
    monkeypatch.setattr("sys.argv", ["pytest"])
    monkeypatch.setattr("sys.path", list(sys.path))


@pytest.mark.parametrize("kind", ["Trainer", "Seq2SeqTrainer", "LibraryTrainer"])
def test_unmodified_script(tmp_path, kind):
    script = write_script(tmp_path, kind)
    assert run([str(script), *flags(tmp_path, "--optim", "elra", "--elra_min_step_norm", "0.25")]) == 0
    result = seen(tmp_path)
    assert result["optimizer"] == "ELRA"
    assert result["class"] == kind
    assert result["floor"] == 0.25
    assert len(result["alpha"]) == 4
    assert not any("elra_" in word for word in result["argv"])


def test_unmodified_script_with_a_stock_optimizer(tmp_path, capsys):
    script = write_script(tmp_path)
    assert run([str(script), *flags(tmp_path, "--optim", "sgd", "--elra_min_step_norm=0.25")]) == 0
    assert seen(tmp_path)["optimizer"] == "SGD"
    assert seen(tmp_path)["alpha"] == []
    assert "--elra_min_step_norm had no effect" in capsys.readouterr().err


def test_flags_without_effect_are_named_before_the_training(tmp_path, caplog_warnings):
    script = write_script(tmp_path)
    assert run([str(script), *flags(tmp_path, "--optim", "sgd", "--elra_min_step_norm=0.25")]) == 0
    assert "elra_min_step_norm has no effect with optim=sgd" in caplog_warnings.text


def test_module(tmp_path, monkeypatch):
    write_script(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert run(["-m", "unmodified_script", *flags(tmp_path, "--optim", "elra", "--no_elra_skip_last_batch")]) == 0
    assert seen(tmp_path)["optimizer"] == "ELRA"
    assert seen(tmp_path)["floor"] == 0.1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--optim", "erla"], "--optim erla is not known. Did you mean 'elra'?"),
        (["--optim=elar"], "Did you mean 'elra'?"),
        (
            ["--optim", "elra", "--elra_min_norm", "1"],
            "unknown flag --elra_min_norm. Did you mean 'elra_min_step_norm'?",
        ),
        (["--optim", "elra", "--optim_args", "c=2"], "'c' is not an argument of ELRA"),
        (["--optim", "elra", "--elra_control_cycle", "soon"], "elra_control_cycle='soon'"),
        (["--optim", "adamw_torch", "--elra_batch_schedule", "0:1"], "needs --elra_batch_control schedule"),
        (["--optim", "pal", "--fp16", "true"], "fp16=True cannot be used with PAL"),
        (["--optim", "elra", "--elra_min_step_norm", "big"], "elra_min_step_norm"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(tmp_path, capsys, words, message):
    script = write_script(tmp_path)
    assert run([str(script), *flags(tmp_path, *words)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "seen.json").exists()


def test_missing_script(capsys):
    assert run(["no_such_script.py"]) == 2
    assert "'no_such_script.py' does not exist" in capsys.readouterr().err
    assert run(["no_such_command"]) == 2
    assert "'no_such_command' does not exist, nor does a command of that name" in capsys.readouterr().err
    assert run(["-m", "no_such.module"]) == 2
    assert "module 'no_such.module' cannot be found" in capsys.readouterr().err
    assert run(["trl.scripts.sft"]) == 2
    assert "write: hf-elra run -m trl.scripts.sft" in capsys.readouterr().err
    assert run([]) == 2
    assert run(["--help"]) == 0


@pytest.mark.parametrize("name", ["run.json", "run.yaml", "RUN.TOML"])
def test_a_file_of_settings_is_no_script(tmp_path, capsys, name):
    (tmp_path / name).write_text('{"optim": "elra", "do_train": true}')
    assert run([str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert error == (
        f"hf-elra: error: script {str(tmp_path / name)!r} holds settings, not a script; name the script first: "
        f"hf-elra run SCRIPT {tmp_path / name}\n"
    )


def test_what_is_no_python_is_no_script(tmp_path, capsys):
    (tmp_path / "run.sh").write_text("for i in 1 2; do echo $i; done")
    (tmp_path / "model.safetensors").write_bytes(bytes(range(64)))
    for path in (tmp_path / "run.sh", tmp_path / "model.safetensors", tmp_path):
        assert run([str(path)]) == 2
        assert capsys.readouterr().err == (
            f"hf-elra: error: script {str(path)!r} is not written in Python, and nothing else can be run.\n"
        )
    (tmp_path / "without-an-ending").write_text("print('ran')")
    (tmp_path / "__main__.py").write_text("print('ran')")
    for path in (tmp_path / "without-an-ending", tmp_path):
        assert run([str(path)]) == 0
        assert capsys.readouterr().out == "ran\n"


def test_packages_are_modules_if_they_have_a_main(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    package = tmp_path / "command_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "start.py").write_text("import sys; print('started', *sys.argv[1:])")
    assert run(["-m", "command_package"]) == 2
    error = capsys.readouterr().err
    assert "'command_package' is a package without a __main__, which cannot be run" in error
    assert "name one of its modules: command_package.start." in error
    assert error.count("\n") == 1
    assert run(["-m", "command_package.start", "a"]) == 0
    (package / "__main__.py").write_text("from command_package import start")
    sys.modules.pop("command_package.start", None)
    importlib.invalidate_caches()
    assert run(["-m", "command_package", "b"]) == 0
    assert capsys.readouterr().out.split() == ["started", "a", "started", "b"]


PARENT = """#!{python}
import subprocess, sys
sys.exit(subprocess.run([sys.executable, {script!r}, *sys.argv[1:]]).returncode)
"""


@pytest.mark.parametrize(("optim", "floor"), [("elra", 0.25), ("sgd", None)])
def test_processes_that_a_command_starts_know_our_optimizers_and_flags(tmp_path, monkeypatch, capfd, optim, floor):
    """As ``trl sft``, which trains in a process of its own, does it."""
    commands, site = tmp_path / "bin", tmp_path / "site"
    for folder in (commands, site):
        folder.mkdir()
    (commands / "train-it").write_text(PARENT.format(python=sys.executable, script=str(write_script(tmp_path))))
    (commands / "train-it").chmod(0o755)
    (site / "sitecustomize.py").write_text("import sys; sys.stdout.write('also read\\n')")
    monkeypatch.setenv("PATH", str(commands), prepend=os.pathsep)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), str(ROOT)]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = dict(os.environ)
    assert run(["train-it", *flags(tmp_path, "--optim", optim, "--elra_min_step_norm", "0.25")]) == 0
    assert seen(tmp_path)["floor"] == floor
    assert len(seen(tmp_path)["alpha"]) == (4 if optim == "elra" else 0)
    assert dict(os.environ) == before
    said = capfd.readouterr()
    assert "also read" in said.out
    assert ("--elra_min_step_norm had no effect" in said.err) == (optim == "sgd")


def command(*words):
    environment = {**os.environ, "PYTHONPATH": ".", "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=120, check=False)


def test_installed_command(tmp_path):
    script = write_script(tmp_path)
    executable = os.path.join(os.path.dirname(sys.executable), "hf-elra")
    result = command(executable, "run", str(script), *flags(tmp_path, "--optim", "elra"))
    assert result.returncode == 0, result.stderr
    assert seen(tmp_path)["optimizer"] == "ELRA"


def test_accelerate_launch(tmp_path):
    script = write_script(tmp_path)
    result = command(
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
        *("-m", "hf_elra.run"),
        *(str(script), *flags(tmp_path, "--optim", "elra", "--elra_min_step_norm", "0.2")),
    )
    assert result.returncode == 0, result.stderr
    assert seen(tmp_path)["floor"] == 0.2


ENDING = """
import atexit, os, sys, threading, time
import torch.distributed as dist

def say(line):  # in one piece: both processes write to the same pipe
    os.write(1, f"{{line}}\\n".encode())

class Trap:  # as a thread of gloo does that lets go of its last tensor
    def __del__(self, abort=os.abort):
        abort()

def late():
    time.sleep(0.5)
    say("thread done")

if __name__ == "__main__":
    dist.init_process_group("gloo")
    sys.trap = Trap()
    atexit.register(lambda: say(f"exit function done {{dist.is_initialized()}}"))
    threading.Thread(target=late).start()
    sys.exit({code})
"""


@pytest.mark.parametrize("code", [0, 3])
def test_processes_leave_without_the_clean_up_that_gloo_may_abort(tmp_path, code):
    script = tmp_path / "script.py"
    script.write_text(ENDING.format(code=code))
    launch = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node")
    result = command(*launch, "2", "-m", "hf_elra.run", str(script))
    if code == 0:
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("thread done") == 2
        assert result.stdout.count("exit function done False") == 2
        assert command(*launch, "1", str(script)).returncode != 0  # the trap works
    else:
        assert "exitcode  : 3" in result.stderr


CLASSIFIER = (  # takes num_items_in_batch and ignores it
    "classifier(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)",
    "[{'input_ids': r['input_ids'], 'labels': r['input_ids'][0] // 32} for r in token_rows()]",
)


@pytest.mark.parametrize(
    ("model", "rows", "more"),
    [
        ("llama()", "token_rows()", []),
        ("llama()", "token_rows(unequal=True)", ["--elra_initial_accumulation", "3", "--elra_max_micro_batch", "auto"]),
        (*CLASSIFIER, []),
        (*CLASSIFIER, ["--elra_initial_accumulation", "3", "--elra_max_samples", "40", "--elra_control_cycle", "2ba"]),
    ],
    ids=["language model", "language model, merged", "classifier", "classifier, accumulated, budget"],
)
def test_two_processes_walk_the_path_of_one(tmp_path, model, rows, more):
    """1 process × batch 4 and 2 processes × batch 2: the same losses and rates."""
    results = []
    for processes, batch in ((1, 4), (2, 2)):
        folder = tmp_path / str(processes)
        folder.mkdir()
        script = write_script(folder, model=model, rows=rows)
        words = flags(folder, "--optim", "elra", "--per_device_train_batch_size", str(batch), *more)
        result = ready.command(
            ["-m", "hf_elra.run", str(script), *words], processes=processes,
            environment={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        results.append(seen(folder))
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], rel=1e-4)
    assert results[0]["alpha"] == pytest.approx(results[1]["alpha"], rel=1e-3)
