"""The server's durable state: after every round, all that a resumed run needs."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, get_type_hints

from torch import Tensor

from tap_flower.files import StorageError, read_tensors, write_json, write_tensors
from tap_flower.plain import PlainError, check_fields
from tap_flower.server.accounting import Ledger
from tap_flower.server.early_stopping import Validation

SCHEMA = 3
_BEST = "best/"
"""Begins the names of the best round's tensors in the file, of those that have other values now."""
log = logging.getLogger("tap_flower")


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
        holds: client -> the number of complete rounds as of which it holds all of its tensors.
        changed: component -> the round in which it got its values.
        validation: where the run may stop early.
        privacy: what a private run has released.
    """

    run: str
    config: dict[str, Any]
    round: int = 0
    replacements: dict[str, dict[str, int]] = field(default_factory=dict)
    down: dict[str, int] = field(default_factory=dict)
    up: dict[str, int] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    dropped: int = 0
    holds: dict[str, int] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict)
    validation: Validation = field(default_factory=Validation)
    privacy: Ledger = field(default_factory=Ledger)


class Writer:
    """Writes checkpoints in the background, one at a time, while the next round runs.

    `save` waits for the write before, so that the checkpoint on disk is at most one round behind. A write that failed is
    an error of the next `save` or `flush`. As a context it ends with a flush, also where the run has failed.

    Args:
        folder: the server's.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None

    def save(self, progress: Progress, tensors: Mapping[str, Tensor], best: Mapping[str, Tensor]) -> None:
        """Begins to write what progress and tensors are now.

        Args:
            progress: copied before this returns.
            tensors: name -> value; values must not be changed in place, the mapping may be.
            best: likewise, those of the best round, or nothing.

        Raises:
            StorageError: the write before this one has failed.
        """
        self.flush()
        record = {"schema": SCHEMA, **asdict(progress)}
        # What has not changed since the best round is in the file once.
        earlier = {f"{_BEST}{name}": tensor for name, tensor in best.items() if tensors.get(name) is not tensor}
        self._pending = self._thread.submit(_write, self.folder, record, {**tensors, **earlier})

    def flush(self) -> None:
        """Waits until everything is on disk.

        Raises:
            StorageError: the last write has failed.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        try:
            self.flush()
        except Exception as problem:
            if error is None:
                raise
            log.error("%s", problem)
            error.add_note(str(problem))
        finally:
            self._thread.shutdown()


def _write(folder: Path, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Tensors and progress in one file, and a readable copy of the progress."""
    write_tensors(folder / "server.safetensors", tensors, record)
    write_json(folder / "state.json", record)


def load(folder: Path) -> tuple[Progress, dict[str, Tensor], dict[str, Tensor]]:
    """Reads the server's folder: progress, tensors, and those of the best round.

    Raises:
        StorageError: there is none, or it is damaged or of another schema.
    """
    tensors, record = read_tensors(folder / "server.safetensors")
    if record.pop("schema", None) != SCHEMA:
        raise StorageError(f"{folder} was written by another version of tap-flower: use that version to resume it")
    try:
        parts = {"validation": Validation, "privacy": Ledger}
        check_fields(record, get_type_hints(Progress) | dict.fromkeys(parts, dict[str, Any]), "its record")
        for key, part in parts.items():
            check_fields(record[key], get_type_hints(part), key)
    except PlainError as error:
        raise StorageError(f"{folder} is damaged: {error}; restore it, or start a new run") from error
    progress = Progress(**{**record, **{key: part(**record[key]) for key, part in parts.items()}})
    earlier = {name.removeprefix(_BEST): tensors.pop(name) for name in list(tensors) if name.startswith(_BEST)}
    return progress, tensors, {**tensors, **earlier} if progress.validation.best_round else {}
