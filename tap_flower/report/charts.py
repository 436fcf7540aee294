"""The report's charts: pure functions from values to SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from tap_flower.report.svg import SERIES, Scale, box, cell, dot, drawing, group, line, number, text, ticks

_WIDTH = 340
"""Width of a chart in pixels: that of a phone, so that its letters are not scaled down there."""


@dataclass(frozen=True)
class Point:
    """A point of a line.

    Attributes:
        x: the round, or what else the chart is over.
        y: the value.
        tip: what the reader is told about it.
        filled: whether its mark is filled.
        half: half the width of its interval, or None where it has none.
    """

    x: float
    y: float
    tip: str
    filled: bool = True
    half: float | None = None


@dataclass(frozen=True)
class Series:
    """A line of a chart.

    Attributes:
        name: its name in the legend.
        points: its points, in order.
        tips: the beginning of all its points' tips.
        marks: whether each point has a mark; without them there is the line alone.
    """

    name: str
    points: Sequence[Point]
    tips: str = ""
    marks: bool = True


@dataclass(frozen=True)
class Axis:
    """The horizontal axis of a line chart.

    Attributes:
        name: what it counts.
        marks: values that have a number, rising.
        end: last value, where that is not the last mark.
    """

    name: str
    marks: Sequence[float]
    end: float | None = None


def rounds_axis(rounds: int) -> Axis:
    """The axis from round 1 to the last one."""
    return Axis("round", _round_ticks(rounds), max(rounds, 2))


def line_chart(series: Sequence[Series], axis: Axis, y_label: str, label: str) -> Markup:
    """A chart of lines. The axis of values holds all values and their intervals, and need not begin at 0.

    Args:
        series: the lines.
        axis: the horizontal axis.
        y_label: name and unit of the values, and what is better.
        label: what the chart shows, for those who do not see it.
    """
    height, left, right, top, bottom = 210, 46, 8, 26, 38
    ends = [p.y + sign * (p.half or 0.0) for one in series for p in one.points for sign in (-1, 1)]
    y_ticks = ticks(min(ends), max(ends)) if ends else [0.0, 1.0]
    y = Scale((y_ticks[0], y_ticks[-1]), (height - bottom, top))
    x = Scale((axis.marks[0], axis.marks[-1] if axis.end is None else axis.end), (left + 6, _WIDTH - right - 6))
    parts = [text(2, 12, y_label, "label")]
    for value in y_ticks:
        parts += [
            line(left, y(value), _WIDTH - right, y(value), "rule"),
            text(left - 5, y(value) + 4, f"{value:g}", "tick", "end"),
        ]
    for value in axis.marks:
        parts.append(text(x(value), height - bottom + 16, f"{value:g}", "tick", "middle"))
    parts.append(text((left + _WIDTH - right) / 2, height - 5, axis.name, "label", "middle"))
    for place, one in enumerate(series):
        path = " ".join(f"{x(point.x):g},{y(point.y):g}" for point in one.points)
        intervals = "".join(
            line(x(p.x), y(p.y - p.half), x(p.x), y(p.y + p.half), "interval") for p in one.points if p.half is not None
        )
        marks = "".join(dot(x(p.x), y(p.y), p.tip, filled=p.filled) for p in one.points if one.marks)
        parts.append(group(place, f'<polyline points="{path}"/>{intervals}{marks}', one.tips))
    return drawing(_WIDTH, height, label, parts)


def _rules(places: Mapping[float, float], top: float, base: float) -> list[str]:
    """Vertical lines with a number below each, for value -> pixel."""
    parts = []
    for value, x in places.items():
        parts += [line(x, top, x, base, "rule"), text(x, base + 16, f"{value:g}", "tick", "middle")]
    return parts


def _round_ticks(rounds: int) -> list[int]:
    return sorted({1, *(int(t) for t in ticks(0, rounds, 6) if 1 < t <= rounds and t == int(t))})


@dataclass(frozen=True)
class Row:
    """A row of a chart of dots: every client's value, and their mean."""

    name: str
    mean: float
    values: Mapping[str, float]


def dot_rows(rows: Sequence[Row], x_label: str, label: str) -> Markup:
    """A chart with a row for each model: a dot for each client, a bar at the mean. The axis begins at 0."""
    left, right, top, step = 104, 14, 8, 26
    height = top + step * len(rows) + 40
    values = [value for row in rows for value in (*row.values.values(), row.mean)]
    x_ticks = ticks(min(0.0, *values), max(values), 4)
    x = Scale((x_ticks[0], x_ticks[-1]), (left, _WIDTH - right))
    parts = _rules({value: x(value) for value in x_ticks}, top, top + step * len(rows))
    parts.append(text((left + _WIDTH - right) / 2, height - 4, x_label, "label", "middle"))
    for place, row in enumerate(rows):
        middle = top + step * (place + 0.5)
        parts.append(text(left - 8, middle + 4, row.name, "tick", "end"))
        tip = f"{row.name}, mean of {len(row.values)} clients: {number(row.mean)}"
        marks = [
            dot(x(v), middle, f"{row.name}, {client}: {number(v)}", filled=False, radius=4)
            for client, v in row.values.items()
        ]
        mean = box(x(row.mean) - 1.5, middle - 9, 3, 18, tip, "mean")
        parts.append(f'<g class="s{place % SERIES}">{"".join(marks)}{mean}</g>')
    return drawing(_WIDTH, height, label, parts)


