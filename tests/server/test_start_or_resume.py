"""How a run begins, and why it may not."""

from __future__ import annotations

from typing import Any

import pytest
from flwr.app import ConfigRecord

from tap_flower.errors import ConfigError, StorageError
from tap_flower.report.trackers import TRACKERS
from tap_flower.server.checkpoint import differences
from tests.federations import ToyFederation


def test_a_used_folder_is_not_overwritten(federation: ToyFederation) -> None:
    federation.out.mkdir()
    (federation.out / "precious").write_text("x")
    with pytest.raises(ConfigError, match="is not empty: give another folder.*--resume"):
        federation.strategy().start(federation.grid())


def test_a_folder_that_cannot_be_made_is_named(federation: ToyFederation) -> None:
    federation.folder = federation.folder / "file" / "below"
    federation.folder.parent.write_text("x")
    with pytest.raises(StorageError, match="the run folder .*run cannot be made or written: Not a directory"):
        federation.strategy().start(federation.grid())


def test_a_run_whose_tracker_cannot_begin_is_not_in_the_way_of_the_next(
    federation: ToyFederation, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> Any:
        raise ConnectionError("no server at localhost:5000")

    monkeypatch.setitem(TRACKERS, "mlflow", refused)  # type: ignore[index]
    federation.settings.append("trackers=mlflow")
    with pytest.raises(ConfigError, match="'mlflow', which could not start"):
        federation.strategy().start(federation.grid())
    federation.settings.remove("trackers=mlflow")
    federation.strategy().start(federation.grid())
    assert (federation.out / "config.yaml").exists()


def test_a_folder_without_a_run_is_not_resumed(federation: ToyFederation) -> None:
    with pytest.raises(StorageError, match="run does not exist, so that nothing can be resumed"):
        federation.strategy(resume=True).start(federation.grid())


def test_another_configuration_is_not_resumed(federation: ToyFederation) -> None:
    federation.strategy().start(federation.grid())
    federation.settings += ["seed=9", "train.steps=3"]
    with pytest.raises(
        ConfigError,
        match=r"\(seed was 41, and is 9; train.steps was 2, and is 3\): resume it with that one",
    ):
        federation.strategy(resume=True).start(federation.grid())


def test_what_differs_deep_in_a_list_is_named_by_its_place() -> None:
    def clients(path: str) -> dict[str, Any]:
        return {"clients": [{"name": "ann"}, {"name": "bob", "tasks": [{"train": [{"path": path, "rows": [0, 5]}]}]}]}

    assert differences(clients("/a"), clients("/a")) == ""
    assert differences(clients("/a"), clients("/b")) == "clients.1.tasks.0.train.0.path was '/a', and is '/b'"


def test_another_train_config_is_told(federation: ToyFederation, caplog: pytest.LogCaptureFixture) -> None:
    given = ConfigRecord({"lr": 0.01, "nesterov": True, "key": b"k"})
    federation.strategy().start(federation.grid(), train_config=given)
    federation.strategy(resume=True).start(federation.grid(), train_config=given)
    assert "another train_config" not in caplog.text
    federation.strategy(resume=True).start(federation.grid(), train_config=ConfigRecord({"lr": 0.001, "key": b"k"}))
    assert "another train_config: lr was 0.01, and is 0.001; nesterov was True, and is None" in caplog.text
