"""The command `init`: writes a first client spec for a folder or a file."""

from __future__ import annotations

import codecs
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.markup import escape

from tap_flower.cli.common import say
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
_PARTS = {"train": [0, 0.7], "validation": [0.7, 0.8], "test": [0.8, 1]}
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}


def init_command(
    data: Annotated[Path, typer.Argument(metavar="FOLDER|FILE", help="A folder, or a CSV, JSON or Parquet file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Write the client spec to this file.")] = Path("client.yaml"),
    name: Annotated[str, typer.Option(help="Name the client.")] = "client-1",
    backbone: Annotated[str, typer.Option(help="Use this backbone: demo, a local folder, or a hub id.")] = "demo",
) -> None:
    """Write a client spec for your own data, with comments; run `tap-flower check` next."""
    from tap_flower.data.spec import NAME

    if not NAME.fullmatch(name):
        raise SpecError(f"--name {name!r}: use letters, digits, '-' and '_', at most 64")
    if out.exists():
        raise SpecError(f"{out} is there already: give another file with --out, or remove it")
    console = Console()
    task = guessed_task(data.resolve(), lambda words: say(console, f"[yellow]{escape(words)}"))
    out.write_text(spec_text(name, backbone, task), encoding="utf-8")
    say(
        console,
        f"{out}: task {task['name']!r}, {task['kind']}; clients share a task by its name; read it, "
        f"change what is wrong, then: tap-flower check {out}",
    )


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
        beside = _by_split(_tables(data.parent)[0]).values()
        if data in beside:
            others = " and ".join(path.name for path in beside if path != data)
            tell(f"{data.name} alone is read: if {others} beside it is its other split, give {data.parent} instead")
        return _of_files({"all": data}, data.stem, tell)
    files, left = _tables(data)
    if files:
        splits = _by_split(files)
        if splits:
            tell(f"read as {', '.join(f'{split} data: {path.name}' for split, path in splits.items())}")
        elif len(files) > 1:
            tell(f"read as one table: {', '.join(path.name for path in files)}")
        if left:
            tell(f"left out: {', '.join(path.name for path in left)}")
        all_ = files[0] if len(files) == 1 else data / f"*{files[0].suffix}"
        task = _of_files(splits or {"all": all_}, data.name, tell)
        if "image" not in task["modalities"] and (images := _images_in(data)):
            tell(f"left out: {images:,} images, which no column of the table names")
        return task
    folders = _folders_in(data)
    splits = _by_split(folders)
    if not splits and (meant := next((path for path in folders if _by_split(_folders_in(path))), None)):
        raise SpecError(f"{data} is not split, and {meant.name} in it is: give {meant}")
    return _of_images(data, splits or {"all": data})


def _folders_in(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if path.is_dir()]


def _images_in(folder: Path) -> int:
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    return sum(path.suffix.lower() in ImageFolder.EXTENSIONS for path in folder.rglob("*"))


def _tables(data: Path) -> tuple[list[Path], list[Path]]:
    """Finds the tables of a folder: (those of its most frequent format, all others)."""
    found = sorted(path for path in data.iterdir() if path.suffix.lower() in _FORMATS) if data.is_dir() else []
    found = [path for path in found if path.stem != "metadata"]
    most = Counter(path.suffix for path in found).most_common(1)
    files = [path for path in found if path.suffix == most[0][0]]
    splits = _by_split(files)
    files = [path for path in files if not splits or path in splits.values()]
    return files, [path for path in found if path not in files]


def _by_split(paths: Sequence[Path]) -> dict[str, Path]:
    """Assigns paths to splits by their names; empty unless there are some for training and some for testing."""
    parts = {path: re.split(r"[-._]", path.stem.lower()) for path in paths}
    found = {
        split: path
        for split, words in _SPLITS.items()
        for path, said in parts.items()  # train-1.csv, orders-train.csv; the last word of a folder may be its class's
        if said[0] in words or (path.suffix and said[-1] in words)
    }
    return found if {"train", "test"} <= found.keys() else {}


def _of_images(folder: Path, splits: Mapping[str, Path]) -> dict[str, Any]:
    source = {"format": "imagefolder", "path": str(folder)}
    given = {split: source | ({} if path == folder else {"split": path.name}) for split, path in splits.items()}
    rows = _opened(next(iter(given.values())))
    named = "label" in rows.column_names and None not in rows["label"]
    classes = sorted(set(rows["label"])) if named else []
    if len(classes) > 1:
        kind, columns = "image_classification", {"image": "image", "label": "label"}
    else:
        kind, columns = "image_generation", {"image": "image"}
    return _task(folder.name, kind, ["image"], columns, classes, _split(given, rows, "file"))


