"""A deployment as docs/deploy.md has it, to the end, with the demo's model. Its parts are killed in other files.

A message takes a new process with torch and transformers, so that the run has two clients and one round.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from client_app.app import app
from tap_flower.client.state import PERSONAL
from tap_flower.config import load_config
from tap_flower.files import read_tensors
from tap_flower.run.in_process import InProcessGrid
from tap_flower.server.strategy import TapStrategy

from . import cluster as real
from .cluster import BIN, ROOT, Cluster, kill
from .hospitals import make_hospitals

pytestmark = pytest.mark.slow
SETTINGS = (
    "clients=[] rounds=1 clients_per_round=2 train.steps=1 train.batch_size=4 train.accumulation=1 "
    "distill.iterations=1 model.text_length=40 start_timeout=600 round_timeout=600 "
    "replacement.mode=hard replacement.before_stage_two=false replacement.after_stage_two=false distill.stage=distillation"
)
TASKS = {"ann": "languages", "bob": "shapes"}


@pytest.fixture
def hospitals(tmp_path: Path) -> list[dict[str, Any]]:
    """Client specs: ann and bob, with one pair each."""
    return make_hospitals(tmp_path / "data")[: len(TASKS)]


def start_node(cluster: Cluster, spec: dict[str, Any], registered: bool = True) -> psutil.Popen:
    """`tap-flower node` for a client."""
    name = str(spec["name"])
    (cluster.folder / f"{name}.yaml").write_text(yaml.safe_dump(spec))
    key = cluster.make_key(name, registered)
    command = (BIN / "tap-flower", "node", f"{name}.yaml", "--key", key, "--state-dir", "state")
    return cluster.start_node(name, *command)


def undisturbed(folder: Path, specs: list[dict[str, Any]]) -> dict[str, Any]:
    """What the same run finds in one process, without its seconds."""
    nodes = []
    for spec in specs:
        file = folder / f"{spec['name']}.yaml"
        file.parent.mkdir(exist_ok=True)
        file.write_text(yaml.safe_dump(spec))
        nodes.append({"client-spec": str(file), "state-dir": str(folder / "state")})
    results = (
        TapStrategy(config=load_config("demo", "", SETTINGS.split()), run_folder=folder / "run")
        .start(InProcessGrid(app, nodes, {}))
        .summary
    )
    return {key: value for key, value in results.items() if key != "seconds"}


def test_a_deployment(tmp_path: Path, hospitals: list[dict[str, Any]]) -> None:
    """The run is resumed, a node started again: still the numbers of one process, and what is a client's stays with it."""
    with real.running(tmp_path / "real", ROOT, preset="demo", set=SETTINGS) as cluster:
        for spec in hospitals:
            cluster.nodes[spec["name"]] = start_node(cluster, spec)
        intruder = start_node(cluster, {**hospitals[0], "name": "intruder"}, registered=False)
        cluster.submit()

        # In round 1 the ServerApp dies, and a node ends by SIGTERM and begins anew: the run goes on at once.
        cluster.wait_for(lambda: cluster.has_received("ann", 1), "ann's training")
        kill(cluster.server_app())
        assert [event["event"] for event in cluster.events][-1] == "round_start"
        cluster.end_node("bob")
        cluster.nodes["bob"] = start_node(cluster, hospitals[1])
        cluster.submit(resume=True)
        expected = undisturbed(tmp_path / "undisturbed", hospitals)
        cluster.wait_for_event("round", round=1)
        cluster.wait_for(lambda: intruder.poll() is not None, "the intruder's end")
        assert intruder.returncode == 1
        assert "Exit Code: 305" in (cluster.folder / "node-intruder.log").read_text()

        assert cluster.results() == expected
        assert set(expected["clients"]) == set(TASKS)
        for name, task in TASKS.items():
            assert set(expected["clients"][name][task]) == {"server", "server+finetune", "personal", "tap"}
            personal, record = read_tensors(cluster.state(name) / PERSONAL)
            assert record["round"] == 1
            tap, _ = read_tensors(cluster.state(name) / "tap.safetensors")
            assert tap.keys() == personal.keys()
            assert any((tap[n] != personal[n]).any() for n in tap)
        assert sorted(path.name for path in (cluster.folder / "state").iterdir()) == ["ann", "bob"]
        assert not (cluster.out / "clients").exists()
