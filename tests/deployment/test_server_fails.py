"""The ServerApp and the SuperLink are killed; the run goes on, and gives what a run gives that nobody disturbed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest

from .cluster import Cluster, running

pytestmark = [pytest.mark.flwr, pytest.mark.xdist_group("deployment")]


def server_app(cluster: Cluster) -> psutil.Process:
    """The process of the run."""
    assert cluster.superlink is not None
    found = [p for p in cluster.superlink.children(recursive=True) if "serverapp" in " ".join(p.cmdline())]
    return found[-1]


def test_a_server_that_dies(tmp_path: Path, hospitals: list[dict[str, Any]], undisturbed: dict[str, Any]) -> None:
    with running(tmp_path) as cluster:
        for spec in hospitals:
            cluster.start_node(spec)
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
        assert {key: value for key, value in results.items() if key != "seconds"} == undisturbed
