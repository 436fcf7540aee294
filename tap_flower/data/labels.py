"""From what the data say of a row's class to the class's number."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import datasets

from tap_flower.data.sources import RowError
from tap_flower.data.spec import TaskSpec


class Labels:
    """The classes of a task in one data set.

    A row's class is its label's place among the spec's `labels`, else among its class names, else the number itself.

    Args:
        task: with the classes.
        data: the data set; the column may be a `ClassLabel`, numbers in the data set's own order.
        column: of the labels.
    """

    def __init__(self, task: TaskSpec, data: datasets.Dataset, column: str) -> None:
        self._classes = len(task.classes)
        self._known: dict[object, int] = {name: number for number, name in enumerate(task.labels or task.classes)}
        names: Sequence[str] = getattr(data.features[column], "names", None) or []
        self._names = list(names) if not task.labels and set(names) & set(task.classes) else []
        if not task.labels and not self._names:
            self._known |= {number: number for number in range(self._classes)}

    def class_of(self, row: int, value: object) -> int:
        """The class of a row whose label is `value`.

        Raises:
            RowError: it is none of the task's.
        """
        label = value
        if self._names:  # -1 marks a row without a label
            label = self._names[value] if isinstance(value, int) and 0 <= value < len(self._names) else None
        if not isinstance(label, Hashable) or label not in self._known:
            known = ", ".join(repr(name) for name in list(self._known)[:10])
            raise RowError(
                f"has label {label!r}",
                row,
                f", but the client spec has {self._classes} classes with labels {known}: correct one of them",
            )
        return self._known[label]
