"""One page about one run or several: verdicts, a table, panels of curves. It needs no server and no network.

Every panel is drawn once for every axis that all runs know; a little JavaScript (``page.js``) shows one drawing of each
and says what is under the pointer. Drawing itself is in ``svg.py``, what runs say in ``runs.py`` and ``verdicts.py``.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.resources import files
from typing import Any

from hf_elra.report.runs import AXES, LIMITS, Group, Point, Run, grouped, median_and_band, running_mean
from hf_elra.report.svg import HEIGHT, LEFT, WIDTH, Curve, Mark, draw, swatch
from hf_elra.report.text import number, table
from hf_elra.report.verdicts import MARKS, verdicts

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""The browser itself then refuses whatever would come from a network."""
MOST_NAMED = 12
"""So many changes of the batch are named in the drawing; all are listed beneath it."""
LOWEST_RATIO, HIGHEST_RATIO = -2.0, 1.5
"""Of the first steps; ratios beyond are drawn at the edge."""
AXIS_TITLES = {"updates": "updates", "epochs": "epochs", "samples": "samples seen", "tokens": "tokens seen"}
AXIS_TITLES["hours"] = "hours"


@dataclass
class Panel:
    """One panel of the page.

    Attributes:
        name: its id.
        title: above it.
        views: axis (empty for one of its own), scale and drawing.
        curves: for the legend.
        note: below it.
        more: HTML below the note.
    """

    name: str
    title: str
    views: list[tuple[str, str, str]] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    note: str = ""
    more: str = ""


@dataclass
class Subject:
    """The runs of a page.

    Attributes:
        groups: seeds of one another.
        axes: which all runs know; the first one is shown.
    """

    groups: list[Group]
    axes: list[str]

    @classmethod
    def of(cls, runs: list[Run]) -> Subject:
        """Group the runs, and choose what their curves are drawn over."""
        axes = [name for name in AXES if all(run.axis(name) for run in runs)]
        if len(runs) > 1:  # updates of different batches are not the same amount of anything
            axes.sort(key=lambda name: ("tokens", "samples", "epochs", "updates", "hours").index(name))
        return cls(grouped(runs), axes)

    @property
    def runs(self) -> list[Run]:
        """All runs."""
        return [run for group in self.groups for run in group.runs]

    @property
    def only(self) -> Run | None:
        """The run, where there is one."""
        return self.runs[0] if len(self.runs) == 1 else None


def build_page(runs: list[Run]) -> str:
    """Return the page about these runs, as HTML."""
    subject = Subject.of(runs)
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    options = "".join(f'<option value="{name}">{AXIS_TITLES[name]}</option>' for name in subject.axes)
    shown = [panel for panel in panels(subject) if panel.views]
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)} · hf-elra report</title>",
        f"<style>{_resource('page.css')}</style></head><body>",
        f"<header><h1>{html.escape(title)}</h1>{_headline(subject)}</header>",
        *(_verdicts(run, titled=len(runs) > 1) for run in runs),
        _table(subject.groups) if len(runs) > 1 else "",
        '<div class="controls" hidden>',
        f'<label>Horizontal axis <select id="axis">{options}</select></label>',
        '<label><input type="checkbox" id="log"> losses on a log axis</label></div>',
        f'<main class="panels">{"".join(_figure(panel, titled=len(runs) > 1) for panel in shown)}</main>',
        _footer(subject),
        '<div id="told" hidden></div>',
        f"<script>{_resource('page.js')}</script></body></html>",
    ]
    return "\n".join(parts) + "\n"


