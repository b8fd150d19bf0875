"""Seconds and state of the tasks of ``no_rate.py``: a whole update with elra_spectral and with its partners, in turns.

    python scripts/experiments/no_rate_cost.py --output docs/results/no_rate/cost.jsonl --bundle gpu-bundle/rate \\
        --data data

An update is forward, backward and step, of ours with the weighted mean too. Every row trains a model of its own; in
each round every one of them makes some updates, one row after another. Every measurement is one line. Printed are the
ratio of medians to AdamW's, and the bytes of state for every parameter that is trained.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_elra.optim.averaging import WeightAverage
from hf_elra.report.environment import environment
from hf_elra.report.table import markdown_table
from lib.partners import PARTNERS, Training, bytes_of
from no_rate import MODELS, TASKS, Data, add_folders, order, our_optimizer, trained_llama

SHOWN = (
    "scratch, batch 16", "scratch, batch 64", "width 256", "sst2, LoRA", "T5", "ViT", "ResNet-20", "LSTM",
    "MiniLM, 4,000 sentences, batch 16",
)  # fmt: skip
OURS, BASE = "elra_spectral", "AdamW, cosine"
MANY = 100_000
"""Updates of a schedule that hardly changes over a measurement."""

Step = Callable[[Tensor], None]


def of_ours(task: Any) -> tuple[Any, Step, Callable[[], int]]:
    """Return a model, what makes an update of it from a loss, and what counts the bytes of state."""
    model = task.model(0)
    optimizer, average = our_optimizer(task, model), WeightAverage(model, power=8)

    def step(loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(loss=loss.detach())
        average.add()

    return model, step, lambda: bytes_of(optimizer.state) + bytes_of(average.mean)


def of_partner(name: str, task: Any) -> tuple[Any, Step, Callable[[], int]]:
    """As :func:`of_ours`."""
    model = task.model(0)
    training = Training(PARTNERS[name], model, 1e-4, MANY)
    return model, training.step, training.state_bytes


def measure(given: argparse.Namespace, name: str, data: Data, start: Path) -> None:
    """Measure all rows of a task in turns, and write lines."""
    trained = TASKS[name]
    task = MODELS[trained.model](trained, given, data, start)
    made = {OURS: of_ours, **{row: partial(of_partner, row) for row in PARTNERS if "constant" not in row}}
    rows = {row: make(task) for row, make in made.items() if row in given.rows}
    for number in range(given.rounds + 1):  # the first one warms up
        batches = order(task.size, trained.batch, given.updates, number).to(task.device)
        for row, (model, step, state) in rows.items():
            gc.collect()
            begins = time.perf_counter()
            for batch in batches:
                step(task.losses(model, batch).mean())
            seconds = (time.perf_counter() - begins) / len(batches)
            params = sum(p.numel() for p in model.parameters() if p.requires_grad)
            line = {"task": name, "row": row, "round": number, "seconds": seconds, "parameters": params}
            line |= {"state_bytes": state(), **environment("cpu")}
            if number:
                with given.output.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
        print(f"{name}: round {number} of {given.rounds}", flush=True)


def table(lines: list[dict[str, Any]]) -> str:
    """Return a table: of every task and row the ratio to AdamW's seconds, and bytes of state a parameter."""
    rows, tasks = (dict.fromkeys(line[key] for line in lines) for key in ("row", "task"))
    found = []
    for task in tasks:
        of_task = {row: [line for line in lines if (line["task"], line["row"]) == (task, row)] for row in rows}
        medians = {row: statistics.median(line["seconds"] for line in runs) for row, runs in of_task.items() if runs}
        kept = {row: runs[-1]["state_bytes"] / runs[-1]["parameters"] for row, runs in of_task.items() if runs}
        cells = [f"{medians[row] / medians[BASE]:.2f}, {kept[row]:.1f}" if row in kept else "–" for row in rows]
        found.append([task, f"{1000 * medians[BASE]:.0f}", *cells])
    return markdown_table(["task", f"{BASE}: ms an update", *rows], found)


def main(words: list[str]) -> int:
    """Measure, and print what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_folders(parser)
    rows = [OURS, *(row for row in PARTNERS if "constant" not in row)]
    parser.add_argument("--only", nargs="+", choices=TASKS, default=list(SHOWN))
    parser.add_argument("--rows", nargs="+", choices=rows, default=rows)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=5, help="of each row in a round")
    parser.add_argument("--print", action="store_true", help="only the table of what is there")
    given = parser.parse_args(words)
    given.device = "cpu"
    if not given.print:
        if BASE not in given.rows:
            parser.error(f'--rows must have "{BASE}", which the others are compared with')
        torch.set_num_threads(1)
        given.output.parent.mkdir(parents=True, exist_ok=True)
        data = Data(given)
        start = trained_llama(given, data)
        for name in given.only:
            measure(given, name, data, start)
    print(table([json.loads(line) for line in given.output.read_text("utf-8").splitlines()]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
