"""README's pictures and table, and the tables on other pages, made from the raw files of docs/results.

    python scripts/experiments/front_page.py            # draws docs/pictures/, writes into README.md and other pages
    python scripts/experiments/front_page.py --check    # says what is not that of the raw files

One picture shows the German captions at batch 16: the one text on which nothing was chosen. The other one shows losses
over multiples of the rate that ``elra_spectral`` reads off the weights, and where it ends by itself. After new runs
this script is all that has to be run again; ``tests/test_readme.py`` runs the check. ``MADE`` says what is written
where.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"
PICTURES = ROOT / "docs" / "pictures"
LANGUAGE, NO_RATE = RESULTS / "lm", RESULTS / "no_rate"
"""Folders of the runs: of language models from scratch, and of many small tasks."""
CAPTIONS, PLAYS = "multi30k-german-2000000", "tinyshakespeare-1000000"
RATES = ("3e-4", "1e-3", "3e-3", "1e-2")
SHOWN = {"elra_spectral": "elra_spectral, nothing chosen"} | {
    f"AdamW__cosine__rate_{rate}": f"AdamW, rate {rate}" for rate in RATES
}
"""Files of the picture's curves, and what the picture calls them."""
OTHERS = {
    "Muon__cosine": "Muon", "Muon__constant": "Muon, constant,", "SOAP__cosine": "SOAP",
    "NadamW__cosine": "NadamW",
}  # fmt: skip
"""Files of the strong partners beside AdamW, and what README calls them."""
OF_NO_RATE = ("Muon, cosine", "NadamW, cosine", "SOAP, cosine", "schedule-free AdamW", "schedule-free RAdam")
"""The same of ``no_rate.py``."""
COLOURS = {
    "light": {"ink": "#1f2328", "grid": "#d1d9e0", "ours": "#0550ae", "AdamW": "#9a6700"},
    "dark": {"ink": "#e6edf3", "grid": "#3d444d", "ours": "#6cb6ff", "AdamW": "#d4a72c"},
}
MARKERS = dict(zip(SHOWN, "o^sDv", strict=True))
BEGIN, END = "<!-- made by scripts/experiments/front_page.py -->", "<!-- /made -->"
COMPARED = {"fashion_mnist": "Fashion-MNIST", "cifar": "ResNet-20, CIFAR-10", "llama": "Llama"}
METHODS = ("elra_spectral", "elra", "adamw", "schedule_free", "prodigy")
TRAINED_BEFORE = ("shakespeare", "german", "sst2", "MiniLM, 500 sentences, batch 16")
"""Tasks of the picture of rates that begin with a trained model."""
CALLED = {
    "scratch, batch 4": "Llama, batch 4",
    "scratch, batch 16": "Llama, batch 16",
    "scratch, batch 64": "Llama, batch 64",
    "scratch, batch 256": "Llama, batch 256",
    "batch 64, 384 updates": "Llama, batch 64, 384 updates",
    "sequences of 1,024": "Llama, sequences of 1,024",
    "width 128": "Llama, width 128",
    "width 256": "Llama, width 256",
    "width 512": "Llama, width 512",
    "12 layers": "Llama, 12 layers",
    "BERT, scratch": "BERT, SST-2",
    "shakespeare": "Llama, plays",
    "german": "Llama, German",
    "sst2": "Llama, SST-2",
    "MiniLM, 500 sentences, batch 16": "MiniLM, 500 sentences",
}
"""What this picture calls tasks."""
FINE_TUNING = ("SFT", "SFT, LoRA", "DPO", "DPO, LoRA", "KTO", "KTO, LoRA", "GRPO")
"""Of TRL's Trainers, those after which the loss on the old text was measured."""
KINDS_OF_LORA = ("SFT, rsLoRA", "SFT, DoRA", "SFT, LoRA and tables", "SFT, LoRA in 8 bits")
"""Other runs of these."""


def read(folder: Path, row: str, batch: int = 16) -> list[dict[str, Any]]:
    """The runs of one row, over all seeds."""
    files = sorted(folder.glob(f"{row}-batch{batch}-seed*.json"))
    return [json.loads(file.read_text("utf-8")) for file in files]


# ---- the pictures ----


