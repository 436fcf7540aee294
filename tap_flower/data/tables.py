"""Readers of files as people have them: CSV with every text as it is written, JSON, folders of images."""

from __future__ import annotations

import codecs
import csv
import glob
import hashlib
import io
import json
import os
import posixpath
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from functools import cache, lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet
from PIL import Image

from tap_flower.plain import shown

_UNDECODED = re.compile("[\ud800-\udfff]")
"""A byte of a file's name that is not valid UTF-8, for which a data set has no place."""
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
"""A file of an image folder that gives the images other columns than a class; its column `file_name` names them."""

_LONGEST_LINE = 1 << 26
"""Bytes of the longest line, breaks within quotes included, that a CSV file may have."""


def csv_table(
    files: Sequence[str],
    delimiter: str = ",",
    encoding: str = "",
    missing: Sequence[str] = (),
    quote: str = '"',
    escape: str = "",
) -> datasets.Dataset:
    """The rows of CSV files, every value a text as it is written; an empty field is a missing value.

    Args:
        files: with the same columns.
        delimiter: between fields.
        encoding: of the files; nothing is UTF-8.
        missing: words that stand for a missing value too.
        quote: character around a field that holds the delimiter or a line break; nothing where no field is quoted.
        escape: character before a quote within a text; nothing where such a quote is doubled.

    Raises:
        ValueError: a line has other fields than the header, a field has text behind its closing quote, a column is named
            twice, or the encoding is another.
    """
    tables = []
    for file in files:
        # A line break within quotes is part of a text.
        parse = pyarrow.csv.ParseOptions(
            delimiter=delimiter, quote_char=quote or False, escape_char=escape or False, newlines_in_values=True
        )
        # In one thread, errors say the line.
        read = pyarrow.csv.ReadOptions(encoding=encoding or "utf8", block_size=_LONGEST_LINE, use_threads=False)
        try:
            _check_encoding(file, encoding)
            _check_quotes(file, encoding, delimiter, quote, escape)
            _check_escapes(file, encoding, escape, (quote, delimiter, "\r", "\n"))
            with pyarrow.csv.open_csv(file, read_options=read, parse_options=parse) as header:
                names = header.schema.names
            _check_names(file, names)
            parse.ignore_empty_lines = len(names) > 1  # in a file of one column, an empty line is a missing value
            convert = pyarrow.csv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=True, null_values=["", *missing]
            )
            tables.append(pyarrow.csv.read_csv(file, read_options=read, parse_options=parse, convert_options=convert))
        except (pa.ArrowInvalid, UnicodeDecodeError) as error:
            if isinstance(error, UnicodeDecodeError) or "UTF8" in str(error):
                known = encoding or "UTF-8"
                raise ValueError(
                    f"{file} is not valid {known}: set `encoding`, for example latin-1 or cp1252"
                ) from error
            if torn := re.search(r"Row #(\d+): Expected (\d+) columns, got (\d+)", str(error)):
                raise ValueError(
                    f"line {torn[1]} of {file} has {torn[3]} fields and its header {torn[2]}, with the delimiter "
                    f"{delimiter!r}: set another `delimiter`, or put fields that hold it in quotes"
                ) from error
            raise
        if names != tables[0].column_names:
            raise ValueError(
                f"{file} has the columns {', '.join(names)}, and {files[0]} {', '.join(tables[0].column_names)}"
            )
    return datasets.Dataset(pa.concat_tables(tables))


def _check_encoding(file: str, encoding: str) -> None:
    with pa.input_stream(file) as stream:
        head: bytes = stream.read(4096)
    if not encoding and head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise ValueError(f"{file} is UTF-16: set `encoding: utf-16`")
    if not encoding and b"\0" in head:
        raise ValueError(f"{file} holds zero bytes: unpack it, or if it is UTF-16, set `encoding: utf-16-le`")


def _lines(file: str, encoding: str) -> Iterator[str]:
    """The lines of a text file, which may be compressed, with what ends them."""
    with pa.input_stream(file) as stream, io.TextIOWrapper(stream, encoding or "utf-8-sig", newline="") as text:
        yield from text


def _check_quotes(file: str, encoding: str, delimiter: str, quote: str, escape: str) -> None:
    """Checks that every quote which opens a field is closed at its end; Arrow's reader goes on in silence.

    Raises:
        ValueError: one is not.
    """
    if not quote:
        return
    dialect = {"delimiter": delimiter, "quotechar": quote, "escapechar": escape or None, "strict": True}
    rows = csv.reader(_lines(file, encoding), **cast(Any, dialect))
    before, limit = 0, csv.field_size_limit(_LONGEST_LINE)
    try:
        for _ in rows:
            before = rows.line_num
    except csv.Error as error:
        known = {"expected after": "text behind a closing quote", "end of data": "a quote that is never closed"}
        said = next((words for part, words in known.items() if part in str(error)), str(error))
        (line,) = islice(_lines(file, encoding), before, before + 1)
        escaped = "" if escape else f"if quotes within texts are written \\{quote}, set `escape: '\\'`; "
        raise ValueError(
            f"line {before + 1} of {file} has {said} ({shown(line.strip())}): {escaped}if no field is quoted, set "
            f"`quote: ''`; else double each {quote} within a text"
        ) from error
    finally:
        csv.field_size_limit(limit)


