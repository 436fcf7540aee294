"""Trackers: TensorBoard and MLflow against their own readers, Weights & Biases against the file of an offline run."""

from __future__ import annotations

import json
import logging
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tap_flower.config import load_config
from tap_flower.errors import ConfigError
from tap_flower.report.events import EventLog, read_events
from tap_flower.report.trackers import TRACKERS, Tracked, open_trackers

ROUNDS = [
    {"ann": {"losses": {"t": 1.0}, "replacements": {"t": 1}}, "bob": {"losses": {"t": 3.0}, "replacements": {"t": 0}}},
    {"bob": {"losses": {"t": 1.5}, "replacements": {"t": 0}}},
]
TASKS = {"t": {"tap": {"accuracy": 0.75}, "server+finetune": {"accuracy": 0.5}}}


def tracked(run: Path, after_round: int | None = None) -> Tracked:
    return Tracked(run, load_config("demo", "", ["seed=7"]), "0123abcd", after_round)


def write_events(run: Path, name: str) -> None:
    log = EventLog(run, None, open_trackers(name, tracked(run)))
    log.write("start", round=0, rounds=2, clients={"ann": ["t"]})
    for number, clients in enumerate(ROUNDS, 1):
        log.write("round", round=number, clients=clients, dropped=[], seconds=0.5)
    log.write("end", round=2, seconds=1.0, tasks=TASKS)
    log.close(complete=True)


def break_off_and_go_on(run: Path, name: str) -> None:
    """Both rounds were logged, but the first alone is complete when the run goes on."""
    for after_round, numbers in ((None, (1, 2)), (1, (2,))):
        log = EventLog(run, after_round, open_trackers(name, tracked(run, after_round)))
        for number in numbers:
            log.write("round", round=number, clients=ROUNDS[number - 1], dropped=[], seconds=0.5)
        log.close(complete=after_round is not None)


def tensorboard_events(run: Path) -> Any:
    """What TensorBoard reads of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run / "tensorboard"))
    found.Reload()
    return found


def mlflow_record(run: Path) -> tuple[Any, Any]:
    """MLflow's client, and the only run that it finds."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{run / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "tap-flower"]
    (found,) = client.search_runs([experiment.experiment_id])
    return client, found


@pytest.fixture
def local_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.mark.slow
def test_tensorboard(tmp_path: Path) -> None:
    write_events(tmp_path, "tensorboard")
    found = tensorboard_events(tmp_path)
    assert [(e.step, e.value) for e in found.Scalars("train_loss/t")] == [(1, 2.0), (2, 1.5)]
    assert [(e.step, e.value) for e in found.Scalars("replaced/t")] == [(1, 0.5), (2, 0.0)]
    assert [(e.step, e.value) for e in found.Scalars("test_accuracy/t/tap")] == [(2, 0.75)]
    text = found.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "seed: 7" in text


@pytest.mark.slow
def test_tensorboard_goes_on(tmp_path: Path) -> None:
    break_off_and_go_on(tmp_path, "tensorboard")
    found = tensorboard_events(tmp_path)
    assert [(e.step, e.value) for e in found.Scalars("train_loss/t")] == [(1, 2.0), (2, 1.5)]


@pytest.mark.slow
@pytest.mark.usefixtures("local_mlflow")
def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "demo-seed7"
    run.mkdir()
    write_events(run, "mlflow")
    client, found = mlflow_record(run)
    assert (found.info.run_name, found.info.status) == ("demo-seed7", "FINISHED")
    assert found.data.params["seed"] == "7"
    history = client.get_metric_history(found.info.run_id, "train_loss/t")
    assert [(m.step, m.value) for m in history] == [(1, 2.0), (2, 1.5)]
    assert found.data.metrics["test_accuracy/t/server-finetune"] == 0.5


@pytest.mark.slow
@pytest.mark.usefixtures("local_mlflow")
def test_mlflow_goes_on(tmp_path: Path) -> None:
    break_off_and_go_on(tmp_path, "mlflow")
    client, found = mlflow_record(tmp_path)
    assert found.info.status == "FINISHED"
    history = client.get_metric_history(found.info.run_id, "train_loss/t")
    assert {(m.step, m.value) for m in history} == {(1, 2.0), (2, 1.5)}


@pytest.mark.slow
@pytest.mark.usefixtures("local_mlflow")
def test_mlflow_of_a_run_that_broke_off(tmp_path: Path) -> None:
    EventLog(tmp_path, None, open_trackers("mlflow", tracked(tmp_path))).close(complete=False)
    assert mlflow_record(tmp_path)[1].info.status == "FAILED"


def wandb_records(file: Path) -> Iterator[Any]:
    """What W&B's log of a run holds: LevelDB's format of logs, in it protocol buffers."""
    from wandb.proto import wandb_internal_pb2 as messages

    content, at, record = file.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if (rest := 2**15 - at % 2**15) < 7:
            at += rest
            continue
        size, kind = struct.unpack("<4xHB", content[at : at + 7])
        record += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield messages.Record.FromString(record)
            record = b""


