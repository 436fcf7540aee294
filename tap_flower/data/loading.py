"""From the sources of a client spec to examples, and the rules by which `check` reads them too."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from tap_flower.core.seeds import named_seed
from tap_flower.data.batching import ClientData
from tap_flower.data.examples import Examples, set_aside
from tap_flower.data.fields import ImageForm
from tap_flower.data.images import images_of, normalise, with_image_forms
from tap_flower.data.labels import read_labels
from tap_flower.data.sources import RowError, SourceError, SourceNote, missing_columns, notes_of, open_source, rows_of
from tap_flower.data.spec import SPLITS, ClientSpec, Source, TaskSpec
from tap_flower.data.text import EmptyTextError, TokenIds, Tokens, pad_inputs, pad_targets, tokenised
from tap_flower.errors import SpecError

Errors = dict[str, list[SourceError]]
"""Role (image, text, label, target; nothing for the whole source) -> what is wrong with it."""


@dataclass(frozen=True, eq=False)
class SourceRows(Dataset[dict[str, Any]]):
    """The rows of one source, with what their task reads from them: role -> value.

    Attributes:
        task: that reads them.
        domain: of all rows.
        rows: of the data set, by place.
        columns: role -> its values. `image` (uint8 [3, size, size]) is indexed by row; `text` and `target` (int32 token ids,
            a target with its closing separator) and `label` (int) by place.
        pad: id of the padding token.
    """

    task: TaskSpec
    domain: str
    rows: list[int]
    columns: Mapping[str, Any]
    pad: int

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, Any]:
        return {role: column[self.rows[place] if role == "image" else place] for role, column in self.columns.items()}

    def examples(self, workers: int = 0) -> Examples:
        """All rows, as batches are drawn from them; their length is that of text and target together."""
        lengths = [column.lengths for column in self.columns.values() if isinstance(column, Tokens)]
        return Examples(
            task=self.task.name,
            dataset=self,
            rows=range(len(self)),
            collate=self.collate,
            form=self.form,
            batch_size=self.task.batch_size,
            lengths=np.sum(lengths, axis=0) if lengths else None,
            pinned=True,
            workers=workers,
        )

    def collate(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Rows as tensors in main memory: those of `input_tensors`, and `label` [B] or `target` [B, S], int64."""
        columns = {role: [item[role] for item in items] for role in self.columns}
        tensors = input_tensors(columns.get("image"), columns.get("text"), self.pad)
        if "label" in columns:
            tensors["label"] = torch.tensor(columns["label"])
        if "target" in columns:
            tensors["target"] = pad_targets(columns["target"])
        return tensors

    def form(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], Tensor]:
        """(inputs of the model, target of the loss) from the tensors of `collate`, on their device."""
        inputs = model_inputs(self.domain, tensors, self.task.image)
        if "target" in inputs:
            target = inputs.pop("target")
            return {**inputs, "target_length": target.shape[1]}, target
        target = inputs.pop("label") if "label" in inputs else inputs["image"]
        return inputs, target


def input_tensors(images: Sequence[Tensor] | None, texts: Sequence[TokenIds] | None, pad: int) -> dict[str, Tensor]:
    """A model's inputs as tensors in main memory, before images are normalised.

    Args:
        images: uint8 [3, size, size] each, or None where the task has no image.
        texts: token ids of each example, or None where the task has no text.
        pad: id of the padding token.

    Returns:
        `image` uint8 [B, 3, size, size]; `input_ids` and `attention_mask` as `pad_inputs` gives them.
    """
    tensors = {} if images is None else {"image": torch.stack(list(images))}
    return tensors if texts is None else tensors | pad_inputs(texts, pad)


def model_inputs(domain: str, tensors: Mapping[str, Tensor], form: ImageForm) -> dict[str, Any]:
    """What a model gets of a batch: its domain, and the tensors of `input_tensors`, the image normalised as `form` says."""
    return {"domain": domain} | {name: normalise(x, form) if name == "image" else x for name, x in tensors.items()}