def _of_files(splits: Mapping[str, Path], name: str, tell: Callable[[str], None]) -> dict[str, Any]:
    from tap_flower.data.fields import LIKE_MISSING

    given: dict[str, dict[str, Any]] = {}
    for split, path in splits.items():
        given[split] = {"format": _FORMATS[path.suffix.lower()], "path": str(path)}
        if given[split]["format"] == "csv":
            sample = path if path.is_file() else sorted(path.parent.glob(path.name))[0]
            guessed = {"delimiter": _delimiter(sample), "encoding": _encoding(sample)}
            given[split] |= {key: value for key, value in guessed.items() if value not in (",", "utf-8")}
    first = next(iter(splits.values()))
    rows = _opened(next(iter(given.values())))
    head = _undecoded(rows)[:_LOOKED_AT]
    image = next((name for name, values in head.items() if _are_images(values, first.parent, rows, name)), None)
    left = [name for name in head if name != image]
    most = min(_MOST_CLASSES, len(rows) // 2 or 2)
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
        raise SpecError(f"{first} has neither an image nor a text in {', '.join(head)}: write the client spec by hand")
    classes: list[str] = []
    if label is not None:
        kind, columns["label"] = f"{modalities[0]}_classification", label
        names = getattr(rows.features[label], "names", None)
        classes = list(names or sorted({str(value) for value in rows[label] if value is not None}))
        if like := [name for name in classes if str(name).strip().lower() in LIKE_MISSING]:
            tell(
                f"{', '.join(map(repr, like))} became a class: if it stands for a missing value, take it and its rows out"
            )
    elif target is not None and "text" in columns:
        kind, columns["target"] = "text_generation", target
    elif image is not None:
        kind = "image_generation"
    else:
        raise SpecError(f"{first} has neither a label nor a target in {', '.join(head)}: write the client spec by hand")
    by = _first(_GROUPS, left, lambda name: len(set(map(str, head[name]))) > 2) or columns[modalities[0]]
    if unused := [name for name in head if name not in (*columns.values(), by)]:
        tell(f"left out: the columns {', '.join(unused)}")
    return _task(name, kind, list[str](modalities), columns, classes, _split(given, rows, by))


def _split(given: dict[str, dict[str, Any]], rows: Dataset, by: str) -> dict[str, dict[str, Any]]:
    """Makes the sources of each split: the given ones, or parts by hash; of few rows, the last one is for testing."""
    if "all" not in given:
        return given
    from tap_flower.data.sources import rows_of
    from tap_flower.data.spec import Source

    source = given["all"]
    parts = {split: source | {"part": part, "by": [by]} for split, part in _PARTS.items()}
    if all(rows_of(Source(**one | {"part": tuple(one["part"]), "by": (by,)}), "", 0) for one in parts.values()):
        return parts
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
    return isinstance(first, bytes) or (isinstance(first, str) and "." in first and (folder / first).is_file())


def _is_text(values: Sequence[Any]) -> bool:
    texts = [value for value in values if value is not None]
    return bool(texts) and all(isinstance(value, str) and value.strip() for value in texts)


def _first(names: Sequence[str], columns: Sequence[str], fits: Any) -> str | None:
    known = {column.lower(): column for column in columns}
    return next((known[name] for name in names if name in known and fits(known[name])), None)


def _flow(value: Any) -> str:
    """Writes a value as YAML in one line."""
    written = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, sort_keys=False, width=float("inf"))
    return str(written).removesuffix("...\n").rstrip("\n")


_COMMENTS = {
    "name": "clients share a task, and its head, by this name: agree on it with the others",
    "kind": "image_classification, text_classification, image_generation or text_generation",
    "domain": "of the data; each has experts of its own",
    "columns": "role -> column; see docs/bring-your-own-data.md for templates",
    "classes": "in an order on which all clients of the task agree",
    "train": "rows whose hash over `by` lies in `part`: name the patient's column there, if there is one",
}


def spec_text(client: str, backbone: str, task: Mapping[str, Any]) -> str:
    """Writes a client spec as YAML, with comments."""
    lines = [
        "# A client spec, made by `tap-flower init`. Read it, change what is wrong, then run `tap-flower check`.",
        f"name: {client}",
        f"backbone: {_flow(backbone)}  # demo, a local folder, or a hub id",
        "tasks:",
    ]
    for number, (key, value) in enumerate(task.items()):
        if key in _COMMENTS and (key != "train" or "part" in value):
            lines.append(f"    # {_COMMENTS[key]}")
        if key == "train" and "encoding" in value:
            lines.append("    # the encoding is a guess: look at the texts that `tap-flower check` shows")
        lines.append(("  - " if number == 0 else "    ") + f"{key}: {_flow(value)}")
    return "\n".join(lines) + "\n"
