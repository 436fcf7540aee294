"""From what the data say of a row's class to the class's number."""

from __future__ import annotations

from collections.abc import Sequence

import datasets

from tap_flower.data.sources import RowError, values_of
from tap_flower.data.spec import TaskSpec

NO_CLASS = -1
"""Stands for the class of a row whose label is none of the task's."""


def read_labels(
    task: TaskSpec, data: datasets.Dataset, rows: Sequence[int], column: str
) -> tuple[list[int], list[RowError]]:
    """The class of each row: its label's place among the spec's `labels`, else among its class names, else the number.

    Args:
        task: with the classes.
        data: the data set; the column may be a `ClassLabel`, numbers in the data set's own order.
        rows: of the data set.
        column: of the labels.

    Returns:
        The class of each row, `NO_CLASS` where its label is none of the task's; and an error for each such row.
    """
    classes = len(task.classes)
    known: dict[object, int] = {name: number for number, name in enumerate(task.labels or task.classes)}
    names: Sequence[str] = getattr(data.features[column], "names", None) or []
    if task.labels or not set(names) & set(task.classes):
        names = []
    if not task.labels and not names:
        known |= {number: number for number in range(classes)}
    listed = ", ".join(repr(name) for name in list(known)[:10])
    rest = f", but the client spec has {classes} classes with labels {listed}: correct one of them"

    found: list[int] = []
    errors: list[RowError] = []
    for part in values_of(data, rows, [column]):
        for row, values in part:
            label = values[column]
            if names:  # -1 marks a row without a label
                label = names[label] if isinstance(label, int) and 0 <= label < len(names) else None
            try:
                found.append(known[label])
            except (KeyError, TypeError):  # TypeError: a list, for example
                found.append(NO_CLASS)
                errors.append(RowError(f"has label {label!r}", row, rest))
    return found, errors
