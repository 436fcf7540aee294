"""A user without a network is told so within seconds, once, whatever the number of names."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

CHECK = """
import json, logging, sys, time
logging.basicConfig(format="%(message)s")
from tap_flower.data.check import check_data
from tap_flower.data.spec import read_spec
from tap_flower.errors import BackboneError
from tap_flower.models.load import outline
from tap_flower.client.text_metrics import missing
spec, _ = read_spec(json.loads(sys.argv[1]))
began = time.monotonic()
problems = [str(problem) for problem in check_data(spec, 8, 41)[1]]
try:
    outline(spec.backbone, 1)
except BackboneError as error:
    problems.append(str(error))
print(json.dumps({"seconds": time.monotonic() - began, "problems": problems}))
"""


def source(name: str) -> dict[str, str]:
    return {"format": "hub", "name": f"owner/{name}", "split": "train"}


SPEC = {
    "name": "hospital-a",
    "backbone": "owner/backbone",
    "tasks": [
        {
            "name": "notes", "kind": "text_generation", "modalities": ["text"], "domain": "law",
            "columns": {"text": "a", "target": "b"}, "train": source("one"), "test": source("two"),
        }
    ],
}  # fmt: skip


SLOW = 3
"""Times as long as a process of this test may take on a machine that others use as well."""


def ran(code: str, endpoint: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A process whose caches are in a folder."""
    switches = {"HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"}
    environment = {name: value for name, value in os.environ.items() if name not in switches}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**environment, "HF_ENDPOINT": endpoint, "HF_HOME": str(folder), "NO_PROXY": "127.0.0.1"},
        capture_output=True,
        text=True,
        check=False,
    )


def told(endpoint: str, folder: Path) -> tuple[dict[str, Any], str]:
    """What a process with an empty cache finds, and its log."""
    done = ran(CHECK, endpoint, folder, json.dumps(SPEC))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.fixture(params=[pytest.param("silent", marks=pytest.mark.slow), "closed"])
def endpoint(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of a hub that takes connections and never answers, or of none."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        if request.param == "closed":
            server.shutdown(socket.SHUT_RDWR)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_without_a_network_everything_that_cannot_be_had_is_told_within_five_seconds(
    endpoint: str, tmp_path: Path
) -> None:
    found, log = told(endpoint, tmp_path)
    assert found["seconds"] < 5
    assert log.count("the hub cannot be reached") == 1
    tokenizer, train, test, backbone = found["problems"]
    assert "backbone 'owner/backbone' gives no tokenizer" in tokenizer
    assert "`hf download owner/one --repo-type dataset`" in train
    assert "`hf download owner/two --repo-type dataset`" in test
    assert "backbone 'owner/backbone' cannot be loaded" in backbone


PRESET = """
import logging, sys, time
logging.basicConfig(format="%(message)s")
began = time.monotonic()
from tap_flower.cli import main
from tap_flower.run import simulation
simulation.simulate = lambda *_: print("started")
sys.argv = ["tap-flower", "simulate", "--preset", "flava", "--out", sys.argv[1]]
imported = time.monotonic()
try:
    main()
finally:
    print("seconds", time.monotonic() - imported)
"""


def test_what_a_preset_lacks_is_told_once_before_anything_starts(endpoint: str, tmp_path: Path) -> None:
    done = ran(PRESET, endpoint, tmp_path, str(tmp_path / "run"))
    assert done.returncode == 1
    assert "started" not in done.stdout
    assert not (tmp_path / "run").exists()
    assert done.stderr.count("error:") == 1
    assert "must be fetched, and the hub does not answer: run `tap-flower fetch flava` with a network" in done.stderr
    assert done.stderr.count("facebook/flava-full") == done.stderr.count("cais/mmlu") == 1
    assert max(map(len, done.stderr.splitlines())) < 500
    assert float(done.stdout.split("seconds ")[1]) < 5 * SLOW


@pytest.mark.slow
def test_a_hub_that_answers_is_asked_for_the_files(tmp_path: Path) -> None:
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        do_GET = do_HEAD

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        _, log = told(f"http://127.0.0.1:{server.server_port}", tmp_path)
        server.shutdown()
    assert "cannot be reached" not in log
    assert asked.count("/") == 1
    assert any("owner/backbone" in path for path in asked)
    assert any("owner/one" in path for path in asked)
