"""From sources to examples that batches are made of: images decoded when they are first used, text tokenised once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import datasets
import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tap_flower.core.initial import named_seed
from tap_flower.core.training import Batch
from tap_flower.data import packaged
from tap_flower.data.collate import normalise, pad_inputs, pad_targets
from tap_flower.data.spec import ClientSpec, Source, SpecError, TaskSpec

IMAGE_SIZE = 64
"""Side of the images that clients hold, in pixels."""
SPLITS = ("train", "validation", "test")
HELD_OUT = 5
"""Without validation rows of its own, a task sets every fifth training example aside."""


class LazyImages:
    """The images of a data set as uint8 pixels, each decoded when it is first used and kept.

    Args:
        column: a data set with the one column `image`.

    Attributes:
        decodes: how many images have been decoded.
    """

    def __init__(self, column: datasets.Dataset) -> None:
        self._column = column
        # Not initialised: the operating system provides the memory of an image when it is first written.
        self._pixels = torch.empty((len(column), 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8)
        self._is_decoded = [False] * len(column)
        self.decodes = 0

    def __getitem__(self, rows: Sequence[int]) -> Tensor:
        """Pixels of some rows, [n, 3, 64, 64] uint8."""
        for row in rows:
            if not self._is_decoded[row]:
                image = self._column[row]["image"].convert("RGB")
                if image.size != (IMAGE_SIZE, IMAGE_SIZE):
                    image = image.resize((IMAGE_SIZE, IMAGE_SIZE))
                self._pixels[row] = torch.from_numpy(np.array(image)).permute(2, 0, 1)
                self._is_decoded[row] = True
                self.decodes += 1
        return self._pixels[torch.tensor(rows)]


@dataclass(frozen=True)
class Examples:
    """Examples of one task, ready for batches. Sequences are indexed by the example's position.

    Attributes:
        task: what they belong to.
        rows: row of the data set.
        images: of the data set, indexed by row; None where the task has no image.
        texts: token ids, or None.
        labels: class of each example, or None.
        targets: token ids of the target text with its closing separator, or None.
        pad: id of the padding token.
    """

    task: TaskSpec
    rows: list[int]
    images: LazyImages | None
    texts: list[list[int]] | None
    labels: list[int] | None
    targets: list[list[int]] | None
    pad: int

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, positions: Sequence[int], device: torch.device) -> Batch:
        """The examples at some positions as one batch on `device`."""
        inputs: dict[str, Any] = {"domain": self.task.domain}
        target: Tensor | None = None
        if self.images is not None:
            pixels = normalise(self.images[[self.rows[p] for p in positions]].to(device))
            inputs["image"] = target = pixels
        if self.texts is not None:
            padded = pad_inputs([self.texts[p] for p in positions], self.pad)
            inputs |= {name: tensor.to(device) for name, tensor in padded.items()}
        if self.labels is not None:
            target = torch.tensor([self.labels[p] for p in positions], device=device)
        if self.targets is not None:
            target = pad_targets([self.targets[p] for p in positions]).to(device)
            inputs["target_length"] = target.shape[1]
        assert target is not None  # a task spec names a label, a target or an image
        return Batch(self.task.name, inputs, target)

    def split(self, seed: int) -> tuple[Examples, Examples]:
        """(the rest, one in `HELD_OUT` set aside), drawn with `seed`."""
        order = _permutation(len(self), seed)
        held_out = max(1, len(self) // HELD_OUT)
        return self._subset(sorted(order[held_out:])), self._subset(sorted(order[:held_out]))

    def _subset(self, positions: list[int]) -> Examples:
        return Examples(
            self.task,
            [self.rows[p] for p in positions],
            self.images,
            None if self.texts is None else [self.texts[p] for p in positions],
            None if self.labels is None else [self.labels[p] for p in positions],
            None if self.targets is None else [self.targets[p] for p in positions],
            self.pad,
        )


class ClientData:
    """The data of one client: for every split and task its examples.

    Args:
        spec: of the client.
        tokenizer: of the client's backbone.
        text_length: longest text and longest target, in tokens.
        seed: of the run; it decides the order of sources with `shuffle`, and what is held out.

    Raises:
        SpecError: the spec does not fit the data.
    """

    def __init__(self, spec: ClientSpec, tokenizer: PreTrainedTokenizerBase, text_length: int, seed: int) -> None:
        self.splits: dict[str, dict[str, Examples]] = {split: {} for split in SPLITS}
        for task in spec.tasks:
            reader = _Reader(f"client {spec.name!r}: task {task.name!r}", task, tokenizer, text_length, seed)
            train, test = reader.read("train", task.train), reader.read("test", task.test)
            if task.validation is None:
                train, validation = train.split(named_seed(seed, spec.name, task.name, "held out"))
            else:
                validation = reader.read("validation", task.validation)
            for split, examples in zip(SPLITS, (train, validation, test), strict=True):
                if not examples:
                    raise SpecError(f"{reader.where} has no {split} rows: give it more rows")
                self.splits[split][task.name] = examples

    def sizes(self, split: str) -> dict[str, int]:
        """Task name -> number of examples in a split."""
        return {task: len(examples) for task, examples in self.splits[split].items()}

    def training_batches(self, batch_size: int, seed: int, device: torch.device) -> Iterator[Batch]:
        """Endless shuffled batches of the training examples, the tasks taking turns.

        Args:
            batch_size: examples in a batch, where the task has no batch size of its own; a task that has fewer gives all.
            seed: decides the order.
            device: of the batches.
        """
        streams = [
            _shuffled(examples, examples.task.batch_size or batch_size, named_seed(seed, task), device)
            for task, examples in sorted(self.splits["train"].items())
        ]
        while True:
            for stream in streams:
                yield next(stream)

    def batches(self, split: str, batch_size: int, device: torch.device) -> Iterator[Batch]:
        """All examples of a split once, in order."""
        for examples in self.splits[split].values():
            for start in range(0, len(examples), batch_size):
                yield examples.batch(range(start, min(start + batch_size, len(examples))), device)


def _shuffled(examples: Examples, batch_size: int, seed: int, device: torch.device) -> Iterator[Batch]:
    size, epoch = min(batch_size, len(examples)), 0
    while True:
        order = _permutation(len(examples), named_seed(seed, epoch))
        for start in range(0, len(order) - size + 1, size):
            yield examples.batch(order[start : start + size], device)
        epoch += 1


def _permutation(count: int, seed: int) -> list[int]:
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return cast(list[int], order.tolist())


@cache
def load_tokenizer(place: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a backbone's local folder or hub id, once a process."""
    return cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(place, trust_remote_code=False))


