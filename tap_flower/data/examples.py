"""Examples of one task from one source: the data set that batches are drawn from, or a loader that has its own order."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    SequentialSampler,
    Subset,
    default_collate,
)
from torch.utils.data import WeightedRandomSampler as Weighted

from tap_flower.core.seeds import named_seed, seeded
from tap_flower.core.training import Batch
from tap_flower.errors import in_task
from tap_flower.plain import counted

OWN = "batch"
"""Name of the only model input that a user's own data set gives: whatever its collate function returned."""
HELD_OUT = 0.2
"""Without validation rows of its own, a task sets this share of its training examples aside."""
_COUNT, _END = 0, object()
"""Seed of the passes that only look at a loader; what stands behind the last batch."""


@dataclass(frozen=True, eq=False)
class Examples(Dataset[Any]):
    """The examples of one task from one source.

    A batch is made in two steps. The examples are read, by a thread ahead of training for example. `collate` and `to_batch`
    run in the training thread, which moves the result to the model's device.

    Attributes:
        task: name of the task.
        dataset: `dataset[row]` is an example; where it has `__getitems__`, the examples of a batch are read at once.
        rows: rows of `dataset`, by position.
        collate: list of examples -> batch of any form, in main memory.
        form: that batch, moved to the model's device -> (the model's inputs, the loss's target).
        batch_size: the task's own number of training examples in a batch; None takes the run's.
        lengths: int64 [n], length of each example in tokens; None where examples have no length.
        pinned: whether `collate` gives a mapping to tensors, which go to a GPU by way of page-locked memory.
        workers: threads that may read examples ahead of training; 0 where `dataset` draws random numbers, or is not made for
            several threads.
    """

    task: str
    dataset: Any
    rows: Sequence[int]
    collate: Callable[[list[Any]], Any]
    form: Callable[[Any], tuple[Mapping[str, Any], Tensor]]
    batch_size: int | None = None
    lengths: NDArray[np.int64] | None = None
    pinned: bool = False
    workers: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> Any:
        return self.dataset[self.rows[position]]

    def __getitems__(self, positions: Sequence[int]) -> list[Any]:
        """The examples at some positions."""
        rows = [self.rows[position] for position in positions]
        at_once = getattr(self.dataset, "__getitems__", None)
        with in_task(self.task):
            return [self.dataset[row] for row in rows] if at_once is None else cast(list[Any], at_once(rows))

    def read(self, positions: Sequence[int]) -> Any:
        """The examples at some positions as `collate` joins them, in main memory."""
        return self.collate(self.__getitems__(positions))

    def to_batch(self, read: Any, device: torch.device) -> Batch:
        """The batch on `device`, from what `read` returned."""
        if self.pinned and device.type == "cuda":  # the copy from there does not wait for the GPU's earlier work
            read = {name: tensor.pin_memory() for name, tensor in read.items()}
        with in_task(self.task):
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


def own_examples(task: str, dataset: Dataset[Any], target: Callable[[Any], Tensor], batch_size: int | None) -> Examples:
    """The examples of a user's data set. Their order comes from the run's seed.

    Args:
        task: name of the task.
        dataset: the data.
        target: batch -> what the task's loss compares the output with.
        batch_size: the task's own, or None: the run's.

    Raises:
        TypeError: the data set has no length or no index.
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TypeError(
            f"task {task!r} has a {type(dataset).__name__} without a length or an index: give a data set with "
            f"`__len__` and `__getitem__`"
        )

    def form(own: Any) -> tuple[Mapping[str, Any], Tensor]:
        return {OWN: own}, target(own)

    return Examples(task, dataset, range(len(dataset)), default_collate, form, batch_size)


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


def set_aside(examples: Examples, seed: int, share: float = HELD_OUT) -> tuple[Examples, Examples]:
    """(the rest, a share of the examples set aside, at least one), drawn with `seed`; a single example is in both."""
    if len(examples) == 1:
        return examples, examples
    order = permutation(len(examples), seed)
    held_out = number_aside(len(examples), share)
    return examples.subset(sorted(order[held_out:])), examples.subset(sorted(order[:held_out]))


def number_aside(count: int, share: float = HELD_OUT) -> int:
    """How many of some examples are set aside."""
    return max(1, int(count * share))


def permutation(count: int, seed: int) -> list[int]:
    """The numbers below `count` in a random order."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return cast(list[int], order.tolist())


