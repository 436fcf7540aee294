from __future__ import annotations

import contextlib
import multiprocessing
import sys
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from tap_flower.client import state as store_module
from tap_flower.client.state import PERSONAL, RECEIVED, SCHEMA, STATE_BYTES, STATES, ClientStore, Kept, Received
from tap_flower.errors import StorageError
from tap_flower.files import read_json, read_tensors, write_atomically, write_tensors
from tap_flower.methods.method import Memory
from tap_flower.recent import Recent
from tap_flower.report.client_records import DECISIONS, read_decisions


def kept(server_round: int, value: float) -> Kept:
    memory = Memory({"personal": {"w": torch.full((2,), value)}}, {"personal_losses": {"t": value}})
    return Kept(server_round, memory, Counter({"t": server_round}))


def losses(found: Kept | None) -> float:
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
    store = ClientStore(tmp_path / "ann", "r1")
    assert store.load() is None
    store.save(kept(3, 0.5))
    found = store.load()
    assert found is not None
    assert found.server_round == 3
    assert found.memory.models["personal"]["w"].tolist() == [0.5, 0.5]
    assert found.memory.record == {"personal_losses": {"t": 0.5}}
    assert found.replacements == Counter({"t": 3})
    assert read_json(tmp_path / "ann" / "state.json")["round"] == 3


def test_a_round_can_be_repeated(tmp_path: Path) -> None:
    store = ClientStore(tmp_path, "r1")
    store.save(kept(3, 0.3))
    store.save(kept(5, 0.5))
    for _ in range(2):  # and repeated again
        before = store.load(before_round=5)
        assert before is not None
        assert before.server_round == 3
        store.save(kept(5, 0.55))
    assert losses(store.load(before_round=6)) == 0.55


def test_two_rounds_can_be_repeated_and_no_more(tmp_path: Path) -> None:
    store = ClientStore(tmp_path, "r1")
    for server_round in (2, 3, 5, 6):
        store.save(kept(server_round, server_round / 10))
    with pytest.raises(StorageError, match="is at round 3 or later, the server repeats 3"):
        store.load(before_round=3)
    assert losses(store.load(before_round=5)) == 0.3
    store.save(kept(5, 0.55))
    assert [store.load(before).server_round for before in (None, 6, 5)] == [5, 5, 3]  # type: ignore[union-attr]
    store.save(kept(6, 0.66))
    assert [losses(store.load(before)) for before in (7, 6, 5)] == [0.66, 0.55, 0.3]


@pytest.mark.parametrize("crash", range(4))
@pytest.mark.parametrize("again", range(5))
def test_a_crash_while_saving_loses_no_earlier_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash: int, again: int
) -> None:
    """Before each of the renames (two states, the new one, the readable copy), and once more in the repetition."""
    store, replace = ClientStore(tmp_path, "r1"), Path.replace
    for server_round in (1, 2, 3):
        store.save(kept(server_round, server_round / 10))
    for at in (crash, again):  # 4: no second crash
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
                monkeypatch.setattr(store_module, "_states", Recent(STATE_BYTES))
            assert losses(store.load()) in (0.3, 0.4)
            assert losses(store.load(before_round=4)) == 0.3
            assert losses(store.load(before_round=3)) == 0.2
    for _ in range(2):
        store.save(kept(4, 0.44))
        assert losses(store.load()) == 0.44
        assert losses(store.load(before_round=4)) == 0.3
    assert {path.name for path in tmp_path.iterdir()} == {*STATES, "state.json"}


def test_the_residual_goes_with_the_personal_model(tmp_path: Path) -> None:
    store = ClientStore(tmp_path, "r1")
    for number in (3, 5):
        of_round = kept(number, 0.1 * number)
        store.save(Kept(number, of_round.memory, residual={"w": torch.full((2,), float(number))}))
    now, before = ClientStore(tmp_path, "r1").load(), ClientStore(tmp_path, "r1").load(before_round=5)
    assert now is not None
    assert before is not None
    assert (now.residual["w"].tolist(), before.residual["w"].tolist()) == ([5.0, 5.0], [3.0, 3.0])
    assert now.memory.models["personal"].keys() == {"w"}


