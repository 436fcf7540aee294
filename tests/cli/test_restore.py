"""`tap-flower restore`, and the state that a node keeps for it."""

from __future__ import annotations

from typing import Any

import pytest
from typer.testing import CliRunner

from tap_flower.cli import app
from tap_flower.client.state import PERSONAL
from tap_flower.files import read_record
from tests.federations import ToyFederation
from tests.grid import InProcessGrid


def keeping(federation: ToyFederation) -> InProcessGrid:
    nodes: list[dict[str, Any]] = [{"partition-id": i, "keep-best": True} for i in range(4)]
    return InProcessGrid(nodes, {}, federation.grid().app)


def test_a_node_keeps_its_best_state_and_goes_back_to_it(federation: ToyFederation) -> None:
    federation.settings.append("rounds=4")
    federation.strategy().start(keeping(federation))
    folder = federation.state("bob")
    best = read_record(folder / "personal.kept.safetensors")
    assert best["score"] >= read_record(folder / PERSONAL)["score"]
    done = CliRunner().invoke(app, ["restore", str(folder), "--best"])
    assert done.exit_code == 0, done.output
    assert f"back from round 4 to round {best['round']}" in " ".join(done.output.split())
    assert read_record(folder / PERSONAL) == best


@pytest.mark.parametrize("damaged", [True, False])
def test_going_back_from_a_state_that_is_damaged_or_missing(federation: ToyFederation, damaged: bool) -> None:
    federation.strategy().start(federation.grid())
    folder = federation.state("bob")
    (folder / PERSONAL).unlink()
    if damaged:
        (folder / PERSONAL).write_bytes(b"torn")
    done = CliRunner().invoke(app, ["restore", str(folder)])
    assert done.exit_code == 0, done.output
    assert ("back to round 1; the damaged state is in personal.undone" in " ".join(done.output.split())) == damaged
    assert read_record(folder / PERSONAL)["round"] == 1
    assert (folder / "personal.undone.safetensors").exists() == damaged


def test_going_back_a_round(federation: ToyFederation) -> None:
    federation.strategy().start(federation.grid())
    assert not (federation.state("bob") / "personal.kept.safetensors").exists()
    done = CliRunner().invoke(app, ["restore", str(federation.state("bob"))])
    assert "back from round 2 to round 1" in " ".join(done.output.split())
    assert read_record(federation.state("bob") / PERSONAL)["round"] == 1
    assert "what stage 2 has made stays as it is, and `predict` goes on using it: server+finetune, tap" in " ".join(
        done.output.split()
    )