def pyplot() -> Any:
    """Matplotlib, to draw files with: the same file from the same runs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "front_page"
    return plt


def finish(figure: Any, file: Path, colours: dict[str, str], about: str) -> None:
    """Give all axes their colours, and write the file with what it shows."""
    for axis in figure.axes:
        axis.tick_params(colors=colours["ink"])
        axis.grid(color=colours["grid"], linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(colours["grid"])
    metadata = {} if file.suffix == ".png" else {"Date": None, "Description": about}
    figure.savefig(file, transparent=True, metadata=metadata)
    pyplot().close(figure)


def draw_captions(file: Path, colours: dict[str, str]) -> None:
    """Draw validation losses over tokens, one run (seed 0) a curve."""
    figure, axis = pyplot().subplots(figsize=(7.2, 3.6), layout="constrained")
    ends: list[tuple[float, str, str]] = []
    for row, label in SHOWN.items():
        result = read(LANGUAGE / CAPTIONS, row)[0]
        a_step = result["tokens"] / result["updates"] / 1e6
        points = {entry["step"]: entry["eval_loss"] for entry in result["log_history"] if "eval_loss" in entry}
        ours = row.startswith("elra")
        colour = colours["ours" if ours else "AdamW"]
        axis.plot(
            [step * a_step for step in points], list(points.values()), marker=MARKERS[row], color=colour,
            markersize=6, linewidth=2.6 if ours else 1.3, linestyle="-" if ours else "--", zorder=3 if ours else 2,
        )  # fmt: skip
        ends.append((list(points.values())[-1], f"{label}: {list(points.values())[-1]:.2f}", colour))
    height = -1.0
    for loss, text, colour in sorted(ends):
        height = max(loss, height + 0.15)  # labels of neighbouring curves do not overlap
        axis.annotate(
            text, (2.0, loss), xytext=(2.06, height), color=colour, fontsize=9.5, va="center",
            fontweight="bold" if text.startswith("elra") else "normal", annotation_clip=False,
        )  # fmt: skip
    axis.set_xlim(0.4, 2.03)
    axis.set_xlabel("million tokens seen", color=colours["ink"])
    axis.set_ylabel("validation loss, nats per token", color=colours["ink"])
    finish(figure, file, colours, numbers_of_captions())


def multiples() -> dict[str, tuple[dict[float, float], float, float]]:
    """Task → loss over multiples of the rate from the weights; the multiple that a run with nothing chosen ended at,
    and its loss. All of seed 0."""
    lines = [
        json.loads(line)
        for name in ("scale", "no_rate")
        for line in (NO_RATE / f"{name}.jsonl").read_text("utf-8").splitlines()
    ]
    found: dict[str, tuple[dict[float, float], float, float]] = {}
    for task in dict.fromkeys(line["task"] for line in lines if line["row"] == "times" and line["rate"] == 1):
        runs = [line for line in lines if line["task"] == task and line["seed"] == 0]
        at = {run["rate"]: run for run in runs if run["row"] == "times"}
        ours = next(run for run in runs if run["row"] == "ours")
        last = [list(run["alpha"].values())[-1] for run in (ours, at[1.0])]
        found[task] = {rate: _loss(at[rate]) for rate in sorted(at)}, last[0] / last[1], _loss(ours)
    return found


def _loss(run: dict[str, Any]) -> float:
    return float(list(run["found"].values())[-1]["mean"]["loss"])


def draw_rates(file: Path, colours: dict[str, str]) -> None:
    """Draw losses over multiples of the rate from the weights, a curve a task, and where runs end by themselves."""
    tasks = multiples()
    plt = pyplot()
    titles = ("Llamas from scratch", "others from scratch", "trained before")
    figure, axes = plt.subplots(1, len(titles), figsize=(9.0, 4.8), layout="constrained", sharey=True)
    for axis, title in zip(axes, titles, strict=True):
        of_axis = {task: found for task, found in tasks.items() if _panel(task) == title}
        for number, (task, (losses, multiple, ours)) in enumerate(of_axis.items()):
            least, colour = min(*losses.values(), ours), plt.get_cmap("tab10")(number)
            above, label = [loss - least for loss in losses.values()], CALLED.get(task, task)
            axis.plot(list(losses), above, color=colour, linewidth=1.4, label=label)
            axis.plot([multiple], [ours - least], marker="o", markersize=7, color=colour, linestyle="none", zorder=3)
        axis.set_xscale("log", base=2)
        farthest = max(8, *(multiple for _, multiple, _ in of_axis.values()))
        ticks = {0.25: "¼", 0.5: "½"} | {2**power: str(2**power) for power in range(round(math.log2(farthest)) + 1)}
        axis.set_xticks(list(ticks), list(ticks.values()))
        axis.set_ylim(-0.02, 0.5)
        axis.set_title(title, color=colours["ink"], fontsize=10)
        axis.set_xlabel("multiple of the rate from the weights", color=colours["ink"])
        axis.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=1, fontsize=8, frameon=False,
            labelcolor=colours["ink"],
        )  # fmt: skip
    axes[0].set_ylabel("loss above the least of the task", color=colours["ink"])
    finish(figure, file, colours, numbers_of_rates())


def _panel(task: str) -> str:
    """Which part of the picture of rates a task is in."""
    if task in TRAINED_BEFORE:
        return "trained before"
    return "Llamas from scratch" if CALLED.get(task, task).startswith("Llama") else "others from scratch"


def numbers_of_rates() -> str:
    """As :func:`numbers_of_captions`."""
    return "; ".join(
        f"{task}: {' '.join(f'{loss:.4f}' for loss in losses.values())}, {ours:.4f} at {multiple:.2f}"
        for task, (losses, multiple, ours) in multiples().items()
    )


def numbers_of_captions() -> str:
    """What the picture shows in numbers; it is kept in the file, so that a picture of other runs is noticed."""
    ends = {label: read(LANGUAGE / CAPTIONS, row)[0]["validation_loss"] for row, label in SHOWN.items()}
    return "; ".join(f"{label}: {loss:.4f}" for label, loss in ends.items())


# ---- tables and sentences ----


def cell(values: list[float], digits: int = 3) -> str:
    """Mean and standard deviation over seeds; a value alone if there is one."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def losses(folder: str, row: str) -> list[float]:
    """Validation losses of all seeds at batch 16."""
    return [run["validation_loss"] for run in read(LANGUAGE / folder, row)]


