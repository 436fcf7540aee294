"""What `tap-flower node` starts; tests/deployment starts it for real."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from flwr.common.config import parse_config_args
from typer.testing import CliRunner

from tap_flower import cli
from tap_flower.cli import check
from tap_flower.client.node import Limits, limits_of
from tap_flower.errors import ConfigError
from tap_flower.run.supernode import NodeLaunch, start
from tests.federations import CLIENTS


def node_config(command: list[str]) -> dict[str, Any]:
    """As Flower reads it."""
    return dict(parse_config_args([command[command.index("--node-config") + 1]]))


@pytest.mark.parametrize("name", ["state", "with space", 'with "quotes"', "with 'quotes'", r"back\slash"])
def test_flower_reads_the_paths_that_were_given(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    launch = NodeLaunch(
        tmp_path / "ann.yaml", "server:8000", folder, data_root=tmp_path / "mirror", meteor=True, compile=True,
        loader_workers=2,
    )  # fmt: skip
    assert node_config(launch.command()) == {
        "client-spec": str(tmp_path / "ann.yaml"),
        "state-dir": str(folder),
        "data-root": str(tmp_path / "mirror"),
        "meteor": True,
        "compile": True,
        "loader-workers": 2,
    }
    assert folder.is_dir()


def test_limits_of_what_a_server_may_ask_are_settings_of_the_node(tmp_path: Path) -> None:
    def launch(*limits: str) -> NodeLaunch:
        return NodeLaunch(tmp_path / "ann.yaml", "server:8000", tmp_path / "state", limits=limits)

    found = node_config(launch("steps=100", "text_length=64", "seconds=7200").command())
    assert limits_of(found) == Limits(steps=100, text_length=64, seconds=7200)
    for wrong in ("steps", "steps=0", "steps=1.5", "epochs=3", "steps=1 compile=true"):
        with pytest.raises(
            ConfigError, match=f"--limit {wrong}: write KEY=N, with one of steps, batch_size, text_length"
        ):
            launch(wrong).command()


def test_a_path_with_both_kinds_of_quotes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="both kinds of quotes"):
        NodeLaunch(tmp_path / "ann.yaml", "server:8000", tmp_path / "a\"'b").command()


def test_tls_and_the_key_are_flowers_own_options(tmp_path: Path) -> None:
    authority, key = tmp_path / "ca.crt", tmp_path / "key"
    launch = NodeLaunch(tmp_path / "ann.yaml", "server:8000", tmp_path / "state", authority, key, port=1234)
    with pytest.raises(ConfigError, match="there is no file .*ca.crt"):
        launch.command()
    authority.touch()
    with pytest.raises(ConfigError, match="there is no file .*key"):
        launch.command()
    key.touch()
    command = launch.command()
    assert command[0].endswith("flower-supernode")
    for option, value in (
        ("--superlink", "server:8000"),
        ("--port", "1234"),
        ("--root-certificates", str(authority)),
        ("--auth-supernode-private-key", str(key)),
    ):
        assert command[command.index(option) + 1] == value
    assert "--insecure" not in command
    with pytest.raises(ConfigError, match="--insecure cannot be combined with"):
        NodeLaunch(tmp_path / "ann.yaml", "server:8000", tmp_path, authority, insecure=True).command()


def test_a_state_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="state folder .*file/state cannot be made: Not a directory"):
        NodeLaunch(tmp_path / "ann.yaml", "server:8000", tmp_path / "file" / "state").command()


def test_a_node_starts_only_with_a_spec_that_can_be_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[NodeLaunch] = []
    monkeypatch.setattr(check, "start_node", started.append)
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text(yaml.safe_dump(CLIENTS[3]))
    bad.write_text(yaml.safe_dump({**CLIENTS[0], "tasks": [{**CLIENTS[0]["tasks"][0], "classes": ["en", "es"]}]}))
    options = ["--superlink", "server:8000", "--insecure", "--state-dir", str(tmp_path / "state")]
    failed = CliRunner().invoke(cli.app, ["node", str(bad), *options])
    assert failed.exit_code == 1
    assert "but the client spec has 2 classes with labels 'en', 'es'" in failed.output
    assert not started
    assert CliRunner().invoke(cli.app, ["node", str(good), *options]).exit_code == 0
    assert CliRunner().invoke(cli.app, ["node", str(good), *options, "--compile"]).exit_code == 0
    assert [(launch.spec, launch.compile) for launch in started] == [(good, False), (good, True)]


def test_flowers_programs_find_each_other_wherever_path_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    become: list[Mapping[str, str]] = []
    monkeypatch.setattr(os, "execve", lambda file, command, environment: become.append(environment))
    monkeypatch.setenv("PATH", str(tmp_path))
    start(NodeLaunch(tmp_path / "ann.yaml", "localhost:8000", insecure=True, state_dir=tmp_path / "state"))
    (environment,) = become
    assert shutil.which("flower-superexec", path=environment["PATH"]) is not None
