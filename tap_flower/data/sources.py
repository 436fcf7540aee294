"""Opens the data set of a source: the demo's, a file, a folder, the hub, or a local mirror of the hub."""

from __future__ import annotations

import glob
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, cast

import datasets
import huggingface_hub
import numpy as np

from tap_flower import hub
from tap_flower.core.seeds import named_seed
from tap_flower.data import packaged
from tap_flower.data.examples import permutation
from tap_flower.data.fields import Field, is_missing
from tap_flower.data.spec import Source
from tap_flower.data.tables import (
    blank_before_quote,
    by_kind,
    csv_table,
    image_folder,
    joined_rows,
    json_table,
    parquet_table,
    passed_over,
)
from tap_flower.errors import TapFlowerError
from tap_flower.hub import fetch_command
from tap_flower.plain import as_text

Values = tuple[int, dict[str, object]]
"""A row of a data set, and its value in each column that is read."""
AT_ONCE = 1000
"""Rows that are read, and texts that are tokenised, together."""
SHOWN = 20
"""Rows, classes, and kinds of problem with one role of a source, that are named; the others are counted."""
OPEN = 4096
"""Data sets, and sources, that a process remembers: more than 100 clients with 10 tasks each have."""


class SourceError(TapFlowerError, ValueError):
    """A source cannot be read; the message goes on after "client ...: task ...: train"."""


class SourceNote(SourceError):
    """Something about a source that is worth knowing, and stops nothing."""


class RowError(SourceError):
    """A row cannot be read.

    Args:
        what: is wrong; rows of which the same is wrong are told together.
        row: of the data set.
        rest: of the message, the same for all such rows.
        reason: of this row alone.
    """

    def __init__(self, what: str, row: int, rest: str, reason: str = "") -> None:
        super().__init__(f"{what} in row {row}{rest}" + (f": {reason}" if reason else ""))
        self.what, self.row, self.rest, self.reason = what, row, rest, reason


class QuoteNote(RowError, SourceNote):
    """A value of a CSV file may be quoted otherwise than was meant."""


def open_source(source: Source, root: str = "") -> datasets.Dataset:
    """The whole split that a source takes rows from, opened once a process and memory-mapped.

    Args:
        source: what to open.
        root: a folder with a mirror of hub data sets, `OWNER/NAME[/CONFIG]`; nothing to use the hub.

    Raises:
        SourceError: it is not there, or cannot be read.
    """
    return _opened(source.place, root)


@lru_cache(maxsize=OPEN)
def rows_of(source: Source, root: str, seed: int) -> list[int]:
    """The rows of a source in its order, as rows of its split.

    Hub and local data sets are shuffled as `datasets.Dataset.shuffle(seed=seed)` does it, which the published rows follow.
    `part` counts before `rows`.

    Raises:
        SourceError: it takes more rows than there are, or its part of them by a column that is not there.
    """
    available = len(open_source(source, root))
    if not source.shuffle:
        rows = list(range(available))
    elif source.format == "packaged":
        rows = permutation(available, named_seed(seed, source.name, source.split))
    else:
        rows = np.random.default_rng(seed).permutation(available).tolist()
    if source.part is not None:
        low, high = source.part
        places = _places(source.place, root, source.by)
        rows = [row for row in rows if low <= places[row] < high]
    if source.rows is None:
        return rows
    start, stop = source.rows
    if (len(rows) if stop is None else stop) > len(rows) or start >= len(rows):
        end = "the end" if stop is None else stop
        raise SourceError(f"takes rows {start} to {end} of {source}, which has {len(rows)}: lower them")
    return rows[start:stop]


