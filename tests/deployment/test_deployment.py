"""A deployment as docs/deploy.md has it, to the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tap_flower.storage import read_tensors

from .cluster import running

pytestmark = [pytest.mark.flwr, pytest.mark.xdist_group("deployment")]


def test_a_deployment(tmp_path: Path, hospitals: list[dict[str, Any]], undisturbed: dict[str, Any]) -> None:
    with running(tmp_path) as cluster:
        for spec in hospitals:
            cluster.start_node(spec)
        cluster.start_node({**hospitals[0], "name": "intruder"}, registered=False)
        cluster.submit()
        results = cluster.results()
        assert cluster.wait_for_the_end() == "finished:completed"
        assert {key: value for key, value in results.items() if key != "seconds"} == undisturbed
        assert set(results["clients"]) == {"ann", "bob", "cleo"}
        for name, task in (("ann", "languages"), ("bob", "shapes"), ("cleo", "translation")):
            assert set(results["clients"][name][task]) == {"server", "server+finetune", "personal", "tap"}
            (run,) = (tmp_path / "state" / name).iterdir()
            personal, record = read_tensors(run / "personal.safetensors")
            assert record["round"] == 3
            tap, _ = read_tensors(run / "tap.safetensors")
            assert tap.keys() == personal.keys()
            assert any((tap[n] != personal[n]).any() for n in tap)
        assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["ann", "bob", "cleo"]
        assert not (cluster.out / "clients").exists()
