"""Nodes and their processes are killed: in training, while a state is written, between the stages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tap_flower.core.components import State
from tap_flower.server import checkpoint

from . import toy
from .cluster import Cluster, kill
from .toy_app.toy.client_app import TASKS

pytestmark = pytest.mark.slow
EVERYBODY = ["ann", "bob", "cleo", "dora"]


def server_tensors(cluster: Cluster, server_round: int) -> State:
    """What the server saves of a round; waits until it has."""
    folder = cluster.out / "server"
    cluster.wait_for(
        lambda: checkpoint.load(folder).progress.round == server_round, f"checkpoint of round {server_round}"
    )
    return checkpoint.load(folder).tensors


def changed(before: State, after: State) -> set[str]:
    """Which layers have other values."""
    assert before.keys() <= after.keys()
    return {name.rpartition(".")[0] for name in before if not torch.equal(before[name], after[name])}


def test_nodes_that_die(tmp_path: Path) -> None:
    """A ClientApp in training, a node in training, a node while it writes its state, and one between the stages.

    Those of round 2 die together, since Flower takes a minute to see any of them. dora is well all the time, and slow: a
    round lasts until she has passed.
    """
    with toy.running(tmp_path, "rounds=3 clients_per_round=4") as (cluster, faults):
        for name in EVERYBODY:
            toy.start_node(cluster, name)
        faults.hold(*EVERYBODY)
        cluster.submit()
        faults.let_pass(*EVERYBODY)

        # Round 2: all of them train, and three die.
        training = {name: faults.held(name) for name in EVERYBODY}
        before, states = server_tensors(cluster, 1), {name: personal_model(cluster, name) for name in EVERYBODY}
        kill(training["ann"])
        with cluster.timed("from a ClientApp's death until it is given up"):
            cluster.kill_node("bob")
            faults.let_go("ann", "bob")
            half = faults.slow_disk("cleo")
            cluster.kill_node("cleo")
            assert half.exists()
            assert half.stat().st_size
            faults.good_disk("cleo")
            with cluster.timed("from a SuperNode's death in training until it is given up"):
                bobs = cluster.wait_for_event("dropped", round=2, who="client 'bob'")
            cleos = cluster.wait_for_event("dropped", round=2, who="client 'cleo'")
            anns = cluster.wait_for_event("dropped", round=2, who="client 'ann'")
        assert anns["problem"].endswith("(Flower's error 8)")  # of Flower's: a ClientApp is gone; and 5, a node is gone
        assert all(event["problem"].endswith("(Flower's error 5)") for event in (bobs, cleos))
        for name in ("ann", "bob", "cleo"):
            assert cluster.saved_round(name) == 1
            assert not changed(states[name], personal_model(cluster, name))
        with cluster.timed("from two SuperNodes' new start until Flower has let them in"):
            answered = {name: faults.answers(name) for name in ("bob", "cleo")}
            for name in answered:
                toy.start_node(cluster, name)
            cluster.wait_for_nodes(4)
        cluster.wait_for(lambda: all(faults.answers(n) > answered[n] for n in answered), "bob's and cleo's manifests")
        faults.let_pass("dora")
        second = cluster.wait_for_event("round", round=2)
        assert (set(second["clients"]), second["dropped"]) == ({"dora"}, ["ann", "bob", "cleo"])

        # Round 3: everybody is there again. What nobody had returned in round 2 has kept its value.
        faults.held("dora")
        assert changed(before, server_tensors(cluster, 2)) == {"encoders.digits", "heads.digits", "trunk.0", "trunk.1"}
        for name in ("ann", "bob", "cleo"):
            cluster.wait_for_state(name, 3)

        # ann is to train in stage 2 as well, and dies.
        faults.hold("ann")
        faults.let_go("dora")
        third = cluster.wait_for_event("round", round=3)
        assert (set(third["clients"]), third["dropped"]) == (set(EVERYBODY), [])
        cluster.wait_for_event("distill_start", clients=EVERYBODY)
        faults.held("ann")
        cluster.kill_node("ann")
        faults.let_go("ann")
        personal = personal_model(cluster, "ann")
        # Flower takes a node back only when it has seen that it was gone; one that tries before is refused, and ends.
        assert cluster.wait_for_event("dropped", round=3, who="client 'ann'")["problem"].endswith("(Flower's error 5)")
        with cluster.timed("from a SuperNode's new start until its stage 2 is done"):
            toy.start_node(cluster, "ann")
            cluster.wait_for_event("distilled", client="ann")
        results = cluster.results()

        assert [e["clients"] for e in cluster.events if e["event"] == "distill_start"] == [EVERYBODY, ["ann"]]
        assert not changed(personal, personal_model(cluster, "ann"))
        assert set(results["clients"]) == set(EVERYBODY)
        for name in EVERYBODY:
            assert results["clients"][name][TASKS[name]].keys() == {"server", "server+finetune", "personal", "tap"}
            assert cluster.saved_round(name) == 3


def personal_model(cluster: Cluster, name: str) -> State:
    """A client's, as of the state that it would go on from."""
    return {tensor: value for tensor, value in cluster.saved_state(name)[0].items() if ":" not in tensor}
