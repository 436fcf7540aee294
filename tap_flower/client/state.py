"""A client's durable state: what its method keeps between rounds, and the models of stage 2."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from cachetools import LRUCache
from filelock import FileLock
from msgspec import Struct

from tap_flower.core.components import State
from tap_flower.errors import ConfigError, DivergedError, StorageError
from tap_flower.files import Identity, identity, keep_as, read_record, read_tensors, write_json, write_tensors
from tap_flower.methods.method import PERSONAL as PERSONAL_MODEL
from tap_flower.methods.method import Memory
from tap_flower.plain import LONGEST_NUMBER
from tap_flower.wire.fields import Count, Epoch

SCHEMA = 5
PERSONAL, PREVIOUS = "personal.safetensors", "personal.previous.safetensors"
"""The latest state, and the one before it, which counts when the server repeats the round of the latest. There is no need
of more: the checkpoint of a round is on the server's disk before the next round begins."""
BEST = "personal.best.safetensors"
"""The state of the best round so far, where a run may stop early; a second name of one of the others, or what it was."""
KEPT = "personal.kept.safetensors"
"""The state with the best scores on the client's own validation rows, where its node keeps it."""
FIRST = "first.safetensors"
"""First values of the run that a module built anew may not have."""
SERVER = "server.safetensors"
"""The tensors that the server sent last."""
_RESIDUAL, _LOCAL = "residual:", "server/own:"
"""Begin the names of the residual's tensors, and of the server's copy's own, in the file of the personal model."""
_CACHE_BYTES = 256 << 20
"""Size limit of the in-process cache of states: about 15 full-size two-task clients."""
_Record = TypeVar("_Record", bound="_FileRecord")


class _FileRecord(Struct, frozen=True, kw_only=True):
    """What every file says of itself."""

    schema: int
    run: str


class _RoundRecord(_FileRecord, frozen=True, kw_only=True):
    """What a file says that counts only in the history in which it was written."""

    history: str
    round: Count


class _StateRecord(_RoundRecord, frozen=True, forbid_unknown_fields=True, kw_only=True):
    models: list[str]
    record: dict[str, Any]
    replacements: dict[str, Count]
    score: float | None = None


@dataclass(frozen=True)
class ClientState:
    """A client's state after a round.

    Attributes:
        round: the round, counted from 1.
        memory: what the method keeps.
        replacements: task name -> how often its components were replaced so far.
        residual: tensor name -> what the wire's encoding has taken from the client's differences so far.
        local: the tensors of the server's copy that stay on the client, such as BatchNorm's statistics.
        score: mean validation score over the client's tasks, where its node keeps the best state; else None.
    """

    round: int
    memory: Memory
    replacements: Counter[str] = field(default_factory=Counter)
    residual: State = field(default_factory=dict)
    local: State = field(default_factory=dict)
    score: float | None = None

    def check_finite(self) -> None:
        """Refuses a state that training cannot continue from.

        Raises:
            DivergedError: a model holds a value that is not finite.
        """
        for model, tensors in self.memory.models.items():
            for name, tensor in tensors.items():
                if not bool(tensor.isfinite().all()):
                    raise DivergedError(
                        f"round {self.round} made {name!r} of model {model!r} non-finite; the previous state was kept: "
                        f"lower the learning rate, or look for broken examples"
                    )


_states: LRUCache[Path, tuple[Identity, State, dict[str, Any]]] = LRUCache(
    _CACHE_BYTES, getsizeof=lambda kept: sum(tensor.nbytes for tensor in kept[1].values())
)
"""Identity, tensors and record of the files that this process last read or wrote; the identity says whether they hold."""


