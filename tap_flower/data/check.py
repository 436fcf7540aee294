"""Reads all data of a client spec as loading does, and gathers every problem in place of stopping at the first."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, combinations, islice
from typing import Any

from transformers import PreTrainedTokenizerBase

from tap_flower.data.examples import number_aside
from tap_flower.data.fields import LIKE_MISSING
from tap_flower.data.images import DARK, pixels_of, with_image_forms
from tap_flower.data.labels import NO_CLASS, alike
from tap_flower.data.loading import Errors, SourceRows, read_source, too_few_rows
from tap_flower.data.sources import SHOWN, RowError, SourceError, SourceNote, listed, open_source
from tap_flower.data.spec import ClientSpec, Source, TaskSpec
from tap_flower.data.text import load_tokenizer, texts_of, token_ids
from tap_flower.errors import BackboneError
from tap_flower.hub import locate

EXAMPLES = 3
"""Examples of each split that are shown."""
UNKNOWN = 0.1
"""Share of a split's tokens from which on unknown ones are worth a note."""
UNEVEN = 0.25
"""Share of the rows of a `part` by which it may be larger or smaller without a note."""


@dataclass(frozen=True)
class Problem:
    """Something that is wrong, or worth knowing.

    Attributes:
        what: it is; the message up to the rows.
        rows: of the data set, where it is about rows.
        rest: of the message.
        is_note: whether it stops nothing.
    """

    what: str
    rows: tuple[int, ...] = ()
    rest: str = ""
    is_note: bool = False

    def __str__(self) -> str:
        rows = f" in row{'s' * (len(self.rows) > 1)} {listed(self.rows)}" if self.rows else ""
        return f"{self.what}{rows}{self.rest}"


class DarkImageNote(RowError, SourceNote):
    """An image uses little of its type's range."""


class OtherLabelNote(RowError, SourceNote):
    """An input has another label in another row."""


@dataclass(frozen=True)
class Example:
    """A row as the model gets it.

    Attributes:
        row: of the data set.
        shown: role -> what the model gets, in words.
        found: role -> a text before it is tokenised, the name of a class, an image's size and the mean of each channel.
    """

    row: int
    shown: Mapping[str, str]
    found: Mapping[str, Any]


@dataclass
class SplitSummary:
    """What one split of a task holds.

    Attributes:
        task: its name.
        split: train, validation or test.
        rows: how many, those with a problem included.
        classes: class name -> rows, for every class of the spec.
        tokens: role (text, target) -> tokens of each text, before it is cut.
        images: (width, height) -> images of this size, before they are brought to the task's size.
        examples: the first rows without a problem.
        labelled: whether the labels of all its sources could be read.
        unknown: tokens that the tokenizer does not know, in all texts.
        inputs: hash of a row's input (text, and pixels as the model gets them) -> a row with it.
        labels: hash of a row's input -> number of the class of the first row with it.
    """

    task: str
    split: str
    rows: int = 0
    classes: Counter[str] = field(default_factory=Counter)
    tokens: dict[str, list[int]] = field(default_factory=dict)
    images: Counter[tuple[int, int]] = field(default_factory=Counter)
    examples: list[Example] = field(default_factory=list)
    labelled: bool = True
    unknown: int = 0
    inputs: dict[bytes, int] = field(default_factory=dict)
    labels: dict[bytes, int] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """What was found, as plain values."""
        examples = [{"row": example.row, **example.found} for example in self.examples]
        return {"rows": self.rows, "classes": dict(self.classes), "examples": examples}


