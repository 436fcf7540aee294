"""Flower's conveniences: the client function, the run config, and what the log says."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, MetricRecord, RecordDict
from flwr.clientapp.mod import LocalDpMod, adaptiveclipping_mod, fixedclipping_mod, message_size_mod

from tap_flower import Client, TapClientApp, Task
from tap_flower.errors import ConfigError, RunError
from tap_flower.server.result import mean_metrics
from tests.small_projects import COMPONENTS, Loop, Net, federate, loader, task


@pytest.mark.parametrize("mod", [LocalDpMod(1.0, 1.0, 1.0, 1e-5), fixedclipping_mod, adaptiveclipping_mod])
def test_mods_that_expect_values_in_a_reply_are_refused(mod: Any) -> None:
    TapClientApp(mods=[message_size_mod])
    with pytest.raises(
        ConfigError, match=r"\w+ cannot be among the mods: .* set aggregation.clip_norm or privacy.epsilon"
    ):
        TapClientApp(mods=[message_size_mod, mod])


def test_what_is_no_client_is_told(tmp_path: Path) -> None:
    app = TapClientApp()
    app.client()(lambda context: None)  # type: ignore[arg-type, return-value]
    with pytest.raises(RunError, match=r"@app.client\(\) decorates returned a NoneType: return a tap_flower.Client"):
        federate(tmp_path, app)


def test_a_parameter_with_a_default_keeps_it(tmp_path: Path) -> None:
    seen, app = list[Any](), TapClientApp()

    @app.client()
    def make(context: Context, debug: bool = False) -> Client:
        seen.append(debug)
        return Client(f"c{context.node_config['partition-id']}", Net, [task()], COMPONENTS, state_dir=tmp_path)

    federate(tmp_path, app)
    assert seen == [False, False]


FLOWERS = {"num-server-rounds": 1, "learning-rate": 0.1, "local-epochs": 2, "batch-size": 4}


def told_of_keys(folder: Path, make_task: Callable[[Any], Task], caplog: pytest.LogCaptureFixture) -> str:
    app = TapClientApp()

    @app.client()
    def make(context: Context) -> Client:
        return Client(f"c{context.node_config['partition-id']}", Net, [make_task(context.run_config)], state_dir=folder)

    with caplog.at_level(logging.INFO):
        federate(folder, app, run_config=dict(FLOWERS))
    return caplog.text


def test_keys_of_the_run_config_that_no_client_reads_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told = told_of_keys(tmp_path, lambda run: task(loader(size=run["batch-size"])), caplog)
    assert (
        "no client has read 'learning-rate', 'local-epochs', 'num-server-rounds': what the ServerApp does not" in told
    )


def test_keys_that_a_loop_reads_later_are_not_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loop = Loop()
    assert "no client has read" not in told_of_keys(tmp_path, lambda _: loop.task(), caplog)


def test_the_log_says_who_was_asked_what_came_back_and_where_results_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told = told_of_keys(tmp_path, lambda _: task(), caplog)
    assert "├──> c0, c1" in told
    assert "digits: training loss " in told
    assert "(mean of 2 clients), replaced on 2 of 2 clients" in told
    assert f"Results: {tmp_path / 'run' / 'results.json'}" in told


def test_metrics_are_means_over_the_clients_that_have_them() -> None:
    records = [{"num-examples": 3, "a": 1.0}, {"num-examples": 1, "a": 5.0, "b": 7.0}, {"num-examples": 0, "c": 1.0}]
    found = mean_metrics([RecordDict({"metrics": MetricRecord(record)}) for record in records], "num-examples")
    assert dict(found) == {"a": 2.0, "b": 7.0}
