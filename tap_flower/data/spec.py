"""What a client has: its tasks, where their data lies, which columns to read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any

from tap_flower.core.components import Pair
from tap_flower.core.tasks import TASK_KINDS

FORMATS = ("packaged",)
MODALITIES = ("image", "text")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


class SpecError(ValueError):
    """A client spec is wrong; the message names the client, the key, the value and the remedy."""


@dataclass(frozen=True)
class Source:
    """Rows of one data set.

    Attributes:
        format: `packaged` (the demo's data).
        name: of the data set.
        split: of the data set.
        rows: first row and the row after the last; None takes all.
        shuffle: whether the split is shuffled with the run's seed before `rows` is taken.
    """

    format: str
    name: str
    split: str
    rows: tuple[int, int] | None = None
    shuffle: bool = False


@dataclass(frozen=True)
class TaskSpec:
    """One task of a client.

    Attributes:
        name: clients that use the same name share the task's head.
        kind: of task.
        modalities: of the input.
        domain: of the data.
        train: rows to train on.
        test: rows to evaluate on.
        validation: held-out rows for the replacement's evidence; None sets a fifth of `train` aside.
        columns: role (image, text, label, target) -> column, or columns that are joined for text.
        classes: names of the classes, in the order of their labels (classification).
        margin: the client's own replacement margin; None takes the run's for the kind of task.
        batch_size: the client's own number of training examples in a batch; None takes the run's.
    """

    name: str
    kind: str
    modalities: tuple[str, ...]
    domain: str
    train: Source
    test: Source
    validation: Source | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    margin: float | None = None
    batch_size: int | None = None

    @property
    def pair(self) -> Pair:
        """The modality-task pair."""
        return Pair(self.name, self.modalities)


@dataclass(frozen=True)
class ClientSpec:
    """A client: its stable name, its backbone and its tasks."""

    name: str
    backbone: str
    tasks: tuple[TaskSpec, ...]


def client_spec(values: Mapping[str, Any]) -> ClientSpec:
    """Checks a client spec as read from YAML.

    Args:
        values: nested mappings, see `ClientSpec`, `TaskSpec` and `Source`.

    Raises:
        SpecError: a key is missing or unknown, or a value is wrong.
    """
    where = f"client {values.get('name', '?')!r}"
    _check_keys(values, ClientSpec, where)
    _check_name(values["name"], where, "name")
    tasks = tuple(_task_spec(task, where) for task in values["tasks"])
    if not tasks:
        raise SpecError(f"{where} has no tasks: list at least one under `tasks`")
    names = [task.name for task in tasks]
    if double := {name for name in names if names.count(name) > 1}:
        raise SpecError(f"{where} names the task {sorted(double)[0]!r} twice: give each task of a client its own name")
    return ClientSpec(values["name"], str(values["backbone"]), tasks)


def _task_spec(values: Mapping[str, Any], where: str) -> TaskSpec:
    where = f"{where}: task {values.get('name', '?')!r}"
    _check_keys(values, TaskSpec, where)
    for key in ("name", "domain"):
        _check_name(values[key], where, key)
    kind, modalities = values["kind"], tuple(values["modalities"])
    if kind not in TASK_KINDS:
        raise SpecError(f"{where} has kind {kind!r}: use one of {', '.join(TASK_KINDS)}")
    if not modalities or any(modality not in MODALITIES for modality in modalities):
        raise SpecError(f"{where} has modalities {list(modalities)}: use one or both of {', '.join(MODALITIES)}")
    classes = tuple(str(name) for name in values.get("classes") or ())
    if kind.endswith("_classification") and len(classes) < 2:
        raise SpecError(f"{where} has {len(classes)} classes: list the names of at least two under `classes`")
    margin = values.get("margin")
    if margin is not None and not 0 <= float(margin) < float("inf"):
        raise SpecError(f"{where} has margin {margin}: use a number of at least 0")
    batch_size = values.get("batch_size")
    if batch_size is not None and not (isinstance(batch_size, int) and 1 <= batch_size <= 65_536):
        raise SpecError(f"{where} has batch_size {batch_size!r}: use a whole number from 1 to 65536")
    columns = dict(values.get("columns") or {})
    roles = {*modalities, {"image_generation": "image", "text_generation": "target"}.get(kind, "label")}
    if missing := roles - columns.keys():
        raise SpecError(f"{where} names no column for {', '.join(sorted(missing))}: add it under `columns`")
    validation = values.get("validation")
    return TaskSpec(
        name=values["name"],
        kind=kind,
        modalities=modalities,
        domain=values["domain"],
        train=_source(values["train"], f"{where}: train"),
        test=_source(values["test"], f"{where}: test"),
        validation=None if validation is None else _source(validation, f"{where}: validation"),
        columns=columns,
        classes=classes,
        margin=None if margin is None else float(margin),
        batch_size=batch_size,
    )


def _source(values: Mapping[str, Any], where: str) -> Source:
    _check_keys(values, Source, where)
    if values["format"] not in FORMATS:
        raise SpecError(f"{where} has format {values['format']!r}: use one of {', '.join(FORMATS)}")
    rows = values.get("rows")
    if rows is not None and not (len(rows) == 2 and 0 <= rows[0] < rows[1]):
        raise SpecError(f"{where} has rows {list(rows)}: give the first row and the row after the last")
    return Source(**{**values, "rows": None if rows is None else (int(rows[0]), int(rows[1]))})


def _check_keys(values: Mapping[str, Any], schema: type, where: str) -> None:
    known = {f.name: f for f in fields(schema)}
    for key in values:
        if key not in known:
            near = get_close_matches(str(key), known, n=1)
            raise SpecError(f"{where} has the unknown key {key!r}" + (f": did you mean {near[0]!r}?" if near else ""))
    required = [name for name, f in known.items() if f.default is f.default_factory]  # both MISSING
    if missing := [name for name in required if name not in values]:
        raise SpecError(f"{where} lacks {', '.join(missing)}")


def _check_name(value: Any, where: str, key: str) -> None:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise SpecError(f"{where} has {key} {value!r}: use 1 to 64 letters, digits, '-' and '_'")
