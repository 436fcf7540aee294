"""Texts of a data set: rendered from columns or templates, tokenised in parts, kept as one array, padded for a batch."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from datetime import date, time
from decimal import Decimal
from functools import cache, lru_cache
from typing import cast

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from tap_flower import hub
from tap_flower.core.tasks import IGNORE
from tap_flower.data.fields import LIKE_MISSING, Field, is_missing
from tap_flower.data.sources import OPEN, RowError, SourceNote, open_source, rows_of, values_of
from tap_flower.data.spec import Source
from tap_flower.errors import BackboneError

log = logging.getLogger("tap_flower")

TokenIds = Sequence[int] | NDArray[np.int32]
"""Token ids of one text."""


class EmptyTextError(RowError):
    """A row's text is blank: `check` tells it, and training can do with it."""


class LikeMissingNote(RowError, SourceNote):
    """A row's text often stands for a value that is not there; a target may well be one."""


class Tokens:
    """Token ids of many texts of different lengths, in one array of 4 bytes a token.

    Args:
        ids: int32, token ids of all texts, one after the other.
        ends: int64 [number of texts], where each text ends in `ids`.
    """

    def __init__(self, ids: NDArray[np.int32], ends: NDArray[np.int64]) -> None:
        self._ids, self._ends = ids, ends

    def __len__(self) -> int:
        return len(self._ends)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each text, [number of texts]."""
        return np.diff(self._ends, prepend=0)

    def count(self, token: int | None) -> int:
        """How often a token stands in all texts."""
        return int((self._ids == token).sum()) if token is not None else 0

    def __getitem__(self, position: int) -> NDArray[np.int32]:
        """Token ids of one text."""
        return self._ids[self._ends[position - 1] if position else 0 : self._ends[position]]


@cache
def load_tokenizer(place: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a backbone's local folder or hub id, once a process.

    Raises:
        BackboneError: it cannot be found, knows no words, lacks a token that texts need, or has more tokens than the
            backbone has embeddings.
    """
    hub.check_folder(place)
    hub.prepare(place)
    try:
        found = AutoTokenizer.from_pretrained(place, revision=revision, trust_remote_code=False)
    except Exception as error:  # whatever transformers and the hub's library raise on what is no tokenizer
        reason = str(error).partition("\n")[0]
        raise BackboneError(f"backbone {place!r} gives no tokenizer: {reason}") from error
    tokenizer, words = cast(PreTrainedTokenizerBase, found), found.get_vocab()
    # Where there is no file of one, transformers makes a tokenizer to which every word is unknown.
    if len(words) <= len(set(tokenizer.all_special_ids)):
        raise BackboneError(f"backbone {place!r} has no tokenizer: put the files of its tokenizer into the folder")
    if lacking := [kind for kind in ("pad_token", "sep_token") if getattr(tokenizer, f"{kind}_id") is None]:
        raise BackboneError(
            f"backbone {place!r} has a tokenizer without {' and '.join(lacking)}: use that of its family"
        )
    embedded, largest = _embedded(place, revision), max(words.values())
    if embedded is not None and largest >= embedded:
        raise BackboneError(
            f"backbone {place!r} has a tokenizer with tokens up to {largest:,}, and embeddings for {embedded:,}: use its own"
        )
    return tokenizer


def _embedded(place: str, revision: str | None) -> int | None:
    """How many tokens have an embedding; None where the folder's config.json is none of transformers', as in an export."""
    try:
        config = AutoConfig.from_pretrained(place, revision=revision, trust_remote_code=False)
    except (OSError, ValueError):
        return None
    found = getattr(config.get_text_config(), "vocab_size", None)
    return found if isinstance(found, int) else None


@lru_cache(maxsize=OPEN)
def tokenised(
    source: Source,
    root: str,
    seed: int,
    read: Field,
    tokenizer: PreTrainedTokenizerBase | None,
    length: int | None,
    is_target: bool,
) -> tuple[Tokens, Sequence[RowError]]:
    """The texts of a source's rows, in its order, read once a process, which tells of those that are cut.

    Args:
        source: the rows.
        root: see `open_source`.
        seed: of the run.
        read: the columns or the template of the text.
        tokenizer: of the backbone; without one, the texts are read and have no tokens.
        length: where a text is cut, in tokens; None cuts none.
        is_target: whether it ends with the separator in place of being framed by the special tokens.

    Returns:
        The tokens of each row, and what is wrong with rows; a row without a text stands as an empty one.

    Raises:
        SourceError: the source cannot be read.
    """
    parts, errors = [np.zeros(0, dtype=np.int32)], []
    ends: list[int] = []
    cut: list[int] = []
    for texts, wrong in texts_of(open_source(source, root), rows_of(source, root, seed), read, is_target):
        errors += wrong
        ids = token_ids(texts, tokenizer, length, is_target) if tokenizer else [[] for _ in texts]
        if tokenizer and length is not None:
            cut += lengths_of_cut(texts, ids, tokenizer, length, is_target)
        parts += [np.array(text, dtype=np.int32) for text in ids]
        ends += [len(text) for text in ids]
    if cut:
        what = "targets" if is_target else "texts"
        told = "%s: %d of %d %s have up to %d tokens, and are cut at model.text_length = %d"
        log.warning(told, source, len(cut), len(ends), what, max(cut), length)
    return Tokens(np.concatenate(parts), np.cumsum(ends, dtype=np.int64)), errors