def test_a_memory_may_hold_several_models_or_none(tmp_path: Path) -> None:
    store = ClientStore(tmp_path, "r1")
    models = {"personal": {"a/w": torch.ones(1), "b": torch.zeros(2)}, "anchor": {"a/w": torch.full((1,), 2.0)}}
    store.save(Kept(1, Memory(models, {"count": 3}), residual={"a/w": torch.full((1,), 5.0)}))
    found = ClientStore(tmp_path, "r1").load()
    assert found is not None
    assert {m: {n: t.tolist() for n, t in s.items()} for m, s in found.memory.models.items()} == {
        "personal": {"a/w": [1.0], "b": [0.0, 0.0]},
        "anchor": {"a/w": [2.0]},
    }
    assert found.memory.record == {"count": 3}
    assert found.residual["a/w"].tolist() == [5.0]
    store.save(Kept(2, Memory()))
    assert store.load() == Kept(2, Memory())


def test_the_servers_tensors_come_back_or_are_not_there(tmp_path: Path) -> None:
    store = ClientStore(tmp_path, "r1")
    assert store.received() is None
    store.save_received(Received(4, {"w": torch.ones(2)}))
    found = ClientStore(tmp_path, "r1").received()
    assert found is not None
    assert (found.state, found.tensors["w"].tolist()) == (4, [1.0, 1.0])
    assert ClientStore(tmp_path, "r2").received() is None  # of another run
    (tmp_path / RECEIVED).write_bytes((tmp_path / RECEIVED).read_bytes()[:40])
    assert store.received() is None


def test_the_first_round_can_be_repeated(tmp_path: Path) -> None:
    store = ClientStore(tmp_path, "r1")
    store.save(kept(4, 0.4))
    assert store.load(before_round=4) is None


def test_models_of_stage_2(tmp_path: Path) -> None:
    store = ClientStore(tmp_path, "r1")
    names = ("server+finetune", "tap")
    assert store.second_stage(names) == {}
    store.save_second_stage({"server+finetune": {"w": torch.zeros(1)}, "tap": {"w": torch.ones(1)}})
    found = store.second_stage((*names, "ditto"))
    assert {name: state["w"].item() for name, state in found.items()} == {"server+finetune": 0.0, "tap": 1.0}


def test_state_of_another_run_is_refused(tmp_path: Path) -> None:
    ClientStore(tmp_path, "r1").save(kept(1, 0.1))
    with pytest.raises(StorageError, match="belongs to run r1, not r2"):
        ClientStore(tmp_path, "r2").load()


@pytest.mark.parametrize("size", [0, 7, 60])
def test_a_truncated_state_is_named_and_not_used(tmp_path: Path, size: int) -> None:
    store = ClientStore(tmp_path, "r1")
    store.save(kept(1, 0.1))
    whole = (tmp_path / PERSONAL).read_bytes()
    (tmp_path / PERSONAL).write_bytes(whole[:size])
    with pytest.raises(StorageError, match="personal.safetensors is damaged"):
        store.load()


@pytest.mark.parametrize("place", ["tensor", "record"])
def test_a_tampered_state_is_named_and_not_used(tmp_path: Path, place: str) -> None:
    store = ClientStore(tmp_path, "r1")
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
    with ClientStore(folder, "r1").locked():
        told.send("works")


@pytest.mark.skipif(sys.platform == "win32", reason="forks a process")
def test_two_processes_work_on_a_folder_one_after_the_other(tmp_path: Path) -> None:
    store, fork = ClientStore(tmp_path / "ann", "r1"), multiprocessing.get_context("fork")
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
    with pytest.raises(StorageError, match="has schema 99, not 3"):
        ClientStore(tmp_path, "r1").load()


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


def test_a_state_is_read_once_and_those_before_it_are_not_written_again(tmp_path: Path, reads: list[str]) -> None:
    ClientStore(tmp_path, "r1").save(kept(1, 0.1))
    files = [(tmp_path / PERSONAL).stat().st_ino]
    for server_round in (2, 3, 4):
        store = ClientStore(tmp_path, "r1")  # as each message has its own
        assert losses(store.load(before_round=server_round)) == (server_round - 1) / 10
        store.save(kept(server_round, server_round / 10))
        files = [(tmp_path / PERSONAL).stat().st_ino, *files][:3]
        assert [(tmp_path / name).stat().st_ino for name in STATES[: len(files)]] == files
    assert reads == []
    assert losses(ClientStore(tmp_path, "r1").load(before_round=4)) == 0.3
    assert losses(ClientStore(tmp_path, "r1").load(before_round=3)) == 0.2
    assert reads == [*STATES[1:]]