def best_of(folder: str, kind: str) -> tuple[str, list[float]]:
    """The rate of a grid with the least mean loss, of those with as many seeds as any, and its losses."""
    grid = {
        file.name.split("rate_")[1].split("-batch")[0]: losses(folder, file.name.split("-batch")[0])
        for file in (LANGUAGE / folder).glob(f"{kind}__rate_*-batch16-seed0.json")
    }
    most = max(map(len, grid.values()))
    rate = min((rate for rate in grid if len(grid[rate]) == most), key=lambda rate: statistics.fmean(grid[rate]))
    return f"{rate} of {len(grid)}", grid[rate]


def best_other(folder: str) -> tuple[str, str, list[float]] | None:
    """Of :data:`OTHERS` the one with the least mean loss at its best rate: name, rate and losses; None without runs."""
    were_run = {file.name.split("__rate_")[0] for file in (LANGUAGE / folder).glob("*__rate_*")}
    found = {name: best_of(folder, kind) for kind, name in OTHERS.items() if kind in were_run}
    if not found:
        return None
    name = min(found, key=lambda name: statistics.fmean(found[name][1]))
    return name, *found[name]


def accuracies(name: str) -> list[float]:
    """Test accuracies in % after the last epoch, as the method is evaluated: ELRA at the mean of an epoch's points."""
    found = []
    for file in sorted((RESULTS / "reproduce" / "mnist").glob(f"{name}-seed*.jsonl")):
        last = json.loads(file.read_text("utf-8").splitlines()[-1])
        found.append(100 * last["boosted_accuracy" if name.startswith("elra") else "test_accuracy"])
    return found


def fine_tuned(row: str) -> tuple[str, list[float]]:
    """Of a Llama that was trained on stories and then on the plays: the best rate of a row, and its losses.

    Ours is evaluated at the weighted mean of its points, AdamW there or at its last point, whichever is better.
    """
    runs: dict[float, list[float]] = {}
    for run in map(json.loads, (NO_RATE / "no_rate.jsonl").read_text("utf-8").splitlines()):
        if (run["task"], run["row"]) == ("shakespeare", row):
            end = list(run["found"].values())[-1]
            kinds = ("mean",) if row == "ours" else ("mean", "last")
            runs.setdefault(run["rate"] or 0.0, []).append(min(end[kind]["loss"] for kind in kinds))
    best = min(runs, key=lambda rate: statistics.fmean(runs[rate]))
    return f"{best:g} of {len(runs)}", runs[best]


