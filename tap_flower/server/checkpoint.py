"""The server's durable state: after every round, all that a resumed run needs."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from filelock import FileLock, Timeout
from torch import Tensor

from tap_flower.config import Config, plain
from tap_flower.errors import ConfigError, StorageError
from tap_flower.files import read_json, read_tensors, write_json, write_tensors
from tap_flower.plain import leaves, shown
from tap_flower.server.early_stopping import Validation
from tap_flower.server.privacy import Ledger
from tap_flower.wire.fields import Epoch
from tap_flower.wire.messages import Manifest

SCHEMA = 5
_FILE, _MANIFESTS, _LOCK = "server.safetensors", "manifests.json", ".lock"
_BEST = "best/"
"""Begins the names of the best round's tensors in the file, of those that have other values now."""


@dataclass
class Progress:
    """What a run has done so far.

    Attributes:
        run: identity of the run; clients keep their state under it.
        config: the resolved configuration, as plain values.
        epochs: the run's start and its resumes, oldest first.
        round: last complete round of stage 1.
        replacements: client -> task -> rounds in which its components were replaced.
        down: component -> bytes sent to clients.
        up: component -> bytes received from clients.
        steps: client -> optimiser steps that it made, both stages.
        took_part: client -> the last complete round in which its reply was used.
        dropped: who -> how many of its replies could not be used.
        marks: client -> what a reader of its metrics must know, such as that its state was lost.
        validation: where the run may stop early.
        privacy: what a private run has released.
        train_config: what the strategy's `start` was given last as such, as plain values; None where that is not known.
    """

    run: str
    config: dict[str, Any]
    epochs: list[Epoch] = field(default_factory=list)
    round: int = 0
    replacements: dict[str, dict[str, int]] = field(default_factory=dict)
    down: dict[str, int] = field(default_factory=dict)
    up: dict[str, int] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    took_part: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    marks: dict[str, list[str]] = field(default_factory=dict)
    validation: Validation = field(default_factory=Validation)
    privacy: Ledger = field(default_factory=Ledger)
    train_config: dict[str, Any] | None = None

    def begin(self) -> None:
        """Begins a new epoch: what clients have written since the last complete round is void."""
        self.epochs.append(Epoch(uuid.uuid4().hex, self.round))


@dataclass
class Checkpoint:
    """A run after a complete round.

    Attributes:
        progress: what the run has done so far.
        tensors: tensor name -> the server's value (float32).
        best: tensor name -> value after the best round, where the run may stop early; else empty.
        manifests: of all clients that the run has known.
    """

    progress: Progress
    tensors: dict[str, Tensor] = field(default_factory=dict)
    best: dict[str, Tensor] = field(default_factory=dict)
    manifests: list[Manifest] = field(default_factory=list)


def has_begun(folder: Path) -> bool:
    """Whether a run folder holds a checkpoint, of a run that has ended or has not."""
    return (folder / "server" / _FILE).exists()


def check_begun(folder: Path) -> None:
    """Checks that a run folder holds a run that can be gone on with.

    Raises:
        StorageError: it holds none.
    """
    if not has_begun(folder):
        what = "holds no run" if folder.exists() else "does not exist"
        raise StorageError(
            f"{folder} {what}, so that nothing can be resumed: give the run's folder, or begin a new run"
        )


