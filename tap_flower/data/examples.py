"""Examples of one task from one source: the data set that batches are drawn from, whoever wrote it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from tap_flower.core.training import Batch

OWN = "batch"
"""Name of the only model input that a user's own data set gives: whatever its collate function returned."""
HELD_OUT = 5
"""Without validation rows of its own, a task sets every fifth training example aside."""


@dataclass(frozen=True, eq=False)
class Examples(Dataset[Any]):
    """The examples of one task from one source.

    A batch is made in two steps. `read` runs wherever the data loader runs, in a worker process for example, and stays in
    main memory. `to_batch` runs in the training process and moves the result to the model's device.

    Attributes:
        task: name of the task.
        dataset: `dataset[row]` is an example; where it has `__getitems__`, the examples of a batch are read at once.
        rows: rows of `dataset`, by position.
        collate: list of examples -> batch of any form, in main memory.
        form: that batch, moved to the model's device -> (the model's inputs, the loss's target).
        batch_size: the task's own number of training examples in a batch; None takes the run's.
        lengths: int64 [n], length of each example in tokens; None where examples have no length.
        pinned: whether the result of `collate` may be copied to page-locked memory on its way to a GPU.
    """

    task: str
    dataset: Any
    rows: Sequence[int]
    collate: Callable[[list[Any]], Any]
    form: Callable[[Any], tuple[Mapping[str, Any], Tensor]]
    batch_size: int | None = None
    lengths: NDArray[np.int64] | None = None
    pinned: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> Any:
        return self.dataset[self.rows[position]]

    def __getitems__(self, positions: Sequence[int]) -> list[Any]:
        """The examples at some positions."""
        rows = [self.rows[position] for position in positions]
        at_once = getattr(self.dataset, "__getitems__", None)
        return [self.dataset[row] for row in rows] if at_once is None else cast(list[Any], at_once(rows))

    def read(self, positions: Sequence[int]) -> Any:
        """The examples at some positions as `collate` joins them, in main memory."""
        return self.collate(self.__getitems__(positions))

    def to_batch(self, read: Any, device: torch.device) -> Batch:
        """The batch on `device`, from what `read` returned."""
        inputs, target = self.form(moved_to(read, device))
        return Batch(self.task, inputs, target)

    def batch(self, positions: Sequence[int], device: torch.device) -> Batch:
        """The examples at some positions as one batch on `device`."""
        return self.to_batch(self.read(positions), device)

    def by_length(self, positions: Sequence[int]) -> list[int]:
        """Some positions, the longest examples first; in the given order where examples have no length."""
        if self.lengths is None:
            return list(positions)
        order = np.argsort(-self.lengths[list(positions)], kind="stable")
        return [positions[i] for i in order]

    def subset(self, positions: Sequence[int]) -> Examples:
        """The examples at some positions, which are numbered anew."""
        lengths = None if self.lengths is None else self.lengths[list(positions)]
        return replace(self, rows=[self.rows[position] for position in positions], lengths=lengths)


def own_examples(
    task: str, source: Dataset[Any] | DataLoader[Any], target: Callable[[Any], Tensor], batch_size: int | None
) -> Examples:
    """The examples of a user's data set, or of a data loader: its data set, `collate_fn`, batch size and `pin_memory`.

    The order is not the loader's: it comes from the run's seed, so that every method sees the same mini-batches.

    Args:
        task: name of the task.
        source: the data.
        target: batch -> what the task's loss compares the output with.
        batch_size: the task's own, or None: the loader's, or without a loader the run's.

    Raises:
        TypeError: the data set has no length or no index.
    """
    dataset, collate, pinned = source, default_collate, False
    if isinstance(source, DataLoader):
        dataset, collate, pinned = source.dataset, source.collate_fn, source.pin_memory
        batch_size = batch_size or source.batch_size
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TypeError(
            f"task {task!r} has a {type(dataset).__name__} without a length or an index: give a data set with "
            f"`__len__` and `__getitem__`"
        )

    def form(own: Any) -> tuple[Mapping[str, Any], Tensor]:
        return {OWN: own}, target(own)

    return Examples(task, dataset, range(len(dataset)), collate, form, batch_size, pinned=pinned)


def moved_to(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors on `device`: a tensor, what has a method `to`, or mappings and sequences of these."""
    if isinstance(batch, Tensor):
        # From page-locked memory, the copy to a GPU runs beside the computation.
        return batch.to(device, non_blocking=device.type == "cuda")
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: moved_to(value, device) for name, value in batch.items()}
    if isinstance(batch, list | tuple):
        moved = [moved_to(value, device) for value in batch]
        return type(batch)(*moved) if hasattr(batch, "_fields") else type(batch)(moved)
    return batch


def set_aside(examples: Examples, seed: int) -> tuple[Examples, Examples]:
    """(the rest, one example in `HELD_OUT` set aside), drawn with `seed`; a single example is in both."""
    if len(examples) == 1:
        return examples, examples
    order = permutation(len(examples), seed)
    held_out = max(1, len(examples) // HELD_OUT)
    return examples.subset(sorted(order[held_out:])), examples.subset(sorted(order[:held_out]))


def permutation(count: int, seed: int) -> list[int]:
    """The numbers below `count` in a random order."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return cast(list[int], order.tolist())
