"""Every method at its defaults on one problem after another, with costs that are counted: the one table.

    python scripts/experiments/compare.py --output docs/results/compare/digits.jsonl --problems digits
    python scripts/experiments/compare.py --output docs/results/compare/two_d.jsonl --problems two_d
    python scripts/experiments/compare.py --table docs/results/compare/*.jsonl

A run is one method on one problem from one seed, at its default rate and at α_0 of 1e-4, 1e-2 and 1. It ends with the
samples of the problem's budget. Batches stay as they are: only optimizers are compared. Counted are forward passes
(those along a line too), backward passes and samples; a forward-equivalent is a forward pass of one batch, and a
backward pass counts two. Every run is a JSON line; the first line is command, machine and versions. Runs that are in
the file already are left out, so that an interrupted comparison goes on. Methods whose package is missing are left out,
and named. ``two_d`` are the problems of ELRA's section 4.1, without noise: counted are updates until the loss is below
the problem's value, at most 500; a seed moves the start by 1e-3.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_elra.optim import LABPALNSGD, LABPALSGD
from hf_elra.optim.snapshot import nothing_changes
from hf_elra.recipes.image_data import load_images
from hf_elra.report.environment import environment
from hf_elra.report.table import markdown_table
from lib import problems_2d
from lib.methods import METHODS
from lib.small_networks import Pictures, ShortSentences

RATES = (None, 1e-4, 1e-2, 1.0)
LABPAL_SAMPLES = 1280
CIFAR_IMAGES = 2000, 1000


@dataclass(frozen=True)
class Problem:
    """Images to classify, text to go on with by a small Llama, or sentences to classify by an encoder.

    Attributes:
        source: of ``load_images``, or a text file; nothing where it is the bundle of ``rate_scan_bundle.py``.
        hidden: units of the hidden layer; 0 where the network has a size of its own.
        batch: samples of an update.
        epochs: the budget.
        target: accuracy whose samples are counted.
        looks: at the test data, in an epoch.
    """

    source: str
    hidden: int
    batch: int
    epochs: int
    target: float
    looks: int = 4


PROBLEMS = {
    "digits": Problem("digits", 32, 32, 15, 0.88),
    "mnist": Problem("mnist", 100, 128, 2, 0.95),
    "mnist_10": Problem("mnist", 10, 64, 20, 0.93),
    "fashion_mnist": Problem("fashion_mnist", 100, 128, 2, 0.83),
    "cifar": Problem("cifar10/cifar10_jpeg.npz", 0, 32, 4, 0.35, 1),
    "encoder": Problem("", 0, 16, 2, 0.75, 2),
    "llama": Problem("tinyshakespeare/input.txt", 64, 16, 1, 0.3),
}


@dataclass
class Costs:
    """Of a run so far."""

    forwards: int = 0
    backwards: int = 0
    samples: int = 0
    seconds: float = 0.0

    @property
    def forward_equivalents(self) -> int:
        """A backward pass counts two."""
        return self.forwards + 2 * self.backwards


@dataclass
class Images:
    """Images as vectors, on the CPU."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @classmethod
    def load(cls, source: str) -> Images:
        """Load and normalise."""
        splits = load_images(source)
        parts = []
        for images in (splits.train, splits.test):
            batch = images.__getitems__(range(len(images)))  # type: ignore[arg-type]
            parts += [batch["pixel_values"].flatten(1), batch["labels"]]
        return cls(*parts)

    def __len__(self) -> int:
        return len(self.images)

    def network(self, hidden: int) -> nn.Module:
        """One hidden layer."""
        return nn.Sequential(nn.Linear(self.images.shape[1], hidden), nn.ReLU(), nn.Linear(hidden, 10))

    def loss(self, model: nn.Module, rows: Tensor) -> Tensor:
        """The mean over these rows."""
        return nn.functional.cross_entropy(model(self.images[rows]), self.labels[rows])

    def test(self, model: nn.Module) -> tuple[float, float]:
        """Loss and accuracy on the test images."""
        scores = model(self.test_images)
        loss = nn.functional.cross_entropy(scores, self.test_labels).item()
        return loss, (scores.argmax(1) == self.test_labels).double().mean().item()


