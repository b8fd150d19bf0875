"""Reproduce the paper's tables; prints the paper's column beside ours.

    python scripts/experiments/reproduce.py 2d                            # Fig. 3, Tables 1 and 2, with pictures
    python scripts/experiments/reproduce.py mnist --data DIR              # Tables 3 and 4
    python scripts/experiments/reproduce.py fashion-mnist --data DIR --seeds 2 --epochs 10
    python scripts/experiments/reproduce.py cifar10-resnet18 --device cuda  # also -resnet34, -wrn; cifar100-resnet18
    python scripts/experiments/reproduce.py alpha0 --data DIR --seeds 3   # Fig. 2a: from any first learning rate
    python scripts/experiments/reproduce.py babyllama --data DIR --sequences 300000  # section 4.4

DIR holds the images (idx files, an npz file or a folder by class; "digits" is in the package), for babyllama
train.txt.gz and validation.txt.gz. Without --data images come from the hub and babyllama's text from its preset. With
babyllama, flags not known here go to train_babyllama.py, e.g. --preset 15m; models and checkpoints are kept in
runs/reproduce-babyllama. Every run keeps its own file under --output: what is finished there is not repeated, and what
was interrupted begins anew (babyllama: goes on from its last checkpoint). --help lists all flags.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from hf_elra import ConfigurationError
from hf_elra.recipes.image_data import load_images
from hf_elra.recipes.run_folder import read_json
from hf_elra.report.environment import environment
from hf_elra.report.pictures import draw_curves, draw_learning_rates, draw_paths
from hf_elra.report.table import markdown_table
from lib import babyllama_comparison, paper_tables, problems_2d

CHAOTIC, STARTS = "Rosenbrock from (-11, 121)", 31  # there a single count means nothing: many starts, moved by 1e-3
LIMIT = 10_000  # updates of a walk
GIVEN_UP = 2000  # updates from each of them


def parse(words: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=["2d", *paper_tables.TABLES, "babyllama"])
    parser.add_argument("--data", help="folder, or npz file with the images; default: the data set of the hub")
    parser.add_argument("--seeds", type=int, help="runs of every column of a table of images; default: 10")
    parser.add_argument("--epochs", type=int, help="of images, instead of the paper's")
    parser.add_argument(
        "--columns", nargs="+", help="only these: elra, elra-ft, adam, lion, ...; a wrong one lists all"
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="runs side by side")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sequences", type=int, help="of every run of babyllama; default: 300000")
    parser.add_argument("--output", default="docs/results/reproduce", help="folder of the raw files")
    given, given.more = parser.parse_known_args(words)
    if given.more and given.table != "babyllama":
        parser.error(f"{' '.join(given.more)}: unknown; see --help")
    for name in ("seeds", "processes", "epochs", "sequences"):
        if getattr(given, name) is not None and getattr(given, name) < 1:
            parser.error(f"--{name} {getattr(given, name)} must be at least 1")
    unused = {"2d": ("seeds", "epochs", "columns", "data", "sequences"), "babyllama": ("seeds", "epochs")}
    for name in unused.get(given.table, ("sequences",)):
        if getattr(given, name) is not None:
            parser.error(f"--{name} does nothing for {given.table}; leave it out")
    given.seeds, given.sequences = given.seeds or 10, given.sequences or 300_000
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
                straight = problems_2d.walk(problem, make, limit=LIMIT)
                turned = problems_2d.walk(problem, make, degrees=45, limit=LIMIT)
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
            picture = "".join(c if c.isalnum() else "_" for c in problem.name) + ".png"
            draw_paths(problem.name, problem.function, paths, folder / picture, LIMIT)
    table = markdown_table(header, rows)
    (folder / "table.md").write_text(table + "\n", encoding="utf-8")
    print(table)


def _count(number: int) -> str:
    return f"> {LIMIT:,}" if number >= LIMIT else str(number)


# ---- networks ----

_DATA: dict[str, Any] = {}


def _images(table: str, source: str, device: str) -> Any:
    """Images of a table on a device, loaded once a process."""
    if source not in _DATA:
        try:
            torch.zeros(1, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ConfigurationError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from None
        data = load_images(source, augmentation=paper_tables.TABLES[table].augmentation)
        data.train.to(device)
        data.test.to(device)
        _DATA[source] = data
    return _DATA[source]


def _run_one(table: str, column: str, seed: int, epochs: int, path: str, header: dict[str, Any], source: str) -> None:
    """One run, in a process of its own."""
    if header["processes"] > 1:
        torch.set_num_threads(1)
    configuration = next(c for c in paper_tables.TABLES[table].columns if c.name == column)
    paper_tables.run(
        table, configuration, _images(table, source, header["device"]),
        seed=seed, epochs=epochs, path=Path(path), header=header,
        show=lambda text: print(text, file=sys.stderr, flush=True),
    )  # fmt: skip


def reproduce_networks(given: argparse.Namespace) -> None:
    """Train every column with every seed, then print the table."""
    columns = paper_tables.TABLES[given.table].columns
    names = given.columns or [column.name for column in columns]
    for name in names:
        if name not in {column.name for column in columns}:
            known = ", ".join(column.name for column in columns)
            raise ConfigurationError(f"--columns {name} is unknown. Choose from {known}.")
    source = given.data or paper_tables.TABLES[given.table].hub
    folder = Path(given.output, given.table)
    images = _images(given.table, source, given.device).name  # wrong paths and devices are found here, before any run
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
            if column.name in names and not paper_tables.is_finished(path, epochs, images):
                jobs.append((given.table, column.name, seed, epochs, str(path), header, source))
    print(f"{len(jobs)} runs to do", file=sys.stderr)
    if given.processes == 1:
        for job in jobs:
            _run_one(*job)
    elif jobs:
        import multiprocessing

        with ProcessPoolExecutor(given.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
            try:
                for future in [pool.submit(_run_one, *job) for job in jobs]:
                    future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    rows, lossy = [], False
    for column in columns:
        summary = paper_tables.summarise(sorted(folder.glob(f"{column.name}-seed*.jsonl")))
        if summary is None:
            rows.append([column.title, column.paper, "", "", "not run", "", "", ""])
            continue
        spreads = [
            f"{mean:.2f}" + (f" ± {deviation:.2f}" if summary.seeds > 1 else "")
            for mean, deviation in (summary.best, summary.last, summary.other)
        ]
        lossy |= summary.lossy_copy
        paper = "" if summary.lossy_copy else column.paper
        rows.append([column.title, paper, str(summary.seeds), str(summary.epochs), *spreads, f"{summary.batch:.0f}"])
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
    if given.table == "alpha0":
        draw_alphas(given, header, folder)
    print(f"{table}\n\nTest accuracy in %. ELRA with boosting, the others without; 'other' is the other way round.")
    if lossy:
        print("The images are a JPEG-compressed copy: not comparable with published numbers.")
    print(f"Table and raw files: {folder}")


def draw_alphas(given: argparse.Namespace, header: dict[str, Any], folder: Path) -> None:
    """Fig. 2a: the learning rate in force over the updates of the first epoch, from every first one."""
    data = _images(given.table, given.data or paper_tables.TABLES[given.table].hub, given.device)
    paths = {}
    with (folder / "first_epoch.jsonl").open("w", encoding="utf-8") as file:
        print(json.dumps({**header, "seed": 0}), file=file)
        for column in paper_tables.TABLES[given.table].columns:
            paths[column.title] = paper_tables.alphas_of_first_epoch(given.table, column, data, seed=0)
            print(json.dumps({"first": column.lr, "alphas": paths[column.title]}), file=file)
    shown = {title: alphas[:60] for title, alphas in paths.items()}
    draw_learning_rates("MNIST: from any first learning rate", shown, folder / "first_updates.png")


# ---- language models ----


def reproduce_babyllama(given: argparse.Namespace) -> None:
    """Make the runs of section 4.4 side by side, then print loss against sequences, updates and seconds."""
    folder, runs = Path(given.output, given.table), Path("runs", "reproduce-babyllama")
    more = list(given.more)
    if given.data:
        for split in ("train", "validation"):
            path = Path(given.data, f"{split}.txt.gz")
            if not path.is_file():
                raise ConfigurationError(f"--data {given.data}: it lacks {path.name}.")
            more += [f"--{split}_file", str(path)]
    chosen = given.columns or [run.name for run in babyllama_comparison.RUNS]
    if unknown := set(chosen) - {run.name for run in babyllama_comparison.RUNS}:
        known = ", ".join(run.name for run in babyllama_comparison.RUNS)
        raise ConfigurationError(f"--columns {' '.join(sorted(unknown))} is unknown. Choose from {known}.")
    threads = max(1, (os.cpu_count() or 1) // given.processes)

    def make(run: babyllama_comparison.Run) -> None:
        script = Path(__file__).parents[1] / "train_babyllama.py"
        babyllama_comparison.make_run(run, given.sequences, folder, runs, more, script=script, threads=threads)
        print(f"{run.title}: done", file=sys.stderr, flush=True)

    print(f"progress of every run: {runs}/NAME.log", file=sys.stderr)
    with ThreadPoolExecutor(given.processes) as pool:
        list(pool.map(make, [run for run in babyllama_comparison.RUNS if run.name in chosen]))
    table = babyllama_comparison.table(folder, given.sequences)
    (folder / "table.md").write_text(table + "\n", encoding="utf-8")
    print(table)
    results = {run.title: folder / f"{run.name}.json" for run in babyllama_comparison.RUNS}
    curves = {title: babyllama_comparison.curve(read_json(path)) for title, path in results.items() if path.is_file()}
    values = {
        title: {name: [getattr(point, name) for point in points] for name in ("sequences", "seconds", "loss")}
        for title, points in curves.items()
    }
    draw_curves(values, ["sequences", "seconds"], "loss", "validation loss, nats per token", folder / "curves.png")


def main(words: list[str]) -> int:
    """Run; return the exit code."""
    given = parse(words)
    try:
        _make_folder(given)
        if given.table == "2d":
            reproduce_2d(given)
        elif given.table == "babyllama":
            reproduce_babyllama(given)
        else:
            reproduce_networks(given)
    except ConfigurationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; finished runs are kept, the same command goes on", file=sys.stderr)
        return 130
    return 0


def _make_folder(given: argparse.Namespace) -> None:
    try:
        Path(given.output, given.table).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"--output {given.output} cannot be written: {error.strerror}.") from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
