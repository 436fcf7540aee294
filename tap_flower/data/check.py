"""Reads all data of a client spec as loading does, and gathers every problem in place of stopping at the first."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from typing import Any

from transformers import PreTrainedTokenizerBase

from tap_flower.data.images import IMAGE_SIZE
from tap_flower.data.labels import NO_CLASS
from tap_flower.data.loading import SourceRows, read_source, too_few_rows
from tap_flower.data.sources import RowError, SourceError, open_source
from tap_flower.data.spec import ClientSpec, Source, TaskSpec, read_spec
from tap_flower.data.text import load_tokenizer, texts_of, token_ids

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
    spec, errors = read_spec(values)
    return spec, [Problem(str(error)) for error in errors]


def check_data(
    spec: ClientSpec, backbone: str, text_length: int, seed: int, root: str = "", hold_out: bool = True
) -> tuple[list[SplitSummary], list[Problem]]:
    """Reads every row of a client's data; `load_client_data` takes the same arguments and stops at the first problem.

    It finds three things besides that loading lets pass: images that cannot be decoded, texts that are empty, and
    classes without training examples.

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
        checker = _Checker(task, tokenizer, text_length, seed, root)
        for split, sources in task.splits.items():
            summary, found = checker.check(split, sources, hold_out)
            summaries += [summary] if sources else []
            problems += [replace(one, what=f"client {spec.name!r}: task {task.name!r}: {one.what}") for one in found]
    return summaries, problems


@dataclass(frozen=True)
class _Checker:
    """Checks the sources of one task."""

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
            errors: dict[str, list[SourceError]] = defaultdict(list)
            try:
                read = read_source(
                    self.task, source, self.tokenizer, None, self.seed, self.root, partial(_gather, errors)
                )
            except SourceError as error:
                problems.append(Problem(f"{split} {error}"))
                summary.labelled = False
                continue
            self._add(source, read, errors, summary)
            sizes.append(len(read))
            for role in ("", *self.task.fields(source)):
                problems += [replace(one, what=f"{split} {source} {one.what}") for one in _grouped(role, errors[role])]
        if sizes or not sources:
            problems += [Problem(problem) for problem in too_few_rows(self.task, split, sizes, hold_out)]
        empty = [repr(name) for name, count in summary.classes.items() if not count]
        if split == "train" and summary.labelled and empty:
            remedy = "add rows, or drop it from the `classes` of all clients"
            problems.append(Problem(f"train has no example of class {listed(empty)}: {remedy}"))
        return summary, problems

    def _add(
        self, source: Source, read: SourceRows, errors: dict[str, list[SourceError]], summary: SplitSummary
    ) -> None:
        """Adds the rows of a source to the summary of its split, and what is wrong with images to the errors."""
        summary.rows += len(read)
        summary.labelled &= "label" in read.columns
        for role, column in read.columns.items():
            if role == "image":
                for row in read.rows:
                    try:
                        summary.images[column.original(row).size] += 1
                    except RowError as error:
                        errors[role].append(error)
            elif role == "label":
                summary.classes.update(self.task.classes[number] for number in column if number != NO_CLASS)
            elif self.tokenizer is not None:
                bad = _rows(errors[role])
                lengths = [n for row, n in zip(read.rows, column.lengths.tolist(), strict=True) if row not in bad]
                if lengths:
                    summary.tokens.setdefault(role, []).extend(lengths)
        bad = _rows(chain(*errors.values()))
        good = (place for place, row in enumerate(read.rows) if row not in bad)
        summary.examples += [
            Example(read.rows[place], {role: self._shown(role, source, read, place) for role in read.columns})
            for place in islice(good, EXAMPLES - len(summary.examples))
        ]

    def _shown(self, role: str, source: Source, read: SourceRows, place: int) -> str:
        """What the model gets of a row, in words."""
        row, column = read.rows[place], read.columns[role]
        if role == "image":
            width, height = column.original(row).size
            return f"{width}x{height} image, as {IMAGE_SIZE}x{IMAGE_SIZE}"
        if role == "label":
            return f"{column[place]}: {self.task.classes[column[place]]}"
        is_target = role == "target"
        data, field_ = open_source(source, self.root), self.task.fields(source)[role]
        (((text,), _),) = texts_of(data, [row], field_, is_target)
        if self.tokenizer is None:
            return text
        (ids,) = token_ids([text], self.tokenizer, self.text_length, is_target)
        return str(self.tokenizer.decode(ids))


def _gather(errors: dict[str, list[SourceError]], role: str, error: SourceError) -> None:
    errors[role].append(error)


def _rows(errors: Iterable[SourceError]) -> set[int]:
    """The rows that errors are about."""
    return {error.row for error in errors if isinstance(error, RowError)}


def _grouped(role: str, errors: Sequence[SourceError]) -> list[Problem]:
    """One problem for all rows of which the same is wrong; past `SHOWN` kinds, one for all others."""
    problems = [Problem(str(error)) for error in errors if not isinstance(error, RowError)]
    groups: dict[str, list[RowError]] = {}
    for error in errors:
        if isinstance(error, RowError):
            known = error.what in groups or len(groups) < SHOWN
            groups.setdefault(error.what if known else f"has other problems with its {role}", []).append(error)
    for what, found in groups.items():
        first = found[0]
        rest = (first.rest if what == first.what else "") + (
            f" (row {first.row}: {first.reason})" if first.reason else ""
        )
        problems.append(Problem(what, tuple(error.row for error in found), rest))
    return problems
