"""The examples: each is run with its own ClientApp and ServerApp, in this process, offline."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict

from tap_flower.federation.in_process import InProcessGrid
from tap_flower.reporting.page import write_report
from tap_flower.simulation import CONNECTION, flwr, status_of, superlink

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(project: Path, nodes: int, folder: Path, server: str, client: str, **more: Any) -> dict[str, Any]:
    """Results of a run of a project, whose own modules are forgotten afterwards."""
    run_config = {"num-server-rounds": 1, "out": str(folder / "run"), **more}
    configs = [{"partition-id": i, "num-partitions": nodes, "state-dir": str(folder / "state")} for i in range(nodes)]
    sys.path.insert(0, str(project))
    try:
        apps = [getattr(importlib.import_module(place), app) for place, app in (p.split(":") for p in (server, client))]
        grid = InProcessGrid(apps[1], configs, run_config)
        apps[0](grid, Context(1, 1, {}, RecordDict(), run_config))
    finally:
        sys.path.remove(str(project))
        package = server.partition(".")[0]
        for name in [name for name in sys.modules if name.split(".")[0] == package]:
            del sys.modules[name]
    (found,) = folder.rglob("results.json")
    return dict(json.loads(found.read_text()))


@pytest.mark.parametrize(
    ("example", "clients"),
    [
        ("two_modalities", {"camera": {"digits"}, "reader": {"languages"}, "both": {"digits", "languages"}}),
        ("regression", {"clinic-0": {"progression"}, "clinic-1": {"progression", "bmi"}}),
        ("backbones", {"ann": {"digits"}, "bob": {"digits", "languages"}}),
        ("language_model", {"ann": {"spanish"}, "bob": {"german"}, "cleo": {"spanish", "german"}}),
    ],
)
def test_an_example_runs(example: str, clients: dict[str, set[str]], tmp_path: Path) -> None:
    found = run(EXAMPLES / example, len(clients), tmp_path, f"{example}.server_app:app", f"{example}.client_app:app")
    assert {name: set(tasks) for name, tasks in found["clients"].items()} == clients
    assert all({"server", "personal", "tap"} <= models.keys() for models in found["tasks"].values())
    assert {path.parent.parent.name for path in (tmp_path / "state").rglob("tap.safetensors")} == clients.keys()
    write_report([tmp_path / "run"], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert all(f"{task}: training loss" in page for task in found["tasks"])


def test_the_quickstart_becomes_tap_by_a_diff_of_less_than_30_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tmp_path / "quickstart"
    shutil.copytree(EXAMPLES / "quickstart", project)
    patch = project / "tap.diff"
    lines = [line for line in patch.read_text().splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    assert len(lines) < 30
    subprocess.run(["patch", "-p1", "-i", str(patch)], cwd=project, check=True, capture_output=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    more = {"batch-size": 32, "learning-rate": 0.01, "local-epochs": 1}
    found = run(project, 2, tmp_path, "quickstart.tap:server", "quickstart.tap:client", **more)
    assert set(found["clients"]) == {"client-0", "client-1"}
    # Guessing is right once in ten; a client that had learned nothing would be caught here.
    assert found["tasks"]["digits"]["tap"]["accuracy"] > 0.5


@pytest.mark.flwr
def test_the_changed_quickstart_under_flwr_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tmp_path / "quickstart"
    shutil.copytree(EXAMPLES / "quickstart", project)
    subprocess.run(["patch", "-p1", "-i", "tap.diff"], cwd=project, check=True, capture_output=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    with superlink(tmp_path / "work") as flower:
        said = flwr(
            flower, "run", str(project), CONNECTION, "--run-config", "num-server-rounds=1",
            "--federation-config", "num-supernodes=2 client-resources-num-cpus=1",
        )  # fmt: skip
        while not (status := status_of(flower, said["run-id"])).startswith("finished"):
            time.sleep(2)
        assert status == "finished:completed", flower.log.read_text()
    (found,) = (tmp_path / "home").rglob("results.json")
    assert set(json.loads(found.read_text())["clients"]) == {"client-0", "client-1"}
    # Each client's personal model is on its own node, here in Flower's home.
    assert len(list((tmp_path / "work" / "flwr" / "tap-flower").rglob("tap.safetensors"))) == 2


def test_the_docs_show_that_diff() -> None:
    shown = (EXAMPLES.parent / "docs" / "plug-in.md").read_text()
    assert f"```diff\n{(EXAMPLES / 'quickstart' / 'tap.diff').read_text().rstrip()}\n```" in shown