@lru_cache(maxsize=OPEN)
def _places(source: Source, root: str, by: tuple[str, ...]) -> list[float]:
    """Each row's place in [0, 1): a hash of its values in some columns, of which numbers count as they are written.

    Raises:
        SourceError: a column is not there, or a row has no value in it.
    """
    data = open_source(source, root)
    if missing := [column for column in by if column not in data.column_names]:
        raise SourceError(f"has no column {missing[0]!r} for `by`: choose among {', '.join(data.column_names)}")
    for column in by:
        if isinstance(data.features[column], datasets.Image):
            data = data.cast_column(column, datasets.Image(decode=False))
    places, empty = list[float](), list[int]()
    for row, values in chain.from_iterable(values_of(data, range(len(data)), by)):
        found = [as_text(value) if isinstance(value, int | float | Decimal) else value for value in values.values()]
        places.append(int.from_bytes(hashlib.sha256(repr(found).encode()).digest()[:6], "big") / 2**48)
        if any(map(is_missing, values.values())):
            empty.append(row)
    if empty:
        raise SourceError(
            f"has no value of {', '.join(by)}, which `by` names, in row{'s' * (len(empty) > 1)} {listed(empty)}: "
            f"fill it, or leave the rows out of the data"
        )
    return places


def missing_columns(data: datasets.Dataset, fields: Mapping[str, Field]) -> Iterator[tuple[str, str]]:
    """(role, what is wrong) for each column that a role reads and `data` lacks."""
    for role, read in fields.items():
        for column in read.reads:
            if column not in data.column_names:
                known = (name if name == name.strip() != "" else repr(name) for name in data.column_names)
                yield role, f"has no column {column!r} for {role}: choose among {', '.join(known)}"


def listed(values: Sequence[object]) -> str:
    """The first `SHOWN` values, and how many more there are."""
    more = len(values) - SHOWN
    return ", ".join(str(value) for value in values[:SHOWN]) + (f" and {more:,} more" if more > 0 else "")


def values_of(data: datasets.Dataset, rows: Sequence[int], columns: Sequence[str]) -> Iterator[list[Values]]:
    """(row, its values in some columns) of each row, in parts of `AT_ONCE` rows."""
    chosen = data.select_columns(list(columns))
    for start in range(0, len(rows), AT_ONCE):
        part = list(rows[start : start + AT_ONCE])
        values = chosen[part] if columns else {}  # a template may be the same text for all rows
        yield [(row, {name: values[name][at] for name in columns}) for at, row in enumerate(part)]


@lru_cache(maxsize=OPEN)
def _opened(source: Source, root: str) -> datasets.Dataset:
    try:
        if source.format == "packaged":
            return packaged.load(source.name, source.split)
        if source.format == "disk":
            return _from_disk(Path(source.path), source.split)
        if source.format == "imagefolder":
            return image_folder(Path(source.path), source.split)
        if source.format == "hub":
            return _from_mirror(source, Path(root)) if root else _from_hub(source)
        files = _files(source.path)
        if source.format == "csv":
            delimiter = source.delimiter or ","
            return csv_table(files, delimiter, source.encoding, source.missing, source.quote, source.escape)
        if source.format == "json":
            return json_table(files)
        return parquet_table(files)
    except SourceError:
        raise
    except Exception as error:  # whatever the readers of six formats raise
        raise SourceError(f"cannot be read from {source}: {_reason(error)}") from error


def _files(path: str) -> list[str]:
    """The files of a path, or of a pattern such as `part-*.parquet`."""
    if Path(path).is_dir():
        raise ValueError("it is a folder: name a file, or a pattern such as part-*.parquet")
    files = [path] if Path(path).exists() else sorted(glob.glob(path, recursive=True))  # noqa: PTH207
    if not files:
        raise ValueError(f"Unable to find {path!r}")
    return files


def folder_of(source: Source) -> Path | None:
    """The folder that a source lies in; None where a pattern finds its files in several."""
    if source.format not in ("csv", "json", "parquet"):
        return Path(source.path).parent
    folders = {Path(file).parent for file in _files(source.path)}
    return folders.pop() if len(folders) == 1 else None


def _reason(error: BaseException) -> str:
    """The reader's own reason: `datasets` puts a sentence that says nothing in front of it."""
    while isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__
    cache = str(datasets.config.HF_DATASETS_CACHE)
    if isinstance(error, OSError) and str(error.filename or "").startswith(cache):
        return f"the cache {cache} cannot be written ({error.strerror}): set HF_DATASETS_CACHE to a folder that can be"
    return (str(error) or type(error).__name__).splitlines()[0]