def texts_of(
    data: datasets.Dataset, rows: Sequence[int], read: Field, is_target: bool
) -> Iterator[tuple[list[str], list[RowError]]]:
    """The text of each row, in parts of `AT_ONCE` rows; a row without one gives an error and an empty text.

    Args:
        data: with the columns.
        rows: of the data set.
        read: the columns or the template of the text.
        is_target: for messages.
    """
    role = "target" if is_target else "text"
    # A class is a word here and not its number, unless a template takes it.
    names = {} if read.template else {name: getattr(data.features[name], "names", None) for name in read.columns}
    for part in values_of(data, rows, read.reads):
        texts: list[str] = []
        errors: list[RowError] = []
        for row, values in part:
            try:
                texts.append(_text_of(read, row, _named(values, names)))
            except RowError as error:
                texts.append("")
                errors.append(error)
            else:
                if not texts[-1].strip():
                    errors.append(EmptyTextError(f"has an empty {role}", row, ": fill it, or leave the row out"))
                elif not is_target and texts[-1].strip().lower() in LIKE_MISSING:
                    rest = ": if it stands for a missing value, leave the row out"
                    errors.append(LikeMissingNote(f"has the text {texts[-1]!r}", row, rest))
        yield texts, errors


def _named(values: dict[str, object], names: Mapping[str, Sequence[str] | None]) -> dict[str, object]:
    """A row's values, a class by its name; -1 stands for none."""
    classes = {name: known for name, known in names.items() if known}
    found = {name: values[name] for name in classes}
    return values | {
        name: classes[name][number] if isinstance(number, int) and number >= 0 else None
        for name, number in found.items()
    }


def _text_of(read: Field, row: int, values: Mapping[str, object]) -> str:
    if read.template:
        try:
            return read.rendered(values)
        except Exception as error:  # a TemplateError, or what a filter raises on a value
            if (empty := [name for name, value in values.items() if is_missing(value)]) and empty[0] in str(error):
                rest = f" of {', '.join(empty)}: fill it, leave the row out, or say what stands there with `default`"
                raise RowError("has no value for its template", row, rest) from error
            reason = f"{error} (template {read.template!r})"
            raise RowError("cannot fill its template", row, "", reason) from error
    found = [values[name] for name in read.columns]
    if any(is_missing(value) for value in found):
        raise RowError("has no text", row, f" of {', '.join(read.columns)}: fill it, or leave the row out")
    if wrong := [value for value in found if not isinstance(value, str | int | float | Decimal | date | time)]:
        rest = f" of {', '.join(read.columns)}: say with a template what of it is the text"
        raise RowError(f"has a {type(wrong[0]).__name__} as text", row, rest)
    return " ".join(str(value) for value in found)


_PROBE = "Crème BRÛLÉE, 2 × 3.50 €\n(don't)  ﬁne"
"""What tokenizers of one vocabulary may cut in different ways: capitals, accents, digits, punctuation, blanks."""


@cache
def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of a tokenizer's vocabulary, and of how it cuts a text into tokens, as 8 hexadecimal digits."""
    words = json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer(_PROBE)["input_ids"]])
    return hashlib.sha256(words.encode()).hexdigest()[:8]


def token_ids(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int | None, is_target: bool
) -> list[list[int]]:
    """The token ids of some texts, as the model gets them.

    Args:
        texts: at least one.
        tokenizer: of the backbone.
        length: where a text is cut, in tokens; None cuts none.
        is_target: whether it ends with the separator in place of being framed by the special tokens.
    """
    cut = {} if length is None else {"truncation": True, "max_length": length - is_target}
    # Not verbose: a text that is longer than the backbone's positions is cut by `length`, or only measured.
    encoded = tokenizer(list(texts), add_special_tokens=not is_target, verbose=False, **cut)["input_ids"]
    closing = [cast(int, tokenizer.sep_token_id)] if is_target else []
    return [[*ids, *closing] for ids in cast(list[list[int]], encoded)]


def lengths_of_cut(
    texts: Sequence[str],
    ids: Sequence[TokenIds],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    is_target: bool,
) -> list[int]:
    """The lengths, in tokens, of those texts that `token_ids` has cut.

    Args:
        texts: as `token_ids` got them.
        ids: what it returned.
        tokenizer: of the backbone.
        length: where a text is cut, in tokens.
        is_target: as for `token_ids`.
    """
    full = [text for text, found in zip(texts, ids, strict=True) if len(found) == length]
    whole = token_ids(full, tokenizer, None, is_target) if full else []
    return [len(found) for found in whole if len(found) > length]


def pad_inputs(texts: Sequence[TokenIds], pad: int) -> dict[str, Tensor]:
    """Token ids padded to the longest text of the batch.

    Args:
        texts: token ids of each example.
        pad: id of the padding token.

    Returns:
        `input_ids` [B, T] int64, and `attention_mask` [B, T] int64 (0 at padding) where something was padded.
    """
    ids = _pad(texts, pad)
    lengths = torch.tensor([len(text) for text in texts])
    if bool((lengths == ids.shape[1]).all()):
        return {"input_ids": ids}
    return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}


def pad_targets(texts: Sequence[TokenIds]) -> Tensor:
    """Target token ids padded with `IGNORE` to the longest of the batch, [B, S] int64."""
    return _pad(texts, IGNORE)


def _pad(texts: Sequence[TokenIds], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(text, dtype=torch.int64) for text in texts], batch_first=True, padding_value=value
    )
