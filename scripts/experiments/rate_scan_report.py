"""Tables and the picture of ``rate_scan.py``.

python scripts/experiments/rate_scan_report.py --input docs/results/rate_scan/rate_scan.jsonl \\
    --picture docs/results/rate_scan/rates.png

Everything is read off the curve of losses over constant rates (mean over seeds, at the weight average): a parabola in
the logarithm of the rate through the lowest point and its neighbours has the best rate at its vertex; between points
the curve is interpolated by straight lines in the logarithm. The line's minimum is its half-way point, see
``rate_scan.half_point``; where it is the lowest point, the table says so.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np

from hf_elra.report.table import markdown_table
from rate_scan import FACTOR, SETTINGS, half_point, minimum, read

SHOWN = 0.35
"""How much more than the least loss a panel of the picture shows."""
FIRST, SECOND = slice(8), slice(8, 16)
"""The two halves of the other batches of a line."""


class Results:
    """What was measured of one setting."""

    def __init__(self, name: str, entries: list[dict[str, Any]]) -> None:
        self.name = name
        self.entries = [entry for entry in entries if entry.get("setting") == name]

    def find(self, **wanted: Any) -> list[dict[str, Any]]:
        """The entries with these values."""
        return [entry for entry in self.entries if all(entry.get(key) == value for key, value in wanted.items())]

    def minima(
        self, *, fitted: bool = True, phase: str = "start", kind: str = "all", half: slice = FIRST, lowest: bool = False
    ) -> list[float]:
        """Minima of the lines of all seeds: half-way points, or lowest points."""
        return [
            (minimum if lowest else half_point)(entry["points"], entry["losses"][kind], half)
            for entry in self.find(row="line", fitted=fitted, phase=phase)
            if kind in entry["losses"]
        ]

    def line(self, kind: str = "all") -> float:
        """The median of the lines' minima; not a number if a loss falls along none of them."""
        found = [value for value in self.minima(kind=kind) if not math.isnan(value)]
        return statistics.median(found) if found else math.nan

    def curve(
        self, row: str = "constant", updates: str | None = None, what: str = "loss", seed: int | None = None
    ) -> dict[float, float]:
        """Loss (or accuracy) at the mean, by rate; of runs with all seeds, if none is given."""
        found: dict[float, list[float]] = {}
        for entry in self.find(row=row) if seed is None else self.find(row=row, seed=seed):
            result = entry["end"] if updates is None else entry["before"].get(updates)
            if result:
                scale = 1e-3 if row.startswith("constant") else 1.0
                found.setdefault(entry["rate"] * scale, []).append(result["mean"][what])
        most = max(map(len, found.values()), default=0)
        return {rate: statistics.fmean(found[rate]) for rate in sorted(found) if len(found[rate]) == most}


def best(curve: dict[float, float]) -> tuple[float, float, bool]:
    """Best rate, its loss, and whether it lies inside of the grid."""
    rates, losses = list(curve), list(curve.values())
    lowest = min(range(len(losses)), key=lambda k: losses[k])
    inside = 0 < lowest < len(losses) - 1
    near = slice(max(lowest - 2, 0), lowest + 3)
    x, y = np.log(rates[near]), np.array(losses[near])
    fine = np.isfinite(y)
    if not inside or fine.sum() < 3:
        return rates[lowest], losses[lowest], inside
    bend, slope, _ = np.polyfit(x[fine] - x[fine].mean(), y[fine], 2)
    if bend <= 0:
        return rates[lowest], losses[lowest], inside
    vertex = float(np.clip(x[fine].mean() - slope / (2 * bend), np.log(rates[lowest - 1]), np.log(rates[lowest + 1])))
    return math.exp(vertex), losses[lowest], inside


def at(curve: dict[float, float], rate: float) -> float:
    """The loss at a rate between those that were measured; not a number beyond them."""
    x = np.log(list(curve))
    inside = x[0] - 0.2 <= math.log(rate) <= x[-1] + 0.2
    return float(np.interp(math.log(rate), x, list(curve.values()))) if inside else math.nan


def number(value: float) -> str:
    """A loss."""
    return "" if math.isnan(value) else f"{value:.3f}"


def _thousandths(rate: float) -> str:
    return "–" if math.isnan(rate) else f"{rate * 1e3:.2f}"


