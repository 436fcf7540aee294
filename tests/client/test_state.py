from __future__ import annotations

import contextlib
import math
import multiprocessing
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from cachetools import LRUCache

from tap_flower.cli.restore import UNDONE, go_back
from tap_flower.client import state as store_module
from tap_flower.client.state import (
    BEST,
    FIRST,
    KEPT,
    PERSONAL,
    PREVIOUS,
    SCHEMA,
    SERVER,
    ClientState,
    StateFolder,
)
from tap_flower.errors import ConfigError, DivergedError, StorageError
from tap_flower.files import read_json, read_tensors, write_atomically, write_tensors
from tap_flower.methods.fedavg import METHOD as FEDAVG
from tap_flower.methods.method import Memory
from tap_flower.report.client_records import DECISIONS, read_decisions
from tap_flower.wire.messages import Epoch


def state_folder(folder: Path, run: str, *epochs: tuple[str, int]) -> StateFolder:
    return StateFolder(folder, run, [Epoch(*epoch) for epoch in epochs or [("h1", 0)]])


def kept(server_round: int, value: float) -> ClientState:
    memory = Memory({"personal": {"w": torch.full((2,), value)}}, {"personal_losses": {"t": value}})
    return ClientState(server_round, memory, Counter({"t": server_round}))