def load_client_data(
    spec: ClientSpec,
    tokenizer: PreTrainedTokenizerBase,
    text_length: int,
    seed: int,
    root: str = "",
    hold_out: bool = True,
    workers: int = 0,
) -> ClientData:
    """The data of one client.

    Args:
        spec: of the client.
        tokenizer: of the client's backbone.
        text_length: longest text and longest target, in tokens.
        seed: of the run; it decides the order of sources with `shuffle`, and what is held out.
        root: a folder with a mirror of hub data sets; nothing to use the hub.
        hold_out: whether a task without validation rows sets a fifth of its training examples aside.
        workers: threads that read ahead of training.

    Raises:
        SpecError: the spec does not fit the data; `check_data` lists all that is wrong.
        BackboneError: a task leaves the form of its images to the backbone, which has no image processor.
    """
    spec = with_image_forms(spec)
    splits: dict[str, dict[str, Sequence[Examples]]] = {split: {} for split in SPLITS}
    for task in spec.tasks:
        where = f"client {spec.name!r}: task {task.name!r}"
        for split, sources in task.splits.items():
            try:
                found = [_right(*read_source(task, source, tokenizer, text_length, seed, root)) for source in sources]
            except SourceError as error:
                raise SpecError(f"{where}: {split} {error}") from error
            for problem in too_few_rows(split, dict(zip(sources, map(len, found), strict=True))):
                raise SpecError(f"{where}: {problem}")
            for source, part in zip(sources, found, strict=True):
                if problem := _unreadable(source, part):
                    raise SpecError(f"{where}: {split} {problem}")
            splits[split][task.name] = [part.examples(workers) for part in found]
        if hold_out and not task.validation:
            halves = [
                set_aside(part, named_seed(seed, spec.name, task.name, "held out", number))
                for number, part in enumerate(splits["train"][task.name])
            ]
            splits["train"][task.name] = [rest for rest, _ in halves]
            splits["validation"][task.name] = [aside for _, aside in halves]
    return ClientData(splits)


def read_source(
    task: TaskSpec,
    source: Source,
    tokenizer: PreTrainedTokenizerBase | None,
    text_length: int | None,
    seed: int,
    root: str,
) -> tuple[SourceRows, Errors]:
    """Reads one source of a task; images are decoded later, when they are used.

    Reading goes on after a problem: without the roles whose columns are missing, with all rows where there are fewer than
    wanted, and with an empty text or the label `NO_CLASS` for a row with a problem.

    Args:
        task: that reads it, with the whole form of its images (see `with_image_forms`).
        source: what it reads.
        tokenizer: of the client's backbone; without one, texts have no tokens.
        text_length: longest text and longest target, in tokens; None cuts none.
        seed: of the run.
        root: a folder with a mirror of hub data sets; nothing to use the hub.

    Returns:
        The rows, and all problems and notes.

    Raises:
        SourceError: the data set cannot be opened.
    """
    data = open_source(source, root)
    errors: Errors = defaultdict(list, {"": list(notes_of(source))})
    fields = task.fields(source)
    for role, problem in list(missing_columns(data, fields)):
        errors[""].append(SourceError(problem))
        fields.pop(role, None)
    try:
        rows = rows_of(source, root, seed)
    except SourceError as error:
        errors[""].append(error)
        source = replace(source, part=None, by=(), rows=None, shuffle=False)
        rows = rows_of(source, root, seed)

    columns: dict[str, Any] = {}
    for role, read in fields.items():
        if role == "image":
            columns[role] = images_of(source, root, read.columns[0], task.image)
        elif role == "label":
            columns[role], errors[role] = read_labels(task, data, rows, read.columns[0])
        else:
            columns[role], wrong = tokenised(source, root, seed, read, tokenizer, text_length, role == "target")
            errors[role] += wrong
    pad = cast(int, tokenizer.pad_token_id) if tokenizer else 0
    return SourceRows(task, source.domain or task.domain, rows, columns, pad), errors


def too_few_rows(split: str, sizes: Mapping[Source, int]) -> Iterator[str]:
    """What is wrong with the number of rows of a split's sources."""
    if not sizes and split != "validation":
        yield f"{split} has no source: name one"
    for source, size in sizes.items():
        if not size:
            chosen = f" in its part {list(source.part)}" if source.part else ""
            yield f"{split} {source} has 0 rows{chosen}: give it at least 1"


def _unreadable(source: Source, rows: SourceRows) -> str:
    """What is wrong with the first file that is no image; those that packages carry are known to be."""
    images = rows.columns.get("image")
    if images is not None and source.format != "packaged":
        for row in rows.rows:
            try:
                images.check(row)
            except RowError as error:
                return f"{source} {error}"
    return ""


def _right(rows: SourceRows, errors: Errors) -> SourceRows:
    """The rows of a source, if nothing is wrong with them that training could not do with."""
    for error in chain(*errors.values()):
        if not isinstance(error, EmptyTextError | SourceNote):
            raise error
    return rows
