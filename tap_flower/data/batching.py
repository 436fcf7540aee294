"""The order in which a client's examples come, whatever they are made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, Self, TypeVar, cast

import torch

from tap_flower.core.initial import named_seed
from tap_flower.core.training import Batch

HELD_OUT = 5
"""Without validation rows of its own, a task sets every fifth training example aside."""
WINDOW = 16
"""Batches of shuffled training examples that are ordered by length together."""


class Examples(Protocol):
    """Examples of one task from one source."""

    @property
    def batch_size(self) -> int | None:
        """The client's own number of training examples in a batch; None takes the run's."""
        ...

    def __len__(self) -> int: ...

    def batch(self, positions: Sequence[int], device: torch.device) -> Batch:
        """The examples at some positions as one batch on `device`."""
        ...

    def by_length(self, order: Sequence[int]) -> list[int]:
        """Positions, the longest examples first; in the given order where they have no length."""
        ...

    def subset(self, positions: list[int]) -> Self:
        """The examples at some positions."""
        ...


class ClientData:
    """The data of one client.

    Args:
        splits: split (`train`, `validation`, `test`) -> task name -> its examples, those of each source apart.
    """

    def __init__(self, splits: Mapping[str, Mapping[str, Sequence[Examples]]]) -> None:
        self.splits = splits

    def sizes(self, split: str) -> dict[str, int]:
        """Task name -> number of examples in a split."""
        return {task: sum(len(part) for part in parts) for task, parts in self.splits[split].items()}

    def training_batches(
        self, batch_size: int, seed: int, device: torch.device, group_by_length: bool = False
    ) -> Iterator[Batch]:
        """Endless shuffled batches of the training examples, the tasks taking turns.

        Args:
            batch_size: examples in a batch, where the task has no batch size of its own; a source that has fewer gives all.
            seed: decides the order.
            device: of the batches.
            group_by_length: whether texts of about one length share a batch.
        """
        streams = [
            _shuffled(parts, parts[0].batch_size or batch_size, named_seed(seed, task), device, group_by_length)
            for task, parts in sorted(self.splits["train"].items())
        ]
        while True:
            for stream in streams:
                yield next(stream)

    def batches(self, split: str, batch_size: int, device: torch.device) -> Iterator[Batch]:
        """All examples of a split once, texts of about one length in a batch."""
        for parts in self.splits[split].values():
            for examples in parts:
                order = examples.by_length(range(len(examples)))
                for start in range(0, len(order), batch_size):
                    yield examples.batch(order[start : start + batch_size], device)

    def first(self, split: str, task: str, count: int, device: torch.device) -> Batch:
        """The first examples of a task's first source, at most `count`."""
        examples = self.splits[split][task][0]
        return examples.batch(range(min(count, len(examples))), device)


_Some = TypeVar("_Some", bound=Examples)


def set_aside(examples: _Some, seed: int) -> tuple[_Some, _Some]:
    """(the rest, one in `HELD_OUT` set aside), drawn with `seed`."""
    order = permutation(len(examples), seed)
    held_out = max(1, len(examples) // HELD_OUT)
    return examples.subset(sorted(order[held_out:])), examples.subset(sorted(order[:held_out]))


def permutation(count: int, seed: int) -> list[int]:
    """The numbers below `count` in a random order."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return cast(list[int], order.tolist())


def _shuffled(
    parts: Sequence[Examples], batch_size: int, seed: int, device: torch.device, group_by_length: bool
) -> Iterator[Batch]:
    """Endless epochs over all sources of a task; a batch is from one source, and so of one domain."""
    epoch = 0
    while True:
        batches: list[tuple[Examples, Sequence[int]]] = []
        for number, examples in enumerate(parts):
            size = min(batch_size, len(examples))
            order = permutation(len(examples), named_seed(seed, epoch, number))
            batches += [(examples, positions) for positions in batches_of(examples, order, size, group_by_length)]
        mixed = len(parts) > 1 or group_by_length
        for turn in permutation(len(batches), named_seed(seed, epoch)) if mixed else range(len(batches)):
            examples, positions = batches[turn]
            yield examples.batch(positions, device)
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
