"""Reads all data of a client spec and finds every problem at once, by the rules that loading follows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from tap_flower.data.images import IMAGE_SIZE, images_of
from tap_flower.data.labels import Labels
from tap_flower.data.loading import too_few_rows
from tap_flower.data.sources import RowError, SourceError, missing_columns, open_source, rows_of, values_of
from tap_flower.data.spec import ClientSpec, Field, Source, TaskSpec, client_spec, task_spec
from tap_flower.data.texts import load_tokenizer, text_of, token_ids
from tap_flower.errors import SpecError

EXAMPLES = 3
"""Examples of each split that are shown."""
SHOWN = 20
"""Rows, classes, and kinds of problem with one role of a source, that are named; the others are counted."""


@dataclass(frozen=True)
class Problem:
    """Something that is wrong.

    Attributes:
        what: it is; the message up to the rows.
        rows: of the data set, where it is about rows.
        rest: of the message.
    """

    what: str
    rows: tuple[int, ...] = ()
    rest: str = ""

    def __str__(self) -> str:
        rows = f" in row{'s' * (len(self.rows) > 1)} {listed(self.rows)}" if self.rows else ""
        return f"{self.what}{rows}{self.rest}"


@dataclass(frozen=True)
class Example:
    """A row as the model gets it: role -> in words."""

    row: int
    shown: Mapping[str, str]


@dataclass
class SplitSummary:
    """What one split of a task holds.

    Attributes:
        task: its name.
        split: train, validation or test.
        rows: how many, those with a problem included.
        classes: class name -> rows, for every class of the spec.
        tokens: role (text, target) -> tokens of each text, before it is cut.
        images: (width, height) -> images of this size, before they are brought to `IMAGE_SIZE`.
        examples: the first rows without a problem.
        labelled: whether the labels of all its sources could be read.
    """

    task: str
    split: str
    rows: int = 0
    classes: Counter[str] = field(default_factory=Counter)
    tokens: dict[str, list[int]] = field(default_factory=dict)
    images: Counter[tuple[int, int]] = field(default_factory=Counter)
    examples: list[Example] = field(default_factory=list)
    labelled: bool = True


def listed(values: Sequence[object]) -> str:
    """The first `SHOWN` values, and how many more there are."""
    more = len(values) - SHOWN
    return ", ".join(str(value) for value in values[:SHOWN]) + (f" and {more:,} more" if more > 0 else "")


def check_spec(values: Mapping[str, Any]) -> tuple[ClientSpec | None, list[Problem]]:
    """Reads a client spec, and goes on after a wrong task.

    Args:
        values: as `client_spec` takes them.

    Returns:
        The spec with the tasks that are right, None where no task is; and what is wrong with it.
    """
    try:
        return client_spec(values), []
    except SpecError as error:
        problems, right = [str(error)], []
    for task in values.get("tasks") or []:
        try:
            task_spec(task, values)
            right.append(task)
        except SpecError as error:
            problems.append(str(error))
    spec = None
    if right:
        try:
            spec = client_spec({**values, "tasks": right})
        except SpecError as error:
            problems.append(str(error))
    return spec, [Problem(problem) for problem in dict.fromkeys(problems)]


def check_data(
    spec: ClientSpec, backbone: str, text_length: int, seed: int, root: str = "", hold_out: bool = True
) -> tuple[list[SplitSummary], list[Problem]]:
    """Reads every row of a client's data; `ClientData` takes the same arguments and stops at the first problem.

    It finds two things besides that training could do with: texts that are empty, and classes without training examples.

    Args:
        spec: of the client.
        backbone: folder or hub id of the client's backbone, for its tokenizer.
        text_length: longest text and longest target, in tokens.
        seed: of the run.
        root: a folder with a mirror of hub data sets; nothing to use the hub.
        hold_out: whether a task without validation rows sets a fifth of its training examples aside.

    Returns:
        A summary of each task's splits, and all problems.
    """
    problems: list[Problem] = []
    tokenizer = None
    try:
        tokenizer = load_tokenizer(backbone, spec.revision)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        problems.append(Problem(f"backbone {spec.backbone!r} gives no tokenizer, so no tokens are counted: {reason}"))
    summaries = []
    for task in spec.tasks:
        checker = _Checker(f"client {spec.name!r}: task {task.name!r}", task, tokenizer, text_length, seed, root)
        for split, sources in (("train", task.train), ("validation", task.validation), ("test", task.test)):
            summary, found = checker.check(split, sources, hold_out)
            summaries += [summary] if sources else []
            problems += found
    return summaries, problems


@dataclass(frozen=True)
class _Checker:
    """Checks the sources of one task; `where` begins every problem."""

    where: str
    task: TaskSpec
    tokenizer: PreTrainedTokenizerBase | None
    text_length: int
    seed: int
    root: str

    def check(self, split: str, sources: Sequence[Source], hold_out: bool) -> tuple[SplitSummary, list[Problem]]:
        summary = SplitSummary(self.task.name, split, classes=Counter(dict.fromkeys(self.task.classes, 0)))
        problems: list[Problem] = []
        sizes = []
        for source in sources:
            try:
                data = open_source(source, self.root)
            except SourceError as error:
                problems.append(Problem(f"{split} {error}"))
                summary.labelled = False
                continue
            before = summary.rows
            problems += [
                replace(problem, what=f"{split} {source} {problem.what}")
                for problem in self._source(source, data, summary)
            ]
            sizes.append(summary.rows - before)
        if sizes or not sources:
            problems += [Problem(problem) for problem in too_few_rows(self.task, split, sizes, hold_out)]
        empty = [repr(name) for name, count in summary.classes.items() if not count]
        if split == "train" and summary.labelled and empty:
            problems.append(
                Problem(
                    f"train has no example of class {listed(empty)}: add rows, or drop it from the `classes` of all clients"
                )
            )
        return summary, [replace(problem, what=f"{self.where}: {problem.what}") for problem in problems]

    def _source(self, source: Source, data: datasets.Dataset, summary: SplitSummary) -> list[Problem]:
        """Adds a source to the summary of its split, and returns its problems."""
        fields = self.task.fields(source)
        missing = list(missing_columns(data, fields))
        problems = [Problem(problem) for _, problem in missing]
        for role, _ in missing:
            fields.pop(role, None)
        summary.labelled &= "label" in fields
        try:
            rows = rows_of(source, self.root, self.seed)
        except SourceError as error:
            problems.append(Problem(str(error)))
            rows = list(range(len(data)))
        summary.rows += len(rows)
        bad: set[int] = set()
        for role, read in fields.items():
            errors = self._role(role, read, source, data, rows, summary)
            bad |= {error.row for error in errors}
            problems += _grouped(role, errors)
        good = (row for row in rows if row not in bad)
        summary.examples += [
            Example(row, {role: self._shown(role, read, source, data, row) for role, read in fields.items()})
            for row in islice(good, EXAMPLES - len(summary.examples))
        ]
        return problems

    def _role(
        self, role: str, read: Field, source: Source, data: datasets.Dataset, rows: list[int], summary: SplitSummary
    ) -> list[RowError]:
        """Adds one role of a source's rows to the summary, and returns what is wrong with rows."""
        errors: list[RowError] = []
        if role == "image":
            images = images_of(source, self.root, read.columns[0])
            for row in rows:
                try:
                    summary.images[images.original(row).size] += 1
                except RowError as error:
                    errors.append(error)
            return errors
        labels = Labels(self.task, data, read.columns[0]) if role == "label" else None
        for part in values_of(data, rows, read.reads):
            texts = []
            for row, values in part:
                try:
                    if labels is not None:
                        summary.classes[self.task.classes[labels.class_of(row, values[read.columns[0]])]] += 1
                    else:
                        texts.append(_filled(text_of(read, row, values), role, row))
                except RowError as error:
                    errors.append(error)
            if texts and self.tokenizer:
                found = token_ids(texts, self.tokenizer, None, role == "target")
                summary.tokens.setdefault(role, []).extend(len(ids) for ids in found)
        return errors

    def _shown(self, role: str, read: Field, source: Source, data: datasets.Dataset, row: int) -> str:
        if role == "image":
            width, height = images_of(source, self.root, read.columns[0]).original(row).size
            return f"{width}x{height} image, as {IMAGE_SIZE}x{IMAGE_SIZE}"
        (((_, values),),) = values_of(data, [row], read.reads)
        if role == "label":
            number = Labels(self.task, data, read.columns[0]).class_of(row, values[read.columns[0]])
            return f"{number}: {self.task.classes[number]}"
        text = text_of(read, row, values)
        if self.tokenizer is None:
            return text
        (ids,) = token_ids([text], self.tokenizer, self.text_length, role == "target")
        return str(self.tokenizer.decode(ids))


def _filled(text: str, role: str, row: int) -> str:
    if not text.strip():
        raise RowError(f"has an empty {role}", row, ": fill it, or leave the row out")
    return text


def _grouped(role: str, errors: Iterable[RowError]) -> list[Problem]:
    """One problem for all rows of which the same is wrong; past `SHOWN` kinds, one for all others."""
    groups: dict[str, list[RowError]] = {}
    for error in errors:
        known = error.what in groups or len(groups) < SHOWN
        groups.setdefault(error.what if known else f"has other problems with its {role}", []).append(error)
    return [
        Problem(
            what,
            tuple(error.row for error in found),
            (found[0].rest if what == found[0].what else "")
            + (f" (row {found[0].row}: {found[0].reason})" if found[0].reason else ""),
        )
        for what, found in groups.items()
    ]