def compared(
    title: str, ours: list[float], adamw: tuple[str, list[float]], other: tuple[str, str, list[float]] | None
) -> str:
    """Return a line of README's table, the least of its mean losses in bold."""
    runs = [ours, adamw[1], *([other[2]] if other else [])]
    least = min(map(statistics.fmean, runs))
    cells = [f"**{cell(values)}**" if statistics.fmean(values) == least else cell(values) for values in runs]
    last = f"{other[0]} {cells[2]} ({other[1]})" if other else "not run"
    return f"| {title} | `elra_spectral` {cells[0]} | {cells[1]} ({adamw[0]}) | {last} |"


def table() -> str:
    """Return README's table."""
    lines = [
        "| task: what is measured | ours, nothing chosen | AdamW at its best rate | best other at its best rate |",
        "|---|---|---|---|",
    ]
    for title, folder in (
        ("German captions from scratch, 2 M tokens: loss", CAPTIONS),
        ("Plays of Shakespeare from scratch, 1 M tokens: loss", PLAYS),
    ):
        (rate, best), default = best_of(folder, "AdamW__cosine"), losses(folder, "AdamW__torch_s_defaults")
        if statistics.fmean(default) < statistics.fmean(best):  # a schedule may do harm in a short run
            rate, best = "1e-3, constant", default
        lines.append(compared(title, losses(folder, "elra_spectral"), (rate, best), best_other(folder)))
    others = [(name.split(",")[0], *fine_tuned(name)) for name in OF_NO_RATE]
    other = min(others, key=lambda found: statistics.fmean(found[2]))
    title = "The same plays, fine-tuned, 0.4 M tokens: loss"
    lines.append(compared(title, fine_tuned("ours")[1], fine_tuned("adamw"), other))
    lines.append(
        f"| MNIST, 784-10-10, 100 epochs: accuracy, % | `elra` **{cell(accuracies('elra'), 2)}** | "
        f"Adam {cell(accuracies('adam'), 2)} (not searched) | not run |"
    )
    return "\n".join(lines)


