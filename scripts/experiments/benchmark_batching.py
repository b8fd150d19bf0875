"""What merging micro-batches gains, and what the Trainer costs beside a hand-written loop.

    python scripts/experiments/benchmark_batching.py --output docs/results/batching/cpu.jsonl

All sides of a comparison run interleaved in this process; medians and their ratios are printed (for the overhead the
median over all updates, logging left out on both sides). Every measurement is written to --output, one JSON line each,
the first line being command, machine and versions.
--help lists all flags.
"""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import statistics
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from benchmark_step import now
from hf_elra import ELRA, ElraTrainer, ElraTrainingArguments
from hf_elra.recipes import babyllama
from hf_elra.recipes.babyllama import PRESETS, collate
from hf_elra.report.environment import environment
from hf_elra.report.table import markdown_table


def parse(words: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="file for the measurements, one JSON line each")
    parser.add_argument("--preset", choices=list(PRESETS), default="tiny", help="size of the Llama")
    parser.add_argument("--micro_batches", type=int, nargs="+", default=[2, 16], help="samples of a micro-batch")
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 32, 64, 128, 256, 512], help="samples an update")
    parser.add_argument(
        "--passes", type=int, nargs="+", default=[32, 512], help="largest merged passes, in samples, that are compared"
    )
    parser.add_argument("--rounds", type=int, default=3, help="how often every case is measured")
    parser.add_argument("--overhead_batch", type=int, default=4, help="samples an update in the overhead measurement")
    parser.add_argument("--overhead_updates", type=int, default=40, help="updates a round there")
    parser.add_argument("--overhead_rounds", type=int, default=20, help="rounds there")
    parser.add_argument("--only", choices=["overhead", "merging"], help="leave the other measurement out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(words)


def build_model(preset: str) -> LlamaForCausalLM:
    """An untrained Llama of the preset's size."""
    torch.manual_seed(0)
    recipe, _ = babyllama.parse_arguments(["--preset", preset])
    return babyllama.build_model(recipe)


def random_rows(preset: str, number: int) -> list[dict[str, list[int]]]:
    """Random tokens: only the speed is measured."""
    size = PRESETS[preset]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, size["vocab_size"], (number, size["block_size"]), generator=generator)
    return [{"input_ids": row} for row in tokens.tolist()]


