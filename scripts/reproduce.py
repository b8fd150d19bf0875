"""Reproduce the paper's tables; prints the paper's column beside ours.

    python scripts/reproduce.py 2d                                            # Fig. 3, Tables 1 and 2, with pictures
    python scripts/reproduce.py mnist --data DIR                              # Tables 3 and 4
    python scripts/reproduce.py fashion-mnist --data DIR --seeds 2 --epochs 10
    python scripts/reproduce.py alpha0 --data DIR --seeds 3                   # MNIST from any first learning rate

DIR holds MNIST's or Fashion-MNIST's four idx files; without --data they are loaded from the hub. Every run keeps its
own file under --output; what is finished there is not repeated. --help lists all flags.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from hf_elra import ConfigurationError
from hf_elra.recipes import paper_tables, problems_2d
from hf_elra.recipes.image_data import load_images
from hf_elra.report.environment import environment
from hf_elra.report.table import markdown_table

HUB = {"mnist": "mnist", "alpha0": "mnist", "fashion-mnist": "fashion_mnist"}
CHAOTIC, STARTS = "Rosenbrock from (-11, 121)", 31  # there a single count means nothing: many starts, moved by 1e-3
GIVEN_UP = 2000  # updates from each of them


def parse(words: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=["2d", *paper_tables.TABLES])
    parser.add_argument("--data", help="folder or npz file with the images; default: the data set of the hub")
    parser.add_argument("--seeds", type=int, default=10, help="runs of every column")
    parser.add_argument("--epochs", type=int, help="instead of the paper's")
    parser.add_argument("--columns", nargs="+", help="only these columns, e.g. elra adam")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="runs side by side")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", default="docs/results/reproduce", help="folder of the raw files")
    given = parser.parse_args(words)
    for name in ("seeds", "processes", "epochs"):
        if getattr(given, name) is not None and getattr(given, name) < 1:
            parser.error(f"--{name} {getattr(given, name)} must be at least 1")
    return given


# ---- 2D problems ----


def reproduce_2d(given: argparse.Namespace) -> None:
    """Tables 1 and 2 and Figure 3: updates until the value is reached, in turned coordinates too."""
    folder = Path(given.output, "2d")
    folder.mkdir(parents=True, exist_ok=True)
    header = ["problem", "optimizer", "paper", "updates", "turned by 45°", f"median of {STARTS} starts"]
    rows = []
    generator = torch.Generator().manual_seed(0)
    shifts = (1e-3 * torch.randn(STARTS, 2, generator=generator, dtype=torch.float64)).tolist()
    with (folder / "counts.jsonl").open("w", encoding="utf-8") as file:
        about = {"command": shlex.join(["python", *sys.argv]), **environment("cpu"), "seed": 0}
        print(json.dumps(about), file=file)
        for problem in problems_2d.PROBLEMS:
            paths = {}
            for name, make in problems_2d.optimizers(problem).items():
                print(f"{problem.name}: {name}", file=sys.stderr)
                straight = problems_2d.walk(problem, make)
                turned = problems_2d.walk(problem, make, degrees=45)
                moved = [0]
                if name.startswith("ELRA") and problem.name == CHAOTIC:
                    moved = [len(problems_2d.walk(problem, make, shift=(a, b), limit=GIVEN_UP)) - 1 for a, b in shifts]
                paths[name] = (straight, turned)
                counts = [len(straight) - 1, len(turned) - 1]
                print(
                    json.dumps({"problem": problem.name, "optimizer": name, "updates": counts, "moved": moved}),
                    file=file,
                )
                paper = problem.paper.get(name.partition(",")[0])
                shown = "" if paper is None else "∞" if math.isinf(paper) else f"{'>' if paper >= 1e4 else ''}{paper:g}"
                middle = statistics.median(moved)
                median = "" if len(moved) == 1 else f"≥ {GIVEN_UP}" if middle >= GIVEN_UP else f"{middle:g}"
                rows.append([problem.name, name, shown, *(_count(n) for n in counts), median])
            draw_paths(problem, paths, folder)
    table = markdown_table(header, rows)
    (folder / "table.md").write_text(table + "\n", encoding="utf-8")
    print(table)


def _count(number: int) -> str:
    return "> 10,000" if number >= 10_000 else str(number)


def draw_paths(problem: problems_2d.Problem, paths: dict[str, Any], folder: Path) -> None:
    """Draw the paths over the function's level lines, straight and turned; skipped where matplotlib is missing."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("no pictures: they need matplotlib (pip install 'hf_elra[plots]')", file=sys.stderr)
        return
    figure, axes = plt.subplots(1, 2, figsize=(11, 5), sharex=True, sharey=True, layout="constrained")
    corners = [point for both in paths.values() for path in both for point in path[:400]]
    bound = max(abs(a) for a, _ in corners[:1]) * 1.5 + 1, max(abs(b) for _, b in corners[:1]) * 1.5 + 1
    across, up = torch.meshgrid(
        torch.linspace(-bound[0], bound[0], 200), torch.linspace(-bound[1], bound[1], 200), indexing="xy"
    )
    heights = problem.function(torch.stack([across, up]).reshape(2, -1)).reshape(across.shape)
    levels = torch.linspace(float(heights.min()), float(heights.max()), 20)
    if float(heights.min()) >= 0:
        levels = torch.logspace(-2, math.log10(float(heights.max())), 20)
    for number, (axis, degrees) in enumerate(zip(axes, (0, 45), strict=True)):
        axis.contour(across, up, heights, levels=levels.tolist(), colors="0.85", linewidths=0.7)
        for name, both in paths.items():
            points = both[number][:2000]
            label = f"{name} ({_count(len(both[number]) - 1)})"
            axis.plot([a for a, _ in points], [b for _, b in points], ".-", linewidth=1, markersize=3, label=label)
        axis.set(title=f"coordinates turned by {degrees}°", xlabel="$x_1$", ylabel="$x_2$")
        axis.set(xlim=(-bound[0], bound[0]), ylim=(-bound[1], bound[1]))
        axis.legend(fontsize=8, title="updates in brackets", title_fontsize=8)
    figure.suptitle(problem.name)
    name = "".join(c if c.isalnum() else "_" for c in problem.name)
    figure.savefig(folder / f"{name}.png", dpi=110)
    plt.close(figure)