def needs_a_rate() -> str:
    """Return README's other table: accuracy at defaults, and at the worst of three rates to begin with."""
    lines = [f"| | {' | '.join(COMPARED.values())} |", f"|---|{'---:|' * len(COMPARED)}"]
    files = {name: (RESULTS / "compare" / f"{name}.jsonl").read_text("utf-8").splitlines() for name in COMPARED}
    for method in METHODS:
        cells = []
        for texts in files.values():
            of_rates: dict[float | None, list[float]] = {}
            for run in map(json.loads, texts):
                if run.get("method") == method:
                    of_rates.setdefault(run["rate"], []).append(100 * run["accuracy"])
            means = {rate: statistics.fmean(values) for rate, values in of_rates.items()}
            worst = min(mean for rate, mean in means.items() if rate is not None)
            cells.append(f"{means[None]:.1f}/{worst:.1f}")
        lines.append(f"| `{method}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def front_page() -> str:
    """Return both tables of README."""
    between = (
        "Accuracy in % [at defaults/at the worst](docs/results/compare.md) initial rate of 1e-4, 1e-2 and 1; five of 25"
        "\nmethods, short runs:"
    )
    return "\n\n".join([table(), between, needs_a_rate()])


def fine_tuning(names: tuple[str, ...] = FINE_TUNING) -> str:
    """A table of the page on fine-tuning: loss or reward of TRL's Trainers, and in brackets that on the old text.

    Rows that were run with none of the clients are left out.
    """
    import clients

    runs = clients.by_rate((NO_RATE / "clients.jsonl").read_text("utf-8").splitlines())
    lines = [f"| | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
    best = {
        optim: {name: clients.best_rate(f"TRL {name}", runs, optim) for name in names}
        for optim in (clients.ADAMW, *clients.OTHERS)
    }
    rows: dict[str, tuple[str, dict[str, float | None]]] = {
        "**elra_spectral**": (clients.OURS, dict.fromkeys(names)),
        **{
            f"the same, `max_drift={drift}`": (f"{clients.OURS}, max_drift={drift}", dict.fromkeys(names))
            for drift in (0.2, 0.1)
        },
        "AdamW, best of four rates": (clients.ADAMW, best[clients.ADAMW]),
        **{f"{optim.split(',')[0]}, best rate, cosine": (optim, best[optim]) for optim in clients.OTHERS},
        **{f"AdamW, {name}, one seed": (clients.ADAMW, dict.fromkeys(names, float(name))) for name in ("3e-4", "1e-4")},
        "AdamW, TRL's default": (clients.ADAMW, dict.fromkeys(names)),
    }
    for title, (optim, rates) in rows.items():
        cells = []
        for name, rate in rates.items():
            found = runs.get((f"TRL {name}", optim, rate), [])
            if not found:
                cells.append("–")
                continue
            if title.endswith("one seed"):
                found = [run for run in found if run["seed"] == 0]
            measure = clients.CLIENTS[f"TRL {name}"].better
            end, kept = (statistics.fmean(run[kind] for run in found) for kind in (measure, "stories"))
            cells.append(f"{end:.3f} ({kept:.2f})")
        if set(cells) != {"–"}:
            lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def small_tasks(which: int) -> str:
    """One of the tables of ``no_rate.py``."""
    import no_rate

    return no_rate.tables((NO_RATE / "no_rate.jsonl").read_text("utf-8").splitlines()).split("\n\n")[which]


def cost() -> str:
    """The table of ``no_rate_cost.py``."""
    import no_rate_cost

    return no_rate_cost.table([json.loads(line) for line in (NO_RATE / "cost.jsonl").read_text("utf-8").splitlines()])


def other_trainers() -> str:
    """The table of ``clients.py``."""
    import clients

    return clients.table((NO_RATE / "clients.jsonl").read_text("utf-8").splitlines())


def table_of_rates() -> str:
    """The table of losses over multiples of the rate from the weights."""
    grid = (0.25, 0.5, 1.0, 2.0, 4.0)
    lines = [f"| | {' | '.join(f'{rate:g}' for rate in grid)} | nothing chosen: loss, ends at |", f"|---|{'---:|' * 6}"]
    for task, (losses, multiple, ours) in multiples().items():
        cells = [f"{losses[rate]:.3f}" if rate in losses else "–" for rate in grid]
        lines.append(f"| {CALLED.get(task, task)} | {' | '.join(cells)} | {ours:.3f}, {multiple:.1f} |")
    return "\n".join(lines)


def result_of_spectral() -> str:
    """The result on the page of elra_spectral."""
    ours, (rate, best) = losses(CAPTIONS, "elra_spectral"), best_of(CAPTIONS, "AdamW__cosine")
    return (
        f"German captions, 2 M tokens, batch 16, three seeds: {cell(ours)} nats.\n"
        f"The best AdamW rate ({rate}) reached {cell(best)}."
    )


MADE: dict[str, tuple[Callable[[], str], ...]] = {
    "README.md": (front_page,),
    "docs/guides/finetuning.md": (fine_tuning, partial(fine_tuning, KINDS_OF_LORA)),
    "docs/optimizers/elra_spectral.md": (result_of_spectral,),
    "docs/results/no_rate.md": (*(partial(small_tasks, n) for n in range(3)), cost, other_trainers, table_of_rates),
}
"""What is written between the marks of a file, one after another."""
DRAWN = {"captions": (draw_captions, numbers_of_captions), "rates": (draw_rates, numbers_of_rates)}
"""What draws a picture, and what it shows in numbers."""


def renewed(path: str) -> str:
    """Return the text of a file with what is made of the raw files in it."""
    text = (ROOT / path).read_text("utf-8")
    between = re.compile(f"(?<={re.escape(BEGIN)}\n).*?(?=\n{re.escape(END)})", re.S)
    makers = iter(MADE[path])
    found = between.sub(lambda _: f"\n{next(makers)()}\n", text)
    assert next(makers, None) is None, f"{path} has fewer marks than tables"
    return found


def stale() -> list[str]:
    """Return the files that are not those of the raw files."""
    texts = [path for path in MADE if renewed(path) != (ROOT / path).read_text("utf-8")]
    pictures = [picture(name, theme) for name in DRAWN for theme in COLOURS]
    old = [file for file in pictures if DRAWN[file.stem.split("-")[0]][1]() not in file.read_text("utf-8")]
    return texts + [str(file.relative_to(ROOT)) for file in old]


def picture(name: str, theme: str) -> Path:
    """The file of a picture in light or dark."""
    return PICTURES / f"{name}-{theme}.svg"


def main(words: list[str]) -> int:
    """Draw and write, or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a file is stale")
    given = parser.parse_args(words)
    if given.check:
        for path in (found := stale()):
            print(f"{path} is not that of docs/results: python scripts/experiments/front_page.py", file=sys.stderr)
        return int(bool(found))
    for path in MADE:
        (ROOT / path).write_text(renewed(path), "utf-8")
    PICTURES.mkdir(exist_ok=True)
    for name, (draw, _) in DRAWN.items():
        for theme, colours in COLOURS.items():
            draw(picture(name, theme), colours)
    print(front_page())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
