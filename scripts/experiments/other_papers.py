"""Figures and tables of the papers behind NTLR and LABPAL, on networks that one core of a CPU can hold.

    python scripts/experiments/other_papers.py ntlr --data DIR --output docs/results/other_papers/ntlr.jsonl
    python scripts/experiments/other_papers.py --table docs/results/other_papers/ntlr.jsonl

``ntlr``: NTLR's figure 2, MNIST by 784-1000-10 from α_0 of 1e-1 to 1e-9, beside SGD. ``batches``: the same network with
batches of 64 to 512. ``hypergradients``: NTLR's table 1, hypergradients of K updates with every η of the paper; here on
MNIST by 784-100-10. ``translation``: its figure 5, NTLR over SGD and Adam; here two layers of width 64 on each side, on
4,000 captions of Multi30k. ``labpal``: LABPAL's figures 8, 10 and 11 (``--batches 128``, 32 and 8), ResNet-20 on
CIFAR-10, beside other line searches and SGD with a piecewise constant rate; here images have half the height and width.
Its steps are batches drawn: those that a measurement takes are spent. ``labpal_digits``: why ``labpal_sgd`` loses its
way on the digits.

DIR holds ``mnist/`` (idx files), ``cifar10/cifar10_jpeg.npz`` and ``multi30k/``. Every run is a JSON line, written at
once; the first line is command, machine and versions. Runs that are in the file already are left out.
"""

from __future__ import annotations

import argparse
import copy
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

from compare import PROBLEMS, Costs, Images, Problem, batches, train
from hf_elra.optim import OPTIMIZERS
from hf_elra.optim.snapshot import nothing_changes
from hf_elra.report.environment import environment
from hf_elra.report.table import markdown_table
from lib.small_networks import Captions, Pictures
from rate_scan import resnet20


@dataclass(frozen=True)
class Run:
    """One line of a result file.

    Attributes:
        experiment: whose run it is.
        method: name of an optimizer.
        settings: its arguments; what else differs between runs of a method.
        batch: samples of a batch.
        seed: of the network and of the order of samples.
    """

    experiment: str
    method: str
    settings: dict[str, Any]
    batch: int
    seed: int

    @property
    def key(self) -> dict[str, Any]:
        """What says which run it is."""
        return {"experiment": self.experiment, "method": self.method, "settings": self.settings, "batch": self.batch,
                "seed": self.seed}  # fmt: skip


# ---- NTLR: figure 2, batches, table 1 ----

DECADES = tuple(10.0**-i for i in range(1, 10))
OF_SGD = DECADES[:5]
"""From the others it goes nowhere, as it does from the last of these."""
OF_BATCHES = DECADES[:5:2]
BATCHES = (64, 128, 256, 512)
ETAS = tuple(10.0**-i for i in range(1, 6))
HIDDEN = {"ntlr": 1000, "batches": 1000, "hypergradients": 100}
MNIST_TARGET = 0.95


def ntlr_runs(seed: int, epochs: int) -> Iterator[Run]:
    """Figure 2, at a batch of 128."""
    for rate in DECADES:
        for method in ("ntlr_sgd", "sgd") if rate in OF_SGD else ("ntlr_sgd",):
            yield Run("ntlr", method, {"lr": rate, "epochs": epochs}, 128, seed)


def batch_runs(seed: int, epochs: int) -> Iterator[Run]:
    """All batches from three decades."""
    for batch in BATCHES:
        for rate in OF_BATCHES:
            for method in ("ntlr_sgd", "sgd"):
                yield Run("batches", method, {"lr": rate, "epochs": epochs}, batch, seed)


def hypergradient_runs(seed: int, epochs: int) -> Iterator[Run]:
    """Both forms with every η, and NTLR, all once in a fifth of an epoch."""
    kinds: list[tuple[str, dict[str, Any]]] = [("ntlr_sgd", {})]
    for formula in ("additive", "multiplicative"):
        kinds += [("hypergradient_sgd", {"formula": formula, "hyper_lr": eta, "every": None}) for eta in ETAS]
    for batch in (512, 128, 256, 64):
        for rate in DECADES[:3]:
            for method, more in kinds:
                yield Run("hypergradients", method, {"lr": rate, "epochs": epochs, **more}, batch, seed)