def picture(run: Run) -> str:
    """Return loss and learning rate of a run as one SVG file, for a card."""
    subject = Subject.of([run])
    shown = [panel for panel in (_loss(subject)[0], _rate(subject)) if panel.views]
    parts = []
    for place, panel in enumerate(shown):
        _, _, drawing = panel.views[0]
        left = place * WIDTH
        parts.append(drawing.replace("<svg ", f'<svg x="{left}" y="26" width="{WIDTH}" height="{HEIGHT}" ', 1))
        at = left + LEFT
        for curve in panel.curves if len(panel.curves) > 1 else []:
            parts.append(swatch(curve).replace("<svg ", f'<svg x="{at}" y="10" width="26" height="8" ', 1))
            parts.append(f'<text x="{at + 31}" y="18">{html.escape(curve.label)}</text>')
            at += 55 + 6 * len(curve.label)
    style = "<style>" + _resource("page.css") + "rect.back { fill: var(--back); }</style>"
    width, height = max(1, len(shown)) * WIDTH, HEIGHT + 30
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'font-family="system-ui, sans-serif">{style}<rect class="back" width="{width}" height="{height}"/>'
        f"{''.join(parts)}</svg>\n"
    )


def panels(subject: Subject) -> list[Panel]:
    """All panels, also those that have nothing to show."""
    metrics = sorted({name for run in subject.runs for name in run.metrics})
    unit = "tokens" if all(run.axis("tokens") for run in subject.runs) else "samples"
    return [
        *(_loss(subject)),
        *(_simple(subject, name, _titled(name), partial(_series, name), _titled(name).lower()) for name in metrics),
        _rate(subject),
        _beginning(subject),
        _batch(subject),
        _smoothed(
            subject,
            "cosine",
            "Cosine",
            "cosine",
            "Between the gradient and the last direction: above 0 the step ended before the minimum of its line.",
        ),
        _smoothed(subject, "step_norm", "Step norm", "‖α·u‖", "The length of a step, with its running mean.", log=True),
        _simple(
            subject,
            "drift",
            "Drift",
            partial(_series, "drift"),
            "share of the weights",
            note="How far the matrices are from where training began, as a share of their norm there.",
        ),
        _simple(
            subject,
            "forwards",
            "Forward passes per update",
            lambda run: _per_update(run, "forwards"),
            "passes",
            note="On each process, trials and line losses included; evaluation is not counted.",
        ),
        _simple(
            subject,
            "speed",
            f"{unit.capitalize()} per second",
            lambda run: run.speed(unit),
            f"{unit}/s",
            note="From log to log; evaluations and checkpoints between them count.",
        ),
    ]


def _series(key: str, run: Run) -> list[Point]:
    return run.series(key)


def _titled(metric: str) -> str:
    return metric.removeprefix("eval_").replace("_", " ").capitalize()


# ---- panels ----


def _over(run: Run, points: list[Point], axis: str) -> list[Point]:
    position = run.axis(axis)
    assert position is not None
    return [(position(step), value) for step, value in points]


def _group_curves(subject: Subject, series: Callable[[Run], list[Point]], axis: str, kind: str = "line") -> list[Curve]:
    """A curve a group; of several seeds the median, and the band between the lowest and the highest."""
    curves = []
    for index, group in enumerate(subject.groups):
        of_runs = [points for run in group.runs if (points := _over(run, series(run), axis))]
        if len(of_runs) == 1:
            curves.append(Curve(group.label, of_runs[0], index, kind))
        elif of_runs:
            band = median_and_band(of_runs)
            label = f"{group.label} (median of {len(of_runs)})"
            points, edges = [(x, middle) for x, _, middle, _ in band], [(x, low, high) for x, low, _, high in band]
            curves.append(Curve(label, points, index, kind, edges))
    return [curve for curve in curves if curve.points]


def _add_views(
    panel: Panel,
    subject: Subject,
    curves_of: Callable[[str], list[Curve]],
    y_title: str,
    *,
    scales: tuple[str, ...] = ("linear",),
    marks_of: Callable[[str], list[Mark]] = lambda axis: [],
) -> Panel:
    """Draw a panel over every axis; ``curves_of`` and ``marks_of`` are asked for each."""
    for axis in subject.axes:
        curves = curves_of(axis)
        panel.curves = panel.curves or curves
        ends = max(position(run.updates) for run in subject.runs if (position := run.axis(axis)))
        for scale in scales:
            summary = f"{panel.title} over {axis}: " + "; ".join(map(_in_words, curves))
            drawing = draw(
                curves, x_title=AXIS_TITLES[axis], y_title=y_title, summary=summary, log=scale == "log",
                marks=marks_of(axis), x_ends=(0.0, ends),
            )  # fmt: skip
            if drawing:
                panel.views.append((axis, scale, drawing))
    return panel


