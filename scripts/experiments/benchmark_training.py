"""Training speed end to end: tokens per second of a BabyLlama with ELRA and with AdamW, in the same Trainer.

    python scripts/experiments/benchmark_training.py --output docs/results/training_speed/cpu.jsonl

Updates have the same batch on all sides, which run in turns in this process; medians over all updates and their ratios
to fused AdamW are printed. Tokens are random: only the speed is measured. Every measurement is written to --output, one
JSON line each, the first line being command, machine and versions. --help lists all flags.
"""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmark_batching import build_model, random_rows, with_trainer
from hf_elra import ElraTrainer, ElraTrainingArguments
from hf_elra.recipes.babyllama import PRESETS
from hf_elra.report.environment import environment
from hf_elra.report.table import markdown_table

BASELINE = "AdamW, fused"
SIDES: dict[str, dict[str, Any]] = {
    "ELRA": {"optim": "elra"},
    "ELRA, memory=point": {"optim": "elra", "optim_args": "memory=point"},
    "ELRA, memory=offload": {"optim": "elra", "optim_args": "memory=offload"},
    "elra_spectral": {"optim": "elra_spectral", "optim_args": "warmup=0"},
    "elra_spectral, no mean of the run": {
        "optim": "elra_spectral",
        "optim_args": "warmup=0",
        "elra_boost_mean": "off",
    },
    BASELINE: {"optim": "adamw_torch_fused", "max_grad_norm": 0.0},
    "AdamW, fused, gradients clipped": {"optim": "adamw_torch_fused", "max_grad_norm": 1.0},
}


def parse(words: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="file for the measurements, one JSON line each")
    parser.add_argument("--preset", choices=list(PRESETS), default="15m", help="size of the Llama")
    parser.add_argument("--batches", type=int, nargs="+", default=[4], help="samples an update")
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), help="default: all; AdamW, fused, always")
    parser.add_argument("--rounds", type=int, default=3, help="how often every side is measured")
    parser.add_argument("--updates", type=int, default=8, help="updates a round, beside a first one that warms up")
    given = parser.parse_args(words)
    for name in ("rounds", "updates"):
        if getattr(given, name) < 1:
            parser.error(f"--{name} {getattr(given, name)} must be at least 1")
    return given


def measure(given: argparse.Namespace, write: Any, folder: str) -> list[list[str]]:
    """The rows of the table."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_model(given.preset).to(device)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    tokens = PRESETS[given.preset]["block_size"]
    table = []
    for batch in given.batches:
        rows = random_rows(given.preset, batch * (given.updates + 1))
        sides = [name for name in SIDES if not given.sides or name in (BASELINE, *given.sides)]
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(given.rounds):
            for name in sides if number % 2 == 0 else sides[::-1]:
                print(f"batch {batch}, round {number + 1}/{given.rounds}: {name}", file=sys.stderr)
                model.load_state_dict(start)
                measured = with_trainer(
                    ElraTrainer, ElraTrainingArguments, model, rows, given.updates + 1, folder,
                    per_device_train_batch_size=batch, elra_batch_control="off", **SIDES[name],
                )  # fmt: skip
                seconds[name] += measured
                write(batch=batch, case=name, seconds=[round(value, 6) for value in measured])
        baseline = statistics.median(seconds[BASELINE])
        for name, measured in seconds.items():
            median = statistics.median(measured)
            table.append(
                [
                    str(batch),
                    name,
                    f"{1000 * median:.1f}",
                    f"{batch * tokens / median:,.0f}",
                    f"{baseline / median:.3f}",
                ]
            )
    return table


def main(words: list[str]) -> int:
    """Measure, write, print."""
    given = parse(words)
    transformers.logging.set_verbosity_error()
    logging.getLogger("hf_elra").setLevel(logging.ERROR)
    path = Path(given.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file, tempfile.TemporaryDirectory() as folder:

        def write(**entry: Any) -> None:
            print(json.dumps(entry), file=file, flush=True)

        device = "cuda" if torch.cuda.is_available() else "cpu"
        write(command=shlex.join(["python", *sys.argv]), **environment(device), preset=given.preset, seed=0)
        rows = measure(given, write, folder)
    header = ["batch", "optimizer", "ms an update", "tokens/s", f"speed, ratio to {BASELINE}"]
    print(markdown_table(header, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
