"""Checkpoints that are written while the next round runs, and crashes before they are there."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message

from tap_flower.client.state import PERSONAL
from tap_flower.errors import StorageError
from tap_flower.files import read_record, read_tensors, write_tensors
from tap_flower.report.events import read_events
from tap_flower.server import checkpoint
from tap_flower.server.checkpoint import Progress, Writer
from tap_flower.server.early_stopping import Validation
from tap_flower.wire import messages
from tests.federations import Make, ToyFederation
from tests.grid import round_of
from tests.toys import TOYS

Write = Callable[[Path, Any, Any], None]


@pytest.fixture
def small(make_federation: Make) -> Callable[[], ToyFederation]:
    """Two clients, three rounds."""
    return lambda: make_federation(TOYS[:2], "rounds=3", "train.steps=1", "distill.iterations=1")


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int, Callable[[], None]], None]], None]:
    """Puts a function (round, write it) in the place of the writing."""
    write: Write = checkpoint._write

    def use(instead: Callable[[int, Callable[[], None]], None]) -> None:
        def spy(folder: Path, record: Any, tensors: Any) -> None:
            instead(record["round"], lambda: write(folder, record, tensors))

        monkeypatch.setattr(checkpoint, "_write", spy)

    return use


def training_round(message: Message) -> int:
    """Of a training instruction; 0 of any other message."""
    return round_of(message) if message.metadata.message_type == messages.TRAIN else 0


def test_a_checkpoint_is_written_while_the_next_round_runs_and_is_there_before_the_one_after(
    small: Callable[[], ToyFederation], tried: Any
) -> None:
    training_again = threading.Event()
    written: list[int] = []

    def write(server_round: int, now: Callable[[], None]) -> None:
        if server_round == 2:
            assert training_again.wait(60)
        now()
        written.append(server_round)

    tried(write)
    federation = small()
    federation.settings.append("rounds=4")
    seen: list[tuple[int, list[int]]] = []

    def look(message: Message, reply: Message) -> Message:
        if server_round := training_round(message):
            seen.append((server_round, list(written)))
            if seen[-2:] == [(3, [1]), (3, [1])]:  # both clients were asked while the write of round 2 was waiting
                training_again.set()
        return reply

    federation.strategy().start(federation.grid(tamper=look))
    assert training_again.is_set()
    assert all(set(range(1, server_round - 1)) <= set(there) for server_round, there in seen)
    assert written == [1, 2, 3, 4]


def test_a_crash_before_a_checkpoint_is_there_goes_on_from_the_one_before(
    small: Callable[[], ToyFederation], tried: Any, tmp_path: Path
) -> None:
    whole = small()
    expected = whole.strategy().start(whole.grid()).summary

    crashed, image = small(), tmp_path / "after the crash"
    over = threading.Event()

    def crash(message: Message, reply: Message) -> Message:
        if (
            training_round(message) == 3 and message.metadata.dst_node_id == 100
        ):  # bob, who has more tensors, comes first
            shutil.copytree(crashed.out, image)
            over.set()
            raise KeyboardInterrupt
        return reply

    def late(server_round: int, now: Callable[[], None]) -> None:
        if server_round == 2:
            assert over.wait(60)
        now()

    tried(late)
    with pytest.raises(KeyboardInterrupt):
        crashed.strategy().start(crashed.grid(tamper=crash))
    durable = json.loads((image / "server" / "state.json").read_text())["round"]
    said = [e["round"] for e in read_events(image) if e["event"] == "round"]
    assert (durable, said) == (1, [1, 2])
    states = [image / crashed.state(name).relative_to(crashed.out) / PERSONAL for name in ("ann", "bob")]
    assert {read_record(state)["round"] for state in states} == {3}
    tried(lambda _, now: now())
    shutil.rmtree(crashed.out)
    shutil.copytree(image, crashed.out)
    resumed = crashed.strategy(resume=True).start(crashed.grid()).summary
    assert {**resumed, "seconds": 0, "bytes": 0} == {**expected, "seconds": 0, "bytes": 0}
    assert resumed["bytes"]["up"] == expected["bytes"]["up"]
    assert resumed["bytes"]["down"] > expected["bytes"]["down"]  # the server does not know any more what clients hold
    assert [e["round"] for e in read_events(crashed.out) if e["event"] == "round"] == [1, 2, 3]


@pytest.mark.parametrize(("failing", "last"), [(1, 0), (2, 3), (3, 3)])
def test_a_checkpoint_that_cannot_be_written_ends_the_run(
    small: Callable[[], ToyFederation], tried: Any, failing: int, last: int
) -> None:
    def write(server_round: int, now: Callable[[], None]) -> None:
        if server_round == failing:
            raise StorageError("server.safetensors cannot be written: No space left on device")
        now()

    tried(write)
    federation = small()
    with pytest.raises(StorageError, match="No space left"):
        federation.strategy().start(federation.grid())
    started = [e["round"] for e in read_events(federation.out) if e["event"] == "round_start"]
    assert max(started) == max(last, 1)
    assert not (federation.out / "results.json").exists()


def test_a_failed_write_is_told_beside_the_failure_that_ended_the_run(tmp_path: Path) -> None:
    (tmp_path / "server").write_text("not a folder")

    def run() -> None:
        with Writer(tmp_path / "server") as writer:
            writer.save(Progress("r1", {}), {"a": torch.zeros(1)}, {})
            raise RuntimeError("no client is left")

    with pytest.raises(RuntimeError, match="no client") as raised:
        run()
    (note,) = raised.value.__notes__
    assert "server.safetensors cannot be written" in note


def test_what_is_written_is_what_was_there_when_it_was_saved(tmp_path: Path, tried: Any) -> None:
    go = threading.Event()

    def write(_: int, now: Callable[[], None]) -> None:
        assert go.wait(60)
        now()

    tried(write)
    progress, tensors = Progress("r1", {}, round=1, down={"c": 5}), {"a": torch.ones(2)}
    with Writer(tmp_path) as writer:
        writer.save(progress, tensors, {})
        progress.round = 2
        progress.down["c"] = 6
        tensors["a"], tensors["b"] = torch.zeros(2), torch.zeros(1)
        go.set()
    found, values, best = checkpoint.load(tmp_path)
    assert best == {}
    assert (found.round, found.down) == (1, {"c": 5})
    assert values.keys() == {"a"}
    assert values["a"].tolist() == [1.0, 1.0]


def test_the_best_rounds_tensors_come_back_and_are_written_once(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2), "b": torch.zeros(2)}
    best = {"a": torch.full((2,), 5.0), "b": tensors["b"]}
    progress = Progress("r1", {}, round=3, validation=Validation({"ann": 0.5}, best_round=2, best_score=0.5))
    with Writer(tmp_path) as writer:
        writer.save(progress, tensors, best)
    found, values, of_best = checkpoint.load(tmp_path)
    assert found == progress
    assert {name: value.tolist() for name, value in values.items()} == {"a": [1.0, 1.0], "b": [0.0, 0.0]}
    assert {name: value.tolist() for name, value in of_best.items()} == {"a": [5.0, 5.0], "b": [0.0, 0.0]}
    assert sorted(read_tensors(tmp_path / "server.safetensors")[0]) == ["a", "b", "best/a"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"round": "3"}, "round is '3', not a whole number"),
        ({"run": 5}, "run is 5, not a text"),
        ({"down": {"c": 0.5}}, r"down\['c'\] is 0.5, not a whole number"),
        ({"validation": None}, "validation is None, not an object"),
        ({"validation": {"latest": {}, "best_round": 0}}, "validation lacks best_score"),
        ({"more": 1}, "has the unknown field 'more'"),
    ],
)
def test_a_checkpoint_with_another_record_is_named(tmp_path: Path, change: dict[str, Any], problem: str) -> None:
    with Writer(tmp_path) as writer:
        writer.save(Progress("r1", {}), {"a": torch.ones(1)}, {})
    file = tmp_path / "server.safetensors"
    write_tensors(file, {"a": torch.ones(1)}, {**read_record(file), **change})
    with pytest.raises(StorageError, match=f"is damaged: .*{problem}"):
        checkpoint.load(tmp_path)