def _in_words(curve: Curve) -> str:
    finite = [y for _, y in curve.points if math.isfinite(y)]
    return f"{curve.label} from {number(finite[0])} to {number(finite[-1])}" if finite else curve.label


def _simple(
    subject: Subject, name: str, title: str, series: Callable[[Run], list[Point]], y_title: str, note: str = ""
) -> Panel:
    panel = Panel(name, title, note=note)
    return _add_views(panel, subject, lambda axis: _group_curves(subject, series, axis), y_title)


def _smoothed(subject: Subject, key: str, title: str, y_title: str, note: str, *, log: bool = False) -> Panel:
    """A number of single updates, which says little, beneath its running mean."""

    def curves(axis: str) -> list[Curve]:
        means = _group_curves(subject, lambda run: running_mean(run.series(key)), axis)
        if subject.only is None:
            return means
        raw = Curve("of single updates", _over(subject.only, subject.only.series(key), axis), 0, "faint", dashed=False)
        means = [Curve("running mean", curve.points, 0) for curve in means]
        return [raw, *means] if raw.points else []

    return _add_views(Panel(key, title, note=note), subject, curves, y_title, scales=("log",) if log else ("linear",))


def _loss(subject: Subject) -> list[Panel]:
    """Training and validation loss: of one run together, of several apart."""
    scales = ("linear", "log")
    if (run := subject.only) is not None:
        averaged = run.facts.get("averaged", "off") != "off" or run.facts.get("boosted", False)
        of_validation = "validation loss of the averaged weights" if averaged else "validation loss"

        def curves(axis: str) -> list[Curve]:
            losses = run.series("loss")
            found = [
                Curve("training loss", _over(run, losses, axis), 0, "faint", dashed=False),
                Curve("its running mean", _over(run, running_mean(losses), axis), 0),
                Curve(of_validation, _over(run, run.series("eval_loss"), axis), 1),
            ]
            return [curve for curve in found if curve.points]

        note = "A triangle is an update whose step before was taken back." if run.taken_back else ""
        panel = Panel("loss", "Loss", note=note)
        return [_add_views(panel, subject, curves, "loss", scales=scales, marks_of=lambda axis: _events(run, axis))]
    training = Panel("loss", "Training loss, running mean")
    validation = Panel("eval_loss", "Validation loss")

    def of_training(axis: str) -> list[Curve]:
        return _group_curves(subject, lambda run: running_mean(run.series("loss")), axis)

    def of_validation_(axis: str) -> list[Curve]:
        return _group_curves(subject, lambda run: run.series("eval_loss"), axis)

    return [
        _add_views(training, subject, of_training, "training loss", scales=scales),
        _add_views(validation, subject, of_validation_, "validation loss", scales=scales),
    ]


def _events(run: Run, axis: str) -> list[Mark]:
    """Updates that were taken back."""
    position = run.axis(axis)
    assert position is not None
    marks = []
    close: dict[int, list[float]] = {}  # those that would be drawn over one another
    for step in run.taken_back:
        close.setdefault(int(WIDTH * step / max(run.updates, 1)), []).append(step)
    for steps in close.values():
        text = f"taken back at update {steps[0]:,.0f}"
        if len(steps) > 1:
            text = f"{len(steps)} taken back, at updates {steps[0]:,.0f} to {steps[-1]:,.0f}"
        marks.append(Mark("restart", position(steps[0]), text=text))
    return marks