class OwnLoader:
    """The examples of one task that a user's data loader gives.

    Whatever the loader draws from torch's own generator, from `random` or from `numpy.random` follows from the run's seed; a
    generator, or a sampler, that the user has seeded is left alone.

    Args:
        task: name of the task.
        loader: over a data set with an index.
        target: batch -> what the task's loss compares the output with; None where the project's own loop trains or scores.

    Raises:
        TypeError: the number of its examples cannot be known.
    """

    batch_size: None = None
    """The loader makes the batches."""

    def __init__(self, task: str, loader: DataLoader[Any], target: Callable[[Any], Tensor] | None) -> None:
        # Persistent workers make one pass at a time, and another task may have the loader, too.
        self.task, self.loader, self.target = task, _changed(loader), target
        dataset, batches = loader.dataset, loader.batch_sampler
        if isinstance(dataset, IterableDataset) or batches is None or not isinstance(batches, Sized):
            what = f"a {type(dataset).__name__}" if batches is None else f"a {type(batches).__name__}"
            raise TypeError(
                f"task {task!r} has a DataLoader over {what} whose number of examples cannot be known: give it a data set "
                f"with `__len__` and `__getitem__`, and a batch size or a batch sampler with a length"
            )
        self._count = len(cast(Sized, loader.sampler)) if _samples_rows(loader) else len(_drawn(loader))

    def __len__(self) -> int:
        return self._count

    def first(self, device: torch.device) -> Batch:
        """The first batch, on `device`."""
        return next(self._pass(self.loader, _COUNT, device))

    def lone(self, device: torch.device) -> Batch | None:
        """A batch of a single example, where a pass has one: its last batch, for example."""
        if not _draws_batches(self.loader):
            return None
        alone = [batch for batch in _drawn_batches(self.loader) if len(batch) == 1]
        return next(self._pass(_changed(self.loader, batch_sampler=alone), _COUNT, device)) if alone else None

    def once(self, device: torch.device) -> Iterator[Batch]:
        """One pass over the loader."""
        return self._pass(self.loader, _COUNT, device)

    def passes(self, seed: int, count: int, device: torch.device) -> Iterator[Batch]:
        """Endless passes over the loader.

        Args:
            seed: of what the loader draws.
            count: batches that will be taken. Where they are fewer than a pass over a loader in a fixed order, the first
                pass begins anywhere in it, or the rows of its end would never be seen.
            device: of the batches.
        """
        first = self.loader
        in_order = _draws_batches(first) and _samples_rows(first) and isinstance(first.sampler, SequentialSampler)
        if count < len(first) and in_order:
            skipped = seed % len(first)
            first = _changed(first, batch_sampler=list(islice(cast(Iterable[Any], first.batch_sampler), skipped, None)))
        epoch = 0
        while True:
            yield from self._pass(first if epoch == 0 else self.loader, named_seed(seed, epoch), device)
            epoch += 1

    def _pass(self, loader: DataLoader[Any], seed: int, device: torch.device) -> Iterator[Batch]:
        assert self.target is not None
        with _seeded(seed), in_task(self.task):  # samplers draw when their first row is asked for
            batches = iter(loader)
            read = next(batches, _END)
        while read is not _END:
            with in_task(self.task):
                own = moved_to(read, device)
                batch = Batch(self.task, {OWN: own}, self.target(own))
            yield batch
            with in_task(self.task):
                read = next(batches, _END)