class StateFolder:
    """The state folder of one client in one run.

    `personal.safetensors` holds the models of the method's memory, the one named `personal` under its tensors' own names and
    the others as MODEL:NAME, together with the method's record, counters and residual, so that they cannot disagree after a
    crash. Each model of stage 2 has a file of its name. `state.json` is a readable copy of the record. A state counts only
    if it was written in one of the run's epochs, for a round that the next epoch did not repeat.

    Args:
        folder: folder of the client.
        run: identity of the run; state of another run is refused.
        epochs: the run's start and its resumes, oldest first.
    """

    def __init__(self, folder: Path, run: str, epochs: Sequence[Epoch]) -> None:
        self.folder, self.run, self.epochs = folder, run, tuple(epochs)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Waits until no other process works on this folder, and keeps others out meanwhile.

        A node that was started twice, or that answers a message for which it had been thought too slow, works on one after
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

    def load(self, before_round: int | None = None) -> ClientState | None:
        """The latest state that counts, or None before the client's first round.

        Args:
            before_round: takes only a state from before this round, which the server repeats.

        Raises:
            StorageError: the state is damaged, of another run, or has gone on beyond what can be repeated.
        """
        found = self._records()
        for name, record in found.items():
            if self._counts(record) and (before_round is None or record.round < before_round):
                return self._read(name)
        if len(found) == 2:
            rounds = " and ".join(str(record.round) for record in found.values())
            raise StorageError(
                f"{self.folder} holds the states of rounds {rounds}, and neither belongs to the run as the server goes on "
                f"with it: restore the client's folder, or remove it to begin anew"
            )
        return None

    @property
    def round(self) -> int:
        """Round of the latest state that counts; 0 where there is none."""
        latest = self._latest()
        return 0 if latest is None else latest[1]

    def save(self, state: ClientState) -> None:
        """Keeps the state after a round; states that a repeated round has made void are removed.

        Raises:
            ConfigError: the method's memory would come back as another one.
            DivergedError: it holds a value that is not finite; what was kept before stays.
        """
        _check_memory(state.memory)
        state.check_finite()
        found = self._records()
        earlier = [name for name, record in found.items() if self._counts(record) and record.round < state.round]
        for void in found.keys() - set(earlier[:1]):
            (self.folder / void).unlink()
        if earlier and earlier[0] != PREVIOUS:
            (self.folder / earlier[0]).replace(self.folder / PREVIOUS)
        record = _StateRecord(
            schema=SCHEMA,
            run=self.run,
            history=self.epochs[-1].history,
            round=state.round,
            models=sorted(state.memory.models),
            record=deepcopy(dict(state.memory.record)),
            replacements=dict(state.replacements),
            score=state.score,
        )
        tensors = {f"{_RESIDUAL}{name}": value for name, value in state.residual.items()}
        tensors |= {f"{_LOCAL}{name}": value for name, value in state.local.items()}
        for model, own in state.memory.models.items():
            tensors |= {f"{_prefix(model)}{name}": value for name, value in own.items()}
        plain = msgspec.to_builtins(record)
        self._remember(PERSONAL, write_tensors(self.folder / PERSONAL, tensors, plain), tensors, plain)
        write_json(self.folder / "state.json", plain, durable=False)
        if state.score is not None and state.score >= self._kept_score():
            keep_as(self.folder / PERSONAL, self.folder / KEPT)

    def _kept_score(self) -> float:
        if not (self.folder / KEPT).exists():
            return -math.inf
        record = self._check(KEPT, read_record(self.folder / KEPT), _StateRecord)
        return record.score if self._counts(record) and record.score is not None else -math.inf

    def keep_best(self, best_round: int) -> None:
        """Keeps the state as of the run's best round so far; called before each round.

        Args:
            best_round: the latest state of it, or of a round before it, is the client's state as of then.
        """
        latest = self._latest()
        if latest is not None and latest[1] <= best_round:  # else the best one has been kept before
            keep_as(self.folder / latest[0], self.folder / BEST)

    def load_best(self, best_round: int) -> ClientState | None:
        """The state as of the run's best round, or None where the client first took part after it."""
        latest = self._latest()
        if latest is not None and latest[1] <= best_round:
            return self._read(latest[0])
        if not (self.folder / BEST).exists():
            return None
        record = self._check(BEST, read_record(self.folder / BEST), _StateRecord)
        return self._read(BEST) if self._counts(record) else None

    def save_models(self, models: Mapping[str, State], server_round: int) -> None:
        """Keeps the models that stage 2 has made after a round, each in a file of its name.

        Raises:
            DivergedError: one holds a value that is not finite; none is kept then.
        """
        ClientState(server_round, Memory(models)).check_finite()
        record = {"schema": SCHEMA, "run": self.run, "history": self.epochs[-1].history, "round": server_round}
        for model, state in models.items():
            write_tensors(self.folder / f"{model}.safetensors", state, record)

    def load_models(self, names: Iterable[str]) -> dict[str, State]:
        """Name -> tensors of each model of stage 2 that has been saved in a history that counts."""
        found = {}
        for model in names:
            if (file := self.folder / f"{model}.safetensors").exists():
                tensors, record = read_tensors(file)
                if self._counts(self._check(file.name, record, _RoundRecord)):
                    found[model] = tensors
        return found

    def save_first(self, tensors: State) -> None:
        """Keeps first values of the run, beside those that are kept already."""
        kept, record = {**(self.load_first() or {}), **tensors}, {"schema": SCHEMA, "run": self.run}
        self._remember(FIRST, write_tensors(self.folder / FIRST, kept, record), kept, record)

    def load_first(self) -> State | None:
        """The first values that are kept, or None where there is no file of them."""
        if not (self.folder / FIRST).exists():
            return None
        tensors, record = self._cached(FIRST)
        self._check(FIRST, record, _FileRecord)
        return tensors

    def save_server(self, tensors: State, server_round: int) -> None:
        """Keeps the tensors that the server sent for a round; a power failure may take the copy away."""
        record = {"schema": SCHEMA, "run": self.run, "round": server_round}
        write_tensors(self.folder / SERVER, tensors, record, durable=False)

    def load_server(self) -> State | None:
        """The tensors that the server sent last, or None where there is no readable copy of this run's."""
        try:
            tensors, record = read_tensors(self.folder / SERVER)
            self._check(SERVER, record, _FileRecord)
        except StorageError:
            return None
        return tensors

    def _counts(self, record: _RoundRecord) -> bool:
        """Whether a state fits the point from which the server resumed the run."""
        ends = [epoch.start for epoch in self.epochs[1:]]
        for epoch, end in zip(self.epochs, [*ends, record.round], strict=True):
            if epoch.history == record.history:
                return record.round <= end
        return False

    def _records(self) -> dict[str, _StateRecord]:
        """File -> record of each saved state, the latest first."""
        return {
            name: self._check(name, read_record(self.folder / name), _StateRecord)
            for name in (PERSONAL, PREVIOUS)
            if (self.folder / name).exists()
        }

    def _latest(self) -> tuple[str, int] | None:
        """File and round of the latest state that counts."""
        counting = [(name, record.round) for name, record in self._records().items() if self._counts(record)]
        return counting[0] if counting else None

    def _read(self, name: str) -> ClientState:
        tensors, plain = self._cached(name)
        record = self._check(name, plain, _StateRecord)
        residual, local = _taken(tensors, _RESIDUAL), _taken(tensors, _LOCAL)
        # Those under their own names, the personal model's, are what is left at the end.
        models = {model: _taken(tensors, _prefix(model)) for model in sorted(record.models, key=_prefix, reverse=True)}
        return ClientState(
            record.round,
            Memory(models, deepcopy(record.record)),
            Counter(record.replacements),
            residual,
            local,
            record.score,
        )

    def _cached(self, name: str) -> tuple[State, dict[str, Any]]:
        """Tensors and record of a file, which is read only where it has changed."""
        found, on_disk = _states.get(self.folder / name), identity(self.folder / name)
        if found is not None and found[0] == on_disk:
            return dict(found[1]), found[2]
        tensors, record = read_tensors(self.folder / name)
        if on_disk is not None and identity(self.folder / name) == on_disk:  # else it was replaced meanwhile
            self._remember(name, on_disk, tensors, record)
        return tensors, record

    def _remember(self, name: str, content: Identity, tensors: State, record: dict[str, Any]) -> None:
        kept = (content, dict(tensors), record)
        if _states.getsizeof(kept) <= _CACHE_BYTES:
            _states[self.folder / name] = kept

    def _check(self, name: str, record: dict[str, Any], kind: type[_Record]) -> _Record:
        path = self.folder / name
        if record.get("schema") != SCHEMA:
            raise StorageError(f"{path} has schema {record.get('schema')}, not {SCHEMA}: use the version that wrote it")
        if record.get("run") != self.run:
            raise StorageError(f"{path} belongs to run {record.get('run')}, not {self.run}: use another state folder")
        try:
            return msgspec.convert(record, kind)
        except msgspec.ValidationError as error:
            raise StorageError(f"{path} is damaged: {error}; restore it, or start a new run") from error


