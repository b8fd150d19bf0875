"""Runs in a terminal: sparklines, the table of runs, verdicts; and all of it as JSON."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

from hf_elra.report.runs import LIMITS, Group, Point, Run, grouped
from hf_elra.report.verdicts import MARKS, verdicts

BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: list[float], width: int = 48, *, log: bool = False) -> str:
    """Draw values as a line of bars, the lowest to the highest; a value that is not finite is an ``×``."""
    values = [math.log(v) if v > 0 else math.nan for v in values] if log else values
    buckets = min(width, len(values))
    shown = []
    for number in range(buckets):
        part = values[number * len(values) // buckets : (number + 1) * len(values) // buckets]
        finite = [value for value in part if math.isfinite(value)]
        shown.append(sum(finite) / len(finite) if finite else math.nan)
    finite = [value for value in shown if math.isfinite(value)]
    if not finite:
        return "×" * buckets
    low, high = min(finite), max(finite)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((v - low) * scale)] if math.isfinite(v) else "×" for v in shown)


def number(value: float | None) -> str:
    """A number with four significant digits; an em dash for none."""
    if value is None:
        return "—"
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def duration(seconds: float | None) -> str:
    """Seconds as text."""
    if seconds is None:
        return "—"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def best(run: Run) -> float | None:
    """The lowest validation loss."""
    return min((loss for _, loss in run.series("eval_loss") if math.isfinite(loss)), default=None)


def table(groups: list[Group]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of the table of runs, with a row of medians after the seeds of a group.

    A column that is empty in all rows is left out.
    """
    runs = [run for group in groups for run in group.runs]
    metrics = sorted({name for run in runs for name in run.metrics})
    told_by_optimizer = all(group.label in (run.optimizer, run.name) for group in groups for run in group.runs)
    texts: dict[str, Callable[[Group, Run], str]] = {
        "run": lambda group, run: run.name,
        "group": lambda group, run: "" if len(groups) == 1 or told_by_optimizer else group.label,
        "optimizer": lambda group, run: run.optimizer,
        "seed": lambda group, run: str(run.facts.get("seed", "")),
    }
    numbers: dict[str, tuple[Callable[[Run], float | None], Callable[[float | None], str]]] = {
        "updates": (lambda run: run.updates, _count),
        "done": (lambda run: run.share, lambda share: "" if share is None else f"{share:.0%}"),
        "tokens": (lambda run: _last_on(run, "tokens"), _count),
        "samples": (lambda run: _last_on(run, "samples"), _count),
        "time": (_seconds, duration),
        "training loss": (lambda run: run.last("loss"), number),
        "validation loss": (lambda run: run.last("eval_loss"), number),
        "lowest": (best, number),
        **{_title(name): (partial(Run.last, key=name), number) for name in metrics},
        "learning rate": (lambda run: run.last("learning_rate"), number),
        "taken back": (lambda run: len(run.taken_back) if run.is_ours else None, _count),
    }
    rows = []
    for group in groups:
        for run in group.runs:
            told = [text(group, run) for text in texts.values()]
            rows.append([*told, *(show(value(run)) for value, show in numbers.values())])
        if len(group.runs) > 1:
            told = [f"median of {len(group.runs)}", texts["group"](group, group.runs[0]), group.runs[0].optimizer, ""]
            values = [[value(run) for run in group.runs] for value, _ in numbers.values()]
            rows.append([*told, *(show(_median(v)) for v, (_, show) in zip(values, numbers.values(), strict=True))])
    header = [*texts, *numbers]
    used = [i for i in range(len(header)) if any(row[i] not in ("", "—") for row in rows)]
    return [header[i] for i in used], [[row[i] for i in used] for row in rows]


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _count(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _title(metric: str) -> str:
    return metric.removeprefix("eval_").replace("_", " ")


def _last_on(run: Run, axis: str) -> float | None:
    position = run.axis(axis)
    return None if position is None else position(run.updates)


def _seconds(run: Run) -> float | None:
    hours = _last_on(run, "hours")
    return run.last("train_runtime") if hours is None else 3600 * hours


def as_text(runs: list[Run]) -> str:
    """All runs as lines for a terminal."""
    groups = grouped(runs)
    header, rows = table(groups)
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        return "  ".join([cells[0].ljust(widths[0]), *padded[1:]])

    parts = []
    for run in runs:
        lines = [f"{run.name}: {run.optimizer}, {run.updates:,} updates"]
        for title, points, log in _curves(run):
            values = [value for _, value in points]
            ends = f"{number(values[0])} → {number(values[-1])}"
            lines.append(f"  {title:<18}{sparkline(values, log=log):<48}  {ends}")
        if run.beginning:
            tried = ", ".join(f"{e['tried']:.2g}" for e in run.beginning if e["tried"])
            lines.append(f"  {'first rates':<18}{tried}; then {run.beginning[-1]['rate']:.2g}")
        lines += [f"  {MARKS[verdict.kind]} {verdict.text}" for verdict in verdicts(run)]
        parts.append("\n".join(lines))
    if len(runs) > 1:
        parts.append("\n".join([line(header), *(line(row) for row in rows)]))
    return "\n\n".join(parts) + "\n"


def _curves(run: Run) -> list[tuple[str, list[Point], bool]]:
    """What is drawn of a run: title, points, whether on a log scale."""
    curves = [
        ("training loss", run.series("loss"), False),
        ("validation loss", run.series("eval_loss"), False),
        *((_title(name), run.series(name), False) for name in run.metrics),
        ("learning rate", run.series("learning_rate"), True),
        ("batch", run.batch, False),
        ("step norm", run.series("step_norm"), True),
        ("cosine", run.series("cosine"), False),
        ("drift", run.series("drift"), False),
        ("samples/s", run.speed("samples"), False),
        ("tokens/s", run.speed("tokens"), False),
    ]
    return [curve for curve in curves if curve[1]]


def as_json(runs: list[Run]) -> dict[str, Any]:
    """All runs as JSON values: facts, series by name as pairs of update and value, verdicts. None for no finite one."""
    return {
        "runs": [
            {
                "name": run.name,
                "folder": str(run.folder),
                "group": group.label,
                "facts": {key: value for key, value in run.facts.items() if key not in ("files", "written_by")},
                "updates": run.updates,
                "finished": run.finished,
                "share": run.share,
                "series": {title.replace(" ", "_"): _finite(points) for title, points, _ in _curves(run)},
                "beginning": run.beginning,
                "taken_back": run.taken_back,
                "batch_changes": run.batch_changes,
                "limits": {name: run.limits[name] for name in LIMITS.values() if name in run.limits},
                "verdicts": [verdict._asdict() for verdict in verdicts(run)],
            }
            for group in grouped(runs)
            for run in group.runs
        ]
    }


def _finite(points: list[Point]) -> list[tuple[float, float | None]]:
    return [(step, value if math.isfinite(value) else None) for step, value in points]
