"""Benchmarks that read the folders of finished runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import evidence, stage_two
from tests.federations import CLIENTS, Federation, federation_of_specs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    """A finished run of a client with two tasks and of one with one, which mixes."""
    federation = federation_of_specs(tmp_path_factory.mktemp("run"), CLIENTS[:2], "method=tap", "replacement.mode=mix")
    federation.strategy().start(federation.grid())
    return federation


def test_stage_two_is_made_again_in_every_way(run: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.json"
    monkeypatch.setattr("sys.argv", ["stage_two", str(run.out), "--steps", "2", "--json", str(file)])
    stage_two.main()
    rows = {row["way"]: row for row in json.loads(file.read_text())["rows"]}
    assert rows.keys() >= {*stage_two.WAYS, "the server's model", "FedAvg + fine-tuning, mixed"}
    # What the run itself has made and tested.
    tasks = json.loads((run.out / "results.json").read_text())["tasks"]
    for way, model in (("the server's model", "server"), ("distillation", "tap")):
        scores = [tasks["languages"][model]["accuracy"], 1 - tasks["shape_images"][model]["mse"]]
        assert float(rows[way]["score"]) == pytest.approx(sum(scores) / 2, abs=2e-4)


def test_decisions_on_few_rows_are_compared_with_those_on_many(
    run: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "rows.json"
    monkeypatch.setattr("sys.argv", ["evidence", str(run.out), "--json", str(file)])
    evidence.main()
    rows = {row["kind"]: row for row in json.loads(file.read_text())["rows"]}
    assert {kind: row["pairs"] for kind, row in rows.items()} == {
        "text_classification": 2, "image_generation": 1, "all": 3,
    }  # fmt: skip