def notes_of(source: Source) -> Iterator[SourceNote]:
    """What is worth knowing about how a source was opened."""
    if source.format == "imagefolder" and (
        passed := passed_over(Path(source.path), source.split, open_source(source)["file"])
    ):
        yield SourceNote(f"has {sum(passed.values()):,} files that are passed over: {by_kind(passed)}")
    if source.format == "csv" and source.quote:
        for row in joined_rows(open_source(source), source.delimiter or ","):
            yield QuoteNote(
                "has a value that spans lines and may hold whole rows",
                row,
                f": if a {source.quote} opens it that is part of the text, double it, or set `quote: ''`",
            )
        for row in blank_before_quote(open_source(source), source.quote):
            rest = f": the blank and each {source.quote} are part of it; take the blank out if they are not meant to be"
            yield QuoteNote("has a quoted value behind a blank", row, rest)


def _from_hub(source: Source) -> datasets.Dataset:
    """From the hub or its caches; what `hf download` has fetched is found offline too."""
    hub.prepare(source.name)
    try:
        found = datasets.load_dataset(source.name, source.config, split=source.split, revision=source.revision)
        return cast(datasets.Dataset, found)
    except Exception as error:
        try:
            snapshot = huggingface_hub.snapshot_download(
                source.name, repo_type="dataset", revision=source.revision, local_files_only=True
            )
        except (OSError, ValueError):
            snapshot = ""
        found = _in_folder(Path(snapshot), source) if snapshot else None
        if found is None:
            reason, command = _reason(error), fetch_command(source.name, source.revision)
            raise SourceError(
                f"needs {source}, which could not be loaded ({reason}): fetch it with `{command}`"
            ) from error
        return found


def _from_mirror(source: Source, root: Path) -> datasets.Dataset:
    folder = root / source.name
    found = _in_folder(folder, source)
    if found is None:
        raise SourceError(
            f"needs {source}, which is not in data.root (neither a folder of `save_to_disk` nor {source.split}*.parquet in "
            f"{folder}): fetch it with `{fetch_command(source.name, source.revision)} --local-dir {folder}`"
        )
    return found


def _in_folder(folder: Path, source: Source) -> datasets.Dataset | None:
    """The split from a folder that `save_to_disk` wrote or that holds the hub repository's files; None where it has neither.

    Raises:
        SourceError: some of the split's files are missing, or it is not a split of what was saved.
    """
    folder = folder / source.config if source.config else folder
    marks = (folder / "dataset_dict.json", folder / "state.json", folder / source.split / "state.json")
    if any(mark.is_file() for mark in marks):
        return _from_disk(folder, source.split)
    # train.jsonl, train-3.parquet, train-00000-of-00002.parquet, train-00000-of-00002-0123456789abcdef.parquet
    pattern = re.compile(rf"{re.escape(source.split)}([-._]?\d+(-of-(?P<of>\d+)(-[0-9a-f]+)?)?)?\.(parquet|jsonl)")
    named = {path: found for path in sorted(folder.rglob("*")) if (found := pattern.fullmatch(path.name))}
    if not named:
        return None
    files, (first, found) = [str(path) for path in named], next(iter(named.items()))
    if len(folders := sorted({str(path.parent.relative_to(folder)) for path in named})) > 1:
        raise SourceError(f"finds {source} in the folders {', '.join(folders)} of {folder}: choose one as `config`")
    if found["of"] and len(files) != int(found["of"]):
        raise SourceError(f"has {len(files)} of the {int(found['of'])} files of {source} in {folder}: fetch the others")
    return json_table(files) if first.suffix == ".jsonl" else parquet_table(files)


def _from_disk(folder: Path, split: str) -> datasets.Dataset:
    if (folder / split / "state.json").is_file():
        return _unformatted(datasets.load_from_disk(str(folder / split)))
    found = datasets.load_from_disk(str(folder))
    if isinstance(found, datasets.DatasetDict):
        raise SourceError(f"has no split {split!r} in {folder}: choose one of {', '.join(found)}")
    saved = "" if found.split is None else str(found.split)
    if split not in ("", saved):
        what = f"the split {saved!r}" if saved else "a data set without splits"
        raise SourceError(
            f"has no split {split!r} in {folder}, which holds {what}: save each split to a folder of its name"
        )
    return _unformatted(found)


def _unformatted(data: Any) -> datasets.Dataset:
    """All columns as plain values: what was saved may have a format of its own."""
    return cast(datasets.Dataset, data.with_format(None))