def losses(found: ClientState | None) -> float:
    assert found is not None
    loss = float(found.memory.record["personal_losses"]["t"])
    assert found.memory.models["personal"]["w"].tolist() == pytest.approx([loss] * 2)
    return loss


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are read."""
    found: list[str] = []

    def read(path: Path) -> object:
        found.append(path.name)
        return read_tensors(path)

    monkeypatch.setattr(store_module, "read_tensors", read)
    return found


def test_a_state_comes_back(tmp_path: Path) -> None:
    store = state_folder(tmp_path / "ann", "r1")
    assert store.load() is None
    store.save(kept(3, 0.5))
    found = store.load()
    assert found is not None
    assert found.round == 3
    assert found.memory.models["personal"]["w"].tolist() == [0.5, 0.5]
    assert found.memory.record == {"personal_losses": {"t": 0.5}}
    assert found.replacements == Counter({"t": 3})
    assert read_json(tmp_path / "ann" / "state.json")["round"] == 3


def test_a_round_can_be_repeated(tmp_path: Path) -> None:
    store = state_folder(tmp_path, "r1")
    store.save(kept(3, 0.3))
    store.save(kept(5, 0.5))
    for _ in range(2):  # and repeated again
        before = store.load(before_round=5)
        assert before is not None
        assert before.round == 3
        store.save(kept(5, 0.55))
    assert losses(store.load(before_round=6)) == 0.55


def test_one_round_can_be_repeated_and_no_more(tmp_path: Path) -> None:
    store = state_folder(tmp_path, "r1")
    for server_round in (2, 3, 5, 6):
        store.save(kept(server_round, server_round / 10))
    with pytest.raises(StorageError, match="holds the states of rounds 6 and 5, and neither belongs to the run"):
        store.load(before_round=5)
    assert losses(store.load(before_round=6)) == 0.5
    store.save(kept(6, 0.66))
    assert [losses(store.load(before)) for before in (7, 6)] == [0.66, 0.5]


def test_what_was_written_after_the_round_that_a_resumed_run_goes_on_from_is_void(tmp_path: Path) -> None:
    first = state_folder(tmp_path, "r1", ("h1", 0))
    first.save(kept(3, 0.3))
    first.save(kept(5, 0.5))  # the server crashed in round 5, and goes on from round 4
    resumed = state_folder(tmp_path, "r1", ("h1", 0), ("h2", 4))
    assert losses(resumed.load()) == 0.3
    assert losses(resumed.load(before_round=7)) == 0.3  # also where the client was not sampled for round 5 again
    resumed.save(kept(7, 0.7))
    assert [losses(resumed.load(before)) for before in (8, 7)] == [0.7, 0.3]
    again = state_folder(tmp_path, "r1", ("h1", 0), ("h2", 4), ("h3", 7))  # round 7 was complete
    assert losses(again.load()) == 0.7
    assert losses(state_folder(tmp_path, "r1", ("h1", 0), ("h2", 4), ("h3", 6)).load()) == 0.3


def test_a_state_of_a_history_that_the_server_does_not_know_is_void(tmp_path: Path) -> None:
    state_folder(tmp_path, "r1", ("h1", 0)).save(kept(1, 0.1))
    assert state_folder(tmp_path, "r1", ("h2", 0)).load() is None


@pytest.mark.parametrize("crash", range(3))
@pytest.mark.parametrize("again", range(4))
def test_a_crash_while_saving_loses_no_earlier_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash: int, again: int
) -> None:
    """Before each of the renames (the state before, the new one, the readable copy), and once more in the repetition."""
    store, replace = state_folder(tmp_path, "r1"), Path.replace
    for server_round in (1, 2, 3):
        store.save(kept(server_round, server_round / 10))
    for at in (crash, again):  # 3: no second crash
        steps = iter(range(100))

        def crashing(self: Path, target: Path, at: int = at, steps: Iterator[int] = steps) -> Path:
            if next(steps) == at:
                raise KeyboardInterrupt
            return replace(self, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", crashing)
            with contextlib.suppress(KeyboardInterrupt):
                store.save(kept(4, 0.4))
        for remembered in (True, False):
            if not remembered:
                monkeypatch.setattr(store_module, "_states", LRUCache(1 << 20, getsizeof=lambda _: 1))
            assert losses(store.load()) in (0.3, 0.4)
            assert losses(store.load(before_round=4)) == 0.3
    for _ in range(2):
        store.save(kept(4, 0.44))
        assert losses(store.load()) == 0.44
        assert losses(store.load(before_round=4)) == 0.3
    assert {path.name for path in tmp_path.iterdir()} == {PERSONAL, PREVIOUS, "state.json"}


def test_the_residual_goes_with_the_personal_model(tmp_path: Path) -> None:
    store = state_folder(tmp_path, "r1")
    for number in (3, 5):
        of_round = kept(number, 0.1 * number)
        store.save(ClientState(number, of_round.memory, residual={"w": torch.full((2,), float(number))}))
    now, before = state_folder(tmp_path, "r1").load(), state_folder(tmp_path, "r1").load(before_round=5)
    assert now is not None
    assert before is not None
    assert (now.residual["w"].tolist(), before.residual["w"].tolist()) == ([5.0, 5.0], [3.0, 3.0])
    assert now.memory.models["personal"].keys() == {"w"}


def test_a_memory_may_hold_several_models_or_none(tmp_path: Path) -> None:
    store = state_folder(tmp_path, "r1")
    models = {"personal": {"a/w": torch.ones(1), "b": torch.zeros(2)}, "anchor": {"a/w": torch.full((1,), 2.0)}}
    store.save(ClientState(1, Memory(models, {"count": 3}), residual={"a/w": torch.full((1,), 5.0)}))
    found = state_folder(tmp_path, "r1").load()
    assert found is not None
    assert {m: {n: t.tolist() for n, t in s.items()} for m, s in found.memory.models.items()} == {
        "personal": {"a/w": [1.0], "b": [0.0, 0.0]},
        "anchor": {"a/w": [2.0]},
    }
    assert found.memory.record == {"count": 3}
    assert found.residual["a/w"].tolist() == [5.0]
    store.save(ClientState(2, Memory()))
    assert store.load() == ClientState(2, Memory())


@pytest.mark.parametrize(
    ("memory", "words"),
    [
        (Memory({"residual": {"w": torch.ones(1)}}), "keeps a model 'residual', .* has other tensors under that name"),
        (Memory({"server/own": {"w": torch.ones(1)}}), "keeps a model 'server/own'"),
        (Memory({"personal": {"anchor:w": torch.ones(1)}}), "the tensor 'anchor:w' .*: use a name without ':'"),
        (
            Memory(record={"x": {"y": [{3: 0.5}]}}),
            "keeps a key of type int in its record, at 'x', which would come back",
        ),
        (Memory(record={3: 0.5}), "keeps a key of type int in its record, at 3"),  # type: ignore[dict-item]
        (Memory(record={"x": [(1, 2)]}), "keeps a tuple in its record, at 'x'"),
        (Memory(record={"x": torch.ones(1)}), "keeps a Tensor in its record, at 'x'.* tensors go into `Memory.models`"),
        (Memory(record={"x": 2**70}), "keeps a number of 71 bits in its record, at 'x'"),
    ],
)
def test_a_memory_that_would_come_back_as_another_is_refused(tmp_path: Path, memory: Memory, words: str) -> None:
    store = state_folder(tmp_path, "r1")
    with pytest.raises(ConfigError, match=words):
        store.save(ClientState(1, memory))
    assert store.load() is None


@pytest.mark.parametrize("file", [PERSONAL, PREVIOUS, BEST, KEPT, FIRST, SERVER, UNDONE, "my model.safetensors"])
def test_a_model_of_stage_2_has_a_file_of_its_own(file: str) -> None:
    with pytest.raises(ConfigError, match="method 'mine' has '.*' among its `results`: use letters"):
        replace(FEDAVG, name="mine", results=(file.removesuffix(".safetensors"),))


def test_the_servers_tensors_come_back_or_are_not_there(tmp_path: Path) -> None:
    store = state_folder(tmp_path, "r1")
    assert store.load_server() is None
    store.save_server({"w": torch.ones(2)}, 3)
    found = state_folder(tmp_path, "r1").load_server()
    assert found is not None
    assert found["w"].tolist() == [1.0, 1.0]
    assert state_folder(tmp_path, "r2").load_server() is None  # of another run
    (tmp_path / SERVER).write_bytes((tmp_path / SERVER).read_bytes()[:40])
    assert store.load_server() is None


def test_the_first_round_can_be_repeated(tmp_path: Path) -> None:
    store = state_folder(tmp_path, "r1")
    store.save(kept(4, 0.4))
    assert store.load(before_round=4) is None


def test_models_of_stage_2(tmp_path: Path) -> None:
    store = state_folder(tmp_path, "r1")
    names = ("server+finetune", "tap")
    assert store.load_models(names) == {}
    store.save_models({"server+finetune": {"w": torch.zeros(1)}, "tap": {"w": torch.ones(1)}}, 3)
    found = store.load_models((*names, "ditto"))
    assert {name: state["w"].item() for name, state in found.items()} == {"server+finetune": 0.0, "tap": 1.0}


def test_models_of_a_stage_2_that_is_void_are_not_there(tmp_path: Path) -> None:
    first = state_folder(tmp_path, "r1", ("h1", 0))
    first.save_models({"tap": {"w": torch.ones(1)}}, 3)
    assert state_folder(tmp_path, "r1", ("h1", 0), ("h2", 3)).load_models(["tap"]).keys() == {"tap"}
    assert state_folder(tmp_path, "r1", ("h1", 0), ("h2", 2)).load_models(["tap"]) == {}  # round 3 is repeated
    assert state_folder(tmp_path, "r1", ("h9", 0)).load_models(["tap"]) == {}


def test_a_best_state_that_is_void_is_not_there(tmp_path: Path) -> None:
    first = state_folder(tmp_path, "r1", ("h1", 0))
    first.save(kept(2, 0.2))
    first.keep_best(2)
    resumed = state_folder(tmp_path, "r1", ("h1", 0), ("h2", 1))
    assert first.load_best(2) is not None
    assert resumed.load_best(1) is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_state_is_kept_only_if_it_is_finite(tmp_path: Path, value: float) -> None:
    store = state_folder(tmp_path, "r1")
    store.save(kept(1, 0.1))
    with pytest.raises(
        DivergedError, match="round 2 made 'w' of model 'personal' non-finite; the previous state was kept"
    ):
        store.save(ClientState(2, Memory({"personal": {"w": torch.tensor([0.0, value])}})))
    with pytest.raises(DivergedError, match="'w' of model 'tap'"):
        store.save_models({"server+finetune": {"w": torch.ones(1)}, "tap": {"w": torch.tensor([value])}}, 2)
    assert losses(store.load()) == 0.1
    assert sorted(path.name for path in tmp_path.iterdir()) == [PERSONAL, "state.json"]


def test_going_back_to_the_state_before(tmp_path: Path) -> None:
    store = state_folder(tmp_path, "r1")
    for server_round in (1, 2, 4):
        store.save(kept(server_round, server_round / 10))
    assert go_back(tmp_path, to_kept=False) == (4, 2)
    assert (losses(store.load()), store.round) == (0.2, 2)
    assert read_json(tmp_path / "state.json")["round"] == 2
    assert read_tensors(tmp_path / UNDONE)[1]["round"] == 4  # nothing is lost
    with pytest.raises(StorageError, match=f"holds no {PREVIOUS}: the client has taken part in only one round"):
        go_back(tmp_path, to_kept=False)


def test_going_back_to_the_best_state(tmp_path: Path) -> None:
    store = state_folder(tmp_path, "r1")
    for server_round, score in ((1, 0.3), (2, 0.8), (3, 0.7), (4, 0.1)):
        store.save(replace(kept(server_round, server_round / 10), score=score))
    assert go_back(tmp_path, to_kept=True) == (4, 2)
    assert losses(store.load()) == 0.2
    store.save(kept(5, 0.5))
    assert losses(store.load(before_round=5)) == 0.2


def test_without_a_kept_state_going_back_says_how_to_have_one(tmp_path: Path) -> None:
    state_folder(tmp_path, "r1").save(kept(1, 0.1))
    with pytest.raises(StorageError, match="its node keeps one where its configuration says keep-best=true"):
        go_back(tmp_path, to_kept=True)


def test_state_of_another_run_is_refused(tmp_path: Path) -> None:
    state_folder(tmp_path, "r1").save(kept(1, 0.1))
    with pytest.raises(StorageError, match="belongs to run r1, not r2"):
        state_folder(tmp_path, "r2").load()


@pytest.mark.parametrize("size", [0, 7, 60])
def test_a_truncated_state_is_named_and_not_used(tmp_path: Path, size: int) -> None:
    store = state_folder(tmp_path, "r1")
    store.save(kept(1, 0.1))
    whole = (tmp_path / PERSONAL).read_bytes()
    (tmp_path / PERSONAL).write_bytes(whole[:size])
    with pytest.raises(StorageError, match="personal.safetensors is damaged"):
        store.load()


@pytest.mark.parametrize("place", ["tensor", "record"])
def test_a_tampered_state_is_named_and_not_used(tmp_path: Path, place: str) -> None:
    store = state_folder(tmp_path, "r1")
    store.save(kept(1, 0.1))
    content = bytearray((tmp_path / PERSONAL).read_bytes())
    if place == "tensor":
        content[-1] ^= 1
    else:
        start = content.index(b"replacements")
        content[start + content[start:].index(b"1")] = ord("9")
    (tmp_path / PERSONAL).write_bytes(content)
    with pytest.raises(StorageError, match="personal.safetensors is damaged.*its checksum is not that of its content"):
        store.load()


def work(folder: Path, told: Connection) -> None:
    told.send("waits")
    with state_folder(folder, "r1").locked():
        told.send("works")


@pytest.mark.skipif(sys.platform == "win32", reason="forks a process")
def test_two_processes_work_on_a_folder_one_after_the_other(tmp_path: Path) -> None:
    store, fork = state_folder(tmp_path / "ann", "r1"), multiprocessing.get_context("fork")
    heard, told = fork.Pipe(duplex=False)
    with store.locked():
        other = fork.Process(target=work, args=(tmp_path / "ann", told))
        other.start()
        told.close()
        assert heard.recv() == "waits"
        assert not heard.poll(1)
    assert heard.recv() == "works"
    other.join()
    assert other.exitcode == 0


def test_a_foreign_file_is_named(tmp_path: Path) -> None:
    write_tensors(tmp_path / PERSONAL, {"w": torch.zeros(1)}, {"schema": 99, "run": "r1"})
    with pytest.raises(StorageError, match="has schema 99, not 5"):
        state_folder(tmp_path, "r1").load()


def test_a_failed_write_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match="file cannot be written: No space left on device; .* is intact"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_state_is_read_once_and_the_one_before_it_is_not_written_again(tmp_path: Path, reads: list[str]) -> None:
    state_folder(tmp_path, "r1").save(kept(1, 0.1))
    before = (tmp_path / PERSONAL).stat().st_ino
    for server_round in (2, 3, 4):
        store = state_folder(tmp_path, "r1")  # as each message has its own
        assert losses(store.load(before_round=server_round)) == (server_round - 1) / 10
        store.save(kept(server_round, server_round / 10))
        assert (tmp_path / PREVIOUS).stat().st_ino == before
        before = (tmp_path / PERSONAL).stat().st_ino
    assert reads == []
    assert losses(state_folder(tmp_path, "r1").load(before_round=4)) == 0.3
    assert reads == [PREVIOUS]


def test_a_state_that_was_renamed_is_not_taken_for_the_one_remembered_there(tmp_path: Path, reads: list[str]) -> None:
    store = state_folder(tmp_path, "r1")
    for server_round in (1, 2):
        store.save(kept(server_round, server_round / 10))
    assert [losses(store.load(before)) for before in (3, 2)] == [0.2, 0.1]  # both remembered
    store.save(kept(3, 0.3))
    assert [losses(store.load(before)) for before in (4, 3)] == [0.3, 0.2]
    assert reads == [PREVIOUS, PREVIOUS]


def test_a_state_that_is_larger_than_the_cache_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_CACHE_BYTES", 4)
    store = state_folder(tmp_path, "r1")
    store.save(kept(1, 0.1))
    assert tmp_path / PERSONAL not in store_module._states
    assert losses(store.load()) == 0.1


def test_what_another_process_wrote_is_read_again(tmp_path: Path, reads: list[str]) -> None:
    here, copies = state_folder(tmp_path, "r1"), tmp_path / "copies"
    here.save(kept(1, 0.1))
    elsewhere = state_folder(copies, "r1")
    elsewhere.save(kept(2, 0.2))
    (copies / PERSONAL).replace(tmp_path / PERSONAL)  # same size
    assert losses(here.load()) == 0.2
    assert losses(here.load()) == 0.2
    assert reads == [PERSONAL]
    with pytest.raises(StorageError, match="belongs to run r1, not r2"):  # remembered or not
        state_folder(tmp_path, "r2").load()


def test_a_state_that_is_gone_is_not_remembered(tmp_path: Path) -> None:
    store = state_folder(tmp_path, "r1")
    store.save(kept(1, 0.1))
    (tmp_path / PERSONAL).unlink()
    assert store.load() is None


def test_a_remembered_state_cannot_be_changed_from_outside(tmp_path: Path) -> None:
    store, given = state_folder(tmp_path, "r1"), kept(1, 0.1)
    store.save(given)
    given.memory.record["personal_losses"]["t"] = 9.0
    given.memory.models["personal"]["other"] = torch.zeros(1)
    found = store.load()
    assert losses(found) == 0.1
    assert found is not None
    found.memory.record["personal_losses"]["t"] = 9.0
    found.replacements["t"] = 9
    del found.memory.models["personal"]["w"]
    again = store.load()
    assert losses(again) == 0.1
    assert again is not None
    assert again.replacements == Counter({"t": 1})


RECORD = {"schema": SCHEMA, "run": "r1", "history": "h1", "round": 1, "models": [], "record": {}, "replacements": {}}


def test_one_tensor_may_have_two_names(tmp_path: Path) -> None:
    kept = torch.arange(6.0).reshape(2, 3)
    write_tensors(tmp_path / "x.safetensors", {"a": kept, "b": kept, "row": kept[0]}, {})
    found, _ = read_tensors(tmp_path / "x.safetensors")
    assert found["a"].equal(kept)
    assert found["b"].equal(kept)
    assert found["row"].equal(kept[0])


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ([], r"its record is \[\], not an object"),
        ({}, f"has schema None, not {SCHEMA}"),
        ({"schema": SCHEMA, "run": "r1"}, "is damaged: Object missing required field `history`"),
        ({**RECORD, "round": "x"}, r"is damaged: Expected `int`, got `str` - at `\$.round`"),
        ({**RECORD, "round": True}, r"Expected `int`, got `bool` - at `\$.round`"),
        ({**RECORD, "round": -1}, r"Expected `int` >= 0 - at `\$.round`"),
        ({**RECORD, "models": [1]}, r"Expected `str`, got `int` - at `\$.models\[0\]`"),
        ({**RECORD, "record": []}, r"Expected `object`, got `array` - at `\$.record`"),
        ({**RECORD, "replacements": {"t": "1"}}, r"Expected `int`, got `str` - at `\$.replacements\[...\]`"),
        ({**RECORD, "more": 1}, "contains unknown field `more`"),
    ],
)
def test_a_state_with_another_record_is_named(tmp_path: Path, record: dict[str, object], problem: str) -> None:
    write_tensors(tmp_path / PERSONAL, {"w": torch.zeros(1)}, record)
    with pytest.raises(StorageError, match=f"personal.safetensors .*{problem}"):
        state_folder(tmp_path, "r1").load()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.bfloat16, torch.bool])
def test_a_state_of_another_dtype_is_named(tmp_path: Path, dtype: torch.dtype) -> None:
    write_tensors(tmp_path / PERSONAL, {"w": torch.zeros(3).to(dtype)}, RECORD)
    with pytest.raises(StorageError, match=f"is damaged.*tensor 'w' is {dtype}, not torch.float32"):
        state_folder(tmp_path, "r1").load()


@pytest.mark.parametrize("text", ["[1]", '{"run": "r1"}', "{", '{"run": 1}', "\xff"])
def test_damaged_decisions_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / DECISIONS).write_text(text + "\n", encoding="latin-1")
    with pytest.raises(StorageError, match=r"decisions.jsonl (is damaged in line 1|cannot be read)"):
        read_decisions(tmp_path)
