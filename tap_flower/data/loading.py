"""From sources to examples that batches are made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import datasets
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tap_flower.core.initial import named_seed
from tap_flower.core.training import Batch
from tap_flower.data.batching import ClientData, Examples, set_aside
from tap_flower.data.collate import model_inputs, pad_targets
from tap_flower.data.images import LazyImages, images_of
from tap_flower.data.labels import Labels
from tap_flower.data.sources import SourceError, missing_columns, open_source, rows_of, values_of
from tap_flower.data.spec import ClientSpec, Field, Source, TaskSpec
from tap_flower.data.texts import Tokens, tokenised
from tap_flower.errors import SpecError


@dataclass(frozen=True)
class TaskExamples:
    """Examples of one task from one source, ready for batches.

    Attributes:
        task: what they belong to.
        domain: of all of them.
        rows: row of the data set, by position.
        images: of the data set, indexed by row; None where the task has no image.
        texts: token ids, indexed by place; None where the task has no text.
        labels: class, indexed by place, or None.
        targets: token ids of the target text with its closing separator, indexed by place, or None.
        places: where each example stands among the source's rows, by position.
        pad: id of the padding token.
    """

    task: TaskSpec
    domain: str
    rows: list[int]
    images: LazyImages | None
    texts: Tokens | None
    labels: list[int] | None
    targets: Tokens | None
    places: Sequence[int]
    pad: int

    @property
    def batch_size(self) -> int | None:
        """The task's own number of training examples in a batch."""
        return self.task.batch_size

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, positions: Sequence[int], device: torch.device) -> Batch:
        """The examples at some positions as one batch on `device`."""
        places = [self.places[p] for p in positions]
        pixels = None if self.images is None else self.images[[self.rows[p] for p in positions]]
        texts = None if self.texts is None else [self.texts[p] for p in places]
        inputs = model_inputs(self.domain, pixels, texts, self.pad, device)
        target: Tensor | None = inputs.get("image")
        if self.labels is not None:
            target = torch.tensor([self.labels[p] for p in places], device=device)
        if self.targets is not None:
            target = pad_targets([self.targets[p] for p in places]).to(device)
            inputs["target_length"] = target.shape[1]
        assert target is not None  # a task spec names a label, a target or an image
        return Batch(self.task.name, inputs, target)

    def by_length(self, order: Sequence[int]) -> list[int]:
        """Positions, the longest texts first (texts and targets together); in the given order where there are none."""
        read = [tokens for tokens in (self.texts, self.targets) if tokens is not None]
        if not read:
            return list(order)
        places = [self.places[p] for p in order]
        lengths = np.sum([tokens.lengths[places] for tokens in read], axis=0)
        return [order[i] for i in np.argsort(-lengths, kind="stable")]

    def subset(self, positions: list[int]) -> TaskExamples:
        """The examples at some positions."""
        return replace(self, rows=[self.rows[p] for p in positions], places=[self.places[p] for p in positions])


def load_client_data(
    spec: ClientSpec,
    tokenizer: PreTrainedTokenizerBase,
    text_length: int,
    seed: int,
    root: str = "",
    hold_out: bool = True,
) -> ClientData:
    """The data of one client.

    Args:
        spec: of the client.
        tokenizer: of the client's backbone.
        text_length: longest text and longest target, in tokens.
        seed: of the run; it decides the order of sources with `shuffle`, and what is held out.
        root: a folder with a mirror of hub data sets; nothing to use the hub.
        hold_out: whether a task without validation rows sets a fifth of its training examples aside.

    Raises:
        SpecError: the spec does not fit the data.
    """
    splits: dict[str, dict[str, Sequence[Examples]]] = {"train": {}, "validation": {}, "test": {}}
    for task in spec.tasks:
        reader = _Reader(f"client {spec.name!r}: task {task.name!r}", task, tokenizer, text_length, seed, root)
        found: dict[str, Sequence[Examples]] = {
            "train": [reader.read("train", source) for source in task.train],
            "validation": [reader.read("validation", source) for source in task.validation],
            "test": [reader.read("test", source) for source in task.test],
        }
        for split, parts in found.items():
            for problem in too_few_rows(task, split, [len(part) for part in parts], hold_out):
                raise SpecError(f"{reader.where}: {problem}")
        if hold_out and not task.validation:
            halves = [
                set_aside(part, named_seed(seed, spec.name, task.name, "held out", number))
                for number, part in enumerate(found["train"])
            ]
            found["train"], found["validation"] = [a for a, _ in halves], [b for _, b in halves]
        for split, parts in found.items():
            splits[split][task.name] = parts
    return ClientData(splits)


def too_few_rows(task: TaskSpec, split: str, sizes: Sequence[int], hold_out: bool) -> Iterator[str]:
    """What is wrong with the number of rows of a split's sources; see `load_client_data` for `hold_out`."""
    fewest = 2 if split == "train" and hold_out and not task.validation else 1
    if not sizes and split != "validation":
        yield f"{split} has no source: name one"
    for size in sizes:
        if size < fewest:
            why = ", one of them to be set aside" if fewest > 1 else ""
            yield f"{split} has a source with {size} rows: give it at least {fewest}{why}"


@dataclass(frozen=True)
class _Reader:
    """Reads the sources of one task; `where` begins every error."""

    where: str
    task: TaskSpec
    tokenizer: PreTrainedTokenizerBase
    text_length: int
    seed: int
    root: str

    def read(self, split: str, source: Source) -> TaskExamples:
        """The examples of one source; `split` is for messages.

        Raises:
            SpecError: the source is not there, or the spec does not fit it.
        """
        try:
            return self._read(source)
        except SourceError as error:
            raise SpecError(f"{self.where}: {split} {error}") from error

    def _read(self, source: Source) -> TaskExamples:
        data = open_source(source, self.root)
        read = self.task.fields(source)
        for _, problem in missing_columns(data, read):
            raise SourceError(problem)
        rows = rows_of(source, self.root, self.seed)
        return TaskExamples(
            task=self.task,
            domain=source.domain or self.task.domain,
            rows=rows,
            images=images_of(source, self.root, read["image"].columns[0]) if "image" in read else None,
            texts=self._tokens(source, read.get("text"), is_target=False),
            labels=self._labels(data, rows, read["label"].columns[0]) if "label" in read else None,
            targets=self._tokens(source, read.get("target"), is_target=True),
            places=range(len(rows)),
            pad=cast(int, self.tokenizer.pad_token_id),
        )

    def _tokens(self, source: Source, read: Field | None, is_target: bool) -> Tokens | None:
        if read is None:
            return None
        return tokenised(source, self.root, self.seed, read, self.tokenizer, self.text_length, is_target)

    def _labels(self, data: datasets.Dataset, rows: list[int], column: str) -> list[int]:
        labels = Labels(self.task, data, column)
        return [labels.class_of(row, value[column]) for part in values_of(data, rows, [column]) for row, value in part]
