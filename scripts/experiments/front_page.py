"""README's picture and table, made from the raw files of docs/results.

    python scripts/experiments/front_page.py            # draws docs/pictures/, writes the table into README.md
    python scripts/experiments/front_page.py --check    # says whether README's table is that of the raw files

The picture shows the German captions at batch 16: the one text on which nothing was chosen. After new runs this script
is all that has to be run again; ``tests/test_readme.py`` runs the check.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"
PICTURES = ROOT / "docs" / "pictures"
LANGUAGE = RESULTS / "lm"
CAPTIONS = "multi30k-german-2000000"
RATES = ("3e-4", "1e-3", "3e-3", "1e-2")
SHOWN = {"elra_spectral": "elra_spectral, nothing chosen"} | {
    f"AdamW__cosine__rate_{rate}": f"AdamW, rate {rate}" for rate in RATES
}
"""Files of the picture's curves, and what the picture calls them."""
COLOURS = {
    "light": {"ink": "#1f2328", "grid": "#d1d9e0", "ours": "#0550ae", "AdamW": "#9a6700"},
    "dark": {"ink": "#e6edf3", "grid": "#3d444d", "ours": "#6cb6ff", "AdamW": "#d4a72c"},
}
MARKERS = dict(zip(SHOWN, "o^sDv", strict=True))
BEGIN, END = "<!-- table: scripts/experiments/front_page.py -->", "<!-- /table -->"


def read(folder: Path, row: str, batch: int = 16) -> list[dict[str, Any]]:
    """The runs of one row, over all seeds."""
    files = sorted(folder.glob(f"{row}-batch{batch}-seed*.json"))
    return [json.loads(file.read_text("utf-8")) for file in files]


# ---- the picture ----


def draw(file: Path, colours: dict[str, str]) -> None:
    """Draw validation losses over tokens, one run (seed 0) a curve."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "front_page"  # the same file from the same runs
    figure, axis = plt.subplots(figsize=(7.2, 3.6), layout="constrained")
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
    axis.tick_params(colors=colours["ink"])
    axis.grid(color=colours["grid"], linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(colours["grid"])
    figure.savefig(file, transparent=True, metadata={"Date": None})
    plt.close(figure)


# ---- the table ----


def cell(values: list[float], digits: int = 3) -> str:
    """Mean and standard deviation over seeds; a value alone if there is one."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def losses(folder: str, row: str) -> list[float]:
    """Validation losses of all seeds at batch 16."""
    return [run["validation_loss"] for run in read(LANGUAGE / folder, row)]


def best_of(folder: str, kind: str) -> tuple[str, list[float]]:
    """The rate of an AdamW grid with the least mean loss, and its losses."""
    grid = {
        file.name.split("rate_")[1].split("-batch")[0]: file.name.split("-batch")[0]
        for file in (LANGUAGE / folder).glob(f"AdamW__{kind}__rate_*-batch16-seed0.json")
    }
    rate = min(grid, key=lambda name: statistics.fmean(losses(folder, grid[name])))
    return f"{rate} of {len(grid)}", losses(folder, grid[rate])


def accuracies(name: str) -> list[float]:
    """Test accuracies in % after the last epoch, as the method is evaluated: ELRA at the mean of an epoch's points."""
    found = []
    for file in sorted((RESULTS / "reproduce" / "mnist").glob(f"{name}-seed*.jsonl")):
        last = json.loads(file.read_text("utf-8").splitlines()[-1])
        found.append(100 * last["boosted_accuracy" if name.startswith("elra") else "test_accuracy"])
    return found


def table() -> str:
    """README's table."""
    lines = [
        "| task: what is measured | ours, nothing chosen | AdamW at a default rate | AdamW at its best rate |",
        "|---|---|---|---|",
    ]
    for title, folder, kind, default in (
        ("German captions from scratch, 2 M tokens: loss", CAPTIONS, "cosine", "AdamW__torch_s_defaults"),
        ("Children's books from scratch, 10 M tokens: loss", "stories-10000000", "cosine", "AdamW__torch_s_defaults"),
        (
            "TinyStories, fine-tuned, 0.5 M tokens: loss",
            "tinystories-from-stories-500000",
            "linear",
            "AdamW__linear__rate_5e-5",
        ),
    ):
        rate, best = best_of(folder, kind)
        ours = cell(losses(folder, "elra_spectral"))
        lines.append(
            f"| {title} | `elra_spectral` **{ours}** | {cell(losses(folder, default))} | {cell(best)} ({rate}) |"
        )
    lines.append(
        f"| MNIST, 784-10-10, 100 epochs: accuracy, % | `elra` **{cell(accuracies('elra'), 2)}** | "
        f"Adam {cell(accuracies('adam'), 2)} | not searched |"
    )
    return "\n".join(lines)


def with_table(readme: str) -> str:
    """README's text, with the table of the raw files."""
    return re.sub(f"(?<={re.escape(BEGIN)}\n).*?(?=\n{re.escape(END)})", lambda _: f"\n{table()}\n", readme, flags=re.S)


def main(words: list[str]) -> int:
    """Draw and write, or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if README's table is stale")
    given = parser.parse_args(words)
    readme = ROOT / "README.md"
    text = readme.read_text("utf-8")
    if given.check:
        stale = with_table(text) != text
        if stale:
            print(
                "README's table is not that of docs/results: python scripts/experiments/front_page.py", file=sys.stderr
            )
        return int(stale)
    readme.write_text(with_table(text), "utf-8")
    PICTURES.mkdir(exist_ok=True)
    for theme, colours in COLOURS.items():
        draw(PICTURES / f"captions-{theme}.svg", colours)
    print(table())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
