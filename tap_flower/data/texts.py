"""Texts of a data set as token ids: rendered, tokenised in batches and kept as one array."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import cast

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tap_flower.data import templates
from tap_flower.data.sources import SourceError, open_source, rows_of
from tap_flower.data.spec import Field, Source

_AT_ONCE = 1000
"""Rows that are read and tokenised together."""


class Tokens:
    """Token ids of many texts of different lengths, in one array of 4 bytes a token.

    Args:
        ids: token ids of all texts, one after the other, int32.
        ends: where each text ends in `ids`.
    """

    def __init__(self, ids: NDArray[np.int32], ends: NDArray[np.int64]) -> None:
        self._ids, self._ends = ids, ends

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, position: int) -> NDArray[np.int32]:
        """Token ids of one text."""
        return self._ids[self._ends[position - 1] if position else 0 : self._ends[position]]


@cache
def load_tokenizer(place: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a backbone's local folder or hub id, once a process.

    Raises:
        OSError: it cannot be found.
    """
    return cast(
        PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(place, revision=revision, trust_remote_code=False)
    )


@cache
def tokenised(
    source: Source, root: str, seed: int, read: Field, tokenizer: PreTrainedTokenizerBase, length: int, is_target: bool
) -> Tokens:
    """The texts of a source's rows, in its order, once a process.

    Args:
        source: the rows.
        root: see `open_source`.
        seed: of the run.
        read: the columns or the template of the text.
        tokenizer: of the backbone.
        length: longest text, in tokens.
        is_target: whether it ends with the separator in place of being framed by the special tokens.

    Raises:
        SourceError: a row has no text.
    """
    parts: list[NDArray[np.int32]] = []
    for texts in _texts(source, root, seed, read):
        limit = length - 1 if is_target else length
        encoded = tokenizer(texts, truncation=True, max_length=limit, add_special_tokens=not is_target)["input_ids"]
        closing = [cast(int, tokenizer.sep_token_id)] if is_target else []
        parts += [np.array([*ids, *closing], dtype=np.int32) for ids in cast(list[list[int]], encoded)]
    return Tokens(np.concatenate(parts), np.cumsum([len(part) for part in parts]))


def _texts(source: Source, root: str, seed: int, read: Field) -> Iterator[list[str]]:
    rows = rows_of(source, root, seed)
    columns = list(read.columns) or sorted(templates.variables(read.template))
    data = open_source(source, root).select_columns(columns)
    for start in range(0, len(rows), _AT_ONCE):
        chosen = rows[start : start + _AT_ONCE]
        values = data[chosen]
        yield [
            _text(read, {column: values[column][position] for column in columns}, row)
            for position, row in enumerate(chosen)
        ]


def _text(read: Field, row: dict[str, object], number: int) -> str:
    try:
        parts: Sequence[object] = [templates.render(read.template, row)] if read.template else list(row.values())
    except templates.PromptError as error:
        raise SourceError(f"row {number}: {error}") from error
    if None in parts:
        raise SourceError(f"has no text in row {number} of {', '.join(read.columns)}: fill it, or leave the row out")
    return " ".join(str(part) for part in parts)