@cache
def _lazy_images(name: str, split: str, column: str) -> LazyImages:
    """An image column, once a process: the clients of one process share what is decoded."""
    return LazyImages(packaged.load(name, split).select_columns([column]).rename_columns({column: "image"}))


@dataclass(frozen=True)
class _Reader:
    """Reads the sources of one task; `where` begins every error."""

    where: str
    task: TaskSpec
    tokenizer: PreTrainedTokenizerBase
    text_length: int
    seed: int

    def read(self, split: str, source: Source) -> Examples:
        try:
            data = packaged.load(source.name, source.split)
        except ValueError as error:
            raise SpecError(f"{self.where}: {split}: {error}") from error
        for role, column in self.task.columns.items():
            if column not in data.column_names:
                known = ", ".join(data.column_names)
                raise SpecError(f"{self.where}: {split} has no column {column!r} for {role}: choose among {known}")
        rows = self._rows(split, source, len(data))
        chosen = data.select(rows)
        image = self.task.columns.get("image")
        return Examples(
            task=self.task,
            rows=rows,
            images=None if image is None else _lazy_images(source.name, source.split, image),
            texts=self._texts(chosen),
            labels=self._labels(split, chosen, rows),
            targets=self._targets(chosen),
            pad=cast(int, self.tokenizer.pad_token_id),
        )

    def _rows(self, split: str, source: Source, available: int) -> list[int]:
        rows = list(range(available))
        if source.shuffle:
            rows = _permutation(available, named_seed(self.seed, source.name, source.split))
        if source.rows is None:
            return rows
        start, stop = source.rows
        if stop > available:
            raise SpecError(
                f"{self.where}: {split} takes rows {start} to {stop} of {source.name!r} {source.split!r}, "
                f"which has {available}: lower them"
            )
        return rows[start:stop]

    def _texts(self, data: datasets.Dataset) -> list[list[int]] | None:
        if "text" not in self.task.columns:
            return None
        texts = list(data[self.task.columns["text"]])
        encoded = self.tokenizer(texts, truncation=True, max_length=self.text_length)
        return cast(list[list[int]], encoded["input_ids"])

    def _targets(self, data: datasets.Dataset) -> list[list[int]] | None:
        if "target" not in self.task.columns:
            return None
        texts = list(data[self.task.columns["target"]])
        encoded = self.tokenizer(texts, truncation=True, max_length=self.text_length - 1, add_special_tokens=False)
        return [[*ids, cast(int, self.tokenizer.sep_token_id)] for ids in encoded["input_ids"]]

    def _labels(self, split: str, data: datasets.Dataset, rows: list[int]) -> list[int] | None:
        if "label" not in self.task.columns:
            return None
        labels = [int(label) for label in data[self.task.columns["label"]]]
        for row, label in zip(rows, labels, strict=True):
            if not 0 <= label < len(self.task.classes):
                raise SpecError(
                    f"{self.where} has {len(self.task.classes)} classes in the client spec "
                    f"but label {label} in {split} row {row}"
                )
        return labels