def _prefix(model: str) -> str:
    """Begins the names of a model's tensors in the file of the client's state."""
    return "" if model == PERSONAL_MODEL else f"{model}:"


def _check_memory(memory: Memory) -> None:
    """Refuses what would come back from the file of the client's state as something else.

    Raises:
        ConfigError: with the name of the model, or of the entry of the record; values are the client's own.
    """
    for model in memory.models:
        if _prefix(model).startswith((_RESIDUAL, _LOCAL)):
            raise ConfigError(
                f"the method keeps a model {model!r}, and the file of a client's state has other tensors under that name: "
                f"give it another one"
            )
    if odd := sorted(name for name in memory.models.get(PERSONAL_MODEL, ()) if ":" in name):
        raise ConfigError(
            f"the method keeps the tensor {odd[0]!r} of the model {PERSONAL_MODEL!r}: use a name without ':'"
        )
    for name, value in memory.record.items():
        if (found := _unlike_json({name: value})) is not None:
            raise ConfigError(
                f"the method keeps {found} in its record, at {name!r}, which would come back as something else, or not: "
                f"use texts, numbers of at most {LONGEST_NUMBER} bits, booleans, None, lists, and dicts with texts as keys; "
                f"tensors go into `Memory.models`"
            )


def _unlike_json(value: Any) -> str | None:
    """What JSON does not give back as it is, in words; None where there is nothing of the kind."""
    if isinstance(value, dict):
        keys = (f"a key of type {type(key).__name__}" for key in value if type(key) is not str)
        return next(keys, None) or _unlike_json(list(value.values()))
    if isinstance(value, list):
        return next((found for part in value if (found := _unlike_json(part)) is not None), None)
    if isinstance(value, int) and value.bit_length() > LONGEST_NUMBER:
        return f"a number of {value.bit_length()} bits"
    return None if value is None or type(value) in (bool, int, float, str) else f"a {type(value).__name__}"


def _taken(tensors: State, prefix: str) -> State:
    """The tensors whose names begin with `prefix`, under the rest of their names; they are removed from `tensors`."""
    names = [name for name in tensors if name.startswith(prefix)]
    return {name.removeprefix(prefix): tensors.pop(name) for name in names}
