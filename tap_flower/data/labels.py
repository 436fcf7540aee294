"""From what the data say of a row's class to the class's number: by name, and never by a guess."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from datetime import date
from decimal import Decimal

import datasets

from tap_flower.data.fields import is_missing
from tap_flower.data.sources import RowError, SourceError, SourceNote, values_of
from tap_flower.data.spec import TaskSpec
from tap_flower.plain import as_text

NO_CLASS = -1
"""Stands for the class of a row whose label is none of the task's."""
_WHOLE = re.compile(r"(-?(?:0|[1-9]\d*))(?:\.0+)?", re.ASCII)
"""A text that is a whole number, as the files that cannot say numbers write it."""
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)", re.ASCII)
_LISTED = 10
"""Names that a message lists."""


def read_labels(
    task: TaskSpec, data: datasets.Dataset, rows: Sequence[int], column: str
) -> tuple[list[int], list[SourceError]]:
    """The class of each row: the place of its label among the spec's `labels`, or without them among its class names.

    A number that is no such name is the class's place itself, where no class name is a number; a note says so.

    Args:
        task: with the classes.
        data: the data set; the column may be a `ClassLabel`, whose names count and not the data set's own numbers.
        rows: of the data set.
        column: of the labels.

    Returns:
        The class of each row, `NO_CLASS` where its label is none of the task's; an error for each such row, and a note
        where numbers were read as places.
    """
    wanted = task.labels or task.classes
    known = {as_text(label): number for number, label in enumerate(wanted)}
    names: Sequence[str] = getattr(data.features[column], "names", None) or []
    rest = f", but the client spec has {len(task.classes)} classes with labels {_list(wanted)}"
    if names:
        rest += f", and the data have {_list(names)}"
    # Classes that are only counted, or labels that are numbers, are those of a `ClassLabel` that knows none of them.
    numbered = task.labels or [str(number) for number in range(len(task.classes))] == list(task.classes)
    if names and numbered and all(_NUMBER.fullmatch(name) for name in known) and not known.keys() & set(names):
        names = []
        place = not task.labels
    else:
        place = not task.labels and not names and not any(_NUMBER.fullmatch(name) for name in known)
    by_place = place and bool(getattr(data.features[column], "names", None))

    found: list[int] = []
    errors: list[SourceError] = []
    placed: list[RowError] = []
    for part in values_of(data, rows, [column]):
        for row, values in part:
            label = values[column]
            if names:  # -1 marks a row without a label
                label = names[label] if isinstance(label, int) and 0 <= label < len(names) else None
            number = _class_of(label, known, task.labels)
            if number is None and place and (at := _whole(label)) is not None and 0 <= at < len(task.classes):
                number, by_place = at, True
                placed.append(RowError(f"has label {label!r} beside names of classes", row, f"{rest}: write its name"))
            if is_missing(label):
                errors.append(RowError("has no label", row, ": give it one, or leave the row out of the data"))
            elif number is None:
                numbers = place and _whole(label) is not None
                remedy = "list what the data say under `labels`" if numbers else "correct one of them"
                errors.append(RowError(f"has label {label!r}", row, f"{rest}{_hint(label, known)}: {remedy}"))
            found.append(NO_CLASS if number is None else number)
    if 0 < len(placed) < len(found) - found.count(NO_CLASS):
        return found, errors + placed
    if by_place:
        order = _list([f"{number} is {name}" for number, name in enumerate(task.classes)])
        errors.append(
            SourceNote(f"has numeric labels; they are read as positions in `classes`, counted from 0: {order}")
        )
    return found, errors


def _class_of(label: object, known: dict[str, int], given: Sequence[object]) -> int | None:
    """The class whose name or label a row's label is, or None."""
    if is_missing(label) or not isinstance(label, str | int | float | Decimal | date):
        return None
    text = as_text(label)
    for written in (text, str(label)):  # of 1.0 it is `1`, but a class may be 1.0
        if written in known:
            return known[written]
    if isinstance(label, bool):  # a boolean has no upper and lower case
        return next((number for name, number in known.items() if name.lower() == text), None)
    if any(isinstance(one, bool) for one in given):
        return known.get(text.lower())
    return known.get(str(_whole(label)))


def _whole(label: object) -> int | None:
    """The whole number that a label is, or None."""
    if isinstance(label, bool) or not isinstance(label, str | int | float | Decimal):
        return None
    matched = _WHOLE.fullmatch(as_text(label))
    return int(matched[1]) if matched else None


def _hint(label: object, known: dict[str, int]) -> str:
    if not isinstance(label, str):
        return ""
    if near := [name for name in known if _folded(name) == _folded(label)]:
        return f" ({label!r} and {near[0]!r} differ in case, blanks or Unicode form only)"
    if same := [
        name for name in known if _NUMBER.fullmatch(label) and _NUMBER.fullmatch(name) and float(name) == float(label)
    ]:
        return f" ({label!r} and {same[0]!r} are one number, which YAML keeps as it is written in quotes)"
    return ""


def alike(names: Sequence[str]) -> list[list[str]]:
    """The names that differ in case, blanks or Unicode form only, in groups."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_folded(name), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def _folded(name: str) -> str:
    """A name without what is easily overlooked: its case, blanks around it, its Unicode form."""
    return unicodedata.normalize("NFKC", name).casefold().strip()


def _list(names: Sequence[object]) -> str:
    more = len(names) - _LISTED
    return ", ".join(repr(name) for name in names[:_LISTED]) + (f" and {more:,} more" if more > 0 else "")
