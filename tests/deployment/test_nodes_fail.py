"""Nodes that are killed, slow, late or gone for a while, as real processes."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tap_flower.federation.store import PERSONAL
from tap_flower.storage import read_record, read_tensors

from .cluster import Cluster, running

pytestmark = [pytest.mark.flwr, pytest.mark.xdist_group("deployment")]


def state(cluster: Cluster, name: str) -> Path:
    """A client's folder."""
    (run,) = (cluster.folder / "state" / name).iterdir()
    return run


def saved_round(cluster: Cluster, name: str) -> int:
    """The round of the state that a client reported saved last."""
    return int(read_record(state(cluster, name) / PERSONAL)["round"])


def dropped(cluster: Cluster, server_round: int) -> list[str]:
    """Who was left out of a round."""
    return list(cluster.wait_for_event("round", round=server_round)["dropped"])


def answers(cluster: Cluster, name: str) -> None:
    """Waits until a node works on a message."""
    cluster.wait_for(lambda: cluster.client_app(name), f"{name}'s ClientApp")


def test_nodes_that_die(tmp_path: Path, hospitals: list[dict[str, Any]]) -> None:
    """A ClientApp in training, a node in training, a node while it writes its state, a node between the stages."""
    slow = tmp_path / "slow"
    with running(tmp_path, "rounds=4") as cluster:
        paths = [str(Path(__file__).parent / "slow_disk"), *filter(None, [os.environ.get("PYTHONPATH")])]
        cluster.environment |= {"PYTHONPATH": os.pathsep.join(paths), "SLOW_DISK": str(slow)}
        for spec in hospitals:
            cluster.start_node(spec)
        cluster.submit()

        cluster.wait_for_event("round_start", round=1)
        answers(cluster, "ann")
        client_app = cluster.client_app("ann")
        assert client_app is not None
        cluster.kill(client_app)
        assert dropped(cluster, 1) == ["ann"]

        cluster.wait_for_event("round_start", round=2)
        answers(cluster, "bob")
        cluster.kill(cluster.nodes["bob"])
        assert dropped(cluster, 2) == ["bob"]
        before, _ = read_tensors(state(cluster, "bob") / PERSONAL)
        cluster.start_node(hospitals[1])

        slow.touch()
        cluster.wait_for_event("round_start", round=3)
        cluster.wait_for(lambda: list(state(cluster, "cleo").glob(".personal*.tmp")), "cleo's writing of her state")
        assert saved_round(cluster, "cleo") == 2 or not (state(cluster, "cleo") / PERSONAL).exists()
        cluster.kill(cluster.nodes["cleo"])
        slow.unlink()
        assert "cleo" in dropped(cluster, 3)
        cluster.start_node(hospitals[2])

        cluster.wait_for_event("distill_start")
        cluster.kill(cluster.nodes["ann"])
        personal, _ = read_tensors(state(cluster, "ann") / PERSONAL)
        cluster.start_node(hospitals[0])
        results = cluster.results()

        after, _ = read_tensors(state(cluster, "ann") / PERSONAL)
        assert all((after[name] == personal[name]).all() for name in personal)
        assert set(results["clients"]) == {"ann", "bob", "cleo"}
        for name, task in (("ann", "languages"), ("bob", "shapes"), ("cleo", "translation")):
            assert "tap" in results["clients"][name][task]
            assert before.keys() == read_tensors(state(cluster, "bob") / PERSONAL)[0].keys()


def test_nodes_that_are_late_or_gone(tmp_path: Path, hospitals: list[dict[str, Any]]) -> None:
    """A straggler, one that joins in round 3 with a pair that nobody had, and a component without a holder for a while."""
    ann, bob, cleo = hospitals
    with running(tmp_path, "rounds=5 clients_per_round=2 round_timeout=45") as cluster:
        for spec in (ann, bob):
            cluster.start_node(spec)
        cluster.submit()

        cluster.wait_for_event("round_start", round=1)
        answers(cluster, "bob")
        stopped = [cluster.nodes["bob"], *cluster.nodes["bob"].children(recursive=True)]
        for process in stopped:
            process.send_signal(signal.SIGSTOP)
        assert dropped(cluster, 1) == ["bob"]
        for process in stopped:
            process.send_signal(signal.SIGCONT)

        cluster.wait_for_event("round", round=2)
        cluster.start_node(cleo)
        cluster.wait_for_event("round_start", clients=["ann", "cleo"])
        results = cluster.results()
        assert set(results["clients"]) == {"ann", "bob", "cleo"}
