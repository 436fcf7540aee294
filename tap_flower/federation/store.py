"""A client's durable state: its personal model, and what stage 2 made of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tap_flower.methods.local import State
from tap_flower.methods.tap import Personal, SecondStage
from tap_flower.recent import Recent
from tap_flower.storage import Identity, StorageError, identity, read_record, read_tensors, write_json, write_tensors

SCHEMA = 1
PERSONAL, RECEIVED = "personal.safetensors", "received.safetensors"
STATES = (PERSONAL, "personal.previous.safetensors", "personal.earlier.safetensors")
"""The latest state and the two before it. A server that crashes in round r has the checkpoint of r - 1 or, where that was
still being written, of r - 2: it repeats r - 1, and clients must go back to their state before that."""
SECOND_STAGE = {"server+finetune": "finetuned.safetensors", "tap": "tap.safetensors"}
_RESIDUAL = "residual/"
"""Begins the names of the residual's tensors, in the file of the personal model."""
STATE_BYTES = 256 << 20
"""Of states that a process remembers: those of fifteen two-task clients at full size."""
_states: Recent[Path, tuple[Identity, State, dict[str, Any]]] = Recent(STATE_BYTES)
"""Identity, tensors and record of files as this process last read or wrote them; the file says whether they still hold."""


@dataclass(frozen=True)
class Kept:
    """A client's state after a participation.

    Attributes:
        server_round: of that participation.
        personal: model and losses.
        replacements: task name -> how often its components were replaced so far.
        residual: name -> what the wire's encoding has taken from the client's updates so far; see `updates`.
    """

    server_round: int
    personal: Personal
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

    `personal.safetensors` holds the personal model together with its losses, counters and residual, so that they cannot
    disagree after a crash; the two states before it are kept beside it, for a server that repeats rounds after a crash of
    its own. `received.safetensors` is a copy of what the server sent last, so that it need not send it twice.
    `state.json` is a readable copy. The process remembers the states that it used last. A file that another process has
    replaced since is read again, so that the processes of a simulation may serve a client in turn.

    Args:
        folder: of the client.
        run: identity of the run; state of another run is refused.
    """

    def __init__(self, folder: Path, run: str) -> None:
        self.folder = folder
        self.run = run

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
        tensors = kept.personal.state | {f"{_RESIDUAL}{name}": value for name, value in kept.residual.items()}
        self._remember(PERSONAL, write_tensors(self.folder / PERSONAL, tensors, record), tensors, record)
        write_json(self.folder / "state.json", record)

    def save_second_stage(self, result: SecondStage) -> None:
        """Keeps the fine-tuned server copy and the distilled personal model."""
        models = {"server+finetune": result.finetuned, "tap": result.tap}
        for model, name in SECOND_STAGE.items():
            write_tensors(self.folder / name, models[model], {"schema": SCHEMA, "run": self.run})

    def save_received(self, received: Received) -> None:
        """Keeps the server's tensors."""
        record = {"schema": SCHEMA, "run": self.run, "state": received.state}
        write_tensors(self.folder / RECEIVED, received.tensors, record)

    def received(self) -> Received | None:
        """The server's tensors, or None where there is no readable copy of this run's: the server can send them again."""
        try:
            tensors, record = read_tensors(self.folder / RECEIVED)
            self._check(RECEIVED, record)
        except StorageError:
            return None
        return Received(record["state"], tensors)

    def models(self) -> dict[str, State]:
        """Model name (`personal`, `server+finetune`, `tap`) -> its tensors, of those that exist."""
        kept = self.load()
        found = {} if kept is None else {"personal": kept.personal.state}
        for model, name in SECOND_STAGE.items():
            if (self.folder / name).exists():
                tensors, record = read_tensors(self.folder / name)
                self._check(name, record)
                found[model] = tensors
        return found

    def _rounds(self) -> dict[str, int]:
        """File -> round of the states that there are, the latest first. A crash in `save` may leave gaps."""
        found = {}
        for name in STATES:
            if (self.folder / name).exists():
                record = read_record(self.folder / name)
                self._check(name, record)
                found[name] = int(record["round"])
        return found

    def _record(self, kept: Kept) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "run": self.run,
            "round": kept.server_round,
            "personal_losses": dict(kept.personal.losses),
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
        self._check(name, record)
        tensors, residual = dict(tensors), {}
        for tensor in [tensor for tensor in tensors if tensor.startswith(_RESIDUAL)]:
            residual[tensor.removeprefix(_RESIDUAL)] = tensors.pop(tensor)
        losses, replacements = record["personal_losses"], record["replacements"]
        return Kept(record["round"], Personal(tensors, dict(losses)), Counter(replacements), residual)

    def _remember(self, name: str, content: Identity, tensors: State, record: dict[str, Any]) -> None:
        _states.put(self.folder / name, (content, dict(tensors), record), sum(t.nbytes for t in tensors.values()))

    def _check(self, name: str, record: dict[str, Any]) -> None:
        if record.get("schema") != SCHEMA:
            raise StorageError(
                f"{self.folder / name} has schema {record.get('schema')}, not {SCHEMA}: use the same version"
            )
        if record.get("run") != self.run:
            raise StorageError(
                f"{self.folder / name} belongs to run {record.get('run')}, not {self.run}: use another state folder"
            )
