"""Texts of a data set as token ids: rendered, tokenised in batches and kept as one array."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import cast

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tap_flower import hub
from tap_flower.data import templates
from tap_flower.data.sources import RowError, open_source, rows_of, values_of
from tap_flower.data.spec import Field, Source


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

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each text."""
        return np.diff(self._ends, prepend=0)

    def __getitem__(self, position: int) -> NDArray[np.int32]:
        """Token ids of one text."""
        return self._ids[self._ends[position - 1] if position else 0 : self._ends[position]]


@cache
def load_tokenizer(place: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a backbone's local folder or hub id, once a process.

    Raises:
        OSError: it cannot be found.
    """
    hub.prepare(place)
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
    for values in values_of(open_source(source, root), rows_of(source, root, seed), read.reads):
        texts = [text_of(read, row, value) for row, value in values]
        parts += [np.array(ids, dtype=np.int32) for ids in token_ids(texts, tokenizer, length, is_target)]
    ids = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)
    return Tokens(ids, np.cumsum([len(part) for part in parts]))


def token_ids(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int | None, is_target: bool
) -> list[list[int]]:
    """The token ids of some texts, as the model gets them.

    Args:
        texts: at least one.
        tokenizer: of the backbone.
        length: where a text is cut, in tokens; None cuts none.
        is_target: see `tokenised`.
    """
    cut = {} if length is None else {"truncation": True, "max_length": length - is_target}
    # Not verbose: a text that is longer than the backbone's positions is cut by `length`, or only measured.
    encoded = tokenizer(list(texts), add_special_tokens=not is_target, verbose=False, **cut)["input_ids"]
    closing = [cast(int, tokenizer.sep_token_id)] if is_target else []
    return [[*ids, *closing] for ids in cast(list[list[int]], encoded)]


def text_of(read: Field, row: int, values: Mapping[str, object]) -> str:
    """The text of a row, which has these values in the columns that `read` reads.

    Raises:
        RowError: it has none.
    """
    try:
        parts = [templates.render(read.template, values)] if read.template else [values[name] for name in read.columns]
    except templates.PromptError as error:
        raise RowError("cannot fill its template", row, "", str(error)) from error
    if None in parts:
        raise RowError("has no text", row, f" of {', '.join(read.columns)}: fill it, or leave the row out")
    return " ".join(str(part) for part in parts)