def check_data(
    spec: ClientSpec, text_length: int, seed: int, root: str = "", hold_out: bool = True
) -> tuple[list[SplitSummary], list[Problem]]:
    """Reads every row of a client's data; `load_client_data` takes the same arguments and stops at the first problem.

    It finds two problems besides that loading lets pass: images that cannot be decoded, and texts that are empty. Notes are
    classes without training examples, inputs that two splits share, files that are passed over, numbers that are read as
    places in `classes`, many words that the tokenizer does not know, images that use little of their type's range, parts
    by hash that are far from their share of the rows, equal inputs with different labels, texts and classes that may stand
    for a missing value, and classes whose names are alike.

    Args:
        spec: of the client.
        text_length: longest text and longest target, in tokens.
        seed: of the run.
        root: a folder with a mirror of hub data sets; nothing to use the hub.
        hold_out: whether a task without validation rows sets a fifth of its training examples aside.

    Returns:
        A summary of each task's splits, and all problems and notes.
    """
    problems: list[Problem] = []
    tokenizer = None
    try:
        tokenizer = load_tokenizer(locate(spec.backbone), spec.revision)
    except BackboneError as error:
        problems.append(Problem(f"{error} (no tokens are counted)"))
    try:
        spec = with_image_forms(spec)
    except BackboneError as error:
        return [], [*problems, Problem(str(error))]
    summaries = []
    for task in spec.tasks:
        checker = _Checker(task, tokenizer, text_length, seed, root)
        of_task: list[SplitSummary] = []
        found: list[Problem] = []
        for split, sources in task.splits.items():
            summary, wrong = checker.check(split, sources, hold_out)
            of_task += [summary] if sources else []
            found += wrong
        found += [note for one, other in combinations(of_task, 2) for note in _shared(one, other)]
        problems += [replace(one, what=f"client {spec.name!r}: task {task.name!r}: {one.what}") for one in found]
        summaries += of_task
    return summaries, problems


