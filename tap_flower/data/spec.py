"""What a client has: its tasks, where their data lies, which columns to read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from types import NoneType
from typing import Any

from tap_flower.core.components import Pair
from tap_flower.core.tasks import TASK_KINDS
from tap_flower.data.fields import Field, ImageForm, check_columns, check_fields, check_keys, fields_of, image_form
from tap_flower.errors import SpecError
from tap_flower.plain import as_text, shown

MODALITIES = ("image", "text")
SPLITS = ("train", "validation", "test")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
"""Names of clients, tasks and domains: a client's is also that of its folder."""
MOST = 65_536
"""Largest number of classes, and of examples in a batch."""
FORMATS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "packaged": (("name", "split"), ("name", "split")),
    "hub": (("name", "split"), ("name", "config", "revision", "split")),
    **dict.fromkeys(("parquet", "json"), (("path",), ("path",))),
    "csv": (("path",), ("path", "delimiter", "encoding", "missing", "quote", "escape")),
    **dict.fromkeys(("imagefolder", "disk"), (("path",), ("path", "split"))),
}
"""Format -> (what a source of it must say about where it lies, what it may say)."""


@dataclass(frozen=True)
class Source:
    """Rows of one data set, and what is different about it within its task.

    Attributes:
        format: `packaged` (the demo's data), `hub`, a file (`parquet`, `csv`, `json`: one document or one object a line), an
            `imagefolder` (a folder of images for each class) or `disk` (a folder that `save_to_disk` of `datasets` wrote).
        name: of a packaged data set, or the id of one on the hub.
        split: of the data set, in an image folder the folder for it; a file has none.
        part: from and to, two fractions: the rows whose hash over the columns `by` lies there. Rows that agree in these
            columns are in one part, whatever their order and however many there are.
        by: columns that decide which part a row is in, such as a patient's number.
        rows: first row and the row after the last (None: to the end); None takes all.
        shuffle: whether the split is shuffled with the run's seed before `rows` is taken.
        path: of a file (or a pattern such as `part-*.parquet`) or folder.
        config: of a data set on the hub that has several.
        revision: commit, tag or branch of a data set on the hub.
        delimiter: of a CSV file's fields; nothing is a comma.
        encoding: of a CSV file, such as `latin-1`; nothing is UTF-8.
        missing: words that stand for a missing value in a CSV file, beside the empty field.
        quote: around a field of a CSV file that holds the delimiter or a line break; an empty text where no field is quoted.
        escape: before a quote within a text of a CSV file, such as a backslash; nothing where such a quote is doubled.
        domain: of these rows, where it is not the task's.
        columns: role -> column or columns, where they are not the task's.
        templates: role -> template, where they are not the task's.
    """

    format: str
    name: str = ""
    split: str = ""
    rows: tuple[int, int | None] | None = None
    shuffle: bool = False
    path: str = ""
    config: str | None = None
    revision: str | None = None
    delimiter: str = ""
    encoding: str = ""
    missing: tuple[str, ...] = ()
    quote: str = '"'
    escape: str = ""
    part: tuple[float, float] | None = None
    by: tuple[str, ...] = ()
    domain: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict, hash=False)
    templates: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def place(self) -> Source:
        """The data set alone, without a choice of rows: equal for sources that read the same data set."""
        same = replace(self, part=None, by=(), rows=None, shuffle=False, domain=None)
        return replace(same, columns={}, templates={})

    def __str__(self) -> str:
        """The data set, for messages."""
        return " ".join(repr(part) for part in (self.name or self.path, self.config, self.split) if part)


