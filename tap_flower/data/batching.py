"""From examples to batches: the order that a seed gives, and reading in this order, ahead of training where asked."""

from __future__ import annotations

import itertools
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch.utils.data import DataLoader

from tap_flower.core.seeds import named_seed
from tap_flower.core.training import Batch
from tap_flower.data.examples import Examples, OwnLoader, permutation
from tap_flower.errors import in_task

WINDOW = 16
"""Batches of shuffled training examples that are ordered by length together."""
AHEAD = 2
"""Batches that each loader worker may be ahead of training."""
Drawn = tuple[int, Sequence[int]]
"""A batch before it is read: position of its source among all sources, positions of its examples in the source."""
Read = tuple[int, list[Any]]
"""A batch that was read: position of its source among all sources, its examples."""


def turns(tasks: Iterable[str], seed: int) -> Iterator[str]:
    """Endless task names: every turn has each task once, in an order that the seed draws anew.

    Were it the order of their names, the first task would get more of a participation whose batches the tasks do not divide,
    and a method that treats every other step alike would treat a task alike.
    """
    names = sorted(tasks)
    for turn in itertools.count():
        yield from (names[at] for at in permutation(len(names), named_seed(seed, "turn", turn)))


def training_order(
    sources: Sequence[Examples], batch_size: int, seed: int, group_by_length: bool = False, others: Iterable[str] = ()
) -> Iterator[Drawn]:
    """Endless shuffled batches: tasks take `turns`, each in epochs of its own.

    A batch comes from one source, and so from one domain.

    Args:
        sources: the training examples of the tasks.
        batch_size: examples in a batch, where the task has no batch size of its own; a source that has fewer gives all.
        seed: decides the order.
        group_by_length: whether texts of about one length share a batch.
        others: tasks whose batches come from elsewhere, and have their turns.
    """
    of_task: dict[str, dict[int, Examples]] = defaultdict(dict)
    for number, examples in enumerate(sources):
        of_task[examples.task][number] = examples
    streams = {
        task: _epochs(of_task[task], batch_size, named_seed(seed, task), group_by_length) for task in sorted(of_task)
    }
    for task in turns([*of_task, *others], seed):
        if task in streams:
            yield next(streams[task])


def _epochs(sources: Mapping[int, Examples], batch_size: int, seed: int, group_by_length: bool) -> Iterator[Drawn]:
    """Endless epochs over the sources of one task, by their positions among all sources."""
    epoch = 0
    while True:
        # Shuffle each source and cut it into batches.
        batches: list[Drawn] = []
        for at, (number, examples) in enumerate(sources.items()):
            order = permutation(len(examples), named_seed(seed, epoch, at))
            size = min(examples.batch_size or batch_size, len(examples))
            batches += [(number, some) for some in batches_of(examples, order, size, group_by_length)]
        # Mix the batches, where otherwise one source, or one length, would come after the other.
        if len(sources) > 1 or group_by_length:
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


def read_ahead(sources: Sequence[Examples], order: Iterable[Drawn], workers: int = 0) -> Iterator[Read]:
    """Reads the batches of an order, one after the other.

    Workers are threads: image decoders run beside Python and beside training, all share the images that the process keeps,
    and nothing has to be started or ended with a pass.

    Args:
        sources: to read from.
        order: the batches.
        workers: threads that read ahead, `AHEAD` batches each; with 0, a batch is read when it is asked for.

    Raises:
        Exception: what reading a batch raises, when that batch is asked for.
    """

    def read(drawn: Drawn) -> Read:
        number, positions = drawn
        return number, sources[number].__getitems__(positions)

    if not workers:
        yield from map(read, order)
        return
    pool = ThreadPoolExecutor(workers, "loader")
    waiting: deque[Future[Read]] = deque()
    try:
        for drawn in order:
            waiting.append(pool.submit(read, drawn))
            if len(waiting) > AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:  # an endless pass is left, not ended
        pool.shutdown(wait=False, cancel_futures=True)


class ClientData:
    """The data of one client.

    Args:
        splits: split (`train`, `validation`, `test`) -> task name -> its examples, those of each source apart, or a list of
            one `OwnLoader`.
    """

    def __init__(self, splits: Mapping[str, Mapping[str, Sequence[Examples | OwnLoader]]]) -> None:
        self.splits = splits

    def sizes(self, split: str) -> dict[str, int]:
        """Task name -> number of examples in a split."""
        return {task: sum(len(part) for part in parts) for task, parts in self.splits[split].items()}

    def training_batches(
        self, batch_size: int, seed: int, device: torch.device, group_by_length: bool = False, count: int = 0
    ) -> Iterator[Batch]:
        """Endless batches of the training examples on `device`; tasks take `turns`.

        Args:
            batch_size: see `training_order`, as for `seed` and `group_by_length`; a loader of the user's own has its own.
            seed: decides the order, as far as a loader of the user's own does not.
            device: of the batches.
            group_by_length: whether texts of about one length share a batch.
            count: batches that will be taken.
        """
        tasks = self.splits["train"]
        own = {
            loader.task: loader.passes(named_seed(seed, loader.task), count // len(tasks), device)
            for loader in self._loaders_of("train")
        }
        order = training_order(self._sources("train"), batch_size, seed, group_by_length, others=own)
        drawn = self._read("train", order, device)
        for task in turns(tasks, seed):
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
        """The batches of a split in an order."""
        sources = self._sources(split)
        workers = min((examples.workers for examples in sources), default=0)
        for number, items in read_ahead(sources, order, workers):
            with in_task(sources[number].task):
                batch = sources[number].to_batch(sources[number].collate(items), device)
            yield batch
