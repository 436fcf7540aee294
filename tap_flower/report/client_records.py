"""Records that a client keeps for its own people in its state folder: decisions, examples, gradient cosines.

None of it is ever sent. In a simulation the report reads it from `RUN/clients/NAME/`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from tap_flower.errors import StorageError
from tap_flower.files import read_json, write_atomically, write_json
from tap_flower.plain import parse_json

if TYPE_CHECKING:
    from tap_flower.core.replacement import Decision

SCHEMA = 1
DECISIONS, EXAMPLES, GRADIENTS = "decisions.jsonl", "examples.json", "gradients.json"
STEPS = "steps.txt"
"""The number of optimiser steps that the client has made on the message that it works on; not there between messages."""
_T = TypeVar("_T")


class DecisionRecord(msgspec.Struct, forbid_unknown_fields=True):
    """A line of `decisions.jsonl`: a decision on replacement, with the losses that were compared.

    Attributes:
        run: identity of the run.
        round: the round, counted from 1.
        task: name of the pair's task.
        teacher_loss: loss of the server's copy; None where it was not finite.
        personal_loss: loss of the personal model; None before its first participation.
        margin: margin of the replacement.
        replaced: what was decided.
        share: how far the personal components were replaced, 0 to 1.
    """

    run: str
    round: int
    task: str
    teacher_loss: float | None
    personal_loss: float | None
    margin: float
    replaced: bool
    share: float | None = None  # records of earlier versions have none


def record_decisions(folder: Path, run: str, server_round: int, decisions: Iterable[Decision]) -> None:
    """Adds a round's decisions on replacement to `decisions.jsonl`; those of this round and later ones are written over.

    Args:
        folder: the client's state folder.
        run: identity of the run.
        server_round: the round, counted from 1; a resumed run may repeat it. The beginning of stage 2
            is one more, its end two.
        decisions: the decision on every pair. An infinite loss (the personal model's before its first participation) is
            written as null.

    Raises:
        StorageError: the record is damaged, or cannot be written.
    """
    before = read_decisions(folder)
    kept = [d for d in before if d.run == run and d.round < server_round]
    new = [
        DecisionRecord(run, server_round, d.pair.task, d.teacher_loss, d.personal_loss, d.margin, d.replaced, d.share)
        for d in decisions
    ]
    if kept + new != before:
        write_atomically(folder / DECISIONS, msgspec.json.Encoder().encode_lines(kept + new))


def read_decisions(folder: Path) -> list[DecisionRecord]:
    """Reads all decisions of a client, in the order of rounds; none where there is no record.

    Args:
        folder: the client's state folder.

    Raises:
        StorageError: the record is damaged.
    """
    path = folder / DECISIONS
    if not path.exists():
        return []
    found: list[DecisionRecord] = []
    try:
        for line in path.read_bytes().splitlines():
            found.append(msgspec.convert(parse_json(line.decode()), DecisionRecord))
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error}") from error
    except ValueError as error:
        raise StorageError(f"{path} is damaged in line {len(found) + 1}: {error}; remove the file to go on") from error
    return found


def record_evaluation(
    folder: Path,
    run: str,
    tasks: Mapping[str, Any],
    cosines: Sequence[Mapping[str, Any]],
    skipped: Mapping[str, str] | None = None,
) -> None:
    """Writes what an evaluation has found besides metrics.

    Args:
        folder: the client's state folder.
        run: identity of the run.
        tasks: task name -> `kind` and `items`, examples with the models' answers.
        cosines: `a`, `b`, `cosine` and `components` of each two pairs: cosines between their gradients.
        skipped: what could not be had -> why.
    """
    write_json(folder / EXAMPLES, {"schema": SCHEMA, "run": run, "tasks": tasks})
    write_json(
        folder / GRADIENTS, {"schema": SCHEMA, "run": run, "pairs": list(cosines), "skipped": dict(skipped or {})}
    )


def read_examples(folder: Path) -> dict[str, Any]:
    """Reads task name -> `kind` and `items`, examples with the models' answers; nothing where there is no record."""
    return _read(folder / EXAMPLES, "tasks", dict[str, Any])


def read_gradients(folder: Path) -> list[dict[str, Any]]:
    """Reads the cosines between the gradients of each two pairs of a client; none where there is no record."""
    return _read(folder / GRADIENTS, "pairs", list[dict[str, Any]])


def read_steps(run: Path) -> dict[str, int]:
    """Reads how many optimiser steps the clients of a run have made on what they are working on: client -> steps.

    Args:
        run: the run folder of a simulation.
    """
    found = {}
    for file in sorted((run / "clients").glob(f"*/{STEPS}")):
        with suppress(OSError, ValueError):  # it has just been removed, or is being written
            found[file.parent.name] = int(file.read_text())
    return found


def _read(path: Path, key: str, kind: type[_T]) -> _T:
    if not path.exists():
        return kind()
    try:
        return msgspec.convert(read_json(path).get(key), kind)
    except msgspec.ValidationError as error:
        raise StorageError(f"{path} is damaged in {key}: {error}; remove the file to go on") from error