@pytest.mark.slow
def test_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    run = tmp_path / "demo-seed7"
    run.mkdir()
    write_events(run, "wandb")
    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    deadline = time.monotonic() + 60
    while True:  # W&B's own process writes the file, and may still be about to when `finish` has returned
        records = list(wandb_records(file))
        kinds = [r.WhichOneof("record_type") for r in records]
        if "exit" in kinds or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    assert kinds.count("run") == 1, (kinds, file.stat().st_size)
    begun = records[kinds.index("run")].run
    assert (begun.project, begun.display_name, begun.run_id) == ("tap-flower", "demo-seed7", "0123abcd")
    config = {u.key: u.value_json for u in begun.config.update}
    assert config["seed"] == "7"
    assert config["train.batch_size"] == "16"
    assert not any("packaged" in value for value in config.values())  # clients and their data stay here
    history = [
        {item.nested_key[0]: json.loads(item.value_json) for item in r.history.item}
        for r in records
        if r.WhichOneof("record_type") == "history"
    ]
    assert [(h["_step"], h["train_loss/t"], h["replaced/t"]) for h in history[:2]] == [(1, 2.0, 0.5), (2, 1.5, 0.0)]
    # W&B's steps are those of its history: what comes in one step is one row.
    assert history[-1]["test_accuracy/t/tap"] == 0.75
    assert history[-1]["_step"] == 2


@pytest.mark.slow
def test_weights_and_biases_without_a_login(tmp_path: Path) -> None:
    code = """
from pathlib import Path
from tap_flower.config import load_config
from tap_flower.report.trackers import Tracked, open_trackers
open_trackers("wandb", Tracked(Path.cwd(), load_config("demo"), "0123abcd"))
"""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    process = subprocess.run(  # of its own: wandb keeps what it found of its settings as long as a process lives
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**kept, "HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 1
    last = process.stderr.splitlines()[-1]
    assert "ConfigError: trackers has 'wandb', which could not start" in last
    assert "log in with `wandb login`, or set WANDB_MODE=offline, or remove it from `trackers`" in last


def test_an_unknown_tracker(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="trackers has 'tensorbord': use some of tensorboard, mlflow, wandb"):
        open_trackers("tensorbord", tracked(tmp_path))


def test_a_package_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(*_: Any) -> Any:
        raise ImportError("No module named 'wandb'")

    monkeypatch.setitem(TRACKERS, "wandb", lacking)  # type: ignore[index]
    with pytest.raises(ConfigError, match=r"wandb.*not installed.*pip install 'tap-flower\[wandb\]'"):
        open_trackers("wandb", tracked(tmp_path))


def test_a_tracker_that_cannot_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[bool] = []

    class Opened:
        def log(self, step: int, scalars: Any) -> None:
            raise AssertionError("nothing is logged")

        def close(self, complete: bool) -> None:
            closed.append(complete)

    def refused(*_: Any) -> Any:
        raise ConnectionError("no server at localhost:5000")

    monkeypatch.setitem(TRACKERS, "tensorboard", lambda *_: Opened())  # type: ignore[index]
    monkeypatch.setitem(TRACKERS, "mlflow", refused)  # type: ignore[index]
    with pytest.raises(
        ConfigError, match=r"'mlflow', which could not start \(ConnectionError: no server at localhost:5000\)"
    ):
        open_trackers("tensorboard,mlflow", tracked(tmp_path))
    assert closed == [False]


def test_a_tracker_that_fails_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Down:
        told = 0

        def log(self, step: int, scalars: Any) -> None:
            Down.told += 1
            raise ConnectionError("the server is down")

        def close(self, complete: bool) -> None:
            raise AssertionError("it was left out")

    monkeypatch.setitem(TRACKERS, "mlflow", lambda *_: Down())  # type: ignore[index]
    with caplog.at_level(logging.WARNING):
        write_events(tmp_path, "mlflow")
    assert Down.told == 1
    assert "Down is not told any more: the server is down" in caplog.text
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize(("last", "complete"), [("end", True), ("failed", False)])
def test_a_run_is_not_told_to_have_ended_before_its_trackers(tmp_path: Path, last: str, complete: bool) -> None:
    """`simulate` stops the server's process when it reads the last event; a tracker may take seconds to send what it has."""
    seen: list[Any] = []

    class Slow:
        def log(self, step: int, scalars: Any) -> None:
            pass

        def close(self, complete: bool) -> None:
            seen.append((complete, [event["event"] for event in read_events(tmp_path)]))

    log = EventLog(tmp_path, None, [Slow()])  # type: ignore[list-item]
    log.write("start", round=0)
    log.write(last, round=2, seconds=1.0, tasks=TASKS)
    assert [event["event"] for event in read_events(tmp_path)] == ["start", last]
    log.close(complete=False)
    assert seen == [(complete, ["start"])]