def main_table(all_results: list[Results]) -> str:
    """Line's minimum, best rate, their ratio, and what losses come of it."""
    lines = []
    for results in all_results:
        curve = results.curve()
        if not curve:
            continue
        line = results.line()
        rate, loss, inside = best(curve)
        today = results.find(row="today", seed=0)
        adamw = results.curve("adamw")
        adamw_best = min(adamw, key=lambda r: adamw[r]) if adamw else None
        found = today[0]["found"] if today else None
        end = today[0]["end"] if today else None
        lines.append([
            results.name, f"{line * 1e3:.2f}", _thousandths(results.line("matrices")),
            f"{'' if inside else 'edge '}{rate * 1e3:.2f}", f"{rate / line:.2f}",
            number(loss), number(at(curve, FACTOR * line)),
            f"{found[0] * 1e3:.2f} → {today[0]['alpha'] * 1e3:.2f}" if found else "",
            number(at(curve, found[0])) if found else "", number(end["mean"]["loss"]) if end else "",
            f"{number(adamw[adamw_best])} ({adamw_best:g})" if adamw_best else "",
            str(len(results.find(row="constant", rate=results.find(row="constant")[0]["rate"]))),
        ])  # fmt: skip
    return markdown_table(
        ["setting", "line's minimum, 1e-3", "matrices alone, seed 0", "best constant rate, 1e-3", "ratio",
         "loss at the best",
         f"at {FACTOR} of the line", "elra_spectral: found → last, 1e-3", "constant at what it found",
         "elra_spectral", "best AdamW (rate)", "seeds"],
        lines,
    )  # fmt: skip


def line_table(all_results: list[Results]) -> str:
    """How steady the line's minimum is."""

    def several(values: list[float]) -> str:
        return " · ".join(map(_thousandths, values))

    lines = []
    for results in all_results:
        if not results.minima():
            continue
        first = results.find(row="line", fitted=True, phase="start")[0]
        kinds = [kind for kind in first["losses"] if kind != "all"]
        lines.append([
            results.name, several(results.minima()), several(results.minima(half=SECOND)),
            several(results.minima(lowest=True)),
            several(results.minima(phase="later")),
            several(results.minima(phase="later, along the averaged gradient")),
            several(results.minima(fitted=False)),
            ", ".join(f"{kind} {several(results.minima(kind=kind))}" for kind in kinds),
            f"{first['size']:.3f}",
        ])  # fmt: skip
    return markdown_table(
        ["setting", "line's minimum, three seeds, 1e-3", "of 8 other batches", "lowest points", "after 20 updates",
         "the same, along the averaged gradient", "from a fresh head", "parts of the direction, seed 0",
         "root mean square of the matrices"],
        lines,
    )  # fmt: skip


def length_table(all_results: list[Results]) -> str:
    """Best rate after a part of the run."""
    lines = []
    for results in all_results:
        if not results.curve():
            continue
        marks = sorted({int(mark) for entry in results.find(row="constant") for mark in entry["before"]})
        cells = []
        for mark in [*map(str, marks), None]:
            rate, loss, inside = best(results.curve(updates=mark))
            updates = mark or str(results.find(row="constant")[0]["updates"])
            cells.append(f"{updates}: {'' if inside else 'edge '}{rate * 1e3:.2f} ({loss:.3f})")
        lines.append([results.name, *cells[-4:]])
    return markdown_table(["setting", "updates: best rate, 1e-3 (loss)", "", "", ""], lines)


def accuracy_table(all_results: list[Results]) -> str:
    """Accuracies where there are classes."""
    lines = []
    for results in all_results:
        if results.find(row="constant") and "accuracy" in results.find(row="constant")[0]["end"]["mean"]:
            for row in ("constant", "constant from a fresh head", "adamw"):
                losses, hits = results.curve(row), results.curve(row, what="accuracy")
                cells = [f"{rate:.2g}: {losses[rate]:.3f}, {100 * hits[rate]:.1f} %" for rate in hits]
                if cells:
                    lines.append([results.name, row, " · ".join(cells)])
            for entry in results.find(row="today"):
                end = entry["end"]["mean"] if entry["end"] else {}
                lines.append([results.name, "elra_spectral", f"{end.get('loss')}, {end.get('accuracy')}"])
    return markdown_table(["setting", "", "rate: validation loss, accuracy"], lines)


