"""A client's durable state: its personal model, and what stage 2 made of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tap_flower.methods.local import State
from tap_flower.methods.tap import Personal, SecondStage
from tap_flower.storage import StorageError, read_record, read_tensors, write_json, write_tensors

SCHEMA = 1
PERSONAL = "personal.safetensors"
STATES = (PERSONAL, "personal.previous.safetensors", "personal.earlier.safetensors")
"""The latest state and the two before it. A server that crashes in round r has the checkpoint of r - 1 or, where that was
still being written, of r - 2: it repeats r - 1, and clients must go back to their state before that."""
SECOND_STAGE = {"server+finetune": "finetuned.safetensors", "tap": "tap.safetensors"}


@dataclass(frozen=True)
class Kept:
    """A client's state after a participation.

    Attributes:
        server_round: of that participation.
        personal: model and losses.
        replacements: task name -> how often its components were replaced so far.
    """

    server_round: int
    personal: Personal
    replacements: Counter[str] = field(default_factory=Counter)


class ClientStore:
    """The state folder of one client in one run.

    `personal.safetensors` holds the personal model together with its losses and counters, so that they cannot disagree
    after a crash; the two states before it are kept beside it, for a server that repeats rounds after a crash of its own.
    `state.json` is a readable copy.

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
        self._write(PERSONAL, kept)
        write_json(self.folder / "state.json", self._record(kept))

    def save_second_stage(self, result: SecondStage) -> None:
        """Keeps the fine-tuned server copy and the distilled personal model."""
        models = {"server+finetune": result.finetuned, "tap": result.tap}
        for model, name in SECOND_STAGE.items():
            write_tensors(self.folder / name, models[model], {"schema": SCHEMA, "run": self.run})

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
            "personal_losses": kept.personal.losses,
            "replacements": dict(kept.replacements),
        }

    def _write(self, name: str, kept: Kept) -> None:
        write_tensors(self.folder / name, kept.personal.state, self._record(kept))

    def _read(self, name: str) -> Kept:
        tensors, record = read_tensors(self.folder / name)
        self._check(name, record)
        return Kept(record["round"], Personal(tensors, record["personal_losses"]), Counter(record["replacements"]))

    def _check(self, name: str, record: dict[str, Any]) -> None:
        if record.get("schema") != SCHEMA:
            raise StorageError(
                f"{self.folder / name} has schema {record.get('schema')}, not {SCHEMA}: use the same version"
            )
        if record.get("run") != self.run:
            raise StorageError(
                f"{self.folder / name} belongs to run {record.get('run')}, not {self.run}: use another state folder"
            )