def _check_escapes(file: str, encoding: str, escape: str, special: Collection[str]) -> None:
    """Checks that each escape stands before something special: Arrow's reader drops all of them.

    Raises:
        ValueError: one does not.
    """
    for number, line in enumerate(_lines(file, encoding), 1) if escape else ():
        for pair in re.findall(re.escape(escape) + ".?", line, re.DOTALL):
            if pair[1:] not in (escape, *special):
                raise ValueError(
                    f"line {number} of {file} has {shown(pair)}, of which {escape} would be dropped: write {2 * escape} "
                    f"where it is part of a text"
                )


def blank_before_quote(data: datasets.Dataset, quote: str) -> list[int]:
    """Rows of a CSV table with a value in quotes that a blank precedes, so that the quotes are part of it."""
    quoted = rf"(?s)^\s+{re.escape(quote)}.*{re.escape(quote)}\s*$"
    found: set[int] = set()
    for column in data.data.columns:
        found.update(np.flatnonzero(pc.match_substring_regex(column, quoted).fill_null(False)).tolist())
    return sorted(found)


def joined_rows(data: datasets.Dataset, delimiter: str) -> list[int]:
    """Rows of a CSV table with a value that holds as many delimiters as the lines that it spans: a quote may be open."""
    found: set[int] = set()
    for column in data.data.columns:
        breaks, delimiters = (np.asarray(pc.count_substring(column, part).fill_null(0)) for part in ("\n", delimiter))
        found.update(np.flatnonzero((breaks > 0) & (delimiters >= breaks * (data.num_columns - 1))).tolist())
    return sorted(found) if data.num_columns > 1 else []


def json_table(files: Sequence[str]) -> datasets.Dataset:
    """The rows of JSON files: a list of objects each, or one object a line. What looks like a date stays a text.

    Raises:
        ValueError: a file is neither, an object has a key twice, or a column holds values of several types.
    """
    rows = [row for file in files for row in _objects(file)]
    if not rows:
        raise ValueError("it holds no rows")
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {}
    for name in names:
        try:
            columns[name] = pa.array([row.get(name) for row in rows])
        except OverflowError as error:
            raise ValueError(
                f"column {name!r} holds a whole number outside the signed 64-bit range: write it as a text"
            ) from error
        except UnicodeEncodeError as error:
            raise ValueError(
                f"column {name!r} holds an unpaired surrogate (half of a UTF-16 character): {error}"
            ) from error
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise ValueError(f"column {name!r} holds values of several types: {str(error).splitlines()[0]}") from error
    return datasets.Dataset(pa.table(columns))


def _objects(file: str) -> Iterator[dict[str, Any]]:
    try:
        with pa.input_stream(file) as stream:  # it unpacks .gz, as Arrow's reader of CSV files does
            text = stream.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not valid UTF-8: save it as UTF-8") from error
    number = 0
    try:
        if text.lstrip().startswith("["):
            found = json.loads(text, object_pairs_hook=_unique)
        else:  # not splitlines(), which breaks lines where JSON has none
            found = (json.loads(line, object_pairs_hook=_unique) for line in text.split("\n") if line.strip())
        for number, row in enumerate(found):
            if not isinstance(row, dict):
                raise ValueError(f"it is a {type(row).__name__}")
            yield row
            number += 1
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: object {number}: {error}; write a list of objects, or one object a line") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if double := [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]:
        raise ValueError(f"the key {shown(double[0])} stands twice")
    return dict(pairs)


def parquet_table(files: Sequence[str]) -> datasets.Dataset:
    """The rows of Parquet files, memory-mapped.

    Raises:
        ValueError: there are no rows, a column is named twice, or the files have other columns, or types of them.
    """
    schemas = {file: pyarrow.parquet.read_schema(file) for file in files}
    for file, schema in schemas.items():
        _check_names(file, schema.names)
    found = [file for file in files if pyarrow.parquet.read_metadata(file).num_rows]
    if not found:
        raise ValueError("it holds no rows")
    for file in found[1:]:
        _check_schema(file, schemas[file], found[0], schemas[found[0]])
    # The cache of `datasets` knows a file by its path and time of change, which a copy may keep.
    state = [(stat.st_size, stat.st_ctime_ns) for stat in map(os.stat, found)]
    name = hashlib.sha256(repr(state).encode()).hexdigest()[:16]
    escaped = [glob.escape(file) for file in found]
    return cast(datasets.Dataset, datasets.load_dataset("parquet", name, data_files=escaped, split="train"))


