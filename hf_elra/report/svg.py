"""Draws curves as SVG text: axes, ticks, lines, bands, marks. Knows nothing of runs.

Colours and fonts are those of the page that a drawing stands in (``page.css``); a curve has the class ``c0`` to ``c6``,
and a dash pattern of its own, so that no colour is needed to tell curves apart.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

Point = tuple[float, float]

WIDTH, HEIGHT = 600, 280
LEFT, RIGHT, TOP, BOTTOM = 72, 14, 14, 40
MOST_POINTS = 300
"""A curve of more points is thinned; of every stretch the lowest and the highest stay."""
COLOURS = 7
DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2", "12 4", "1 2")


@dataclass
class Curve:
    """One curve.

    Args:
        label: of the legend.
        points: x and y, rising in x; a y that is not finite breaks the line.
        index: number of its colour and its dash pattern.
        kind: ``"line"``, ``"faint"`` (what a running mean is drawn over), ``"steps"`` or ``"dots"``.
        band: x, low and high, drawn beneath.
        dashed: whether it has the dash pattern of its number.
    """

    label: str
    points: list[Point]
    index: int = 0
    kind: str = "line"
    band: list[tuple[float, float, float]] = field(default_factory=list)
    dashed: bool = True


@dataclass
class Mark:
    """A mark in a drawing.

    Args:
        kind: ``"restart"`` (a tick at the upper edge), ``"vertical"`` or ``"horizontal"`` (a dashed line), ``"limit"``
            (a bar at the lower edge, in the row ``row``), ``"row"`` (the name of such a row), ``"cross"``, ``"text"``.
        x, y: where, as far as the kind needs it.
        end: of a limit.
        text: shown beside it, or when it is pointed at.
        strength: of a limit, from 0 to 1.
        row: of a limit, from below.
    """

    kind: str
    x: float = 0.0
    y: float = 0.0
    end: float = 0.0
    text: str = ""
    strength: float = 1.0
    row: int = 0


@dataclass
class Scale:
    """From values to pixels.

    Args:
        low, high: the values at both ends.
        start, end: the pixels there.
        log: whether it is logarithmic.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the pixel of a value."""
        low, high, at = self.low, self.high, value
        if self.log:
            low, high, at = math.log(low), math.log(high), math.log(max(value, 1e-300))
        return self.start + (self.end - self.start) * (at - low) / (high - low)

    def ticks(self) -> list[float]:
        """Return round values within the ends."""
        if not self.log:
            return _round_values(self.low, self.high)
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        decades = [10.0**k for k in range(first, last + 1, max(1, -(-(last - first) // 6)))]
        inside = [tick for tick in decades if self.low <= tick <= self.high * (1 + 1e-9)]
        if len(inside) >= 3:
            return inside
        finer = [m * 10.0**k for k in range(first, last + 1) for m in (1, 2, 5)]
        inside = [tick for tick in finer if self.low <= tick <= self.high * (1 + 1e-9)]
        return inside if len(inside) >= 2 else _round_values(self.low, self.high)


def scale_over(values: Iterable[float], start: float, end: float, *, log: bool = False) -> Scale | None:
    """Return a scale over all finite values, with a margin; None where there are none."""
    finite = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
    if not finite:
        return None
    low, high = min(finite), max(finite)
    if log:
        if high / low < 1.2:
            low, high = low / 1.5, high * 1.5
        margin = (high / low) ** 0.05
        return Scale(low / margin, high * margin, start, end, True)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = low - (abs(low) * 0.1 or 1), high + (abs(high) * 0.1 or 1)
    margin = 0.05 * (high - low)
    return Scale(low - margin, high + margin, start, end)


def draw(
    curves: list[Curve],
    *,
    x_title: str,
    y_title: str,
    summary: str,
    log: bool = False,
    x_log: bool = False,
    marks: list[Mark] | None = None,
    x_ends: tuple[float, float] | None = None,
    y_ends: tuple[float, float] | None = None,
) -> str:
    """Return an ``<svg>`` of the curves; empty text where there is nothing to draw.

    Args:
        curves: drawn in this order.
        x_title, y_title: of the axes.
        summary: what the drawing shows, for those who do not see it.
        log, x_log: whether y and x are logarithmic.
        marks: drawn beside the curves.
        x_ends: the least and the greatest x; those of the curves otherwise.
        y_ends: two values that are to be seen, whatever the curves are.
    """
    all_x = x_ends or [x for curve in curves for x, _ in curve.points]
    all_y = [y for curve in curves for _, y in curve.points]
    all_y += [y for curve in curves for _, low, high in curve.band for y in (low, high)]
    if y_ends is not None:
        all_y += y_ends
    up = scale_over(all_y, HEIGHT - BOTTOM, TOP, log=log)
    across = scale_over(all_x, LEFT, WIDTH - RIGHT, log=x_log)
    if up is None or across is None:
        return ""
    if not x_log and min(all_x) >= 0:
        across = Scale(0.0 if min(all_x) < 0.2 * max(all_x) else min(all_x), max(all_x) or 1.0, LEFT, WIDTH - RIGHT)
    data = f"{across.low:.8g} {across.high:.8g} {int(x_log)} {up.low:.8g} {up.high:.8g} {int(log)}"
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(summary)}" data-scales="{data}" '
        f'data-plot="{LEFT} {WIDTH - RIGHT} {TOP} {HEIGHT - BOTTOM}">',
        *_frame(across, up, x_title, y_title),
    ]
    behind: list[str] = []
    before: list[str] = []
    for mark in marks or []:
        (behind if mark.kind in ("horizontal", "vertical") else before).append(_mark(mark, across, up))
    parts += behind
    parts += [_curve(curve, across, up) for curve in curves]
    parts += before
    parts.append("</svg>")
    return "\n".join(parts)


def _frame(across: Scale, up: Scale, x_title: str, y_title: str) -> list[str]:
    parts = []
    for tick in up.ticks():
        y = up(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{tick_text(tick)}</text>')
    for tick in across.ticks():
        x = across(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        label = f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">{tick_text(tick)}</text>'
        parts.append(label)
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text class="title" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}">{html.escape(x_title)}</text>')
    parts.append(
        f'<text class="title" transform="translate(13 {middle}) rotate(-90)" text-anchor="middle">'
        f"{html.escape(y_title)}</text>"
    )
    return parts


def _curve(curve: Curve, across: Scale, up: Scale) -> str:
    colour = f"c{curve.index % COLOURS}"
    parts = []
    if curve.band:
        top = [(across(x), _within(up, high)) for x, _, high in curve.band]
        bottom = [(across(x), _within(up, low)) for x, low, _ in reversed(curve.band)]
        shape = " ".join(f"{x:.1f},{y:.1f}" for x, y in top + bottom)
        parts.append(f'<polygon class="band {colour}" points="{shape}"/>')
    pixels = [
        [(across(x), _within(up, y)) for x, y in piece] for piece in _pieces(thinned(curve.points), positive=up.log)
    ]
    if curve.kind == "dots":
        dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for piece in pixels for x, y in piece)
        parts.append(f'<g class="dots {colour}">{dots}</g>')
    label, dash = html.escape(curve.label, quote=True), DASHES[curve.index % len(DASHES)] if curve.dashed else ""
    path = " ".join(_path(piece, steps=curve.kind == "steps") for piece in pixels)
    if path:
        look = "faint" if curve.kind == "faint" else "thin" if curve.kind == "dots" else "line"
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        parts.append(f'<path class="curve {look} {colour}" data-label="{label}" d="{path}"{dashes}/>')
    for piece in pixels:
        if len(piece) == 1 and curve.kind != "dots":
            parts.append(f'<circle class="dots {colour}" cx="{piece[0][0]:.1f}" cy="{piece[0][1]:.1f}" r="2.6"/>')
    return "\n".join(parts)


def _within(up: Scale, value: float) -> float:
    """The pixel of a value; one that is beyond an end is drawn there."""
    return up(min(max(value, up.low), up.high))


def _path(piece: list[Point], *, steps: bool) -> str:
    (x, y), *rest = piece
    words = [f"M{x:.1f} {y:.1f}"]
    for after_x, after_y in rest:
        words.append(f"H{after_x:.1f}V{after_y:.1f}" if steps else f"L{after_x:.1f} {after_y:.1f}")
    return "".join(words)


def _pieces(points: list[Point], *, positive: bool) -> Iterable[list[Point]]:
    """The stretches of points that can be drawn."""
    piece: list[Point] = []
    for point in points:
        if math.isfinite(point[1]) and (point[1] > 0 or not positive):
            piece.append(point)
        elif piece:
            yield piece
            piece = []
    if piece:
        yield piece


def thinned(points: list[Point], most: int = MOST_POINTS) -> list[Point]:
    """Return about ``most`` of the points: the ends, and of every stretch between the lowest and the highest."""
    if len(points) <= most:
        return points
    stretches, kept = most // 2, {0, len(points) - 1}
    for number in range(stretches):
        numbers = range(number * len(points) // stretches, (number + 1) * len(points) // stretches)
        finite = [i for i in numbers if math.isfinite(points[i][1])]
        if len(finite) < len(numbers):
            kept.add(next(i for i in numbers if not math.isfinite(points[i][1])))
        if finite:
            key: Callable[[int], float] = lambda i: points[i][1]  # noqa: E731
            kept |= {min(finite, key=key), max(finite, key=key)}
    return [points[i] for i in sorted(kept)]


def _mark(mark: Mark, across: Scale, up: Scale) -> str:
    text, top, bottom = html.escape(mark.text), TOP, HEIGHT - BOTTOM
    x = min(max(across(mark.x), LEFT), WIDTH - RIGHT)
    told = f"<title>{text}</title>" if text else ""
    if mark.kind == "restart":
        return f'<path class="restart" d="M{x:.1f} {top}l-4 -8h8z">{told}</path>'
    if mark.kind == "vertical":
        anchor, shift = ("end", -5) if x > (LEFT + WIDTH) / 2 else ("start", 5)
        return (
            f'<line class="rule" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>'
            f'<text class="note" x="{x + shift:.1f}" y="{top + 12}" text-anchor="{anchor}">{text}</text>'
        )
    if mark.kind == "horizontal":
        y = up(mark.y)
        return (
            f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="note" x="{WIDTH - RIGHT - 4}" y="{y - 4:.1f}" text-anchor="end">{text}</text>'
        )
    if mark.kind == "limit":
        width, y = max(1.0, min(across(mark.end), WIDTH - RIGHT) - x), bottom - 10 - 11 * mark.row
        return (
            f'<rect class="limit" x="{x:.1f}" width="{width:.1f}" y="{y}" height="8" '
            f'fill-opacity="{0.15 + 0.85 * mark.strength:.2f}">{told}</rect>'
        )
    y = _within(up, mark.y)
    if mark.kind == "cross":
        return f'<path class="cross" d="M{x - 5:.1f} {y - 5:.1f}l10 10m0 -10l-10 10">{told}</path>'
    if mark.kind == "row":
        y = bottom - 3 - 11 * mark.row
        return f'<text class="note" x="{WIDTH - RIGHT - 3}" y="{y}" text-anchor="end">{text}</text>'
    return f'<text class="note" x="{x:.1f}" y="{y - 7:.1f}" text-anchor="middle">{text}</text>'


def swatch(curve: Curve) -> str:
    """A small line of a curve's colour and pattern, for a legend."""
    dash = DASHES[curve.index % len(DASHES)] if curve.dashed else ""
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    look = "faint" if curve.kind == "faint" else "line"
    return (
        '<svg class="swatch" viewBox="0 0 26 8" aria-hidden="true">'
        f'<path class="{look} c{curve.index % COLOURS}" d="M0 4H26"{dashes}/></svg>'
    )


def tick_text(value: float) -> str:
    """A tick's number, short."""
    size = abs(value)
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= unit * (10 if name == "k" else 1):
            return f"{value / unit:g}{name}"
    if size and size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{round(value, 10):g}"


def _round_values(low: float, high: float) -> list[float]:
    raw = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]
