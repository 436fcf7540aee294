"""Axes, numbers and marks that every chart shares. Text is escaped; colours come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from markupsafe import Markup, escape

SERIES = 8
"""Colours that the style sheet has for series; further series begin again."""


def number(value: float | None) -> str:
    """A number for people: three decimals, fewer for large numbers; a dash for None, infinity and NaN."""
    if value is None or not math.isfinite(value):
        return "–"
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.2e}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 100 else f"{value:.3f}"


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`, about `most` of them, equally far apart.

    Args:
        low: smallest value that is shown.
        high: largest value that is shown.
        most: largest number of steps.
    """
    if not high > low:
        low, high = low - abs(low) * 0.1 - 0.1, high + abs(high) * 0.1 + 0.1
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]


def scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """The linear map from values to pixels, rounded to a tenth, that takes `low` to `start` and `high` to `end`."""
    return lambda value: round(start + (value - low) / ((high - low) or 1.0) * (end - start), 1)


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    """A text element."""
    return f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{escape(words)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    """A straight line."""
    return f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" class="{kind}"/>'


def mark(shape: str, tip: str, kind: str = "", **place: float) -> str:
    """A `circle` or `rect` with a tip. What `place` leaves out of its size is in the style sheet."""
    where = "".join(f' {name}="{value:g}"' for name, value in place.items())
    return f'<{shape} class="m {kind}"{where}><title>{escape(tip)}</title></{shape}>'


def group(series: int | None, content: str, tips: str = "") -> str:
    """Groups marks that share the start of their tooltips: a series (coloured, can be switched off) or, with None, a row."""
    beginning = f' data-of="{escape(tips)}"' if tips else ""
    if series is not None:
        beginning += f' class="series s{series % SERIES} d{series // SERIES % 3}" data-series="{series}"'
    return f"<g{beginning}>{content}</g>"


def drawing(width: float, height: float, label: str, parts: Sequence[str], kind: str = "") -> Markup:
    """A whole picture, in which the arrow keys go from mark to mark.

    Args:
        width: width in pixels at full size.
        height: height in pixels at full size.
        label: what it shows, for those who do not see it.
        parts: the elements in it.
        kind: a class in the style sheet.
    """
    opening = (
        f'<svg class="chart {kind}" viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" role="img" '
        f'tabindex="0" aria-label="{escape(label)}">'
    )
    return Markup(f"{opening}{''.join(parts)}</svg>")
