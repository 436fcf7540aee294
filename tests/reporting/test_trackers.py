"""Trackers: TensorBoard and MLflow against their own readers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from tap_flower.config import ConfigError, load_config
from tap_flower.reporting.events import EventLog
from tap_flower.reporting.trackers import TRACKERS, open_trackers

ROUNDS = [
    {"ann": {"losses": {"t": 1.0}, "replacements": {"t": 1}}, "bob": {"losses": {"t": 3.0}, "replacements": {"t": 0}}},
    {"bob": {"losses": {"t": 1.5}, "replacements": {"t": 0}}},
]
TASKS = {"t": {"tap": {"accuracy": 0.75}, "server+finetune": {"accuracy": 0.5}}}


def write_events(run: Path, name: str) -> None:
    config = load_config("demo", "", ["seed=7"])
    log = EventLog(run, None, open_trackers(name, run, config))
    log.write("start", round=0, rounds=2, clients={"ann": ["t"]})
    for number, clients in enumerate(ROUNDS, 1):
        log.write("round", round=number, clients=clients, dropped=[], seconds=0.5)
    log.write("end", round=2, seconds=1.0, tasks=TASKS)
    log.close()


def test_tensorboard(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    write_events(tmp_path, "tensorboard")
    found = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [(e.step, e.value) for e in found.Scalars("train_loss/t")] == [(1, 2.0), (2, 1.5)]
    assert [(e.step, e.value) for e in found.Scalars("replaced/t")] == [(1, 0.5), (2, 0.0)]
    assert [(e.step, e.value) for e in found.Scalars("test_accuracy/t/tap")] == [(2, 0.75)]
    text = found.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "seed: 7" in text


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracking = pytest.importorskip("mlflow.tracking")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "demo-seed7"
    run.mkdir()
    write_events(run, "mlflow")
    client = tracking.MlflowClient(tracking_uri=f"sqlite:///{run / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "tap-flower"]
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.run_name, found.info.status) == ("demo-seed7", "FINISHED")
    assert found.data.params["seed"] == "7"
    history = client.get_metric_history(found.info.run_id, "train_loss/t")
    assert [(m.step, m.value) for m in history] == [(1, 2.0), (2, 1.5)]
    assert found.data.metrics["test_accuracy/t/server-finetune"] == 0.5


def test_an_unknown_tracker(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="trackers has 'tensorbord': use some of tensorboard, mlflow, wandb"):
        open_trackers("tensorbord", tmp_path, load_config("demo"))


def test_a_package_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(*_: Any) -> Any:
        raise ImportError("No module named 'wandb'")

    monkeypatch.setitem(TRACKERS, "wandb", lacking)  # type: ignore[index]
    with pytest.raises(ConfigError, match=r"wandb.*not installed.*pip install 'tap-flower\[wandb\]'"):
        open_trackers("wandb", tmp_path, load_config("demo"))


def test_a_tracker_that_fails_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Down:
        told = 0

        def log(self, step: int, scalars: Any) -> None:
            Down.told += 1
            raise ConnectionError("the server is down")

        def close(self) -> None:
            raise AssertionError("it was left out")

    monkeypatch.setitem(TRACKERS, "mlflow", lambda *_: Down())  # type: ignore[index]
    with caplog.at_level(logging.WARNING):
        write_events(tmp_path, "mlflow")
    assert Down.told == 1
    assert "Down is not told any more: the server is down" in caplog.text
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4