class Stopwatch(TrainerCallback):
    """Notes the time at the end of every update."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: D102
        self.times.append(now(args.device.type))

    @property
    def seconds(self) -> list[float]:
        """Duration of all updates but the first, which warms up."""
        return [end - start for start, end in pairwise(self.times)]


def with_trainer(
    kind: Any, arguments_kind: Any, model: Any, rows: Any, updates: int, folder: str, **given: Any
) -> list[float]:
    """Train for some updates; return the seconds of each."""
    stopwatch = Stopwatch()
    arguments = arguments_kind(
        folder,
        max_steps=updates,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        **given,
    )
    trainer = kind(model, arguments, train_dataset=rows, data_collator=collate, callbacks=[stopwatch])
    trainer.pop_callback(transformers.PrinterCallback)
    trainer.train()
    return stopwatch.seconds


def by_hand(
    model: Any, rows: Any, updates: int, batch: int, optimizer: torch.optim.Optimizer, device: str
) -> list[float]:
    """The same updates in a plain loop; return the seconds of each."""
    loader = DataLoader(rows, batch_size=batch, shuffle=True, collate_fn=collate)  # type: ignore[arg-type]
    model.train()
    times = []
    for inputs, _ in zip(loader, range(updates), strict=False):
        loss = model(**{key: value.to(device) for key, value in inputs.items()}).loss
        loss.backward()
        if isinstance(optimizer, ELRA):
            optimizer.step(loss=loss.detach())
        else:
            optimizer.step()
        optimizer.zero_grad()
        times.append(now(device))
    return [end - start for start, end in pairwise(times)]


def measure_merging(given: argparse.Namespace, write: Any, folder: str) -> str:
    """Samples per second, accumulated and merged."""
    model = build_model(given.preset).to(given.device)
    seconds: dict[tuple[int, int, int], list[float]] = {}
    cases = [(micro, batch) for micro in given.micro_batches for batch in given.batches if batch % micro == 0]
    for number in range(given.rounds):
        for micro, batch in cases:
            updates = 1 + max(1, 64 // batch)
            rows = random_rows(given.preset, batch * updates)
            for limit in (micro, *given.passes):
                print(f"round {number + 1}/{given.rounds}: batch {batch} in passes of {limit}", file=sys.stderr)
                measured = with_trainer(
                    ElraTrainer,
                    ElraTrainingArguments,
                    model,
                    rows,
                    updates,
                    folder,
                    per_device_train_batch_size=micro,
                    elra_batch_control="elra",
                    elra_initial_accumulation=batch // micro,
                    elra_max_micro_batch=None if limit == micro else str(limit),
                )
                seconds.setdefault((micro, batch, limit), []).extend(measured)
                write(kind="merging", micro_batch=micro, batch=batch, largest_pass=limit, seconds=measured)
    table = []
    for micro, batch in cases:
        apart, *together = (statistics.median(seconds[micro, batch, limit]) for limit in (micro, *given.passes))
        merged = [f"{batch / value:.1f} ({apart / value:.2f})" for value in together]
        table.append([str(micro), str(batch), f"{batch / apart:.1f}", *merged])
    limits = [f"passes of up to {limit} (ratio)" for limit in given.passes]
    return markdown_table(["micro-batch", "batch", "accumulated, samples/s", *limits], table)


def measure_overhead(given: argparse.Namespace, write: Any, folder: str) -> str:
    """Seconds per update: by hand, stock Trainer, ElraTrainer."""
    model = build_model(given.preset).to(given.device)
    batch, updates = given.overhead_batch, given.overhead_updates
    rows = random_rows(given.preset, batch * updates)
    stock = dict(per_device_train_batch_size=batch, optim="adamw_torch", max_grad_norm=0.0)
    ours = dict(per_device_train_batch_size=batch)
    cases: dict[str, Any] = {
        "AdamW by hand": lambda: by_hand(
            model, rows, updates, batch, torch.optim.AdamW(model.parameters(), 1e-4), given.device
        ),
        "AdamW, stock Trainer": lambda: with_trainer(Trainer, TrainingArguments, model, rows, updates, folder, **stock),
        "AdamW, ElraTrainer, dynamic batch": lambda: with_trainer(
            ElraTrainer, ElraTrainingArguments, model, rows, updates, folder, elra_batch_control="elra", **stock
        ),
        "ELRA by hand": lambda: by_hand(
            model, rows, updates, batch, ELRA(model.parameters(), min_step_norm=0.1), given.device
        ),
        "ELRA, ElraTrainer, dynamic batch": lambda: with_trainer(
            ElraTrainer, ElraTrainingArguments, model, rows, updates, folder, **ours
        ),
    }
    start = {name: value.clone() for name, value in model.state_dict().items()}
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(given.overhead_rounds):
        for name in list(cases) if number % 2 == 0 else list(cases)[::-1]:
            print(f"round {number + 1}/{given.overhead_rounds}: {name}", file=sys.stderr)
            model.load_state_dict(start)
            measured = cases[name]()
            seconds[name] += measured
            write(kind="overhead", case=name, batch=batch, seconds=[round(value, 6) for value in measured])
    table = []
    for name, measured in seconds.items():
        hand = statistics.median(seconds["ELRA by hand" if name.startswith("ELRA") else "AdamW by hand"])
        median = statistics.median(measured)
        table.append([name, f"{1000 * median:.1f}", f"{median / hand:.3f}"])
    return markdown_table(["", "ms an update", "ratio to the loop by hand"], table)


def main(words: list[str]) -> int:
    """Measure, write, print."""
    given = parse(words)
    logging.disable(logging.WARNING)
    path = Path(given.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file, tempfile.TemporaryDirectory() as folder:

        def write(**entry: Any) -> None:
            print(json.dumps(entry), file=file, flush=True)

        write(command=shlex.join(["python", *sys.argv]), **environment(given.device))
        if given.only != "merging":
            print(f"{measure_overhead(given, write, folder)}\n")
        if given.only != "overhead":
            print(measure_merging(given, write, folder))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
