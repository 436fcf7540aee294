"""Nodes that are late, that stand still, and that were not there from the beginning."""

from __future__ import annotations

import re
import signal
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

from tap_flower.client.module import built_module
from tap_flower.client.state import SERVER
from tap_flower.files import read_tensors

from . import toy
from .toy_app.toy.client_app import TASKS, Net

pytestmark = pytest.mark.slow
SEED, LIMIT = 25, 90
"""The run's seed, which takes dora into round 3 whether or not bob is there, and its `round_timeout`."""
STEPS = 6, 4
"""Optimiser steps of a participation in stage 1 (3 of the server's copy, 3 of the personal model), and in stage 2."""


def test_nodes_that_are_late_or_gone(tmp_path: Path) -> None:
    """A machine that stands still, a straggler, and a node that comes in round 1 with a pair that nobody had."""
    with toy.running(tmp_path, f"rounds=3 clients_per_round=3 seed={SEED} round_timeout={LIMIT}") as (cluster, faults):
        for name in ("ann", "bob", "dora"):
            toy.start_node(cluster, name)
        cluster.wait_for_nodes(3)
        faults.hold(*TASKS)
        cluster.submit()

        # Round 1: bob's machine stands still, and dora's training takes too long. cleo comes.
        for name in ("ann", "bob", "dora"):
            faults.held(name)
        stopped = [cluster.nodes["bob"], *cluster.nodes["bob"].children(recursive=True)]
        for process in stopped:
            process.send_signal(signal.SIGSTOP)
        toy.start_node(cluster, "cleo")
        faults.let_pass("ann")
        first = cluster.wait_for_event("round", round=1)
        assert (set(first["clients"]), first["dropped"]) == ({"ann"}, ["bob", "dora"])
        assert first["seconds"] >= LIMIT
        gone, late = (cluster.wait_for_event("dropped", round=1, who=f"client {name!r}") for name in ("bob", "dora"))
        # It is the time limit that ends it for dora: the server's own, or that of the message, which Flower calls 3. Of bob
        # Flower may say before that it has not heard of him for a minute, 5.
        said = re.compile(r"no answer in time .*|.*\(Flower's error 3\)")
        assert said.fullmatch(late["problem"])
        assert said.fullmatch(gone["problem"]) or gone["problem"].endswith("(Flower's error 5)")
        assert not cluster.saved_round("bob")
        assert not cluster.saved_round("dora")

        # Round 2: cleo has been admitted beside round 1, and gets the initial values of what is hers alone. Nobody waits for
        # bob and dora: they are asked who they are, and take part again once they have answered.
        cluster.wait_for_event("round_start", round=2, clients=["ann", "cleo"])
        faults.held("cleo")
        received, record = read_tensors(cluster.state("cleo") / SERVER)
        assert record["round"] == 2
        built = built_module(lambda: Net("topic"), SEED)
        assert built is not None
        for name in (f"{layer}.topic.{part}" for layer in ("encoders", "heads") for part in ("weight", "bias")):
            assert torch.equal(received[name], built.values[name])
        assert (received["trunk.1.bias"] != 0).any()  # the server's by then: ann has trained it

        # The two that were late go on with what they had been asked for. dora then answers, and is there for the next round;
        # bob, whom Flower may have taken for gone, is asked at its beginning, and there after it.
        faults.let_go("bob", "dora")
        for process in stopped:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)
        cluster.wait_for_nodes(4)
        cluster.wait_for(lambda: faults.answers("dora") == 3, "dora's answers: who she is, round 1, and who she is")
        faults.let_go("ann", "cleo")
        third = cluster.wait_for_event("round", round=3)
        assert set(third["clients"]) & {"bob", "dora"}  # three of those that are there by then are drawn
        assert third["dropped"] == []
        results = cluster.results()

        assert results["clients"].keys() == TASKS.keys()
        assert results["replacements"]["cleo"]["topic"] >= 1  # the first one, of what she was sent
        rounds = [event for event in cluster.events if event["event"] == "round"]
        for name in TASKS:
            # What came too late is not in any sum: each counts for the rounds in which it was in time.
            counted = [event["round"] for event in rounds if name in event["clients"]]
            assert results["steps"][name] == len(counted) * STEPS[0] + STEPS[1]
            # Whether bob's training of round 1 ends is Flower's choice: the ClientApp's token may have run out meanwhile.
            saved = {counted[-1]} if counted else {0, 1} if name == "bob" else {1}
            assert cluster.saved_round(name) in saved
