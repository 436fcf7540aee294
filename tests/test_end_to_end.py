"""One run through Flower's simulation runtime, real processes and all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.federations import CLIENTS, SETTINGS, Federation

pytestmark = pytest.mark.slow
TAP_FLOWER = str(Path(sys.executable).with_name("tap-flower"))
ONE_CORE = ["--cpus-per-client", "1", "--gpus-per-client", "0"]
"""As in this process: the last bits of a sum depend on the number of threads, and on the device."""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    own = {"HOME": str(tmp_path), "FLWR_HOME": str(tmp_path / "flwr"), "COLUMNS": "160"}
    # Not even the folder of the command itself is on PATH, as with a virtual environment that is not activated.
    return {**os.environ, **own, "PATH": os.defpath}


def arguments(file: Path, out: Path, *more: str) -> list[str]:
    settings = [part for setting in SETTINGS if "_timeout=" not in setting for part in ("--set", setting)]
    return [TAP_FLOWER, "simulate", "--config", str(file), "--out", str(out), *ONE_CORE, *settings, *more]


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps({"clients": CLIENTS}))
    return file


def processes_of(home: Path) -> list[str]:
    """Command lines of the processes that were started with this HOME, directly or not."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("HOME") == str(home) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
    return found


def test_simulate(tmp_path: Path, config_file: Path, environment: dict[str, str]) -> None:
    out = tmp_path / "run"
    done = subprocess.run(
        arguments(config_file, out), cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((out / "results.json").read_text())
    assert set(results["clients"]) == {"ann", "bob", "cleo", "dan"}
    assert set(results["clients"]["bob"]["languages"]) == {"server", "server+finetune", "personal", "tap"}
    for text in ("round 2: ann, bob, cleo, dan", "personalising 4 clients", "+finetune", "languages"):
        assert text in done.stdout
    assert (out / "clients" / "cleo" / "tap.safetensors").exists()
    assert processes_of(tmp_path) == []  # its SuperLink has ended with it

    # The same clients in one process give the same numbers: neither Ray nor the order of replies matters.
    federation = Federation(tmp_path / "in-process", config_file, settings=list(SETTINGS))
    federation.folder.mkdir()
    again = federation.strategy().start(federation.grid()).summary
    assert again["clients"] == results["clients"]
    assert again["replacements"] == results["replacements"]
    assert again["bytes"] == results["bytes"]

    refused = subprocess.run(
        arguments(config_file, out), cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert refused.returncode == 1
    assert "is not empty" in refused.stderr


def test_a_run_that_fails_exits_with_an_error(tmp_path: Path, environment: dict[str, str]) -> None:
    broken = [{**CLIENTS[0], "tasks": [{**CLIENTS[0]["tasks"][0], "classes": ["en", "es"]}]}]
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps({"clients": broken}))
    done = subprocess.run(
        arguments(file, tmp_path / "run"), cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "client 'ann': task 'languages': train has label" in done.stderr
    assert "but the client spec has 2 classes with labels 'en', 'es'" in done.stderr
    assert "Traceback" not in done.stderr
    assert processes_of(tmp_path) == []


def test_a_run_that_is_told_to_end_leaves_no_process(
    tmp_path: Path, config_file: Path, environment: dict[str, str]
) -> None:
    out = tmp_path / "run"
    with subprocess.Popen(arguments(config_file, out), cwd=tmp_path, env=environment, stdout=subprocess.PIPE) as run:
        deadline = time.monotonic() + 900
        while not (out / "metrics.jsonl").exists() and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
        assert len(processes_of(tmp_path)) > 2
        run.terminate()
        assert run.wait(900) == 128 + signal.SIGTERM
    assert processes_of(tmp_path) == []