@dataclass(frozen=True)
class TaskSpec:
    """One task of a client.

    Attributes:
        name: clients that use the same name share the task's head.
        kind: of task.
        modalities: of the input.
        domain: of the data.
        train: rows to train on, of one or more data sets.
        test: rows to evaluate on.
        validation: held-out rows for the replacement's evidence; without any, a run that needs them sets a fifth of each
            training source aside.
        columns: role (image, text, label, target) -> column; text and target may be a list of columns.
        templates: role (text, target) -> Jinja2 template over a row's columns, in place of a column.
        image: what the images are made into before the model gets them.
        classes: names of the classes, in the order of their labels (classification); a number n stands for 0 .. n-1.
        labels: what the data say for each class, in this order; by default 0 .. n-1, or the classes' names.
        margin: the client's own replacement margin; None takes the run's for the kind of task.
        batch_size: the client's own number of training examples in a batch; None takes the run's.
    """

    name: str
    kind: str
    modalities: tuple[str, ...]
    domain: str
    train: tuple[Source, ...]
    test: tuple[Source, ...]
    validation: tuple[Source, ...] = ()
    columns: Mapping[str, Any] = field(default_factory=dict, hash=False)
    templates: Mapping[str, str] = field(default_factory=dict, hash=False)
    image: ImageForm = field(default_factory=ImageForm)
    classes: tuple[str, ...] = ()
    labels: tuple[Any, ...] = ()
    margin: float | None = None
    batch_size: int | None = None

    @property
    def pair(self) -> Pair:
        """The modality-task pair."""
        return Pair(self.name, self.modalities)

    @property
    def splits(self) -> dict[str, tuple[Source, ...]]:
        """Split (train, validation, test) -> its sources."""
        return {"train": self.train, "validation": self.validation, "test": self.test}

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains of all sources, sorted."""
        return tuple(sorted({s.domain or self.domain for sources in self.splits.values() for s in sources}))

    @property
    def roles(self) -> frozenset[str]:
        """What a row must provide: the inputs, and a label or target; image generation has the image as its target."""
        output = {"image_generation": "image", "text_generation": "target"}.get(self.kind, "label")
        return frozenset({*self.modalities, output})

    def fields(self, source: Source) -> dict[str, Field]:
        """Role -> what it is read from in `source`; a source's own entry comes before the task's."""
        return fields_of(self.columns, self.templates) | fields_of(source.columns, source.templates)


@dataclass(frozen=True)
class ClientSpec:
    """A client.

    Attributes:
        name: stable; the client is known by it.
        backbone: `demo`, a local folder, or a hub id.
        tasks: what it trains.
        revision: commit, tag or branch of a backbone on the hub.
    """

    name: str
    backbone: str
    tasks: tuple[TaskSpec, ...]
    revision: str | None = None


def client_spec(values: Mapping[str, Any]) -> ClientSpec:
    """Checks a client spec as read from YAML.

    Args:
        values: nested mappings, see `ClientSpec`, `TaskSpec` and `Source`.

    Raises:
        SpecError: a key is missing or unknown, or a value is wrong.
    """
    spec, errors = read_spec(values)
    if spec is None or errors:
        raise errors[0]
    return spec


def read_spec(values: Mapping[str, Any]) -> tuple[ClientSpec | None, list[SpecError]]:
    """Reads a client spec, and goes on after a wrong task.

    Args:
        values: nested mappings, see `ClientSpec`, `TaskSpec` and `Source`.

    Returns:
        The spec with the tasks that are right, None where no task is; and what is wrong with it.
    """
    where = f"client {_name(values)}"
    given: dict[str, Any] = {}
    errors, tasks = list[SpecError](), list[TaskSpec]()
    try:
        given = check_keys(values, ClientSpec, where)
        check_name(given["name"], where, "name")
        if not given["tasks"]:
            raise SpecError(f"{where} has no tasks: list at least one under `tasks`")
    except SpecError as error:
        errors.append(error)
    right, listed = not errors, values.get("tasks") if isinstance(values, Mapping) else None
    for task in listed if isinstance(listed, list | tuple) else ():
        try:
            tasks.append(_task(task, f"{where}: task {_name(task)}"))
        except SpecError as error:
            errors.append(error)
    if double := [name for name, count in Counter(task.name for task in tasks).items() if count > 1]:
        errors.append(SpecError(f"{where} names the task {double[0]!r} twice: give each task of a client its own name"))
    if not right or double or not tasks:
        return None, errors
    return ClientSpec(**{**given, "tasks": tuple(tasks)}), errors


def _task(values: Mapping[str, Any], where: str) -> TaskSpec:
    given = check_keys(values, TaskSpec, where)
    for key in ("name", "domain"):
        check_name(given[key], where, key)
    check_kind(given["kind"], given["modalities"], where)
    if not 0 <= given.get("margin", 0) < 1e300:
        raise SpecError(f"{where} has margin {given['margin']}: use a number of at least 0")
    if not 1 <= given.get("batch_size", 1) <= MOST:
        raise SpecError(f"{where} has batch_size {given['batch_size']!r}: use a whole number from 1 to {MOST}")
    if not given["kind"].endswith("_classification") and (idle := [k for k in ("classes", "labels") if given.get(k)]):
        raise SpecError(f"{where} has {idle[0]}, which kind {given['kind']!r} does not use: leave {idle[0]} out")
    classes = class_names(given.get("classes"), given["kind"], where)
    labels = tuple(given.get("labels", ()))
    _check_scalars(labels, f"{where} has label")
    if labels and len(labels) != len(classes):
        raise SpecError(f"{where} has {len(labels)} labels for {len(classes)} classes: list one label for each class")
    if double := [text for text, count in Counter(map(as_text, labels)).items() if count > 1]:
        raise SpecError(f"{where} names the label {double[0]!r} twice: give each class its own label")
    given |= {"modalities": tuple(given["modalities"]), "classes": classes, "labels": labels}
    given["image"] = image_form(given.get("image", {}), where)
    for split in SPLITS:
        sources = given.get(split, ())
        sources = [sources] if isinstance(sources, Mapping) else sources
        given[split] = tuple(_source(source, f"{where}: {split}") for source in sources)
    task = TaskSpec(**given)
    if "image" in values and "image" not in task.roles:
        raise SpecError(f"{where} has no images: leave `image` out")
    check_columns(task.columns, task.templates, where)
    for source in (*task.train, *task.validation, *task.test):
        check_columns(source.columns, source.templates, where)
        check_fields(task.fields(source), task.roles, where)
    return task


def check_kind(kind: str, modalities: Sequence[object], where: str) -> None:
    """Checks a kind of task and the modalities of its input.

    Raises:
        SpecError: there is no such kind or modality, or the kind needs another; `where` begins the message.
    """
    if kind not in TASK_KINDS:
        raise SpecError(f"{where} has kind {kind!r}: use one of {', '.join(TASK_KINDS)}")
    if not modalities or any(modality not in MODALITIES for modality in modalities):
        raise SpecError(f"{where} has modalities {list(modalities)}: use one or both of {', '.join(MODALITIES)}")
    if len(set(modalities)) < len(modalities):
        raise SpecError(f"{where} has modalities {list(modalities)}: name each once")
    if (needed := kind.partition("_")[0]) not in modalities and kind != "text_generation":
        raise SpecError(f"{where} has kind {kind!r} and modalities {list(modalities)}: name {needed} among them")


def class_names(value: Any, kind: str, where: str) -> tuple[str, ...]:
    """The classes of a kind of task from what a spec says: a list of names, or their number.

    Raises:
        SpecError: there are too few or too many, or one is named twice; `where` begins the message.
    """
    count = value if isinstance(value, int) else len(value or ())
    if count > MOST:
        raise SpecError(f"{where} has {count} classes: use at most {MOST}")
    names = range(value) if isinstance(value, int) else value or ()
    if any(isinstance(name, bool) for name in names):
        raise SpecError(
            f"{where} has the class true or false (yes, no, on and off are these in YAML): put it in quotes"
        )
    _check_scalars(names, f"{where} has class")
    classes = tuple(str(name) for name in names)
    if double := [name for name, count in Counter(classes).items() if count > 1]:
        raise SpecError(f"{where} names the class {shown(double[0])} twice: give each class its own name")
    if kind.endswith("_classification") and len(classes) < 2:
        raise SpecError(f"{where} has {len(classes)} classes: list the names of at least two under `classes`")
    return classes


def _source(values: Mapping[str, Any], where: str) -> Source:
    given = check_keys(values, Source, where)
    form = given["format"]
    if form not in FORMATS:
        raise SpecError(f"{where} has format {form!r}: use one of {', '.join(FORMATS)}")
    needed, allowed = FORMATS[form]
    if missing := [key for key in needed if not given.get(key)]:
        raise SpecError(f"{where} lacks {', '.join(missing)}, which format {form!r} needs")
    of_formats = {key for _, keys in FORMATS.values() for key in keys}
    if extra := [key for key in given if key in of_formats and given[key] and key not in allowed]:
        value = f"{extra[0]} = {given[extra[0]]!r}"
        raise SpecError(f"{where} has {value}: format {form!r} takes {', '.join(allowed)} only")
    if "rows" in given:
        if not _is_range(given["rows"]):
            raise SpecError(f"{where} has rows {shown(given['rows'])}: give the first row and the row after the last")
        given["rows"] = tuple(given["rows"])
    if "domain" in given:
        check_name(given["domain"], where, "domain")
    if "part" in given and not _is_part(given["part"]):
        raise SpecError(f"{where} has part {shown(given['part'])}: give two fractions, from and to, such as [0, 0.8]")
    if ("part" in given) != bool(given.get("by")):
        raise SpecError(f"{where} sets only one of `part` and `by`: give both, or neither")
    delimiter = given.get("delimiter", ",")
    if len(delimiter) != 1 or not delimiter.isascii() or delimiter in '"\r\n':
        raise SpecError(f"{where} has delimiter {shown(delimiter)}: give one character of ASCII, such as ; or a tab")
    quote = given.get("quote", '"')
    if len(quote) > 1 or not quote.isascii() or quote in ("\r", "\n", delimiter):
        raise SpecError(
            f"{where} has quote {shown(quote)}: give one character of ASCII, or '' where no field is quoted"
        )
    escape = given.get("escape", "")
    if escape and (len(escape) > 1 or not escape.isascii() or escape in ("\r", "\n", delimiter, quote)):
        raise SpecError(f"{where} has escape {shown(escape)}: give one character of ASCII, such as a backslash")
    try:
        "".encode(given.get("encoding", "utf-8"))
    except (LookupError, ValueError) as error:
        raise SpecError(f"{where} has encoding {shown(given['encoding'])}: give one that Python knows") from error
    for key in ("part", "by", "missing"):
        if key in given:
            given[key] = tuple(given[key])
    for key in ("by", "missing"):
        if wrong := [word for word in given.get(key, ()) if not isinstance(word, str)]:
            raise SpecError(f"{where} has {key} {shown(wrong[0])}: put it in quotes")
    return Source(**given)


def _is_part(part: Any) -> bool:
    numbers = all(isinstance(end, int | float) and not isinstance(end, bool) for end in part)
    return len(part) == 2 and numbers and 0 <= part[0] < part[1] <= 1


def _name(values: Any) -> str:
    return shown(values.get("name", "?") if isinstance(values, Mapping) else "?")


def _check_scalars(values: Iterable[Any], where: str) -> None:
    for value in values:
        if not isinstance(value, str | int | float | date):
            raise SpecError(f"{where} {shown(value)}: use texts and numbers")


def _is_range(rows: Any) -> bool:
    """Whether it is [a row, a later row or null]."""
    types = [type(row) for row in rows] if isinstance(rows, list | tuple) else []
    return types in ([int, int], [int, NoneType]) and rows[0] >= 0 and (rows[1] is None or rows[0] < rows[1])


def check_name(value: str, where: str, key: str) -> None:
    """Checks the name of a client, task or domain.

    Raises:
        SpecError: it is none; `where` begins the message.
    """
    if not NAME.fullmatch(value):
        raise SpecError(f"{where} has {key} {shown(value)}: use 1 to 64 letters, digits, '-' and '_'")