def split_off(loader: DataLoader[Any], share: float, seed: int) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """(the loader without some of its sampler's rows, a loader over these rows in a fixed order).

    Args:
        loader: of an `OwnLoader`; both results have its collate function, workers and so on.
        share: of the rows that are set aside, between 0 and 1; at least one row is.
        seed: decides which.

    Raises:
        TypeError: it draws fewer than two rows, or the others make no batch, or it may draw any row.
    """
    if not _draws_batches(loader):
        raise TypeError(
            f"its loader is a {type(loader).__name__} with an `__iter__` of its own, which may draw rows that are held out: "
            f"give `validation` data, or None"
        )
    rows = sorted(set(_rows(loader)))
    if len(rows) < 2:
        raise TypeError("it draws one row, and one is to be set aside: give `validation` data, or None")
    order = permutation(len(rows), seed)
    held = {rows[at] for at in order[: max(1, int(len(rows) * share))]}
    kept: Any = _Without(cast(Iterable[Any], loader.sampler if _samples_rows(loader) else loader.batch_sampler), held)
    if _samples_rows(loader):
        assert loader.batch_size is not None
        rest = _changed(loader, sampler=kept, batch_sampler=BatchSampler(kept, loader.batch_size, loader.drop_last))
    else:
        rest = _changed(loader, batch_sampler=kept)
    if not len(cast(Sized, rest.batch_sampler)):
        raise TypeError(
            f"its loader yields no batch once {counted(len(held), 'row')} of {len(rows)} are held out: "
            f"lower its batch size, set drop_last=False, or give `validation` data"
        )
    some: Any = Subset(loader.dataset, sorted(held))
    size = loader.batch_size or max(map(len, cast(Iterable[Any], _drawn_batches(loader))))
    in_order = SequentialSampler(some)
    aside = _changed(loader, dataset=some, sampler=in_order, batch_sampler=BatchSampler(in_order, size, False))
    return rest, aside


def beginning(loader: DataLoader[Any], count: int) -> DataLoader[Any]:
    """A loader of an `OwnLoader` that ends after some batches; one with an `__iter__` of its own stays as it is."""
    if not _draws_batches(loader):
        return loader
    return _changed(loader, batch_sampler=_drawn_batches(loader)[:count])


def extremes(loader: DataLoader[Any]) -> DataLoader[Any]:
    """A loader of an `OwnLoader` with its first batch and its smallest one; see `beginning`."""
    if not _draws_batches(loader):
        return loader
    batches = _drawn_batches(loader)
    return _changed(loader, batch_sampler=[batches[0], min(batches[1:], key=len)] if len(batches) > 1 else batches)


class _Without(Sampler[Any]):
    """A sampler, or a batch sampler, without some rows; batches that become empty are left out."""

    def __init__(self, sampler: Iterable[Any], rows: set[Any]) -> None:
        self.sampler, self.rows = sampler, rows
        with _seeded(_COUNT, sampler):
            self.count = sum(1 for _ in self)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        for drawn in self.sampler:
            if isinstance(drawn, list | tuple):
                if kept := [row for row in drawn if _plain(row) not in self.rows]:
                    yield kept
            elif _plain(drawn) not in self.rows:
                yield drawn


def _rows(loader: DataLoader[Any]) -> list[Any]:
    """The rows that a loader can draw, as far as a pass, or its sampler's weights, tell."""
    if _samples_rows(loader) and isinstance(loader.sampler, Weighted):
        return loader.sampler.weights.nonzero().flatten().tolist()
    return _drawn(loader)


def _drawn(loader: DataLoader[Any]) -> list[Any]:
    """The rows of one pass."""
    if not _samples_rows(loader):
        return [_plain(row) for batch in _drawn_batches(loader) for row in batch]
    with _seeded(_COUNT, loader.sampler, loader):
        return [_plain(row) for row in loader.sampler]


def _drawn_batches(loader: DataLoader[Any]) -> list[Any]:
    batches: Any = loader.batch_sampler
    with _seeded(_COUNT, batches, getattr(batches, "sampler", None), loader):
        return list(islice(batches, len(batches)))


def _draws_batches(loader: DataLoader[Any]) -> bool:
    """Whether a pass goes by the loader's batch sampler, as far as its class tells."""
    return type(loader).__iter__ is DataLoader.__iter__


def _samples_rows(loader: DataLoader[Any]) -> bool:
    """Whether the loader cuts its batches from a sampler's rows; else it has a batch sampler of the user's own."""
    return loader.batch_size is not None


def _plain(row: Any) -> Any:
    return row.item() if isinstance(row, Tensor) else row


def _changed(loader: DataLoader[Any], **changes: Any) -> DataLoader[Any]:
    """A copy, also of a class of the user's own, with other rows; `DataLoader.__setattr__` would refuse the change."""
    other = copy.copy(loader)
    other.__dict__.update(changes, _iterator=None)
    return other


@contextmanager
def _seeded(seed: int, *others: Any) -> Iterator[None]:
    """Seeds what loaders draw from; that is put back afterwards, as are the generators that `others` have."""
    generators = [g for g in (getattr(other, "generator", None) for other in others) if isinstance(g, torch.Generator)]
    states = [generator.get_state() for generator in generators]
    with seeded(seed):
        yield
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)
