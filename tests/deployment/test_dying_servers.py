"""The server's processes are killed, and the run is resumed: it finds what a run finds that nothing disturbed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tap_flower.client.state import PERSONAL
from tap_flower.files import read_tensors
from tap_flower.server import checkpoint

from . import toy
from .cluster import kill
from .toy_app.toy.client_app import TASKS

pytestmark = pytest.mark.slow
NAMES = ["ann", "bob", "cleo"]
SETTINGS = "rounds=3 clients_per_round=3"


def test_servers_that_die(tmp_path: Path) -> None:
    """ServerApp and SuperLink die, each once, while all clients train."""
    undisturbed = toy.undisturbed(tmp_path / "undisturbed", NAMES, SETTINGS)
    with toy.running(tmp_path / "real", SETTINGS) as (cluster, faults):
        for name in NAMES:
            toy.start_node(cluster, name)
        faults.hold(*NAMES)
        cluster.submit()
        faults.let_pass(*NAMES)

        # Round 2: the ServerApp dies. The clients finish the round, and so are ahead of the server.
        for name in NAMES:
            faults.held(name)
        first = cluster.run_id
        kill(cluster.server_app())
        with cluster.timed("from the ServerApp's death until Flower says so"):
            faults.let_pass(*NAMES)
            for name in NAMES:
                cluster.wait_for_state(name, 2)
            with cluster.timed("from the resumed run's submission until round 2 is complete"):
                cluster.submit(resume=True)
                cluster.wait_for_event("start", round=1)
                faults.let_pass(*NAMES)
                cluster.wait_for_event("round_start", round=3)
            cluster.wait_for_status(first, "finished:failed")

        # Round 3: the SuperLink dies, and with it the ServerApp. The nodes do not.
        for name in NAMES:
            faults.held(name)
        cluster.wait_for(
            lambda: checkpoint.load(cluster.out / "server").progress.round == 2, "the checkpoint of round 2"
        )
        cluster.kill_superlink()
        with cluster.timed("from the SuperLink's new start until round 3 is complete"):
            cluster.start_superlink()
            faults.let_go(*NAMES)
            cluster.submit(resume=True)
            cluster.wait_for_event("start", round=2)
            cluster.wait_for_event("round", round=3)

        assert cluster.results() == undisturbed
        assert [e["round"] for e in cluster.events if e["event"] == "round"] == [1, 2, 3]
        assert not [e for e in cluster.events if e["event"] == "dropped"]
        for name in NAMES:
            assert undisturbed["clients"][name][TASKS[name]].keys() == {"server", "server+finetune", "personal", "tap"}
            (alone,) = (tmp_path / "undisturbed" / "state" / name).iterdir()
            assert cluster.saved_round(name) == 3
            for file in (PERSONAL, "tap.safetensors"):
                found, expected = (read_tensors(folder / file)[0] for folder in (cluster.state(name), alone))
                assert found.keys() == expected.keys()
                assert all(torch.equal(found[tensor], expected[tensor]) for tensor in expected)
