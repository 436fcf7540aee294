"""The report's charts: pure functions from values to SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from tap_flower.report.svg import SERIES, drawing, group, line, mark, number, scale, text, ticks

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
    y = scale(y_ticks[0], y_ticks[-1], height - bottom, top)
    x = scale(axis.marks[0], axis.marks[-1] if axis.end is None else axis.end, left + 6, _WIDTH - right - 6)
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
        marks = "".join(
            mark("circle", p.tip, "" if p.filled else "o", cx=x(p.x), cy=y(p.y)) for p in one.points if one.marks
        )
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


def dot_rows(rows: Mapping[str, Mapping[str, float]], means: Mapping[str, float], x_label: str, label: str) -> Markup:
    """A chart with a row for each model: a dot for each client, a bar at the mean. The axis begins at 0.

    Args:
        rows: model -> client -> value.
        means: model -> mean over clients.
        x_label: name of the values, and what is better.
        label: what the chart shows, for those who do not see it.
    """
    left, right, top, step = 104, 14, 8, 26
    height = top + step * len(rows) + 40
    values = [value for by_client in (*rows.values(), means) for value in by_client.values()]
    x_ticks = ticks(min(0.0, *values), max(values), 4)
    x = scale(x_ticks[0], x_ticks[-1], left, _WIDTH - right)
    parts = _rules({value: x(value) for value in x_ticks}, top, top + step * len(rows))
    parts.append(text((left + _WIDTH - right) / 2, height - 4, x_label, "label", "middle"))
    for place, (model, by_client) in enumerate(rows.items()):
        middle = top + step * (place + 0.5)
        parts.append(text(left - 8, middle + 4, model, "tick", "end"))
        tip = f"{model}, mean of {len(by_client)} clients: {number(means[model])}"
        marks = [
            mark("circle", f"{model}, {client}: {number(value)}", "o large", cx=x(value), cy=middle)
            for client, value in by_client.items()
        ]
        marks.append(mark("rect", tip, "mean", x=x(means[model]) - 1.5, y=middle - 9))
        parts.append(f'<g class="s{place % SERIES}">{"".join(marks)}</g>')
    return drawing(_WIDTH, height, label, parts)


def round_map(lanes: Mapping[str, Mapping[int, bool]], rounds: int, label: str) -> tuple[Markup, Markup]:
    """A map of rounds: a full square where a pair was replaced, a small one where it took part and was not.

    Args:
        lanes: client and task -> round -> whether the components of the pair were replaced; rounds without the client are
            missing.
        rounds: number of rounds.
        label: what the map shows, for those who do not see it.

    Returns:
        The picture of the rows' names, and the map, which may be wider than a page.
    """
    width, row, top = max(5, min(18, 700 // max(rounds, 1))), 18, 4
    across, height = width * rounds + 24, top + row * len(lanes) + 36
    places: dict[float, float] = {n: 8 + width * (n - 0.5) for n in _round_ticks(rounds)}
    names, parts = [], _rules(places, top, top + row * len(lanes))
    parts.append(text(8, height - 4, "round", "label"))
    for place, (name, replaced) in enumerate(lanes.items()):
        y = top + row * place
        names.append(text(162, y + 13, name if len(name) < 27 else name[:25] + "…", "tick", "end"))
        parts.append(line(8, y + row / 2, 8 + width * rounds, y + row / 2, "lane"))
        marks = []
        for at_round, was in replaced.items():
            x = 8 + width * (at_round - 1)
            if was:
                marks.append(mark("rect", f"{at_round}: replaced", "replaced", x=x + 0.5, y=y + 2))
            else:
                marks.append(mark("rect", f"{at_round}: kept its own", "kept", x=x + width / 2 - 2, y=y + row / 2 - 2))
        parts.append(group(None, "".join(marks), f"{name}, round "))
    opening = f'<svg class="names" aria-hidden="true" width="166" height="{height}" viewBox="0 0 166 {height}">'
    parts = [f'<g style="--width:{width - 1}px">', *parts, "</g>"]
    return Markup(f"{opening}{''.join(names)}</svg>"), drawing(across, height, label, parts, "wide")
