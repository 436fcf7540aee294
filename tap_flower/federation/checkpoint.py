"""The server's durable state: after every round, all that a resumed run needs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from tap_flower.storage import StorageError, read_tensors, write_json, write_tensors

SCHEMA = 1


@dataclass
class Progress:
    """What a run has done so far.

    Attributes:
        run: identity of the run; clients keep their state under it.
        config: the resolved configuration, as plain values.
        round: last complete round of stage 1.
        replacements: client -> task -> rounds in which its components were replaced.
        down: component -> bytes sent to clients.
        up: component -> bytes received from clients.
        steps: client -> optimiser steps that it made, both stages.
        dropped: replies that could not be used.
    """

    run: str
    config: dict[str, Any]
    round: int = 0
    replacements: dict[str, dict[str, int]] = field(default_factory=dict)
    down: dict[str, int] = field(default_factory=dict)
    up: dict[str, int] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    dropped: int = 0


def save(folder: Path, progress: Progress, tensors: dict[str, Tensor]) -> None:
    """Writes the server's folder: tensors and progress in one file, and a readable copy of the progress."""
    record = {"schema": SCHEMA, **asdict(progress)}
    write_tensors(folder / "server.safetensors", tensors, record)
    write_json(folder / "state.json", record)


def load(folder: Path) -> tuple[Progress, dict[str, Tensor]]:
    """Reads the server's folder.

    Raises:
        StorageError: there is none, or it is damaged or of another schema.
    """
    tensors, record = read_tensors(folder / "server.safetensors")
    if record.pop("schema", None) != SCHEMA:
        raise StorageError(f"{folder} was written by another version of tap-flower: use that version to resume it")
    try:
        return Progress(**record), tensors
    except TypeError as error:
        raise StorageError(f"{folder} is damaged: {error}") from error
