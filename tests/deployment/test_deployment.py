"""A deployment as docs/deploy.md has it, to the end: with nodes that fail, and with a server that fails.

All in one file: pytest-xdist gives a file to one worker, and these machines have room for one deployment at a time.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tap_flower.federation.store import PERSONAL, ClientStore
from tap_flower.storage import read_tensors

from .cluster import Cluster, processes_within, running

pytestmark = pytest.mark.flwr


def saved_round(cluster: Cluster, name: str) -> int:
    """The round of the state that a client reported saved last."""
    folder = cluster.state(name)
    kept = ClientStore(folder, folder.name).load()
    assert kept is not None
    return kept.server_round


def dropped(cluster: Cluster, server_round: int) -> list[str]:
    """Who was left out of a round."""
    return list(cluster.wait_for_event("round", round=server_round)["dropped"])


def test_nodes_that_die(tmp_path: Path, hospitals: list[dict[str, Any]]) -> None:
    """A ClientApp in training, a node in training, a node while it writes its state, a node between the stages."""
    slow = tmp_path / "slow"
    with running(tmp_path, "rounds=4 train.steps=10") as cluster:
        paths = [str(Path(__file__).parent / "slow_disk"), *filter(None, [os.environ.get("PYTHONPATH")])]
        cluster.environment |= {"PYTHONPATH": os.pathsep.join(paths), "SLOW_DISK": str(slow)}
        for spec in hospitals:
            cluster.start_node(spec)
        cluster.submit()

        cluster.kill(cluster.in_training("ann", 1))
        with cluster.timed("from a ClientApp's death until the round goes on"):
            assert dropped(cluster, 1) == ["ann"]

        cluster.in_training("bob", 2)
        cluster.kill(cluster.nodes["bob"])
        with cluster.timed("from a SuperNode's death until the round goes on"):
            assert dropped(cluster, 2) == ["bob"]
        assert saved_round(cluster, "bob") == 1
        cluster.start_node(hospitals[1])

        slow.touch()
        cluster.wait_for_event("round_start", round=3)
        cluster.wait_for(lambda: list(cluster.state("cleo").glob(".personal*.tmp")), "cleo's writing of her state")
        assert saved_round(cluster, "cleo") == 2
        cluster.kill(cluster.nodes["cleo"])
        slow.unlink()
        assert "cleo" in dropped(cluster, 3)
        cluster.start_node(hospitals[2])

        cluster.wait_for_event("distill_start")
        cluster.kill(cluster.nodes["ann"])
        personal, _ = read_tensors(cluster.state("ann") / PERSONAL)
        # Flower takes a node back only when it has seen that it was gone; one that tries before is refused, and ends.
        cluster.wait_for_event("dropped", round=4, who="client 'ann'")
        with cluster.timed("from a SuperNode's new start until its stage 2 is done"):
            cluster.start_node(hospitals[0])
            cluster.wait_for_event("distilled", client="ann")
        results = cluster.results()

        after, _ = read_tensors(cluster.state("ann") / PERSONAL)
        assert all((after[name] == personal[name]).all() for name in personal)
        assert set(results["clients"]) == {"ann", "bob", "cleo"}
        for name, task in (("ann", "languages"), ("bob", "shapes"), ("cleo", "translation")):
            assert "tap" in results["clients"][name][task]
        assert saved_round(cluster, "ann") == 4


def test_nodes_that_are_late_or_gone(tmp_path: Path, hospitals: list[dict[str, Any]]) -> None:
    """A straggler, one that joins in round 3 with a pair that nobody had, and a component without a holder for a while."""
    ann, bob, cleo = hospitals
    with running(tmp_path, "rounds=6 train.steps=10 clients_per_round=2 round_timeout=120") as cluster:
        for spec in (ann, bob):
            cluster.start_node(spec)
        cluster.submit()

        cluster.in_training("bob", 1)
        stopped = [cluster.nodes["bob"], *cluster.nodes["bob"].children(recursive=True)]
        for process in stopped:
            process.send_signal(signal.SIGSTOP)
        assert dropped(cluster, 1) == ["bob"]
        for process in stopped:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)

        cluster.wait_for_event("round", round=2)
        cluster.start_node(cleo)
        results = cluster.results()
        joined = next(e["round"] for e in cluster.events if e["event"] == "round_start" and "cleo" in e["clients"])
        assert 3 <= joined <= 6
        assert set(results["clients"]) == {"ann", "bob", "cleo"}
        assert results["replacements"]["cleo"]["translation"] >= 1  # the first one, of what she was sent
        assert saved_round(cluster, "bob") > 1


def server_app(cluster: Cluster) -> psutil.Process:
    """The process of the run."""
    assert cluster.superlink is not None
    return processes_within(cluster.superlink, "serverapp")[-1]


def test_a_deployment(tmp_path: Path, hospitals: list[dict[str, Any]], undisturbed: dict[str, Any]) -> None:
    """ServerApp and SuperLink die, each once: still the numbers of one process, and what is a client's stays with it."""
    with running(tmp_path) as cluster:
        for spec in hospitals:
            cluster.start_node(spec)
        cluster.start_node({**hospitals[0], "name": "intruder"}, registered=False)
        cluster.submit()

        cluster.in_training("ann", 2)
        cluster.kill(server_app(cluster))
        with cluster.timed("from the ServerApp's death until Flower says so"):
            assert cluster.wait_for_the_end() == "finished:failed"
        with cluster.timed("from the resumed run's submission until round 2 is complete"):
            cluster.submit(resume=True)
            cluster.wait_for_event("round_start", round=3)

        assert cluster.superlink is not None
        cluster.kill(cluster.superlink)
        with cluster.timed("from the SuperLink's new start until round 3 is complete"):
            cluster.start_superlink()
            cluster.submit(resume=True)
            cluster.wait_for_event("round", round=3)
        results = cluster.results()
        assert cluster.wait_for_the_end() == "finished:completed"

        assert {key: value for key, value in results.items() if key != "seconds"} == undisturbed
        assert set(results["clients"]) == {"ann", "bob", "cleo"}
        for name, task in (("ann", "languages"), ("bob", "shapes"), ("cleo", "translation")):
            assert set(results["clients"][name][task]) == {"server", "server+finetune", "personal", "tap"}
            personal, record = read_tensors(cluster.state(name) / PERSONAL)
            assert record["round"] == 3
            tap, _ = read_tensors(cluster.state(name) / "tap.safetensors")
            assert tap.keys() == personal.keys()
            assert any((tap[n] != personal[n]).any() for n in tap)
        assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["ann", "bob", "cleo"]
        assert not (cluster.out / "clients").exists()
