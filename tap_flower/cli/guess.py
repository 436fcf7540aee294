"""Guesses a client spec's task from a folder or a file, by the names of files and columns and by what they hold."""

from __future__ import annotations

import codecs
import glob
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tap_flower.errors import SpecError
from tap_flower.plain import counted

if TYPE_CHECKING:
    from datasets import Dataset  # it takes long to import

_FORMATS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_LABELS = ("label", "class", "category", "diagnosis", "finding", "sentiment", "rating", "target", "y")
_TARGETS = ("target", "answer", "summary", "translation", "reply", "output", "response")
_TEXTS = ("text", "note", "question", "prompt", "input", "sentence", "report", "body")
_GROUPS = ("patient", "patient_id", "subject", "subject_id", "person", "user", "user_id", "case", "case_id")
"""Columns such as a patient's number: rows that share a value belong into one split."""
_MOST_CLASSES = 100
_LOOKED_AT = 2000
"""Number of rows looked at to tell what a column holds; classes are collected from all rows."""
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")
_SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})(-[0-9a-f]+)?")
"""The name of a file that is a part of a table, as the hub has them."""
_PARTS = {"train": [0, 0.7], "validation": [0.7, 0.8], "test": [0.8, 1]}
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}


def guessed_task(data: Path, tell: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Guesses a task from a folder or a file, in the form of a client spec.

    Args:
        data: the folder or file.
        tell: called with what the guess leaves out, and what it puts together.

    Raises:
        SpecError: nothing there can be read, or a folder in it is what was meant.
    """
    if not data.exists():
        raise SpecError(f"{data} does not exist: give a folder, or a CSV, JSON or Parquet file")
    if data.is_file():
        if data.suffix.lower() not in _FORMATS:
            raise SpecError(f"{data} is no file that can be read: give one of {', '.join(_FORMATS)}, or a folder")
        tables = _tables(data.parent)[0]
        splits = _by_split(list(tables))
        others = [path.name for path, files in tables.items() if files != [data] and (splits or data in files)]
        if others and data in chain(*tables.values()):
            tell(
                f"{data.name} alone is read: if {' and '.join(others)} beside it belongs to it, give {data.parent} instead"
            )
        return _of_files({"all": data}, data.stem, tell)
    tables, left = _tables(data)
    if tables:
        splits = _by_split(list(tables))
        if splits:
            tell(_read_as(splits))
        if left:
            tell(f"left out: {', '.join(path.name for path in left)}")
        task = _of_files(splits or {"all": _whole(data, tables, tell)}, data.name, tell)
        if "image" not in task["modalities"] and (images := _images_in(data)):
            tell(f"left out: {images:,} images, which no column of the table names")
        return task
    folders = _folders_in(data)
    splits = _by_split(folders)
    if not splits and (meant := next((path for path in folders if _by_split(_folders_in(path))), None)):
        raise SpecError(f"{data} has no train and test folders, but {meant} has: give that folder")
    if splits and (others := [path.name for path in folders if path not in splits.values()]):
        tell(f"{_read_as(splits)}; left out: {', '.join(others)}")
    return _of_images(data, splits or {"all": data}, tell)


def _read_as(splits: Mapping[str, Path]) -> str:
    return f"read as {', '.join(f'{split} data: {path.name}' for split, path in splits.items())}"


def _folders_in(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if path.is_dir()]


def _images_in(folder: Path) -> int:
    from tap_flower.data.tables import image_suffixes

    return sum(path.suffix.lower() in image_suffixes() for path in folder.rglob("*"))


def _tables(data: Path) -> tuple[dict[Path, list[Path]], list[Path]]:
    """Finds the tables of a folder.

    Returns:
        Path of each table of the most frequent format, or a pattern where it is in parts as on the hub -> its files; and all
        other tables.
    """
    found = sorted(path for path in data.iterdir() if path.suffix.lower() in _FORMATS) if data.is_dir() else []
    found = [path for path in found if path.stem != "metadata" and not path.name.startswith(".")]
    most = Counter(path.suffix.lower() for path in found).most_common(1)
    tables: dict[Path, list[Path]] = {}
    for path in found:
        if path.suffix.lower() == most[0][0]:
            part = _SHARD.fullmatch(path.stem)
            table = _pattern(data, f"{glob.escape(part[1])}-*-of-{part[2]}*{path.suffix}") if part else path
            tables.setdefault(table, []).append(path)
    splits = _by_split(list(tables)).values()
    tables = {table: files for table, files in tables.items() if not splits or table in splits}
    return tables, [path for path in found if path not in chain(*tables.values())]


def _pattern(folder: Path, name: str) -> Path:
    return Path(glob.escape(str(folder)), name)


def _whole(data: Path, tables: Mapping[Path, Sequence[Path]], tell: Callable[[str], None]) -> Path:
    """The pattern of all tables of a folder, or the path of the only one."""
    if len(tables) == 1:
        return next(iter(tables))
    files = sorted(chain(*tables.values()))
    pattern = _pattern(data, f"*{files[0].suffix}")
    names, read = (", ".join(path.name for path in paths) for paths in (files, _files_of(pattern)))
    if read != names:
        raise SpecError(f"{data} has the tables {names}, but {pattern.name} reads {read}: rename or move the others")
    tell(f"read as one table: {names}")
    return pattern


def _files_of(path: Path) -> list[Path]:
    """The files of a path, or of a pattern."""
    return [path] if path.exists() else sorted(map(Path, glob.glob(str(path))))  # noqa: PTH207


def _by_split(paths: Sequence[Path]) -> dict[str, Path]:
    """Assigns paths to splits by their names; empty unless there are some for training and some for testing.

    A whole name (train.csv) comes before its beginning or, of a file, its end (train-1.csv, orders-train.csv; the last word
    of a folder may be its class's).
    """
    names = {path: re.sub(r"-\*-of-.*", "", path.stem.lower()) for path in paths}
    said = {path: re.split(r"[-._]", name) for path, name in names.items()}
    found = {}
    for split, words in _SPLITS.items():
        whole = [path for path in paths if names[path] in words]
        parts = [path for path in paths if said[path][0] in words or (path.suffix and said[path][-1] in words)]
        if whole or parts:
            found[split] = (whole or parts)[0]
    return found if {"train", "test"} <= found.keys() else {}


def _of_images(folder: Path, splits: Mapping[str, Path], tell: Callable[[str], None]) -> dict[str, Any]:
    source = {"format": "imagefolder", "path": str(folder)}
    given = {split: source | ({} if path == folder else {"split": path.name}) for split, path in splits.items()}
    rows = _opened(next(iter(given.values())))
    if rows.column_names != ["image", "label", "file"]:  # it has a metadata file
        return _guessed(given, rows, folder.name, folder, tell)
    classes = sorted({label for label in rows["label"] if label is not None})
    if len(classes) < 2:
        return _task(folder.name, "image_generation", ["image"], {"image": "image"}, [], _split(given, rows, "file"))
    if stray := [file for file, label in zip(rows["file"], rows["label"], strict=True) if label is None]:
        raise SpecError(
            f"{folder} has folders of classes ({', '.join(classes[:3])}), and {counted(len(stray), 'image')} beside them "
            f"({stray[0]}): move each into the folder of its class, or out of {folder}"
        )
    columns = {"image": "image", "label": "label"}
    return _task(folder.name, "image_classification", ["image"], columns, classes, _split(given, rows, "file"))


def _of_files(splits: Mapping[str, Path], name: str, tell: Callable[[str], None]) -> dict[str, Any]:
    given: dict[str, dict[str, Any]] = {}
    for split, path in splits.items():
        given[split] = {"format": _FORMATS[path.suffix.lower()], "path": str(path)}
        if given[split]["format"] == "csv":
            sample = _files_of(path)[0]
            guessed = {"delimiter": _delimiter(sample), "encoding": _encoding(sample)}
            given[split] |= {key: value for key, value in guessed.items() if value not in (",", "utf-8")}
            if _has_escapes(given[split]):
                given[split]["escape"] = "\\"
                tell(f"{path.name} is read with `escape: '\\'`: quotes within its texts are written \\\"")
    folder = _files_of(next(iter(splits.values())))[0].parent
    return _guessed(given, _opened(next(iter(given.values()))), name, folder, tell)


def _guessed(
    given: dict[str, dict[str, Any]], rows: Dataset, name: str, folder: Path, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Guesses a task from the columns of a table.

    Args:
        given: split, or `all` -> its source.
        rows: of the first source.
        name: of the task.
        folder: where the paths of images start.
        tell: see `guessed_task`.
    """
    from tap_flower.data.fields import LIKE_MISSING
    from tap_flower.data.labels import alike

    source = next(iter(given.values()))
    place, in_folder = source["path"], source["format"] == "imagefolder"
    head = _undecoded(rows)[:_LOOKED_AT]
    if in_folder:
        image: str | None = "image"
        head.pop("file")
    else:
        image = next((name for name, values in head.items() if _are_images(values, folder, rows, name)), None)
    left = [name for name in head if name != image]
    of_rows = [name for name in left if _NUMBER.fullmatch(name) or name in set(map(str, head[name]))]
    if of_rows and source["format"] == "csv":
        told = ", ".join(map(repr, of_rows))
        tell(f"{told} in the first line of {place} looks like a value: if it is a row, put a line of names before it")
    most = min(_MOST_CLASSES, max(2, len(rows) // 2))
    label = _first(_LABELS, left, lambda name: 2 <= len(set(map(str, head[name]))) <= most)
    target = _first(_TARGETS, left, lambda name: _is_text(head[name]))
    for column in [] if label is not None else [name for name in left if name.lower() in _LABELS and name != target]:
        values = counted(len(set(map(str, head[column]))), "different value")
        tell(
            f"{column!r} is not taken as the label: {len(head[column]):,} rows have {values} in it, "
            f"and 2 to {most} make classes"
        )
    if label is None and target is None:  # a column in which few values come again and again
        few = {name: len(set(map(str, head[name]))) for name in left}
        again = [name for name, count in few.items() if 2 <= count <= min(20, len(rows) // 3)]
        label = min(again, key=lambda name: few[name], default=None)
    texts = sorted(
        (name for name in left if name not in (label, target) and _is_text(head[name])),
        key=lambda name: (name.lower() not in _TEXTS, -sum(map(len, map(str, head[name])))),
    )
    columns: dict[str, Any] = {} if image is None else {"image": image}
    # A text beside an image is a question about it, or a report; without an image it is what there is to read.
    if texts and (image is None or (target is not None and label is None)):
        columns["text"] = texts[0]
    modalities = [modality for modality in ("image", "text") if modality in columns]
    if not modalities:
        raise SpecError(f"{place} has neither an image nor a text in {', '.join(head)}: write the client spec by hand")
    classes: list[str] = []
    if label is not None:
        kind, columns["label"] = f"{modalities[0]}_classification", label
        names = getattr(rows.features[label], "names", None)
        classes = list(names or sorted({str(value) for value in rows[label] if value is not None}))
        if like := [name for name in classes if str(name).strip().lower() in LIKE_MISSING]:
            tell(
                f"{', '.join(map(repr, like))} became a class: if it stands for a missing value, take it and its rows out"
            )
        for same in alike(classes):
            tell(
                f"{', '.join(map(repr, same))} became classes, and differ in case, blanks or Unicode form only: if they "
                f"are one, write it in one way in the data, and take the others out"
            )
    elif target is not None and "text" in columns:
        kind, columns["target"] = "text_generation", target
    elif image is not None:
        kind = "image_generation"
    else:
        raise SpecError(f"{place} has neither a label nor a target in {', '.join(head)}: write the client spec by hand")
    group = _first(_GROUPS, left, lambda name: len(set(map(str, head[name]))) > 2)
    by = group or ("file" if in_folder else columns[modalities[0]])
    if unused := [name for name in head if name not in (*columns.values(), by)]:
        tell(f"left out: the columns {', '.join(unused)}")
    return _task(name, kind, list[str](modalities), columns, classes, _split(given, rows, by))


def _split(given: dict[str, dict[str, Any]], rows: Dataset, by: str) -> dict[str, dict[str, Any]]:
    """Makes the sources of each split: the given ones, or parts by hash; of few rows, the last one is for testing."""
    if "all" not in given:
        return given
    from tap_flower.data.sources import SourceError, rows_of
    from tap_flower.data.spec import Source

    source = given["all"]
    parts = {split: source | {"part": part, "by": [by]} for split, part in _PARTS.items()}
    try:
        if all(rows_of(Source(**one | {"part": tuple(one["part"]), "by": (by,)}), "", 0) for one in parts.values()):
            return parts
    except SourceError as error:
        raise SpecError(f"{source['path']} {error}") from error
    last = max(1, len(rows) - 1)
    return {"train": source | {"rows": [0, last]}, "test": source | {"rows": [last, None] if len(rows) > 1 else [0, 1]}}


def _task(
    name: str,
    kind: str,
    modalities: list[str],
    columns: dict[str, Any],
    classes: list[str],
    splits: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-_")[:64] or "task"
    task = {"name": plain, "kind": kind, "modalities": modalities, "domain": plain, "columns": columns}
    return task | ({"classes": classes} if classes else {}) | splits


def _opened(source: Mapping[str, Any]) -> Dataset:
    from tap_flower.data.sources import SourceError, open_source
    from tap_flower.data.spec import Source

    try:
        rows = open_source(Source(**source))
    except SourceError as error:
        raise SpecError(f"{source['path']} {error}") from error
    if not len(rows):
        raise SpecError(f"{source['path']} has no rows: give data with at least one")
    return rows


def _delimiter(path: Path) -> str:
    """Finds the usual delimiter that is most frequent in a file's first line."""
    line = path.open("rb").readline().decode("latin-1")
    counts = Counter({delimiter: line.count(delimiter) for delimiter in ",;\t|"})
    return counts.most_common(1)[0][0] if any(counts.values()) else ","


def _encoding(path: Path) -> str:
    """Finds a CSV file's encoding: UTF-8, UTF-16 by its first bytes, or a guess that a comment marks as one."""
    with path.open("rb") as file:
        if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            return "utf-16"
    for encoding in ("utf-8", "cp1252"):
        with suppress(UnicodeDecodeError), path.open(encoding=encoding) as lines:
            for _ in lines:
                pass
            return encoding
    return "latin-1"


def _has_escapes(source: Mapping[str, Any]) -> bool:
    """Whether a CSV file can be read only where a backslash stands before quotes within its texts."""
    from tap_flower.data.sources import SourceError, open_source
    from tap_flower.data.spec import Source

    try:
        open_source(Source(**source))
    except SourceError:
        with suppress(SourceError):
            return bool(open_source(Source(**source, escape="\\")))
    return False


def _undecoded(rows: Dataset) -> Dataset:
    """Reads rows and leaves images as the bytes of their files."""
    import datasets

    for name, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
    return rows


def _are_images(values: Sequence[Any], folder: Path, rows: Dataset, name: str) -> bool:
    import datasets

    if isinstance(rows.features[name], datasets.Image):
        return True
    first = next((value for value in values if value), None)
    if isinstance(first, Mapping):
        return isinstance(first.get("bytes"), bytes)
    if isinstance(first, str):
        return "." in first and os.path.isfile(folder / first)  # noqa: PTH113 (a long text is no path)
    return isinstance(first, bytes)


def _is_text(values: Sequence[Any]) -> bool:
    texts = [value for value in values if value is not None]
    return bool(texts) and all(isinstance(value, str) and value.strip() for value in texts)


def _first(names: Sequence[str], columns: Sequence[str], fits: Any) -> str | None:
    known = {column.lower(): column for column in columns}
    return next((known[name] for name in names if name in known and fits(known[name])), None)
