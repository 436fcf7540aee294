"""Tables of what a client spec's data hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median

from rich import box
from rich.table import Table
from rich.text import Text
from torch import Tensor

from tap_flower.data.check import SplitSummary

_CLASSES, _SIZES, _CHARACTERS = 6, 3, 160
"""Classes, image sizes and characters of a text that are shown in full."""


def data_table(summaries: Sequence[SplitSummary], text_length: int) -> Table:
    """Task × split: rows, balance of the classes, token lengths, image sizes."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.caption = f"tokens: fewest / median / most, before texts are cut at {text_length}"
    for name in ("task", "split", "rows", "classes", "text tokens", "target tokens", "images"):
        table.add_column(name, justify="right" if name == "rows" else "left")
    for found in summaries:
        tokens = [_tokens(found.tokens.get(role, []), text_length) for role in ("text", "target")]
        cells = (found.task, found.split, f"{found.rows:,}", _balance(found.classes), *tokens, _sizes(found.images))
        table.add_row(*(Text(cell) for cell in cells))
    return table


def example_table(summaries: Sequence[SplitSummary]) -> Table:
    """The examples of each split: what the model gets, and what it is to give."""
    table = Table("task", "split", "row", "what the model gets, and what it is to give", box=box.SIMPLE_HEAD)
    for found in summaries:
        for example in found.examples:
            shown = "\n".join(f"{role}: {_short(text)}" for role, text in example.shown.items())
            table.add_row(*(Text(cell) for cell in (found.task, found.split, str(example.row), shown)))
    return table


def exchange_line(tensors: Mapping[str, Tensor]) -> str:
    """How much a client and the server send each other."""
    megabytes = sum(tensor.nbytes for tensor in tensors.values()) / 1e6
    return (
        f"{len(tensors)} tensors, {megabytes:.3f} MB of values to the client and as much back in each of its rounds, and "
        "to the client once more for stage 2; half of it with wire.encoding=bfloat16, a quarter with int8"
    )


def _balance(classes: Counter[str]) -> str:
    total = max(1, classes.total())
    lines = [f"{name} {count:,} ({count / total:.0%})" for name, count in classes.most_common()]
    if len(lines) > _CLASSES:
        lines = [f"{len(lines)} classes", f"most: {lines[0]}", f"fewest: {lines[-1]}"]
    return "\n".join(lines)


def _tokens(lengths: Sequence[int], text_length: int) -> str:
    if not lengths:
        return ""
    cut = sum(length > text_length for length in lengths)
    return f"{min(lengths)} / {median(lengths):g} / {max(lengths)}" + (f"\n{cut:,} cut" if cut else "")


def _sizes(images: Counter[tuple[int, int]]) -> str:
    lines = [f"{width}x{height}: {count:,}" for (width, height), count in images.most_common(_SIZES)]
    more = len(images) - len(lines)
    return "\n".join(lines + ([f"{more:,} other sizes"] if more else []))


def _short(text: str) -> str:
    return text if len(text) <= _CHARACTERS else text[:_CHARACTERS] + "…"