def _shared(one: SplitSummary, other: SplitSummary) -> list[Problem]:
    """A note where two splits have inputs in common."""
    rows = sorted(one.inputs[found] for found in one.inputs.keys() & other.inputs.keys())
    if not rows:
        return []
    what = f"{one.split} and {other.split} share {len(rows):,} inputs, which {one.split} has"
    return [Problem(what, tuple(rows), ": leave them out of one", is_note=True)]


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
        sizes = dict[Source, int]()
        for source in sources:
            try:
                read, errors = read_source(self.task, source, self.tokenizer, None, self.seed, self.root)
            except SourceError as error:
                problems.append(Problem(f"{split} {error}"))
                summary.labelled = False
                continue
            self._add(source, read, errors, summary)
            sizes[source] = len(read)
            problems += self._uneven(split, source, len(read))
            for role in ("", *self.task.fields(source)):
                problems += [replace(one, what=f"{split} {source} {one.what}") for one in _grouped(role, errors[role])]
        if sizes or not sources:
            problems += [Problem(problem) for problem in too_few_rows(split, sizes)]
        if split == "train" and hold_out and not self.task.validation and sizes:
            aside = sum(map(number_aside, sizes.values()))
            rows = f"{aside:,} of {sum(sizes.values()):,} training rows"
            what = "are held out to decide on replacements and are not trained on"
            problems.append(Problem(f"no `validation` source: {rows} {what}", is_note=True))
            if 1 in sizes.values():
                problems.append(
                    Problem("train has a source with 1 row, which is trained on and held out", is_note=True)
                )
        like = [name for name in self.task.classes if name.strip().lower() in LIKE_MISSING]
        if split == "train" and like:
            remedy = "if it stands for a missing value, drop the class, and these rows"
            problems.append(Problem(f"has the class {listed(list(map(repr, like)))}: {remedy}", is_note=True))
        for group in alike(self.task.classes) if split == "train" else ():
            what = (
                f"has the classes {listed(list(map(repr, group)))}, which differ in case, blanks or Unicode form only"
            )
            problems.append(Problem(f"{what}: if they are one, write it in one way in the data", is_note=True))
        empty = [repr(name) for name, count in summary.classes.items() if not count]
        if split == "train" and summary.labelled and empty:
            remedy = "add rows, or drop it from the `classes` of all clients"
            problems.append(Problem(f"train has no example of class {listed(empty)}: {remedy}", is_note=True))
        if (share := summary.unknown / max(1, sum(map(sum, summary.tokens.values())))) > UNKNOWN:
            remedy = "is it the tokenizer of these texts' language?"
            problems.append(
                Problem(f"{split} has {share:.0%} tokens that the tokenizer does not know: {remedy}", is_note=True)
            )
        return summary, problems

    def _uneven(self, split: str, source: Source, taken: int) -> list[Problem]:
        """A note where a part by hash has a share of the rows that is far from its own, as happens with few groups."""
        if source.part is None or source.rows is not None:
            return []
        available, (low, high) = len(open_source(source, self.root)), source.part
        meant = (high - low) * available
        if abs(taken - meant) <= max(1, UNEVEN * meant):
            return []
        what = (
            f"{split} {source} has {taken:,} of {available:,} rows; its part, {high - low:.0%}, would be {meant:,.0f}"
        )
        remedy = f"equal values of {listed(source.by)} stay together: move the bounds of `part`, or choose `rows`"
        return [Problem(f"{what}: {remedy}", is_note=True)]

    def _add(self, source: Source, read: SourceRows, errors: Errors, summary: SplitSummary) -> None:
        """Adds the rows of a source to the summary of its split, and what is wrong with images to the errors."""
        summary.rows += len(read)
        summary.labelled &= "label" in read.columns
        inputs = {row: hashlib.sha256() for row in read.rows}
        for role, column in read.columns.items():
            if role == "image":
                for row in read.rows:
                    try:
                        image = column.original(row)
                        inputs[row].update(pixels_of(image, self.task.image).numpy().tobytes())
                    except RowError as error:
                        errors[role].append(error)
                        continue
                    except Exception as error:  # an image of 1 x 90,000 pixels has no square
                        errors[role].append(RowError("has no image", row, "", str(error)))
                        continue
                    summary.images[image.info["size"]] += 1
                    if image.info.get("used", 1) < DARK:
                        rest = f" (row {row}: {image.info['used']:.1%} of 16 bits): scale it to the whole range"
                        errors[role].append(DarkImageNote("has an image that is nearly black", row, rest))
            elif role == "label":
                summary.classes.update(self.task.classes[number] for number in column if number != NO_CLASS)
            elif self.tokenizer is not None:
                bad = _rows(errors[role])
                lengths = [n for row, n in zip(read.rows, column.lengths.tolist(), strict=True) if row not in bad]
                if lengths:
                    summary.tokens.setdefault(role, []).extend(lengths)
                summary.unknown += column.count(self.tokenizer.unk_token_id)
                if role == "text":
                    for place, row in enumerate(read.rows):
                        inputs[row].update(column[place].tobytes())
        bad = _rows(chain(*errors.values()))
        known = read.columns if self.tokenizer is not None else read.columns.keys() - {"text"}
        if all(role in known for role in self.task.modalities):
            whole = {row: found.digest() for row, found in inputs.items() if row not in bad}
            summary.inputs |= {found: row for row, found in whole.items()}
            for row, label in zip(read.rows, read.columns.get("label", ()), strict=False):
                if row in whole and summary.labels.setdefault(whole[row], label) != label:
                    rest = ", which an equal input before it does not have: correct one of them"
                    errors["label"].append(OtherLabelNote("has a label", row, rest))
        good = (place for place, row in enumerate(read.rows) if row not in bad)
        summary.examples += [
            self._example(source, read, place) for place in islice(good, EXAMPLES - len(summary.examples))
        ]

    def _example(self, source: Source, read: SourceRows, place: int) -> Example:
        pairs = {role: self._shown(role, source, read, place) for role in read.columns}
        return Example(
            read.rows[place],
            {role: shown for role, (shown, _) in pairs.items()},
            {role: found for role, (_, found) in pairs.items()},
        )

    def _shown(self, role: str, source: Source, read: SourceRows, place: int) -> tuple[str, Any]:
        """What the model gets of a row, in words and as `Example.found` has it."""
        row, column, side = read.rows[place], read.columns[role], self.task.image.size
        if role == "image":
            width, height = column.original(row).info["size"]
            mean = (column[row].float() / 255).mean((1, 2)).tolist()
            return f"{width}x{height} image, as {side}x{side}", {"size": [width, height], "mean": mean}
        if role == "label":
            name = self.task.classes[column[place]]
            return f"{column[place]}: {name}", name
        is_target = role == "target"
        data, field_ = open_source(source, self.root), self.task.fields(source)[role]
        (((text,), _),) = texts_of(data, [row], field_, is_target)
        if self.tokenizer is None:
            return text, text
        (ids,) = token_ids([text], self.tokenizer, self.text_length, is_target)
        return str(self.tokenizer.decode(ids)), text


def _rows(errors: Iterable[SourceError]) -> set[int]:
    """The rows that errors are about."""
    return {error.row for error in errors if isinstance(error, RowError) and not isinstance(error, SourceNote)}


def _grouped(role: str, errors: Sequence[SourceError]) -> list[Problem]:
    """One problem for all rows of which the same is wrong; past `SHOWN` kinds, one for all others."""
    problems = [
        Problem(str(error), is_note=isinstance(error, SourceNote))
        for error in errors
        if not isinstance(error, RowError)
    ]
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
        is_note = isinstance(first, SourceNote)
        problems.append(Problem(what, tuple(error.row for error in found), rest, is_note))
    return problems
