"""A client's own data sets as examples that batches are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from tap_flower.core.training import Batch

OWN = "batch"
"""Under this name an input of the model is what the client's own data set and `collate` gave."""


@dataclass(frozen=True)
class DatasetExamples:
    """Examples of one task, from a data set with a length and an index.

    Attributes:
        task: its name.
        dataset: `dataset[i]` is an example; where it has `__getitems__`, a batch is read at once.
        rows: of the data set, by position.
        collate: list of examples -> batch of any form.
        target: batch -> what the task's loss compares the output with.
        batch_size: the task's own number of training examples in a batch.
    """

    task: str
    dataset: Any
    rows: Sequence[int]
    collate: Callable[[list[Any]], Any]
    target: Callable[[Any], Tensor]
    batch_size: int | None

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, positions: Sequence[int], device: torch.device) -> Batch:
        """The examples at some positions as one batch on `device`."""
        rows = [self.rows[p] for p in positions]
        at_once = getattr(self.dataset, "__getitems__", None)
        examples = [self.dataset[row] for row in rows] if at_once is None else at_once(rows)
        own = moved_to(self.collate(examples), device)
        return Batch(self.task, {OWN: own}, self.target(own))

    def by_length(self, order: Sequence[int]) -> list[int]:
        """The given order: nothing is known of the examples' lengths."""
        return list(order)

    def subset(self, positions: list[int]) -> DatasetExamples:
        """The examples at some positions."""
        return replace(self, rows=[self.rows[p] for p in positions])


def examples_of(
    task: str, source: Dataset[Any] | DataLoader[Any], target: Callable[[Any], Tensor], batch_size: int | None
) -> DatasetExamples:
    """The examples of a data set, or of a data loader: its data set, its `collate_fn` and its batch size.

    The order is not the loader's: it comes from the run's seed, so that every method sees the same mini-batches.

    Args:
        task: name of the task.
        source: the data.
        target: batch -> what the task's loss compares the output with.
        batch_size: the task's own, or None: the loader's, or without a loader the run's.

    Raises:
        TypeError: the data set has no length or no index.
    """
    dataset, collate = source, default_collate
    if isinstance(source, DataLoader):
        dataset, collate = source.dataset, source.collate_fn
        batch_size = batch_size or source.batch_size
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TypeError(
            f"task {task!r} has a {type(dataset).__name__} without a length or an index: give a data set with "
            f"`__len__` and `__getitem__`"
        )
    return DatasetExamples(task, dataset, range(len(dataset)), collate, target, batch_size)


def moved_to(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors on `device`: a tensor, what has a method `to`, or mappings and sequences of these."""
    if isinstance(batch, Tensor) or hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: moved_to(value, device) for name, value in batch.items()}
    if isinstance(batch, list | tuple):
        moved = [moved_to(value, device) for value in batch]
        return type(batch)(*moved) if hasattr(batch, "_fields") else type(batch)(moved)
    return batch