def mnist_run(run: Run, data: Images) -> dict[str, Any]:
    """Train a network with one hidden layer."""
    settings = dict(run.settings)
    problem = Problem("mnist", HIDDEN[run.experiment], run.batch, settings.pop("epochs"), MNIST_TARGET)
    torch.manual_seed(run.seed)
    model = data.network(problem.hidden)
    kind: Any = {**OPTIMIZERS, "sgd": torch.optim.SGD}[run.method]
    return train(problem, data, model, kind(model.parameters(), **settings), run.seed, looks=1)


# ---- LABPAL: figure 8 ----

BATCH, LOOKS = 128, 8
MEASURED, EVERY = 1280, 50
"""Samples of LABPAL's measurement."""
LABPAL = ("labpal_sgd", "labpal_nsgd")
SCHEDULE = ((0.75, 4), (0.5, 2), (0.0, 1))
"""From which share of training on LABPAL's updates have how many batches."""


def labpal_runs(seed: int, steps: int, batch: int) -> Iterator[Run]:
    """The methods of figure 8, and ``elra``. Training is short: LABPAL measures every 50 updates in place of 1,000, and
    at smaller batches less often, so that measurements take the same share of what is drawn."""
    for rate in (0.1, 0.01):
        yield Run("labpal", "sgd_piecewise", {"lr": rate, "momentum": 0.9, "steps": steps}, batch, seed)
    for method in LABPAL:
        yield Run("labpal", method, {"every": EVERY * BATCH // batch, "steps": steps}, batch, seed)
    for method in ("elra", "sls", "pal", "gols", "pls"):
        yield Run("labpal", method, {"steps": steps}, batch, seed)


def labpal_run(run: Run, data: Pictures) -> dict[str, Any]:
    """Train until so many batches were drawn."""
    settings = dict(run.settings)
    steps = settings.pop("steps")
    torch.manual_seed(run.seed)
    model = resnet20()
    piecewise, measures = run.method == "sgd_piecewise", run.method in LABPAL
    if piecewise:
        optimizer: Any = torch.optim.SGD(model.parameters(), **settings)
    else:
        optimizer = OPTIMIZERS[run.method](model.parameters(), **settings)
        optimizer.updates_per_epoch, optimizer.samples_per_update = len(data.labels) // run.batch, run.batch
    source, costs = batches(len(data.labels), run.batch, run.seed), Costs()
    curve: list[list[Any]] = []
    drawn = updates = 0
    failed, look_every, start = None, max(1, steps // LOOKS), time.perf_counter()

    def draw(number: int) -> list[Tensor]:
        nonlocal drawn
        drawn += number
        return [next(source) for _ in range(number)]

    def forward(rows: Tensor) -> Tensor:
        costs.forwards += 1
        return data.loss(model, rows)

    def along_the_line(lots: list[Tensor]) -> Callable[[], float]:
        def evaluate() -> float:
            with nothing_changes(model):  # the averages of BatchNorm
                return statistics.fmean(forward(rows).double().item() for rows in lots or measured())

        return evaluate

    held: list[Tensor] = []

    def measured() -> list[Tensor]:
        if not held:  # the same batches for all points of a measurement
            held.extend(draw(math.ceil(MEASURED / run.batch)))
        return held

    while drawn < steps and failed is None:
        share = drawn / steps
        lots = draw(next(k for begins, k in SCHEDULE if share >= begins) if measures else 1)
        if piecewise:
            optimizer.param_groups[0]["lr"] = settings["lr"] * (0.01 if share > 0.75 else 0.1 if share > 0.5 else 1)
        optimizer.zero_grad()
        loss = torch.zeros((), dtype=torch.float64)
        for rows in lots:
            part = forward(rows) / len(lots)
            part.backward()
            loss += part.detach()
            costs.backwards += 1
        more: dict[str, Any] = {} if piecewise else {"loss": loss}
        if getattr(optimizer, "needs_line_loss", False):
            more["evaluate"] = along_the_line([] if measures else lots)
        try:
            optimizer.step(**more)
        except (RuntimeError, ValueError, ArithmeticError) as error:
            failed = f"{type(error).__name__}: {error}"[:200]
        held.clear()
        updates += 1
        if drawn // look_every > len(curve) or drawn >= steps or failed:
            alpha = optimizer.param_groups[0]["lr"] if piecewise else optimizer.metrics.get("alpha")
            curve.append([drawn, loss.item(), *data.test(model), alpha])
            if not math.isfinite(curve[-1][1]):
                failed = "not finite"
    return {
        "train_loss": curve[-1][1], "loss": curve[-1][2], "accuracy": curve[-1][3],
        "best_accuracy": max(row[3] for row in curve), "batches": drawn, "updates": updates,
        "forwards": costs.forwards, "backwards": costs.backwards, "seconds": round(time.perf_counter() - start, 1),
        "failed": failed, "curve": [[row[0], *(round(x, 6) for x in row[1:])] for row in curve],
    }  # fmt: skip


# ---- LABPAL's one measurement ----

ON_DIGITS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("labpal_sgd", {}),
    ("labpal_sgd", {"every": 44}),
    ("labpal_sgd", {"adaptation": 1.0}),
    ("labpal_sgd", {"max_step": 0.1}),
    ("labpal_sgd", {"soft_restart": True}),
    ("labpal_nsgd", {}),
)
"""What could be wrong with ``labpal_sgd`` on the digits, one thing after another."""


def lowest_on_the_first_line(model: nn.Module, data: Images, rows: Tensor) -> float:
    """How far the loss of all samples falls along the first gradient, in float64: the length of that step, to 0.05."""
    model = copy.deepcopy(model).double()
    images = data.images.double()
    loss = nn.functional.cross_entropy(model(images[rows]), data.labels[rows])
    params: list[Tensor] = list(model.parameters())
    direction = torch.autograd.grad(loss, params)
    norm = torch.nn.utils.get_total_norm(list(direction)).item()
    losses = []
    with torch.no_grad():
        for _ in range(100):
            losses.append(nn.functional.cross_entropy(model(images), data.labels).item())
            torch._foreach_add_(params, list(direction), alpha=-0.05 / norm)
    return 0.05 * losses.index(min(losses))


def labpal_digits_run(run: Run, data: Images) -> dict[str, Any]:
    """Train as compare.py does; say how long the step of the last measurement was, and the weights at the start."""
    torch.manual_seed(run.seed)
    model = data.network(PROBLEMS["digits"].hidden)
    lowest = lowest_on_the_first_line(model, data, next(batches(len(data), run.batch, run.seed)))
    norm = torch.nn.utils.get_total_norm(list(model.parameters())).item()
    optimizer = OPTIMIZERS[run.method](model.parameters(), **run.settings)
    result = train(PROBLEMS["digits"], data, model, optimizer, run.seed)
    length = optimizer.param_groups[0]["scalars"]["rule"]["length"]
    return {**result, "length": length, "weights": norm, "lowest": round(lowest, 2)}


# ---- NTLR over SGD and Adam, in translation: figure 5 ----

TRANSLATED = {"sgd": (0.1, 1.0), "ntlr_sgd": (1e-3, 1.0), "adamw": (1e-3, 1e-2), "ntlr_adamw": (1e-5, 1e-3)}
"""Rates of each."""
WIDTH, TRANSLATED_BATCH = 64, 64


def translation_runs(seed: int, epochs: int) -> Iterator[Run]:
    """SGD and Adam at two rates, and NTLR over both from one that is far too small and from one that is not."""
    for method, rates in TRANSLATED.items():
        for rate in rates:
            yield Run("translation", method, {"lr": rate, "epochs": epochs}, TRANSLATED_BATCH, seed)


def translation_run(run: Run, data: Captions) -> dict[str, Any]:
    """Train a small Transformer."""
    problem = Problem("multi30k", WIDTH, run.batch, run.settings["epochs"], math.inf)
    torch.manual_seed(run.seed)
    model = data.network(WIDTH)
    kind: Any = {**OPTIMIZERS, "sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[run.method]
    return train(problem, data, model, kind(model.parameters(), lr=run.settings["lr"]), run.seed, looks=1)


# ---- runs ----


def make(runs: list[Run], one: Callable[[Run], dict[str, Any]], output: Path) -> None:
    """Make all runs that are not in the file yet, and say how far it is."""
    torch.set_num_threads(1)
    output.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []
    done = [{name: line.get(name) for name in ("experiment", "method", "settings", "batch", "seed")} for line in lines]
    with output.open("a") as file:
        if not lines:
            head = {"command": shlex.join(["python", *sys.argv]), **environment("cpu")}
            file.write(json.dumps(head) + "\n")
        for number, run in enumerate(runs, 1):
            if run.key in done:
                continue
            start = time.perf_counter()
            result = one(run)
            file.write(json.dumps({**run.key, **result}) + "\n")
            file.flush()
            print(f"{number} of {len(runs)}: {run.method} {run.settings} batch {run.batch} seed {run.seed}: "
                  f"{result['accuracy']:.1%}, {time.perf_counter() - start:.0f} s", flush=True)  # fmt: skip


# ---- tables ----


def table(file: Path) -> str:
    """The tables of a result file."""
    runs = [line for line in map(json.loads, file.read_text().splitlines()) if "method" in line]
    tables = {
        "ntlr": ntlr_table, "batches": batch_table, "hypergradients": hypergradient_table, "labpal": labpal_table,
        "labpal_digits": labpal_digits_table, "translation": translation_table,
    }  # fmt: skip
    names = dict.fromkeys(run["experiment"] for run in runs)
    return "\n\n".join(tables[name]([run for run in runs if run["experiment"] == name]) for name in names)


def _of(runs: list[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    """Those whose entries, or settings, are these."""
    return [run for run in runs if all({**run, **run["settings"]}[name] == value for name, value in wanted.items())]


def _mean_and_spread(values: list[float], digits: int = 2) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def _ends(runs: list[dict[str, Any]]) -> tuple[str, str]:
    """Loss and accuracy."""
    if not runs:
        return "", ""
    losses, accuracies = [run["loss"] for run in runs], [100 * run["accuracy"] for run in runs]
    return " / ".join(f"{x:.3f}" for x in losses), " / ".join(f"{x:.1f}" for x in accuracies)


def ntlr_table(runs: list[dict[str, Any]]) -> str:
    """Figure 2 at its end."""
    rows = []
    for rate in DECADES:
        ends = [_ends(_of(runs, method=method, lr=rate)) for method in ("ntlr_sgd", "sgd")]
        rows.append([f"{rate:.0e}", *ends[0], *ends[1]])
    return markdown_table(["α_0", "`ntlr_sgd`: loss", "accuracy", "`sgd`: loss", "accuracy"], rows)


def batch_table(runs: list[dict[str, Any]]) -> str:
    """Loss over α_0, mean and deviation, and the lowest accuracy."""
    rows = []
    for batch in BATCHES:
        row = [str(batch)]
        for method in ("ntlr_sgd", "sgd"):
            if mine := _of(runs, method=method, batch=batch):
                lowest = min(100 * run["accuracy"] for run in mine)
                row += [_mean_and_spread([run["loss"] for run in mine], 3), f"{lowest:.1f}"]
        rows.append(row + [""] * (5 - len(row)))
    return markdown_table(["batch", "`ntlr_sgd`: loss", "lowest accuracy", "`sgd`: loss", "lowest accuracy"], rows)


def hypergradient_table(runs: list[dict[str, Any]]) -> str:
    """Table 1: loss over batches (and seeds), mean and deviation, for all η."""
    columns: list[tuple[str, dict[str, Any]]] = [("NTLR", {"method": "ntlr_sgd"})]
    for formula in ("additive", "multiplicative"):
        columns += [(f"{formula}, η = {eta:.0e}", {"formula": formula, "hyper_lr": eta}) for eta in ETAS]
    rows = []
    for name, wanted in columns:
        mine = [[run["loss"] for run in runs if all({**run, **run["settings"]}.get(k) == v for k, v in wanted.items())
                 and run["settings"]["lr"] == rate] for rate in DECADES[:3]]  # fmt: skip
        rows.append([name, *(_mean_and_spread(losses) if losses else "" for losses in mine)])
    return markdown_table(["", *(f"α_0 = {rate:.0e}" for rate in DECADES[:3])], rows)


def translation_table(runs: list[dict[str, Any]]) -> str:
    """Loss and words foreseen at the end, and how low the loss was."""
    rows = []
    for run in runs:
        lowest = min(row[2] for row in run["curve"])
        rows.append([f"`{run['method']}`", f"{run['settings']['lr']:.0e}", f"{run['loss']:.3f}", f"{lowest:.3f}",
                     f"{100 * run['accuracy']:.1f}", f"{run['alpha']:.2g}" if run["alpha"] else ""])  # fmt: skip
    return markdown_table(["method", "α_0", "loss", "lowest", "words foreseen", "last α"], rows)


def labpal_digits_table(runs: list[dict[str, Any]]) -> str:
    """Accuracy of every seed."""
    rows = []
    for method, settings in ON_DIGITS:
        mine = [run for run in runs if (run["method"], run["settings"]) == (method, settings)]
        more = ", ".join(f"{name}={value}" for name, value in settings.items())
        rows.append([f"`{method}`" + (f" ({more})" if more else ""), *(
            " / ".join(form.format(x) for x in values) for form, values in (
                ("{:.1f}", [100 * run["accuracy"] for run in mine]), ("{:.2f}", [run["length"] for run in mine]),
                ("{:.2g}", [run["alpha"] for run in mine]),
            )
        )])  # fmt: skip
    return markdown_table(["method", "accuracy", "length of the last measured step", "last α"], rows)


def labpal_table(runs: list[dict[str, Any]]) -> str:
    """Figures 8, 10 and 11 at their ends, batch after batch and length after length."""
    rows = []
    for run in sorted(runs, key=lambda run: (-run["batch"], run["settings"]["steps"], -run["accuracy"])):
        more = ", ".join(f"{name}={value}" for name, value in run["settings"].items() if name != "steps")
        rows.append([str(run["batch"]), f"`{run['method']}`" + (f" ({more})" if more else ""),
                     f"{run['train_loss']:.3f}", f"{100 * run['accuracy']:.1f}", str(run["batches"]),
                     str(run["updates"]),
                     f"{run['forwards'] + 2 * run['backwards']:,}", f"{run['curve'][-1][4]:.2g}",
                     run["failed"] or ""])  # fmt: skip
    head = ["batch", "method", "last training loss", "accuracy", "batches drawn", "updates", "forward-equivalents",
            "last α", ""]  # fmt: skip
    return markdown_table(head, rows)


EXPERIMENTS = ("ntlr", "batches", "hypergradients", "translation", "labpal", "labpal_digits")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", nargs="?", choices=EXPERIMENTS)
    parser.add_argument("--output", type=Path, help="file for the runs, one JSON line each")
    parser.add_argument("--table", type=Path, help="print the tables of this file instead")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with mnist/ and cifar10/")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, help="of ntlr (20), batches (5), hypergradients (3), translation (4)")
    parser.add_argument("--steps", type=int, default=312, help="of labpal, batches drawn (312 an epoch)")
    parser.add_argument("--batches", type=int, nargs="+", default=[BATCH], help=f"of labpal. Default: {BATCH}.")
    parser.add_argument("--methods", nargs="+", help="these alone")
    given = parser.parse_args()
    if given.table:
        print(table(given.table))
        return
    if not (given.experiment and given.output):
        parser.error("give an experiment and --output, or --table")
    runs: list[Run] = []
    for seed in given.seeds:
        if given.experiment == "ntlr":
            runs += ntlr_runs(seed, given.epochs or 20)
        elif given.experiment == "batches":
            runs += batch_runs(seed, given.epochs or 5)
        elif given.experiment == "hypergradients":
            runs += hypergradient_runs(seed, given.epochs or 3)
        elif given.experiment == "translation":
            runs += translation_runs(seed, given.epochs or 4)
        elif given.experiment == "labpal":
            for batch in given.batches:
                runs += labpal_runs(seed, given.steps, batch)
        else:
            runs += [
                Run("labpal_digits", method, settings, PROBLEMS["digits"].batch, seed) for method, settings in ON_DIGITS
            ]
    runs = [run for run in runs if given.methods is None or run.method in given.methods]
    if given.experiment == "labpal":
        pictures = Pictures(str(given.data / "cifar10" / "cifar10_jpeg.npz"))
        make(runs, lambda run: labpal_run(run, pictures), given.output)
    elif given.experiment == "translation":
        captions = Captions(given.data / "multi30k")
        make(runs, lambda run: translation_run(run, captions), given.output)
    elif given.experiment == "labpal_digits":
        digits = Images.load("digits")
        make(runs, lambda run: labpal_digits_run(run, digits), given.output)
    else:
        data = Images.load(str(given.data / "mnist"))
        make(runs, lambda run: mnist_run(run, data), given.output)


if __name__ == "__main__":
    main()