# ---- networks ----

_DATA: dict[str, Any] = {}


def _run_one(table: str, column: str, seed: int, epochs: int, path: str, header: dict[str, Any], source: str) -> None:
    """One run, in a process of its own; images are loaded once a process."""
    if header["processes"] > 1:
        torch.set_num_threads(1)
    device = header["device"]
    if source not in _DATA:
        data = load_images(source, augmentation=paper_tables.TABLES[table][1])
        data.train.to(device)
        data.test.to(device)
        _DATA[source] = data
    configuration = next(c for c in paper_tables.TABLES[table][2] if c.name == column)
    paper_tables.run(
        table, configuration, _DATA[source], seed=seed, epochs=epochs, path=Path(path), header=header,
        show=lambda text: print(text, file=sys.stderr, flush=True),
    )  # fmt: skip


def reproduce_networks(given: argparse.Namespace) -> None:
    """Train every column with every seed, then print the table."""
    columns = paper_tables.TABLES[given.table][2]
    names = given.columns or [column.name for column in columns]
    for name in names:
        if name not in {column.name for column in columns}:
            known = ", ".join(column.name for column in columns)
            raise ConfigurationError(f"--columns {name} is unknown. Choose from {known}.")
    source = given.data or HUB[given.table]
    folder = Path(given.output, given.table)
    header = {
        "command": shlex.join(["python", *sys.argv]),
        **environment(given.device, "lion-pytorch"),
        "device": given.device,
        "processes": given.processes,
    }
    jobs = []
    for column in columns:
        epochs = given.epochs or column.epochs
        for seed in range(given.seeds):
            path = folder / f"{column.name}-seed{seed}.jsonl"
            if column.name in names and not paper_tables.is_finished(path, epochs):
                jobs.append((given.table, column.name, seed, epochs, str(path), header, source))
    print(f"{len(jobs)} runs to do", file=sys.stderr)
    if given.processes == 1:
        for job in jobs:
            _run_one(*job)
    elif jobs:
        import multiprocessing

        with ProcessPoolExecutor(given.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
            for future in [pool.submit(_run_one, *job) for job in jobs]:
                future.result()
    rows = []
    for column in columns:
        summary = paper_tables.summarise(sorted(folder.glob(f"{column.name}-seed*.jsonl")))
        if summary is None:
            rows.append([column.title, column.paper, "", "", "not run", "", "", ""])
            continue
        spreads = [f"{mean:.2f} ± {deviation:.2f}" for mean, deviation in (summary.best, summary.last, summary.other)]
        rows.append(
            [column.title, column.paper, str(summary.seeds), str(summary.epochs), *spreads, f"{summary.batch:.0f}"]
        )
    columns_shown = [
        "",
        "paper",
        "seeds",
        "epochs",
        "best epoch",
        "last epoch",
        "last epoch, other",
        "batch at the end",
    ]
    table = markdown_table(columns_shown, rows)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(table + "\n", encoding="utf-8")
    print(f"{table}\n\nTest accuracy in %. ELRA with boosting, the others without; 'other' is the other way round.")


def main(words: list[str]) -> int:
    """Run; return the exit code."""
    given = parse(words)
    try:
        if given.table == "2d":
            reproduce_2d(given)
        else:
            reproduce_networks(given)
    except ConfigurationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