RULES = {
    "0.3 of the line": lambda line, batch: 0.3 * line,
    "0.45 of the line": lambda line, batch: FACTOR * line,
    "0.6 of the line": lambda line, batch: 0.6 * line,
    "0.4 of the line, times the root of batch/16": lambda line, batch: 0.4 * line * (batch / 16) ** 0.5,
}
"""What could be done with the line's minimum."""


def rules_table(all_results: list[Results]) -> str:
    """How much more than at the best constant rate the loss is at what a rule gives; of the median line."""
    lines = []
    for results in all_results:
        curve = results.curve()
        if curve:
            _, lowest, _ = best(curve)
            batch = results.find(row="constant")[0]["batch"]
            losses = [at(curve, rule(results.line(), batch)) - lowest for rule in RULES.values()]
            today = [entry["end"]["mean"]["loss"] - lowest for entry in results.find(row="today") if entry["end"]]
            cells = [*losses, today[0] if today else math.nan]
            lines.append([results.name, *("beyond" if math.isnan(loss) else f"{loss:+.3f}" for loss in cells[:-1]),
                          number(cells[-1])])  # fmt: skip
    return markdown_table(["setting", *RULES, "elra_spectral"], lines)


def all_rates(all_results: list[Results]) -> str:
    """Every loss."""
    lines = []
    for results in all_results:
        curve = results.curve()
        if curve:
            lines.append([results.name, " · ".join(f"{rate:.2g}: {loss:.3f}" for rate, loss in curve.items())])
    return markdown_table(["setting", "constant rate: loss at the mean"], lines)


def picture(all_results: list[Results], file: Path) -> None:
    """Loss over constant rates, a panel a setting."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter

    shown = [results for results in all_results if len(results.curve()) > 2]
    columns = 4
    rows = -(-len(shown) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.5 * columns, 2.7 * rows), squeeze=False)
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    for axis, results in zip(axes.flat, shown, strict=False):
        curve = {rate: loss for rate, loss in results.curve().items() if math.isfinite(loss)}
        axis.plot(
            list(curve), list(curve.values()), "o-", ms=3.5, color="tab:blue", label="constant rate, weight average"
        )
        line, lowest = results.line(), min(curve.values())
        axis.axvline(FACTOR * line, color="tab:green", label=f"{FACTOR} × the line's minimum")
        axis.axvline(line, color="tab:green", ls=":", lw=1, label="the line's minimum")
        today = results.find(row="today", seed=0)
        if today and today[0]["found"] and today[0]["end"]:
            axis.axvline(today[0]["found"][0], color="tab:red", ls="--", lw=1, label="found by elra_spectral now")
            loss = today[0]["end"]["mean"]["loss"]
            axis.axhline(loss, color="tab:red", lw=1, label="elra_spectral now, its loss")
        adamw = results.curve("adamw")
        if adamw:
            axis.axhline(min(adamw.values()), color="0.5", lw=1, ls="-.", label="best AdamW")
        axis.set(xscale="log", title=results.name, xlim=(1e-5, 2e-2), ylim=(lowest - 0.03, lowest + SHOWN))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3)
        axis.title.set_fontsize(10)
        axis.tick_params(labelsize=8)
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(list(handles.values()), list(handles), loc="upper center", ncols=3, fontsize=9)
    figure.supxlabel("rate")
    figure.supylabel("validation loss")
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.5 / (2.7 * rows)))
    figure.savefig(file, dpi=110)


def main(words: list[str]) -> int:
    """Print the tables, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, type=Path, help="rate_scan.jsonl")
    parser.add_argument("--picture", type=Path, help="PNG file to draw")
    given = parser.parse_args(words)
    entries = read(given.input)
    all_results = [results for name in SETTINGS if (results := Results(name, entries)).find(row="line")]
    for table in (main_table, line_table, rules_table, length_table, accuracy_table, all_rates):
        print(f"## {table.__doc__}\n\n{table(all_results)}\n")
    failed = [entry for entry in entries if "error" in entry]
    print("\n".join(f"failed: {entry['job']}: {entry['error']}" for entry in failed))
    if given.picture:
        picture(all_results, given.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