def _check_schema(file: str, schema: pa.Schema, first: str, of_first: pa.Schema) -> None:
    if sorted(schema.names) != sorted(of_first.names):
        raise ValueError(f"{file} has the columns {', '.join(schema.names)}, and {first} {', '.join(of_first.names)}")
    for name in schema.names:
        one, other = schema.field(name).type, of_first.field(name).type
        if None not in (kinds := (_kind(one), _kind(other))) and len(set(kinds)) > 1:
            raise ValueError(
                f"column {name!r} is {one} in {file}, and {other} in {first}: save it with one type, or list each file as "
                f"a source of its own"
            )


def _kind(kind: pa.DataType) -> str | None:
    """What values of a type are; None where it is no plain type, or has none."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    for name in ("boolean", "integer", "floating", "string", "large_string", "temporal"):
        if getattr(pa.types, f"is_{name}")(kind):
            return name.removeprefix("large_")
    return None


def _check_names(file: str, names: Sequence[str]) -> None:
    if double := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"{file} has two columns {double[0]!r}: give each its own name")


def image_folder(folder: Path, split: str = "") -> datasets.Dataset:
    """The images of a folder by name: columns `image` (path), `label` (folder below `folder` that it is in) and `file`.

    With a metadata file, its columns stand in place of `label`.

    Args:
        folder: with a folder of images for each class, or images alone, which have no label.
        split: folder below it that holds these in its place; nothing reads all.

    Raises:
        ValueError: the folder is missing, or holds no images.
    """
    folder = _split_folder(folder, split)
    if metadata := [name for name in _METADATA if (folder / name).is_file()]:
        if len(metadata) > 1:
            raise ValueError(f"{folder} has {' and '.join(metadata)}: keep one")
        return _with_metadata(folder, folder / metadata[0])
    images, others = _listing(folder)
    if not images:
        raise ValueError(
            f"{folder} holds no images" + (f", but files that are none: {by_kind(others)}" if others else "")
        )
    labels = [file.split("/")[0] if "/" in file else None for file in images]
    text = datasets.Value("string")
    return datasets.Dataset.from_dict(
        {"image": [str(folder / file) for file in images], "label": labels, "file": list(images)},
        features=datasets.Features(image=text, label=text, file=text),
    )


def _with_metadata(folder: Path, file: Path) -> datasets.Dataset:
    readers = {".csv": csv_table, ".jsonl": json_table, ".parquet": parquet_table}
    data = readers[file.suffix]([str(file)])
    if "file_name" not in data.column_names:
        raise ValueError(f"{file} has no column 'file_name', which names the images")
    if taken := [name for name in ("image", "file") if name in data.column_names]:
        raise ValueError(f"{file} has a column {taken[0]!r}, which is the images' own: name it otherwise")
    paths = [None if name is None else str(folder / name) for name in data["file_name"]]
    return data.rename_column("file_name", "file").add_column("image", paths)


def passed_over(folder: Path, split: str, read: Collection[str]) -> Counter[str]:
    """What is passed over -> files of an image folder, where those `read`, by their paths below it, are its rows."""
    images, others = _listing(_split_folder(folder, split))
    unnamed = set(images) - {posixpath.normpath(file) for file in read if file}
    return others + Counter({"that the metadata file does not name": len(unnamed)})


def by_kind(files: Counter[str]) -> str:
    """Files by kind, in words."""
    return ", ".join(f"{count:,} {kind}" for kind, count in sorted(files.items()))


@cache
def image_suffixes() -> frozenset[str]:
    """The suffixes, in small letters, of files that are read as images."""
    Image.init()
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN)


def _split_folder(folder: Path, split: str) -> Path:
    if not folder.is_dir():
        raise ValueError(f"Unable to find the folder {folder}")
    if split and not (folder / split).is_dir():
        there = sorted(path.name for path in folder.iterdir() if path.is_dir())
        raise ValueError(f"{folder} has no folder {split!r}: use one of {', '.join(there)}, or leave `split` out")
    return folder / split


@lru_cache(maxsize=64)
def _listing(folder: Path) -> tuple[tuple[str, ...], Counter[str]]:
    """(images below a folder, in order; suffix, `hidden` or `without a suffix` -> number of other files).

    Raises:
        ValueError: a link leads to a folder that is read already.
    """
    suffixes = image_suffixes()
    images: list[str] = []
    others: Counter[str] = Counter()
    read: dict[str, str] = {}
    for place, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        real = os.path.realpath(place)
        if real in read:
            raise ValueError(f"{place} and {read[real]} are one folder: remove the link")
        read[real] = place
        for name in files:
            path = Path(place, name).relative_to(folder)
            if _UNDECODED.search(path.as_posix()):
                raise ValueError(f"{place} holds a file named {name!r}: rename it")
            if any(part.startswith(".") for part in path.parts):
                others["hidden"] += 1
            elif path.suffix.lower() in suffixes:
                images.append(path.as_posix())
            elif path.as_posix() not in _METADATA:
                others[path.suffix.lower() or "without a suffix"] += 1
    return tuple(sorted(images)), others
