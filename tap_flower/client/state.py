"""A client's durable state: what its method keeps between rounds, and what stage 2 made of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from tap_flower.files import (
    Identity,
    StorageError,
    identity,
    keep_as,
    read_record,
    read_tensors,
    write_json,
    write_tensors,
)
from tap_flower.methods.method import Memory, State
from tap_flower.plain import PlainError, check_fields
from tap_flower.recent import Recent

SCHEMA = 3
PERSONAL, RECEIVED = "personal.safetensors", "received.safetensors"
STATES = (PERSONAL, "personal.previous.safetensors", "personal.earlier.safetensors")
"""The latest state and the two before it. A server that crashes in round r has the checkpoint of r - 1 or, where that was
still being written, of r - 2: it repeats r - 1, and clients must go back to their state before that."""
BEST = "personal.best.safetensors"
"""The state of the best round so far, where a run may stop early; a second name of one of the others, or what it was."""
_RESIDUAL = "residual/"
"""Begins the names of the residual's tensors, in the file of the personal model."""
_STATE = {"round": int, "models": list[str], "record": dict[str, Any], "replacements": dict[str, int]}
"""What the record of a state says beside schema and run."""
STATE_BYTES = 256 << 20
"""Of states that a process remembers: those of fifteen two-task clients at full size."""
_states: Recent[Path, tuple[Identity, State, dict[str, Any]]] = Recent(STATE_BYTES)
"""Identity, tensors and record of files as this process last read or wrote them; the file says whether they still hold."""


@dataclass(frozen=True)
class Kept:
    """A client's state after a participation.

    Attributes:
        server_round: of that participation.
        memory: of the method.
        replacements: task name -> how often its components were replaced so far.
        residual: name -> what the wire's encoding has taken from the client's updates so far; see `updates`.
    """

    server_round: int
    memory: Memory
    replacements: Counter[str] = field(default_factory=Counter)
    residual: State = field(default_factory=dict)


@dataclass(frozen=True)
class Received:
    """The server's tensors that a client holds.

    Attributes:
        state: number of complete rounds that they come from; see `messages.Instruction`.
        tensors: of all components of the client.
    """

    state: int
    tensors: State


