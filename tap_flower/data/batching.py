"""From examples to batches: the order that a seed gives, and the data loader that reads in this order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from tap_flower.core.seeds import named_seed
from tap_flower.core.training import Batch
from tap_flower.data.examples import Examples, OwnLoader, permutation

WINDOW = 16
"""Batches of shuffled training examples that are ordered by length together."""
Drawn = tuple[int, Sequence[int]]
"""A batch before it is read: position of its source among all sources, positions of its examples in the source."""


class TrainingSampler(Sampler[Drawn]):
    """Endless shuffled batches: tasks take turns by name, each in epochs of its own. Every iteration gives the same ones.

    A batch comes from one source, and so from one domain.

    Args:
        sources: the training examples of all tasks.
        batch_size: examples in a batch, where the task has no batch size of its own; a source that has fewer gives all.
        seed: decides the order.
        group_by_length: whether texts of about one length share a batch.
    """

    def __init__(self, sources: Sequence[Examples], batch_size: int, seed: int, group_by_length: bool = False) -> None:
        self.sources, self.batch_size, self.seed, self.group_by_length = sources, batch_size, seed, group_by_length

    def __iter__(self) -> Iterator[Drawn]:
        of_task: dict[str, list[int]] = defaultdict(list)
        for number, examples in enumerate(self.sources):
            of_task[examples.task].append(number)
        streams = [self._epochs(of_task[task], named_seed(self.seed, task)) for task in sorted(of_task)]
        while True:
            for stream in streams:
                yield next(stream)

    def _epochs(self, numbers: Sequence[int], seed: int) -> Iterator[Drawn]:
        """Endless epochs over the sources of one task."""
        batch_size = self.sources[numbers[0]].batch_size or self.batch_size
        epoch = 0
        while True:
            # Shuffle each source and cut it into batches.
            batches: list[Drawn] = []
            for at, number in enumerate(numbers):
                examples = self.sources[number]
                order = permutation(len(examples), named_seed(seed, epoch, at))
                size = min(batch_size, len(examples))
                batches += [(number, some) for some in batches_of(examples, order, size, self.group_by_length)]
            # Mix the batches, where otherwise one source, or one length, would come after the other.
            if len(numbers) > 1 or self.group_by_length:
                batches = [batches[turn] for turn in permutation(len(batches), named_seed(seed, epoch))]
            yield from batches
            epoch += 1


def batches_of(examples: Examples, order: Sequence[int], size: int, group_by_length: bool) -> Iterator[Sequence[int]]:
    """Positions of whole batches; a rest is left out.

    Args:
        examples: of one source.
        order: shuffled positions.
        size: examples in a batch.
        group_by_length: whether `WINDOW` batches at a time are ordered by length, so that little is padded.
    """
    whole = len(order) // size * size
    for start in range(0, whole, size * WINDOW):
        window = order[start : min(start + size * WINDOW, whole)]
        ordered = examples.by_length(window) if group_by_length else window
        for at in range(0, len(ordered), size):
            yield ordered[at : at + size]


def all_once(sources: Sequence[Examples], batch_size: int) -> Iterator[Drawn]:
    """Batches of all examples once, the longest of each source first; the last of a source may be smaller."""
    for number, examples in enumerate(sources):
        order = examples.by_length(range(len(examples)))
        for start in range(0, len(order), batch_size):
            yield number, order[start : start + batch_size]


def batch_loader(
    sources: Sequence[Examples], order: Iterable[Drawn], workers: int = 0, pin_memory: bool = False
) -> DataLoader[tuple[int, Any]]:
    """A data loader that gives, for each batch of an order, its source's position and what `Examples.read` returns.

    Args:
        sources: to read from.
        order: the batches; each pass over the loader takes a new iterator over it.
        workers: processes that read ahead; they live as long as the loader. With 0, this process reads when asked.
        pin_memory: whether batches are copied to page-locked memory, from which a GPU fetches them on its own.
    """
    return DataLoader(
        _Sources(sources),
        batch_size=None,  # `order` gives whole batches
        sampler=order,
        collate_fn=_unchanged,
        num_workers=workers,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        # Each pass draws a seed for its workers. By default it comes from the process's own generator, and dropout's
        # numbers would depend on how often data were loaded.
        generator=torch.Generator(),
    )


class ClientData:
    """The data of one client.

    Args:
        splits: split (`train`, `validation`, `test`) -> task name -> its examples, those of each source apart, or a list of
            one `OwnLoader`.
        workers: processes for each split that read ahead; with any, a split is read by one pass at a time. Loaders of the
            user's own have their own workers.
    """

    def __init__(self, splits: Mapping[str, Mapping[str, Sequence[Examples | OwnLoader]]], workers: int = 0) -> None:
        self.splits, self.workers = splits, workers
        self._loaders: dict[tuple[str, bool], DataLoader[tuple[int, Any]]] = {}

    def sizes(self, split: str) -> dict[str, int]:
        """Task name -> number of examples in a split."""
        return {task: sum(len(part) for part in parts) for task, parts in self.splits[split].items()}

    def training_batches(
        self, batch_size: int, seed: int, device: torch.device, group_by_length: bool = False, count: int = 0
    ) -> Iterator[Batch]:
        """Endless batches of the training examples on `device`; tasks take turns by name.

        Args:
            batch_size: see `TrainingSampler`, as for `seed` and `group_by_length`; a loader of the user's own has its own.
            seed: decides the order, as far as a loader of the user's own does not.
            device: of the batches.
            group_by_length: whether texts of about one length share a batch.
            count: batches that will be taken.
        """
        sampler = TrainingSampler(self._sources("train"), batch_size, seed, group_by_length)
        tasks, drawn = sorted(self.splits["train"]), self._read("train", sampler, device)
        loaders = {own.task: own for own in self._loaders_of("train")}
        own = {
            task: loader.passes(named_seed(seed, task), count // len(tasks), device) for task, loader in loaders.items()
        }
        while True:
            for task in tasks:
                yield next(own.get(task, drawn))

    def batches(self, split: str, batch_size: int, device: torch.device) -> Iterator[Batch]:
        """All examples of a split once, texts of about one length in a batch."""
        yield from self._read(split, all_once(self._sources(split), batch_size), device)
        for own in self._loaders_of(split):
            if own.target is not None:  # else the project evaluates itself
                yield from own.once(device)

    def first(self, split: str, task: str, count: int, device: torch.device) -> Batch:
        """The first examples of a task's first source, at most `count`; a loader of the user's own gives its first batch."""
        examples = self.splits[split][task][0]
        if isinstance(examples, OwnLoader):
            return examples.first(device)
        return examples.batch(range(min(count, len(examples))), device)

    def loader(self, split: str, task: str) -> DataLoader[Any]:
        """The user's own loader of a task."""
        (own,) = self.splits[split][task]
        assert isinstance(own, OwnLoader)
        return own.loader

    def _sources(self, split: str) -> list[Examples]:
        return [part for parts in self.splits[split].values() for part in parts if isinstance(part, Examples)]

    def _loaders_of(self, split: str) -> list[OwnLoader]:
        return [part for parts in self.splits[split].values() for part in parts if isinstance(part, OwnLoader)]

    def _read(self, split: str, order: Iterable[Drawn], device: torch.device) -> Iterator[Batch]:
        """The batches of a split in an order.

        Raises:
            RuntimeError: another pass over the split has begun meanwhile, and workers read for one pass at a time.
        """
        sources = self._sources(split)
        pin = device.type == "cuda" and all(examples.pinned for examples in sources)
        if (split, pin) not in self._loaders:
            self._loaders[split, pin] = batch_loader(sources, _Order(), self.workers, pin)
        loader = self._loaders[split, pin]
        current = cast(_Order, loader.sampler)
        current.batches = order
        for number, read in loader:
            yield sources[number].to_batch(read, device)
            if self.workers and current.batches is not order:
                raise RuntimeError(f"a second pass over the {split} examples has begun: end this one before it")


class _Order(Sampler[Drawn]):
    """The order of the present pass. A data loader takes no other sampler, and another loader would start new workers."""

    batches: Iterable[Drawn] = ()

    def __iter__(self) -> Iterator[Drawn]:
        return iter(self.batches)


class _Sources(Dataset[tuple[int, Any]]):
    """Sources as one data set, whose items are whole batches."""

    def __init__(self, sources: Sequence[Examples]) -> None:
        self.sources = sources

    def __getitem__(self, drawn: Drawn) -> tuple[int, Any]:
        number, positions = drawn
        return number, self.sources[number].read(positions)


def _unchanged(read: Any) -> Any:
    return read