def test_a_state_that_was_renamed_is_not_taken_for_the_one_remembered_there(tmp_path: Path, reads: list[str]) -> None:
    store = ClientStore(tmp_path, "r1")
    for server_round in (1, 2, 3):
        store.save(kept(server_round, server_round / 10))
    assert [losses(store.load(before)) for before in (4, 3, 2)] == [0.3, 0.2, 0.1]  # all three remembered
    store.save(kept(4, 0.4))
    assert [losses(store.load(before)) for before in (5, 4, 3)] == [0.4, 0.3, 0.2]
    store.save(kept(3, 0.33))  # two rounds back: what was the latest state and the one before it are void
    assert losses(store.load()) == 0.33
    assert losses(store.load(before_round=3)) == 0.2
    assert reads == [*STATES[1:], *STATES[1:], STATES[1]]  # the last: of round 2, at the place of round 3


def test_what_another_process_wrote_is_read_again(tmp_path: Path, reads: list[str]) -> None:
    here, copies = ClientStore(tmp_path, "r1"), tmp_path / "copies"
    here.save(kept(1, 0.1))
    elsewhere = ClientStore(copies, "r1")
    elsewhere.save(kept(2, 0.2))
    (copies / PERSONAL).replace(tmp_path / PERSONAL)  # same size
    assert losses(here.load()) == 0.2
    assert losses(here.load()) == 0.2
    assert reads == [PERSONAL]
    with pytest.raises(StorageError, match="belongs to run r1, not r2"):  # remembered or not
        ClientStore(tmp_path, "r2").load()


def test_a_state_that_is_gone_is_not_remembered(tmp_path: Path) -> None:
    store = ClientStore(tmp_path, "r1")
    store.save(kept(1, 0.1))
    (tmp_path / PERSONAL).unlink()
    assert store.load() is None


def test_a_remembered_state_cannot_be_changed_from_outside(tmp_path: Path) -> None:
    store, given = ClientStore(tmp_path, "r1"), kept(1, 0.1)
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


RECORD = {"schema": SCHEMA, "run": "r1", "round": 1, "models": [], "record": {}, "replacements": {}}


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ([], r"its record is \[\], not an object"),
        ({}, f"has schema None, not {SCHEMA}"),
        ({"schema": SCHEMA, "run": "r1"}, "is damaged: its record lacks models"),
        ({**RECORD, "round": "x"}, "is damaged: round is 'x', not a whole number"),
        ({**RECORD, "round": True}, "round is True"),
        ({**RECORD, "models": [1]}, r"models\[0\] is 1, not a text"),
        ({**RECORD, "record": []}, r"record is \[\], not an object"),
        ({**RECORD, "replacements": {"t": "1"}}, r"replacements\['t'\] is '1'"),
        ({**RECORD, "more": 1}, "has the unknown field 'more'"),
    ],
)
def test_a_state_with_another_record_is_named(tmp_path: Path, record: dict[str, object], problem: str) -> None:
    write_tensors(tmp_path / PERSONAL, {"w": torch.zeros(1)}, record)
    with pytest.raises(StorageError, match=f"personal.safetensors .*{problem}"):
        ClientStore(tmp_path, "r1").load()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.bfloat16, torch.bool])
def test_a_state_of_another_dtype_is_named(tmp_path: Path, dtype: torch.dtype) -> None:
    write_tensors(tmp_path / PERSONAL, {"w": torch.zeros(3).to(dtype)}, RECORD)
    with pytest.raises(StorageError, match=f"is damaged.*tensor 'w' is {dtype}, not torch.float32"):
        ClientStore(tmp_path, "r1").load()


def test_a_copy_of_the_servers_tensors_without_its_round_is_none(tmp_path: Path) -> None:
    write_tensors(tmp_path / RECEIVED, {"w": torch.zeros(1)}, {"schema": SCHEMA, "run": "r1", "state": "4"})
    assert ClientStore(tmp_path, "r1").received() is None


@pytest.mark.parametrize("text", ["[1]", '{"run": "r1"}', "{", '{"run": 1}', "\xff"])
def test_damaged_decisions_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / DECISIONS).write_text(text + "\n", encoding="latin-1")
    with pytest.raises(StorageError, match=r"decisions.jsonl (is damaged in line 1|cannot be read)"):
        read_decisions(tmp_path)