def _rate(subject: Subject) -> Panel:
    run = subject.only

    def marks(axis: str) -> list[Mark]:
        if run is None:
            return []
        found, position = _events(run, axis), run.axis(axis)
        assert position is not None
        rows = [name for name in LIMITS.values() if run.limits.get(name)]
        for row, name in enumerate(rows):
            for first, last, share in run.limits[name]:
                text = f"{name} in force in {share:.0%} of updates {first + 1:,.0f} to {last:,.0f}"
                found.append(Mark("limit", position(first), end=position(last), text=text, strength=share, row=row))
        return [*found, *(Mark("row", text=name, row=row) for row, name in enumerate(rows))]

    note = "The rate in force: α, times a scheduler's factor."
    if run is not None and any(run.limits.values()):
        note += " Bars at the bottom: where a floor, a crop or a ceiling decided it, the fuller the more often."
    panel = Panel("rate", "Learning rate", note=note)
    series: Callable[[Run], list[Point]] = lambda one: [p for p in one.series("learning_rate") if p[1] > 0]  # noqa: E731
    return _add_views(
        panel, subject, lambda axis: _group_curves(subject, series, axis), "learning rate", scales=("log",),
        marks_of=marks,
    )  # fmt: skip


def _beginning(subject: Subject) -> Panel:
    """The beginning as a learning-rate finder's curve: the rate that was tried, and the slope that was left."""
    panel = Panel("beginning", "The first learning rates")
    curves, marks = [], [Mark("horizontal", y=0.0, text="minimum of the line")]
    for index, group in enumerate(subject.groups):
        for run in group.runs:
            tried = [e for e in run.beginning if e.get("ratio") is not None and e["tried"] > 0]
            if not tried:
                continue
            ratios = [min(max(float(e["ratio"]), LOWEST_RATIO), HIGHEST_RATIO) for e in tried]
            points = [(float(e["tried"]), ratio) for e, ratio in zip(tried, ratios, strict=True)]
            curves.append(Curve(run.name if subject.only is None else "steps that were tried", points, index, "dots"))
            for order, (at, entry) in enumerate(zip(points, tried, strict=True), 1):
                if entry.get("taken_back"):
                    marks.append(Mark("cross", *at, text="taken back at once"))
                if subject.only is not None:
                    marks.append(Mark("text", *at, text=str(order)))
            rate = float(run.beginning[-1]["rate"])
            marks.append(Mark("vertical", rate, text="" if subject.only is None else f"after them: {rate:.2g}"))
    if not curves:
        return panel
    ends = [mark.x for mark in marks if mark.kind == "vertical"] + [x for curve in curves for x, _ in curve.points]
    panel.curves = curves
    panel.note = (
        "Each dot is a step that was tried, and the share of the slope that was left at its end: near 1 the step was "
        "much too short, at 0 it ended in the minimum of its line, below 0 it went past it. The dashed line is the "
        "rate after them."
    )
    drawing = draw(
        curves, x_title="learning rate that was tried", y_title="slope left at the end of the step", marks=marks,
        summary=panel.title + ": " + "; ".join(map(_in_words, curves)), x_log=True,
        x_ends=(min(ends), max(ends)), y_ends=(LOWEST_RATIO / 4, 1.0),
    )  # fmt: skip
    panel.views = [("", "linear", drawing)] if drawing else []
    return panel


def _batch(subject: Subject) -> Panel:
    panel = Panel("batch", "Batch size")
    run = subject.only

    def marks(axis: str) -> list[Mark]:
        if run is None or len(run.batch_changes) > MOST_NAMED:
            return []
        position = run.axis(axis)
        assert position is not None
        return [
            Mark("text", position(float(e["step"])), float(e["batch_size"]), text=_why(e)) for e in run.batch_changes
        ]

    if run is not None and run.batch_changes:
        items = "".join(
            f"<li>update {entry['step']:,}: {entry['batch_size']:,.0f} samples, {html.escape(_why(entry))}</li>"
            for entry in run.batch_changes
        )
        many = "1 change" if len(run.batch_changes) == 1 else f"{len(run.batch_changes)} changes"
        panel.more = f"<details><summary>{many}</summary><ul>{items}</ul></details>"
        panel.note = (
            "rise: the mean loss of a control cycle rose; noise: its spread is over half its mean; stall: no better "
            "mean in three cycles. Every third change shrinks."
            if any(e.get("condition") in ("rise", "noise", "stall") for e in run.batch_changes)
            else ""
        )
    return _add_views(
        panel, subject, lambda axis: _group_curves(subject, lambda one: one.batch, axis, "steps"), "samples an update",
        marks_of=marks,
    )  # fmt: skip


