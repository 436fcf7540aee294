"""Checkpoints that are on disk before the next round begins, and crashes before they are there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message

from tap_flower.client.state import PERSONAL
from tap_flower.errors import ConfigError, StorageError
from tap_flower.files import read_record, read_tensors, write_tensors
from tap_flower.report.events import read_events
from tap_flower.server import checkpoint
from tap_flower.server.checkpoint import Progress
from tap_flower.server.early_stopping import Validation
from tap_flower.wire import messages
from tap_flower.wire.messages import Epoch
from tests.federations import Make, ToyFederation
from tests.grid import round_of
from tests.toys import TOYS


@pytest.fixture
def small(make_federation: Make) -> Callable[[], ToyFederation]:
    """Two clients, three rounds."""
    return lambda: make_federation(TOYS[:2], "rounds=3", "train.steps=1", "distill.iterations=1")


def nothing(_: int) -> None:
    """Does nothing at a checkpoint."""


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Calls functions with the round before and after each checkpoint."""
    save = checkpoint.save

    def use(before: Callable[[int], None] = nothing, after: Callable[[int], None] = nothing) -> None:
        def spy(folder: Path, progress: Progress, *rest: Any) -> None:
            before(progress.round)
            save(folder, progress, *rest)
            after(progress.round)

        monkeypatch.setattr(checkpoint, "save", spy)

    return use


def training_round(message: Message) -> int:
    """Round of a training instruction; 0 of any other message."""
    return round_of(message) if message.metadata.message_type == messages.TRAIN else 0


def test_a_round_is_on_disk_before_the_messages_of_the_next_leave(small: Callable[[], ToyFederation]) -> None:
    federation = small()
    file = federation.out / "server" / "server.safetensors"
    seen: list[tuple[int, int]] = []

    def look(message: Message, reply: Message) -> Message:
        if server_round := training_round(message):
            seen.append((server_round, read_record(file)["round"] if file.exists() else 0))
        return reply

    federation.strategy().start(federation.grid(tamper=look))
    assert seen == [(1, 0), (1, 0), (2, 1), (2, 1), (3, 2), (3, 2)]


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("at", [1, 2])
def test_a_crash_around_a_checkpoint_goes_on_from_the_last_one_that_is_there(
    small: Callable[[], ToyFederation], tried: Any, at: int, moment: str
) -> None:
    whole = small()
    expected = whole.strategy().start(whole.grid()).summary
    crashed = small()

    def crash(server_round: int) -> None:
        if server_round == at:
            raise KeyboardInterrupt

    tried(**{moment: crash})
    with pytest.raises(KeyboardInterrupt):
        crashed.strategy().start(crashed.grid())
    states = [crashed.state(name) / PERSONAL for name in ("ann", "bob")]
    assert {read_record(state)["round"] for state in states} == {at}  # ahead of the server
    tried()
    resumed = crashed.strategy(resume=True).start(crashed.grid()).summary
    assert resumed["clients"] == expected["clients"]
    assert resumed["replacements"] == expected["replacements"]
    assert [e["round"] for e in read_events(crashed.out) if e["event"] == "round"] == [1, 2, 3]


def test_a_second_process_does_not_run_in_a_folder_meanwhile(small: Callable[[], ToyFederation]) -> None:
    federation = small()
    refused: list[str] = []

    def begin_again(message: Message, reply: Message) -> Message:
        for resume in (False, True):
            with pytest.raises(ConfigError, match="another process runs in") as error:
                federation.strategy(resume=resume).start(federation.grid())
            refused.append(str(error.value))
        return reply

    result = federation.strategy().start(federation.grid(tamper=begin_again)).summary
    assert refused
    assert result["missing"] == {}
    assert [e["round"] for e in read_events(federation.out) if e["event"] == "round"] == [1, 2, 3]


def test_what_a_killed_process_left_of_its_first_checkpoint_is_in_nobodys_way(
    small: Callable[[], ToyFederation],
) -> None:
    federation = small()
    (federation.out / "server").mkdir(parents=True)
    for name in (".lock", "server/.server.safetensors.0.tmp"):
        (federation.out / name).touch()
    assert federation.strategy().start(federation.grid()).summary["rounds"] == 3


def test_a_checkpoint_that_cannot_be_written_ends_the_run(small: Callable[[], ToyFederation], tried: Any) -> None:
    def fail(server_round: int) -> None:
        if server_round == 2:
            raise StorageError("server.safetensors cannot be written: No space left on device")

    tried(fail)
    federation = small()
    with pytest.raises(StorageError, match="No space left"):
        federation.strategy().start(federation.grid())
    events = list(read_events(federation.out))
    assert max(e["round"] for e in events if e["event"] == "round_start") == 2
    assert (events[-1]["event"], events[-1]["type"]) == ("failed", "StorageError")
    assert not (federation.out / "results.json").exists()


def test_the_best_rounds_tensors_come_back_and_are_written_once(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2), "b": torch.zeros(2)}
    best = {"a": torch.full((2,), 5.0), "b": tensors["b"]}
    progress = Progress(
        "r1", {}, [Epoch("h", 0)], round=3, validation=Validation({"ann": 0.5}, best_round=2, best_score=0.5)
    )
    checkpoint.save(tmp_path, progress, tensors, best)
    found = checkpoint.load(tmp_path)
    assert found.progress == progress
    assert {name: value.tolist() for name, value in found.tensors.items()} == {"a": [1.0, 1.0], "b": [0.0, 0.0]}
    assert {name: value.tolist() for name, value in found.best.items()} == {"a": [5.0, 5.0], "b": [0.0, 0.0]}
    assert sorted(read_tensors(tmp_path / "server.safetensors")[0]) == ["a", "b", "best/a"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"round": "3"}, r"Expected `int`, got `str` - at `\$.round`"),
        ({"run": 5}, r"Expected `str`, got `int` - at `\$.run`"),
        ({"down": {"c": 0.5}}, r"Expected `int`, got `float` - at `\$.down"),
        ({"validation": None}, r"Expected `object`, got `null` - at `\$.validation`"),
        ({"epochs": [{"history": "h"}]}, r"missing required field `start` - at `\$.epochs\[0\]`"),
    ],
)
def test_a_checkpoint_with_another_record_is_named(tmp_path: Path, change: dict[str, Any], problem: str) -> None:
    checkpoint.save(tmp_path, Progress("r1", {}), {"a": torch.ones(1)}, {})
    file = tmp_path / "server.safetensors"
    write_tensors(file, {"a": torch.ones(1)}, {**read_record(file), **change})
    with pytest.raises(StorageError, match=f"is damaged: .*{problem}"):
        checkpoint.load(tmp_path)