@dataclass(frozen=True)
class Bar:
    """A component's bars: MB to the clients, and back."""

    name: str
    down: float
    up: float


def byte_bars(bars: Sequence[Bar], label: str) -> Markup:
    """A chart with two bars for each component, to clients and back, in MB. The axis begins at 0."""
    step, top = 44, 4
    height = top + step * len(bars) + 38
    x_ticks = ticks(0, max((max(bar.down, bar.up) for bar in bars), default=1.0) or 1.0, 4)
    x = Scale((0, x_ticks[-1]), (4, _WIDTH - 16))
    parts = _rules({value: x(value) for value in x_ticks}, top, top + step * len(bars))
    parts.append(text(_WIDTH / 2, height - 4, "MB in the whole run (lower is better)", "label", "middle"))
    for place, bar in enumerate(bars):
        y = top + step * place
        parts.append(text(4, y + 13, bar.name, "tick"))
        for series, (way, value) in enumerate((("to clients", bar.down), ("back", bar.up))):
            at = 18 + 10 * series
            tip = f"{bar.name}, {way}: {number(value)} MB"
            parts.append(group(series, box(4, y + at, x(value) - 4, 9, tip, "bar")))
    return drawing(_WIDTH, height, label, parts)


def matrix(names: Sequence[str], cells: Mapping[tuple[str, str], float | None], label: str) -> Markup:
    """A matrix of cosines between tasks: red is opposed (-1), blue the same direction (1); every cell says its number.

    Args:
        names: names of the tasks.
        cells: (a, b) -> cosine, for a before b; the diagonal is 1.
        label: what the matrix shows, for those who do not see it.
    """
    left, top = 110, 6
    size = min(72, (_WIDTH - left - 4) // max(len(names), 1))
    parts, height = [], top + size * len(names) + 22
    for row, a in enumerate(names):
        parts.append(text(left - 8, top + size * (row + 0.5) + 4, a, "tick", "end"))
        parts.append(text(left + size * (row + 0.5), height - 6, a[:12] + "…" * (len(a) > 12), "tick", "middle"))
        for column, b in enumerate(names):
            value = 1.0 if a == b else cells.get((a, b), cells.get((b, a)))
            kind, strength = ("opposed", -value) if (value or 0) < 0 and value is not None else ("along", value or 0.0)
            x, y = left + size * column, top + size * row
            tip = f"{a} and {b}: cosine {number(value)}"
            parts.append(
                box(x + 1, y + 1, size - 2, size - 2, tip, f"cell {kind}", f"fill-opacity:{0.08 + 0.55 * strength:.2f}")
            )
            parts.append(
                text(x + size / 2, y + size / 2 + 4, number(value)[: 6 if size > 40 else 4], "value", "middle")
            )
    return drawing(_WIDTH, height, label, parts)


@dataclass(frozen=True)
class Lane:
    """A row of the map of rounds.

    Attributes:
        name: client and task.
        replaced: round -> whether the components of the pair were replaced; rounds without the client are missing.
    """

    name: str
    replaced: Mapping[int, bool]


def round_map(lanes: Sequence[Lane], rounds: int, label: str) -> tuple[Markup, Markup]:
    """A map of rounds: a full square where a pair was replaced, a small one where it took part and was not.

    Returns:
        The picture of the rows' names, and the map, which may be wider than a page.
    """
    width, row, top = max(5, min(18, 700 // max(rounds, 1))), 18, 4
    across, height = width * rounds + 24, top + row * len(lanes) + 36
    places: dict[float, float] = {n: 8 + width * (n - 0.5) for n in _round_ticks(rounds)}
    names, parts = [], _rules(places, top, top + row * len(lanes))
    parts.append(text(8, height - 4, "round", "label"))
    for place, each in enumerate(lanes):
        y = top + row * place
        names.append(text(162, y + 13, each.name if len(each.name) < 27 else each.name[:25] + "…", "tick", "end"))
        parts.append(line(8, y + row / 2, 8 + width * rounds, y + row / 2, "lane"))
        marks = []
        for at_round, replaced in each.replaced.items():
            x = 8 + width * (at_round - 1)
            if replaced:
                marks.append(cell(x + 0.5, y + 2, f"{at_round}: replaced", "replaced"))
            else:
                marks.append(cell(x + width / 2 - 2, y + row / 2 - 2, f"{at_round}: kept its own", "kept"))
        parts.append(group(None, "".join(marks), f"{each.name}, round "))
    opening = f'<svg class="names" aria-hidden="true" width="166" height="{height}" viewBox="0 0 166 {height}">'
    parts = [f'<g style="--width:{width - 1}px">', *parts, "</g>"]
    return Markup(f"{opening}{''.join(names)}</svg>"), drawing(across, height, label, parts, "wide")