def _why(decision: dict[str, Any]) -> str:
    reason = str(decision.get("condition"))
    return f"{reason} (shrinks)" if decision.get("change") == "shrink" else reason


def _per_update(run: Run, key: str) -> list[Point]:
    """A count's growth from log to log, over the updates between them."""
    points, before = [], (0.0, 0.0)
    for step, count in run.series(key):
        if step > before[0]:
            points.append((step, (count - before[1]) / (step - before[0])))
            before = step, count
    return points


# ---- HTML ----


def _figure(panel: Panel, *, titled: bool) -> str:
    views = "".join(
        f'<div class="view" data-axis="{axis}" data-scale="{scale}"{" hidden" if position else ""}>{drawing}</div>'
        for position, (axis, scale, drawing) in enumerate(panel.views)
    )
    items = "".join(f"<span>{swatch(curve)}{html.escape(curve.label)}</span>" for curve in panel.curves)
    legend = f'<div class="legend">{items}</div>' if len(panel.curves) > 1 or titled else ""
    note = f"<figcaption>{html.escape(panel.note)}</figcaption>" if panel.note else ""
    return f'<figure id="{panel.name}"><h2>{html.escape(panel.title)}</h2>{legend}{views}{note}{panel.more}</figure>\n'


def _headline(subject: Subject) -> str:
    if (run := subject.only) is None:
        return ""
    words = [run.optimizer, f"{run.updates:,} updates"]
    for axis, unit in (("samples", "samples"), ("tokens", "tokens")):
        if (position := run.axis(axis)) is not None:
            words.append(f"{position(run.updates):,.0f} {unit}")
    if "parameters" in run.facts:
        words.append(f"{run.facts['parameters']:,} parameters")
    ends = [("training loss", run.last("loss")), ("validation loss", run.last("eval_loss"))]
    ends += [(_titled(name).lower(), run.last(name)) for name in run.metrics]
    words += [f"{name} {number(value)}" for name, value in ends if value is not None]
    return f'<p class="soft">{html.escape(" · ".join(words))}</p>'


def _verdicts(run: Run, *, titled: bool) -> str:
    items = "".join(
        f'<li class="{verdict.kind}"><b>{MARKS[verdict.kind]}</b>{html.escape(verdict.text)}</li>'
        for verdict in verdicts(run)
    )
    if titled:
        marks = " ".join(MARKS[verdict.kind] for verdict in verdicts(run))
        summary = f"<summary>{html.escape(run.name)} <span class=soft>{marks}</span></summary>"
        return f'<details class="of-run">{summary}<ul class="verdicts">{items}</ul></details>'
    return f'<ul class="verdicts">{items}</ul>'


def _table(groups: list[Group]) -> str:
    header, rows = table(groups)
    is_text = [name in ("run", "group", "optimizer") for name in header]

    def line(cells: list[str], tag: str) -> str:
        marked = zip(cells, is_text, strict=True)
        return "".join(f"<{tag}{' class=text' if text else ''}>{html.escape(cell)}</{tag}>" for cell, text in marked)

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{line(header, "th")}</tr></thead><tbody>{body}</tbody></table></div>'


def _footer(subject: Subject) -> str:
    parts = []
    for run in subject.runs:
        lines = [str(run.facts[name]) for name in ("command", "machine") if name in run.facts]
        if isinstance(versions := run.facts.get("versions"), dict):
            lines.append(", ".join(f"{package} {version}" for package, version in versions.items()))
        if "seed" in run.facts:
            lines.append(f"seed {run.facts['seed']}")
        shown = html.escape("\n".join([str(run.folder), *lines]))
        parts.append(
            f"<details><summary>{html.escape(run.name)}: how it was made</summary><pre>{shown}</pre></details>"
        )
    return f"<footer>{''.join(parts)}<p>Made by hf-elra report from the logs of the runs.</p></footer>"


def _resource(name: str) -> str:
    return files("hf_elra.report").joinpath(name).read_text(encoding="utf-8")
