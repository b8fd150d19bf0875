"""The paper's section 4.4 on language models: ELRA and AdamW on equal numbers of sequences, and the honest rest.

A run is one call of ``scripts/train_babyllama.py``; what was logged is kept in one JSON file a run. The paper sets ELRA
from batch 16 against AdamW at batch 512 with llama2.c's settings; AdamW at batch 16 with its learning rate tuned is the
comparison it leaves out. Arguments and printing are in ``scripts/experiments/reproduce.py``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_elra.errors import ConfigurationError
from hf_elra.recipes.run_folder import read_json, write_json
from hf_elra.report.names import LOG, METRICS
from hf_elra.report.table import markdown_table

EVALUATIONS = 16
CYCLES = 48
"""Control cycles of ELRA's run, as in the preset ``tiny``; the paper's 45,000 sequences are one in 1,138 of its run."""
_ADAMW = ("--optim", "adamw_torch", "--lr_scheduler_type", "cosine", "--warmup_steps", "0.01")  # 1,000 of 100,000


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        name: of its file.
        title: in the table.
        batch: sequences of the first update.
        flags: of the script, beside batch and length.
    """

    name: str
    title: str
    batch: int
    flags: tuple[str, ...]


RUNS = (
    Run(
        "elra",
        "ELRA, batch from 16",
        16,
        ("--optim", "elra", "--elra_min_step_norm", "0.1", "--optim_args", "max_relative_step=none"),
    ),
    Run("adamw-512", "AdamW, batch 512, rate 5e-4", 512, (*_ADAMW, "--learning_rate", "5e-4")),
    *(
        Run(f"adamw-16-{rate}", f"AdamW, batch 16, rate {rate}", 16, (*_ADAMW, "--learning_rate", rate))
        for rate in ("3e-4", "1e-3", "3e-3")
    ),
)


def command(run: Run, sequences: int, folder: str, more: Sequence[str]) -> list[str]:
    """The words after ``python`` that make a run; ``more`` are further flags, the same for every run."""
    updates = max(1, sequences // (EVALUATIONS * run.batch))
    words = ["scripts/train_babyllama.py", "--output_dir", folder, "--elra_max_samples", str(sequences)]
    words += ["--per_device_train_batch_size", str(run.batch), *run.flags]
    words += ["--eval_steps", str(updates), "--save_steps", str(updates), "--logging_steps", str(updates)]
    if run.name == "elra":
        words += ["--elra_control_cycle", f"{max(sequences // CYCLES, run.batch)}sp"]
    return [*words, *more]


def make_run(
    run: Run, sequences: int, folder: Path, runs: Path, more: Sequence[str], *, script: Path, threads: int
) -> None:
    """Make a run, or go on with it where it was interrupted.

    Args:
        run: which.
        sequences: its length.
        folder: its results go to ``NAME.json`` there.
        runs: models, checkpoints and what the script prints go there.
        more: further flags of the script.
        script: ``train_babyllama.py``.
        threads: of the process.

    Raises:
        ConfigurationError: the script failed; its last line says why.
    """
    words = command(run, sequences, str(runs / run.name), more)
    path = folder / f"{run.name}.json"
    if is_finished(path, words):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    runs.mkdir(parents=True, exist_ok=True)
    with (runs / f"{run.name}.log").open("a", encoding="utf-8") as log:
        done = subprocess.run(
            [sys.executable, str(script), *words[1:], "--resume", "--overwrite"],
            stdout=log, stderr=subprocess.STDOUT, check=False, env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )  # fmt: skip
    if done.returncode:
        lines = (runs / f"{run.name}.log").read_text(encoding="utf-8").splitlines()
        raise ConfigurationError(f"{run.title}: {lines[-1] if lines else 'the script failed'}")
    metrics, history = (read_json(runs / run.name / name) for name in (METRICS, LOG))
    metrics["command"] = " ".join(["python", *words])
    write_json(path, {"run": run.title, "words": words, **metrics, "log_history": history})


def is_finished(path: Path, words: list[str]) -> bool:
    """Whether the file holds the results of this very command.

    Raises:
        ConfigurationError: it holds those of another one, which are not to be lost.
    """
    if not path.is_file():
        return False
    if (before := read_json(path)["words"]) != words:
        raise ConfigurationError(
            f"{path} holds a run with other settings ({' '.join(before[1:])}); choose another --output, or remove it."
        )
    return True


@dataclass(frozen=True)
class Point:
    """The state of a run at an evaluation.

    Attributes:
        sequences, tokens, updates: trained on.
        seconds: of training, without evaluation.
        loss: on the validation text, in nats per token.
    """

    sequences: int
    tokens: int
    updates: int
    seconds: float
    loss: float


def curve(result: dict[str, Any]) -> list[Point]:
    """The evaluations of a run, from its results file."""
    block = result["settings"]["block_size"]
    points, evaluating = [], 0.0
    for entry in result["log_history"]:
        if "eval_loss" not in entry:
            continue
        evaluating += entry["eval_runtime"]
        tokens = entry["num_input_tokens_seen"]
        seconds = entry["seconds"] - evaluating
        points.append(Point(tokens // block, tokens, entry["step"], seconds, entry["eval_loss"]))
    return points


def table(folder: Path, sequences: int) -> str:
    """Validation loss after every quarter of the run, beside updates and seconds; runs not made yet are left out."""
    rows = []
    for run in RUNS:
        path = folder / f"{run.name}.json"
        if not path.is_file():
            continue
        points = curve(read_json(path))
        for quarter in range(1, 5):
            # Updates do not end exactly at a quarter: the nearest evaluation.
            limit = sequences * quarter / 4
            point = points[-1] if quarter == 4 else min(points, key=lambda p: abs(p.sequences - limit))
            rows.append(
                [
                    run.title if quarter == 1 else "",
                    f"{point.sequences:,}",
                    f"{point.tokens:,}",
                    f"{point.updates:,}",
                    f"{point.seconds:,.0f}",
                    f"{point.loss:.4f}",
                ]
            )
    return markdown_table(["", "sequences", "tokens", "updates", "seconds", "validation loss"], rows)