class ClientStore:
    """The state folder of one client in one run.

    `personal.safetensors` holds the models of the method's memory, the one named `personal` under its tensors' own names and
    the others as MODEL/NAME, together with the method's record, counters and residual, so that they cannot disagree after a
    crash; the two states before it are kept beside it, for a server that repeats rounds after a crash of its own.
    `received.safetensors` is a copy of what the server sent last, so that it need not send it twice. Each model of stage 2
    has a file of its name. `state.json` is a readable copy. The process remembers the states that it used last. A file that
    another process has replaced since is read again, so that the processes of a simulation may serve a client in turn.

    Args:
        folder: of the client.
        run: identity of the run; state of another run is refused.
    """

    def __init__(self, folder: Path, run: str) -> None:
        self.folder = folder
        self.run = run

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Waits until no other process works on this folder, and keeps others out meanwhile.

        A node that was started twice, or that answers a message which it had been thought too slow for, works on one after
        the other. The lock ends with the process, however that ends.

        Raises:
            StorageError: the folder cannot be written.
        """
        lock = FileLock(self.folder / ".lock")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except OSError as error:
            raise StorageError(
                f"state folder {self.folder} cannot be written: {error.strerror}; make it writable, or give another one"
            ) from error
        try:
            yield
        finally:
            lock.release()

    def load(self, before_round: int | None = None) -> Kept | None:
        """The latest state, or None before the first participation.

        Args:
            before_round: only a state from before this round: the round is being repeated.

        Raises:
            StorageError: the state is damaged, of another run, or has gone on beyond what can be repeated.
        """
        rounds = self._rounds()
        for name, server_round in rounds.items():
            if before_round is None or server_round < before_round:
                return self._read(name)
        if len(rounds) == len(STATES):
            raise StorageError(
                f"{self.folder}: the client is at round {min(rounds.values())} or later, the server repeats {before_round}: "
                f"start a new run, or restore the client's folder"
            )
        return None

    def save(self, kept: Kept) -> None:
        """Keeps the state after a participation; states that a repeated round has made void are dropped."""
        rounds = self._rounds()
        earlier = [name for name, server_round in rounds.items() if server_round < kept.server_round]
        for void in rounds.keys() - set(earlier):
            (self.folder / void).unlink()
        for name, moved in reversed(list(zip(earlier, STATES[1:], strict=False))):
            (self.folder / name).replace(self.folder / moved)
        record = self._record(kept)
        tensors = {f"{_RESIDUAL}{name}": value for name, value in kept.residual.items()}
        for model, state in kept.memory.models.items():
            tensors |= {f"{_prefix(model)}{name}": value for name, value in state.items()}
        self._remember(PERSONAL, write_tensors(self.folder / PERSONAL, tensors, record), tensors, record)
        write_json(self.folder / "state.json", record)

    def keep_best(self, best_round: int) -> None:
        """Keeps the state as of the run's best round so far; to be called before each participation.

        Args:
            best_round: the latest state that is of it, or of a round before it, is the client's state as of then.
        """
        latest = next(iter(self._rounds().items()), None)
        if latest is not None and latest[1] <= best_round:  # else the best one has been kept before
            keep_as(self.folder / latest[0], self.folder / BEST)

    def load_best(self, best_round: int) -> Kept | None:
        """The state as of the run's best round, or None where the client first took part after it."""
        latest = next(iter(self._rounds().items()), None)
        if latest is not None and latest[1] <= best_round:
            return self._read(latest[0])
        return self._read(BEST) if (self.folder / BEST).exists() else None

    def save_second_stage(self, models: Mapping[str, State]) -> None:
        """Keeps the models that stage 2 has made, each in a file of its name."""
        for model, state in models.items():
            write_tensors(self._file(model), state, {"schema": SCHEMA, "run": self.run})

    def save_received(self, received: Received) -> None:
        """Keeps the server's tensors."""
        record = {"schema": SCHEMA, "run": self.run, "state": received.state}
        write_tensors(self.folder / RECEIVED, received.tensors, record)

    def received(self) -> Received | None:
        """The server's tensors, or None where there is no readable copy of this run's: the server can send them again."""
        try:
            tensors, record = read_tensors(self.folder / RECEIVED)
            self._check(RECEIVED, record, {"state": int})
        except StorageError:
            return None
        return Received(record["state"], tensors)

    def second_stage(self, names: Iterable[str]) -> dict[str, State]:
        """Model name -> its tensors, of the models of stage 2 that exist."""
        found = {}
        for model in names:
            if (file := self._file(model)).exists():
                tensors, record = read_tensors(file)
                self._check(file.name, record, {})
                found[model] = tensors
        return found

    def _file(self, model: str) -> Path:
        return self.folder / f"{model}.safetensors"

    def _rounds(self) -> dict[str, int]:
        """File -> round of the states that there are, the latest first. A crash in `save` may leave gaps."""
        found = {}
        for name in STATES:
            if (self.folder / name).exists():
                record = read_record(self.folder / name)
                self._check(name, record, _STATE)
                found[name] = record["round"]
        return found

    def _record(self, kept: Kept) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "run": self.run,
            "round": kept.server_round,
            "models": sorted(kept.memory.models),
            "record": deepcopy(dict(kept.memory.record)),
            "replacements": dict(kept.replacements),
        }

    def _read(self, name: str) -> Kept:
        found, on_disk = _states.get(self.folder / name), identity(self.folder / name)
        if found is not None and found[0] == on_disk:
            _, tensors, record = found
        else:
            tensors, record = read_tensors(self.folder / name)
            if on_disk is not None and identity(self.folder / name) == on_disk:  # else it was replaced meanwhile
                self._remember(name, on_disk, tensors, record)
        self._check(name, record, _STATE)
        tensors = dict(tensors)
        residual = _taken(tensors, _RESIDUAL)
        # Those under their own names, the personal model's, are what is left at the end.
        models = {
            model: _taken(tensors, _prefix(model)) for model in sorted(record["models"], key=_prefix, reverse=True)
        }
        memory = Memory(models, deepcopy(record["record"]))
        return Kept(record["round"], memory, Counter(record["replacements"]), residual)

    def _remember(self, name: str, content: Identity, tensors: State, record: dict[str, Any]) -> None:
        _states.put(self.folder / name, (content, dict(tensors), record), sum(t.nbytes for t in tensors.values()))

    def _check(self, name: str, record: dict[str, Any], fields: Mapping[str, Any]) -> None:
        if record.get("schema") != SCHEMA:
            raise StorageError(
                f"{self.folder / name} has schema {record.get('schema')}, not {SCHEMA}: use the same version"
            )
        if record.get("run") != self.run:
            raise StorageError(
                f"{self.folder / name} belongs to run {record.get('run')}, not {self.run}: use another state folder"
            )
        try:
            check_fields(record, {"schema": int, "run": str, **fields}, "its record")
        except PlainError as error:
            raise StorageError(f"{self.folder / name} is damaged: {error}; restore it, or start a new run") from error


def _prefix(model: str) -> str:
    """Begins the names of a model's tensors in the file of the client's state."""
    return "" if model == "personal" else f"{model}/"


def _taken(tensors: State, prefix: str) -> State:
    """The tensors whose names begin with `prefix`, under the rest of their names; they are removed from `tensors`."""
    names = [name for name in tensors if name.startswith(prefix)]
    return {name.removeprefix(prefix): tensors.pop(name) for name in names}