@dataclass
class Text:
    """Rows of characters of a text; the last ones are for testing."""

    rows: Tensor
    test_rows: Tensor
    characters: int

    LENGTH, ROWS, TEST_ROWS = 64, 4800, 400

    @classmethod
    def load(cls, source: str) -> Text:
        """As many rows as are wanted."""
        text = Path(source).read_text()
        known = {character: number for number, character in enumerate(sorted(set(text)))}
        numbers = torch.tensor([known[character] for character in text])
        rows = numbers[: len(numbers) // cls.LENGTH * cls.LENGTH].view(-1, cls.LENGTH)
        return cls(rows[: cls.ROWS], rows[-cls.TEST_ROWS :], len(known))

    def __len__(self) -> int:
        return len(self.rows)

    def network(self, hidden: int) -> nn.Module:
        """Two layers."""
        from transformers import LlamaConfig, LlamaForCausalLM

        return LlamaForCausalLM(LlamaConfig(
            vocab_size=self.characters, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=self.LENGTH, tie_word_embeddings=True,
        ))  # fmt: skip

    def loss(self, model: nn.Module, rows: Tensor) -> Tensor:
        """The mean over the characters of these rows."""
        loss: Tensor = model(input_ids=self.rows[rows], labels=self.rows[rows]).loss
        return loss

    def test(self, model: nn.Module) -> tuple[float, float]:
        """Loss, and the share of characters that are foreseen."""
        told = model(input_ids=self.test_rows, labels=self.test_rows)
        return told.loss.item(), (told.logits[:, :-1].argmax(-1) == self.test_rows[:, 1:]).double().mean().item()


def batches(number: int, size: int, seed: int) -> Iterator[Tensor]:
    """Rows of one whole batch after another, epoch after epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from (rows for rows in torch.randperm(number, generator=generator).split(size) if len(rows) == size)


class LookAhead:
    """Batches that can be looked at before they are taken."""

    def __init__(self, source: Iterator[Tensor]) -> None:
        self.source, self.waiting = source, list[Tensor]()

    def take(self) -> Tensor:
        """The next batch."""
        return self.waiting.pop(0) if self.waiting else next(self.source)

    def peek(self, number: int) -> list[Tensor]:
        """The next batches, which stay there."""
        self.waiting += [next(self.source) for _ in range(number - len(self.waiting))]
        return self.waiting[:number]


def run(problem: Problem, data: Any, method: str, rate: float | None, seed: int) -> dict[str, Any]:
    """Train once; return what was measured."""
    torch.manual_seed(seed)
    model = data.network(problem.hidden)
    return train(problem, data, model, METHODS[method].make(model, problem.batch, rate), seed)


def train(
    problem: Problem, data: Any, model: nn.Module, optimizer: Any, seed: int, looks: int | None = None
) -> dict[str, Any]:
    """Train a model to the end of a problem's budget; return what was measured, at its looks or so many per epoch."""
    per_epoch = len(data) // problem.batch
    optimizer.updates_per_epoch, optimizer.samples_per_update = per_epoch, problem.batch
    rows, costs, curve = LookAhead(batches(len(data), problem.batch, seed)), Costs(), []
    look_every, failed = max(1, per_epoch // (looks or problem.looks)), None

    def loss_of(rows: Tensor) -> Tensor:
        costs.forwards += 1
        return data.loss(model, rows)

    for update in range(1, problem.epochs * per_epoch + 1):
        start, now = time.perf_counter(), rows.take()
        optimizer.zero_grad()
        loss = loss_of(now)
        loss.backward()
        costs.backwards += 1
        costs.samples += problem.batch
        try:
            step(optimizer, loss, evaluation(optimizer, model, loss_of, now, rows, problem.batch))
        except (RuntimeError, ValueError, ArithmeticError) as error:
            failed = f"{type(error).__name__}: {error}"[:200]
        if hasattr(optimizer, "end_cycle") and update % per_epoch == 0:
            optimizer.end_cycle()
        costs.seconds += time.perf_counter() - start
        if failed or update % look_every == 0:
            curve.append([costs.samples, costs.forward_equivalents, *looked_at(model, optimizer, data)])
        if failed or not math.isfinite(curve[-1][2] if curve else 0.0):
            break
    try:
        metrics = optimizer.metrics if hasattr(optimizer, "observe_loss") else {}
    except RuntimeError as error:  # nothing was finite for long: an error where it is read
        metrics, failed = {}, failed or f"{type(error).__name__}: {error}"[:200]
    reached = next((row for row in curve if row[3] >= problem.target), None)
    return {
        "loss": curve[-1][2], "accuracy": 0.0 if failed else curve[-1][3],
        "best_accuracy": max(row[3] for row in curve), "samples_to_target": reached and reached[0],
        "forward_equivalents_to_target": reached and reached[1], "updates": costs.backwards,
        "forwards": costs.forwards, "backwards": costs.backwards, "samples": costs.samples,
        "seconds": round(costs.seconds, 3), "restarts": metrics.get("restarts"), "alpha": metrics.get("alpha"),
        "failed": failed, "curve": [[a, b, round(c, 5), round(d, 5)] for a, b, c, d in curve],
    }  # fmt: skip


def evaluation(
    optimizer: Any, model: nn.Module, loss_of: Callable[[Tensor], Tensor], now: Tensor, rows: LookAhead, batch: int
) -> Callable[[], float] | None:
    """What tells the loss along the line: of this batch, or for LABPAL of those to come."""
    if not getattr(optimizer, "needs_line_loss", False):
        return None

    def along_a_line(lot: Tensor) -> float:
        with nothing_changes(model):  # the averages of BatchNorm
            return loss_of(lot).item()

    if isinstance(optimizer, (LABPALSGD, LABPALNSGD)):
        number = math.ceil(LABPAL_SAMPLES / batch)
        return lambda: statistics.fmean(along_a_line(lot) for lot in rows.peek(number))
    return lambda: along_a_line(now)


def step(optimizer: Any, loss: Tensor, evaluate: Callable[[], float] | None) -> None:
    """Tell the optimizer what it wants to know."""
    if hasattr(optimizer, "observe_loss"):
        optimizer.step(loss=loss.detach(), **({} if evaluate is None else {"evaluate": evaluate}))
    elif type(optimizer).__name__ == "ElraOptimizer":
        optimizer.step(loss.item())
    else:
        if hasattr(optimizer, "train"):
            optimizer.train()
        optimizer.step()


def looked_at(model: nn.Module, optimizer: Any, data: Any) -> tuple[float, float]:
    """Loss and accuracy of the test rows; of schedule-free optimizers at their averages."""
    switches = hasattr(optimizer, "eval") and hasattr(optimizer, "train")
    if switches:
        optimizer.eval()
    with torch.no_grad():
        found = data.test(model)
    if switches:
        optimizer.train()
    return found


# ---- without noise ----

TWO_D = "two_d"
MOST_UPDATES = 500


class Point(nn.Module):
    """A point in the plane, as a model."""

    def __init__(self, start: tuple[float, float], seed: int) -> None:
        super().__init__()
        moved = 1e-3 * torch.randn(2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        self.x = nn.Parameter(torch.tensor(start, dtype=torch.float64) + (moved if seed else 0))


def walk(problem: problems_2d.Problem, method: str, rate: float | None, seed: int) -> dict[str, Any]:
    """Walk until the loss is below the problem's value."""
    model = Point(problem.start, seed)
    optimizer, costs = METHODS[method].make(model, 1, rate), Costs()
    optimizer.updates_per_epoch = optimizer.samples_per_update = 1
    failed, reached = None, None

    def loss_of() -> Tensor:
        costs.forwards += 1
        return problem.function(model.x)

    for update in range(MOST_UPDATES):
        optimizer.zero_grad()
        loss = loss_of()
        if loss.item() < problem.below:
            reached = update
            break
        loss.backward()
        costs.backwards += 1
        looks = getattr(optimizer, "needs_line_loss", False)
        try:
            step(optimizer, loss, (lambda: loss_of().item()) if looks else None)
        except (RuntimeError, ValueError, ArithmeticError) as error:
            failed = f"{type(error).__name__}: {error}"[:200]
            break
        if not model.x.isfinite().all():
            failed = "not finite"
            break
    return {"updates": reached, "forwards": costs.forwards, "backwards": costs.backwards, "failed": failed}


# ---- the comparison ----


def compare(given: argparse.Namespace) -> None:
    """Make all runs that are not in the file yet."""
    torch.set_num_threads(1)
    output = Path(given.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []
    done = {(line["problem"], line["method"], line["rate"], line["seed"]) for line in lines if "method" in line}
    missing: set[str] = set()
    with output.open("a") as file:
        if not lines:
            packages = ("lion-pytorch", "prodigyopt", "schedulefree", "elra")
            head = {"command": shlex.join(["python", *sys.argv]), **environment("cpu", *packages)}
            file.write(json.dumps(head) + "\n")
        for name in given.problems:
            makes = runs_of(name, given)
            for seed in range(given.seeds):
                for method in given.methods:
                    rates = given.rates if METHODS[method].has_rate else RATES[:1]
                    for rate in rates:
                        for which, make in makes.items():
                            if (which, method, rate, seed) in done or method in missing:
                                continue
                            try:
                                with contextlib.redirect_stdout(None):  # one of the peers talks
                                    result = make(method, rate, seed)
                            except ImportError:
                                missing.add(method)
                                print(f"left out: {method} (pip install {METHODS[method].package})", file=sys.stderr)
                                continue
                            line = {"problem": which, "method": method, "rate": rate, "seed": seed, **result}
                            file.write(json.dumps(line) + "\n")
                            file.flush()


def runs_of(name: str, given: argparse.Namespace) -> dict[str, Callable[[str, float | None, int], dict[str, Any]]]:
    """What makes a run on each problem that a name stands for."""
    if name == TWO_D:
        return {problem.name: functools.partial(walk, problem) for problem in problems_2d.PROBLEMS}
    problem = PROBLEMS[name]
    source = problem.source if name == "digits" else str(Path(given.data) / problem.source)
    data: Any
    if name == "encoder":
        data = ShortSentences(Path(given.bundle))
    elif name == "cifar":
        data = Pictures(source, *CIFAR_IMAGES)
    else:
        data = Text.load(source) if name == "llama" else Images.load(source)
    return {name: functools.partial(run, problem, data)}


# ---- the table ----


def table(files: list[str]) -> str:
    """One row a method and problem, over the seeds."""
    lines = [json.loads(line) for file in files for line in Path(file).read_text().splitlines()]
    runs = [line for line in lines if "method" in line]
    texts = [table_2d(runs)] if any("samples" not in line for line in runs) else []
    runs = [line for line in runs if "samples" in line]
    for problem in dict.fromkeys(line["problem"] for line in runs):
        rows = []
        for method in METHODS:
            mine = [line for line in runs if (line["problem"], line["method"]) == (problem, method)]
            if mine:
                rows.append(row_of(method, mine))
        rows.sort(key=lambda row: -float(row[1].split()[0]))
        head = ["method", "accuracy at defaults", "worst over α_0", "samples to target", "forward-equivalents to it",
                "passes an update", "seeds"]  # fmt: skip
        target = PROBLEMS[problem].target
        texts.append(f"## {problem}, target {target:.0%}\n\n{markdown_table(head, rows)}")
    return "\n\n".join(texts)


def table_2d(runs: list[dict[str, Any]]) -> str:
    """Median updates of the problems without noise, at defaults."""
    names = [problem.name for problem in problems_2d.PROBLEMS]
    rows = []
    for method in METHODS:
        row = [f"`{method}`"]
        for name in names:
            mine = [run for run in runs if (run["problem"], run["method"], run["rate"]) == (name, method, None)]
            counts = [math.inf if run["updates"] is None else run["updates"] for run in mine]
            median = statistics.median(counts) if counts else math.nan
            row.append(f"{median:.0f}" if math.isfinite(median) else "" if math.isnan(median) else "none")
        rows.append(row)
    return f"## without noise, updates (median over seeds)\n\n{markdown_table(['method', *names], rows)}"


def row_of(method: str, runs: list[dict[str, Any]]) -> list[str]:
    """What the table says of a method."""
    default = [run for run in runs if run["rate"] is None]
    swept = [run for run in runs if run["rate"] is not None]
    accuracies = [100 * run["accuracy"] for run in default]
    spread = f" ± {statistics.stdev(accuracies):.1f}" if len(accuracies) > 1 else ""
    by_rate = {
        rate: statistics.fmean(100 * run["accuracy"] for run in swept if run["rate"] == rate)
        for rate in {run["rate"] for run in swept}
    }
    worst = f"{min(by_rate.values()):.1f}" if by_rate else "" if METHODS[method].has_rate else "no α_0"
    reached = [run for run in default if run["samples_to_target"] is not None]
    all_reached = len(reached) == len(default)
    samples = f"{statistics.median(run['samples_to_target'] for run in reached):,.0f}" if all_reached else "not by all"
    costs = f"{statistics.median(run['forward_equivalents_to_target'] for run in reached):,.0f}" if all_reached else ""
    per_update = statistics.fmean((run["forwards"] + 2 * run["backwards"]) / run["updates"] for run in default)
    return [f"`{method}`", f"{statistics.fmean(accuracies):.1f}{spread}", worst, samples, costs, f"{per_update:.1f}",
            str(len(default))]  # fmt: skip


def _rate(text: str) -> float | None:
    return None if text == "none" else float(text)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="file for the runs, one JSON line each")
    parser.add_argument("--table", nargs="+", help="print the table of these files instead")
    parser.add_argument("--problems", nargs="+", choices=[TWO_D, *PROBLEMS], default=[TWO_D, *PROBLEMS])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--rates", nargs="+", type=_rate, default=RATES, help="α_0; none for the default of each")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--data", default="data", help="folder with mnist/, fashion_mnist/ (idx files), cifar10/, tinyshakespeare/"
    )
    parser.add_argument("--bundle", default="gpu-bundle/rate", help="folder that rate_scan_bundle.py made: encoder")
    given = parser.parse_args()
    if given.table:
        print(table(given.table))
    elif given.output:
        if "encoder" in given.problems and not (Path(given.bundle) / "sst2.npz").exists():
            parser.error(
                f"--bundle {given.bundle} has no sst2.npz, which encoder needs: make it with rate_scan_bundle.py"
            )
        compare(given)
    else:
        parser.error("give --output or --table")


if __name__ == "__main__":
    main()
