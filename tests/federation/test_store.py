from __future__ import annotations

import contextlib
from collections import Counter
from pathlib import Path

import pytest
import torch

from tap_flower.federation.store import PERSONAL, ClientStore, Kept
from tap_flower.methods.tap import Personal, SecondStage
from tap_flower.storage import StorageError, read_json, write_atomically, write_tensors


def kept(server_round: int, value: float) -> Kept:
    return Kept(server_round, Personal({"w": torch.full((2,), value)}, {"t": value}), Counter({"t": server_round}))


def test_a_state_comes_back(tmp_path: Path) -> None:
    store = ClientStore(tmp_path / "ann", "r1")
    assert store.load() is None
    store.save(kept(3, 0.5))
    found = store.load()
    assert found is not None
    assert found.server_round == 3
    assert found.personal.state["w"].tolist() == [0.5, 0.5]
    assert found.personal.losses == {"t": 0.5}
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
    assert store.load(before_round=6).personal.losses == {"t": 0.55}  # type: ignore[union-attr]


def test_two_rounds_can_be_repeated_and_no_more(tmp_path: Path) -> None:
    store = ClientStore(tmp_path, "r1")
    for server_round in (2, 3, 5, 6):
        store.save(kept(server_round, server_round / 10))
    with pytest.raises(StorageError, match="is at round 3 or later, the server repeats 3"):
        store.load(before_round=3)
    found = store.load(before_round=5)
    assert found is not None
    assert found.personal.losses == {"t": 0.3}
    store.save(kept(5, 0.55))
    assert [store.load(before).server_round for before in (None, 6, 5)] == [5, 5, 3]  # type: ignore[union-attr]
    store.save(kept(6, 0.66))
    assert [store.load(before).personal.losses["t"] for before in (7, 6, 5)] == [0.66, 0.55, 0.3]  # type: ignore[union-attr]


@pytest.mark.parametrize("crash", range(5))
def test_a_crash_while_saving_loses_no_earlier_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash: int
) -> None:
    store = ClientStore(tmp_path, "r1")
    for server_round in (1, 2, 3):
        store.save(kept(server_round, server_round / 10))
    steps = iter(range(100))
    replace = Path.replace

    def crashing(self: Path, target: Path) -> Path:
        if next(steps) == crash:
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", crashing)
        with contextlib.suppress(KeyboardInterrupt):
            store.save(kept(4, 0.4))
    for before in (4, 3):
        found = store.load(before_round=before)
        assert found is not None
        assert found.server_round == before - 1
    store.save(kept(4, 0.44))
    assert store.load().personal.losses == {"t": 0.44}  # type: ignore[union-attr]
    assert store.load(before_round=4).server_round == 3  # type: ignore[union-attr]


def test_the_first_round_can_be_repeated(tmp_path: Path) -> None:
    store = ClientStore(tmp_path, "r1")
    store.save(kept(4, 0.4))
    assert store.load(before_round=4) is None


def test_models_of_stage_2(tmp_path: Path) -> None:
    store = ClientStore(tmp_path, "r1")
    assert store.models() == {}
    store.save(kept(1, 0.1))
    store.save_second_stage(SecondStage({"w": torch.zeros(1)}, {"w": torch.ones(1)}, {}))
    models = store.models()
    assert {name: state["w"][0].item() for name, state in models.items()} == {
        "personal": pytest.approx(0.1),
        "server+finetune": 0.0,
        "tap": 1.0,
    }


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


def test_a_foreign_file_is_named(tmp_path: Path) -> None:
    write_tensors(tmp_path / PERSONAL, {"w": torch.zeros(1)}, {"schema": 99, "run": "r1"})
    with pytest.raises(StorageError, match="has schema 99, not 1"):
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
