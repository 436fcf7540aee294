"""Tables for the terminal: results, what a client spec's data hold, what a preset needs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING

from rich import box
from rich.markup import escape
from rich.table import Table as RichTable
from rich.text import Text
from torch import Tensor

from tap_flower.data.spec import ClientSpec, Source
from tap_flower.hub import CATALOGUE, fetch_command
from tap_flower.report.result_tables import Table

if TYPE_CHECKING:
    from tap_flower.data.check import SplitSummary  # it brings transformers and datasets

_CLASSES, _SIZES, _CHARACTERS = 6, 3, 160
"""Classes, image sizes and characters of a text that are shown in full."""


def terminal(table: Table) -> RichTable:
    """A table of results for the terminal; the two columns that name a row are on the left, the numbers on the right.

    No number is cut: on a narrow terminal, print it with `crop=False`.
    """
    caption, note = escape(table.caption), escape(table.note)
    shown = RichTable(title=caption, caption=note, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column, name in enumerate(table.header):
        if column < 2:
            shown.add_column(escape(name), no_wrap=True)
        else:
            header = name.replace("+", "\n+")
            words = " ".join([header, *(row[column] for row in table.rows)]).split()
            shown.add_column(escape(header), justify="right", min_width=max(map(len, words), default=1))
    for i, row in enumerate(table.rows):
        shown.add_row(*(Text(cell, "bold" if (i, j) in table.best else "") for j, cell in enumerate(row)))
    return shown


def data_table(summaries: Sequence[SplitSummary], text_length: int) -> RichTable:
    """Task × split of a client spec: rows, balance of the classes, lengths in tokens, sizes of images.

    Args:
        summaries: of every task and split.
        text_length: tokens that texts are cut at.
    """
    table = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.caption = f"tokens: fewest / median / most, before texts are cut at {text_length}"
    for name in ("task", "split", "rows", "classes", "text tokens", "target tokens", "images"):
        table.add_column(name, justify="right" if name == "rows" else "left")
    for found in summaries:
        tokens = [_tokens(found.tokens.get(role, []), text_length) for role in ("text", "target")]
        cells = (found.task, found.split, f"{found.rows:,}", _balance(found.classes), *tokens, _sizes(found.images))
        table.add_row(*map(Text, cells))
    return table


def example_table(summaries: Sequence[SplitSummary]) -> RichTable:
    """The first examples of each split: what the model gets, and what it is to give."""
    table = RichTable("task", "split", "row", "what the model gets, and what it is to give", box=box.SIMPLE_HEAD)
    for found in summaries:
        for example in found.examples:
            shown = "\n".join(f"{role}: {_short(text)}" for role, text in example.shown.items())
            table.add_row(*map(Text, (found.task, found.split, str(example.row), shown)))
    return table


def exchange_line(tensors: Mapping[str, Tensor]) -> str:
    """How much a client and the server send each other, given the tensors that they exchange."""
    megabytes = sum(tensor.nbytes for tensor in tensors.values()) / 1e6
    return (
        f"{len(tensors)} tensors, {megabytes:.3f} MB of values to the client and as much back in each of its rounds, and "
        "to the client once more for stage 2; half of it with wire.encoding=bfloat16, a quarter with int8"
    )


def download_table(specs: Sequence[ClientSpec]) -> tuple[RichTable, list[str]]:
    """What clients read: a table of backbones and data sets, and the commands that fetch those on the hub."""
    table = RichTable("backbone or data set", "split", "training rows", "licence", "MB")
    commands: dict[str, None] = {}

    def add(name: str, split: str, rows: str, command: str) -> None:
        if facts := CATALOGUE.get(name):
            commands[command] = None
            table.add_row(name, split, rows, facts.licence, str(facts.megabytes or "?"))
        else:
            table.add_row(name, split, rows, "comes with a pip package", "")

    for backbone, revision in sorted({(spec.backbone, spec.revision) for spec in specs}):
        add(backbone, "", "", fetch_command(backbone, revision, is_model=True))
    counts: Counter[Source] = Counter()
    for source in (source for spec in specs for task in spec.tasks for source in task.train):
        start, stop = source.rows or (0, None)
        counts[source.place] += (stop or start) - start
    for source, count in counts.items():
        split = f"{source.config} {source.split}" if source.config else source.split
        add(source.name, split, f"{count:,}" if count else "all", fetch_command(source.name, source.revision))
    return table, list(commands)


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
