"""Axes, numbers and marks that every chart shares. Text is escaped; colours come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

RADIUS = 3
"""Radius of a dot in pixels, as in the style sheet."""
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


@dataclass(frozen=True)
class Scale:
    """A linear map from values to pixels.

    Attributes:
        values: first and last value.
        pixels: the pixels of these two values.
    """

    values: tuple[float, float]
    pixels: tuple[float, float]

    def __call__(self, value: float) -> float:
        """The pixel of a value, rounded to a tenth."""
        (low, high), (start, end) = self.values, self.pixels
        return round(start + (value - low) / ((high - low) or 1.0) * (end - start), 1)


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    """A text element."""
    return f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{escape(words)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    """A straight line."""
    return f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" class="{kind}"/>'


def dot(x: float, y: float, tip: str, *, filled: bool = True, radius: float = RADIUS) -> str:
    """A round mark with a tip."""
    size = "" if radius == RADIUS else f' style="r:{radius:g}px"'
    return f'<circle class="m{"" if filled else " o"}" cx="{x:g}" cy="{y:g}"{size}>{_tip(tip)}</circle>'


def box(x: float, y: float, width: float, height: float, tip: str, kind: str, style: str = "") -> str:
    """A rectangle with a tip."""
    more = f' style="{escape(style)}"' if style else ""
    return (
        f'<rect class="m {kind}" x="{x:g}" y="{y:g}" width="{max(width, 0):g}" height="{height:g}"{more}>'
        f"{_tip(tip)}</rect>"
    )


def group(series: int | None, content: str, tips: str = "") -> str:
    """Marks whose tips begin alike: of a series, which has a colour, dashes and can be switched off, or of a row (None)."""
    beginning = f' data-of="{escape(tips)}"' if tips else ""
    if series is not None:
        beginning += f' class="series s{series % SERIES} d{series // SERIES % 3}" data-series="{series}"'
    return f"<g{beginning}>{content}</g>"


def cell(x: float, y: float, tip: str, kind: str) -> str:
    """A rectangle with a tip, whose size is in the style sheet."""
    return f'<rect class="m {kind}" x="{x:g}" y="{y:g}">{_tip(tip)}</rect>'


def _tip(words: str) -> str:
    return f"<title>{escape(words)}</title>"


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