def resumable(folder: Path, config: Config) -> Checkpoint:
    """The checkpoint of a run folder that is to be gone on with.

    Args:
        folder: the run folder.
        config: the resolved configuration.

    Raises:
        ConfigError: the run was started with another configuration.
        StorageError: the folder holds none, or it is damaged or of another schema.
    """
    check_begun(folder)
    found = load(folder / "server")
    if different := differences(found.progress.config, plain(config)):
        raise ConfigError(f"{folder} was started with another configuration ({different}): resume it with that one")
    return found


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Where nested mappings differ, in words, the first five; empty where they are equal."""
    old, new = (dict(leaves(_indexed(values))) for values in (before, now))
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    words = [f"{key} was {shown(old.get(key))}, and is {shown(new.get(key))}" for key in keys]
    return "; ".join(words[:5] + [f"{len(words) - 5} more"] * (len(words) > 5))


def _indexed(value: Any) -> Any:
    """`value` with its lists of mappings as mappings by number."""
    if isinstance(value, Mapping):
        return {key: _indexed(inner) for key, inner in value.items()}
    if isinstance(value, list) and any(isinstance(inner, Mapping) for inner in value):
        return {str(number): _indexed(inner) for number, inner in enumerate(value)}
    return value


def check_free(folder: Path) -> Progress | None:
    """Checks that a new run may begin in a folder: it is empty or not there, or its run has no complete round.

    Returns:
        What that run has done, if there is one.

    Raises:
        ConfigError: it holds another run, or something else.
        StorageError: the checkpoint there cannot be read.
    """
    before = load(folder / "server").progress if has_begun(folder) else None
    if before is not None:
        free = not before.round
    else:
        files = (file for file in folder.rglob("*") if not file.is_dir())  # a process that was killed leaves .tmp
        free = not folder.is_file() and all(file.name == _LOCK or file.suffix == ".tmp" for file in files)
    if not free:
        raise ConfigError(
            f"{folder} is not empty: give another folder (`--out`, run_folder), or go on (`--resume`, resume=True)"
        )
    return before


@contextmanager
def locked(folder: Path, resume: bool) -> Iterator[None]:
    """Keeps other processes from running in a run folder meanwhile. The lock ends with the process, however that ends.

    Args:
        folder: the run folder; that of a new run is made.
        resume: whether its run is to be gone on with.

    Raises:
        ConfigError: another process runs in it, or it holds something else than a run.
        StorageError: it cannot be made or written, or holds nothing to go on with.
    """
    lock = FileLock(folder / _LOCK)
    try:
        if resume:
            check_begun(folder)
        else:
            if not has_begun(folder):  # nothing is written into a folder that holds something else
                check_free(folder)
            folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            f"another process runs in {folder}: wait until it has ended, or give another folder (`--out`, run_folder)"
        ) from None
    except OSError as error:
        raise StorageError(f"the run folder {folder} cannot be made or written: {error.strerror}") from error
    try:
        yield
    finally:
        lock.release()


def start_or_resume(config: Config, folder: Path, resume: bool) -> Checkpoint:
    """Where a run begins: anew, or after its last complete round.

    Nothing is written yet, so that a run which cannot begin after all is not in the way of the next. Neither is a run that
    failed before its first round was complete: a new one takes its place, and what its clients have written is void.

    Args:
        config: the resolved configuration.
        folder: the run folder.
        resume: whether to go on with the run that the folder holds.

    Raises:
        ConfigError: a new run's folder holds another run, or a resumed run was started with another configuration.
        StorageError: the checkpoint cannot be read.
    """
    if resume:
        return resumable(folder, config)
    before = check_free(folder)
    # A simulation's clients know the folder's run by its identity.
    if before is not None and (folder / "clients").exists():
        return Checkpoint(Progress(before.run, plain(config), before.epochs))
    return Checkpoint(Progress(uuid.uuid4().hex, plain(config)))


def save(folder: Path, progress: Progress, tensors: Mapping[str, Tensor], best: Mapping[str, Tensor]) -> None:
    """Writes tensors and progress in one file, and a readable copy of the progress.

    It returns when they are on the disk. The messages of the next round leave after that, so that no client is ever more
    than one round ahead of the checkpoint, and a private round is never released twice.

    Args:
        folder: folder of the server.
        progress: what the run has done so far.
        tensors: tensor name -> value (float32).
        best: tensor name -> value after the best round, or empty.

    Raises:
        StorageError: they cannot be written; the checkpoint before is intact.
    """
    record = {"schema": SCHEMA, **msgspec.to_builtins(progress)}
    # What has not changed since the best round is in the file once.
    earlier = {f"{_BEST}{name}": tensor for name, tensor in best.items() if tensors.get(name) is not tensor}
    write_tensors(folder / _FILE, {**tensors, **earlier}, record)
    write_json(folder / "state.json", record, durable=False)


def save_manifests(folder: Path, manifests: Iterable[Manifest]) -> None:
    """Writes who takes part in the run, so that a resumed run knows who is missing.

    Args:
        folder: folder of the server.
        manifests: of all clients that the run has known.

    Raises:
        StorageError: they cannot be written.
    """
    write_json(folder / _MANIFESTS, {"schema": SCHEMA, "clients": msgspec.to_builtins(list(manifests))})


def load(folder: Path) -> Checkpoint:
    """Reads what `save` wrote.

    Raises:
        StorageError: there is none, or it is damaged or of another schema.
    """
    tensors, record = read_tensors(folder / _FILE)
    known = read_json(folder / _MANIFESTS) if (folder / _MANIFESTS).exists() else {"schema": SCHEMA, "clients": []}
    if record.pop("schema", None) != SCHEMA or known.get("schema") != SCHEMA:
        raise StorageError(f"{folder} was written by another version of tap-flower: use that version to resume it")
    try:
        progress = msgspec.convert(record, Progress)
        manifests = msgspec.convert(known.get("clients"), list[Manifest])
    except msgspec.ValidationError as error:
        raise StorageError(f"{folder} is damaged: {error}; restore it, or start a new run") from error
    earlier = {name.removeprefix(_BEST): tensors.pop(name) for name in list(tensors) if name.startswith(_BEST)}
    return Checkpoint(progress, tensors, {**tensors, **earlier} if progress.validation.best_round else {}, manifests)
