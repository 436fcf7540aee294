"""`benchmarks.simulation`: the table, what frameworks are given, and two of the ways in one process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.simulation import command, small_cnn

ROOT = Path(__file__).parent.parent


def told(*seconds: float, loss: float = 1.0) -> dict[str, Any]:
    return {"version": "1.2", "torch": "2.13", "seconds": list(seconds), "loss": loss}


def test_a_row_is_the_median_over_rounds_after_the_first_and_a_ratio_to_flowers_own_simulation() -> None:
    found = {
        "flower-ray": [told(9.0, 2.0, 4.0, 3.0), told(9.0, 5.0), told(9.0, 1.0)],
        "tap-ray": [told(9.0, 6.0)],
        "tap": [],
        "pfl": [{"note": "left out: no --pfl-python"}],
    }
    flower, tap, pfl = command.table(found)
    assert (flower["s a round"], flower["least"], flower["most"], flower["ratio"]) == (3.0, 1.0, 5.0, 1.0)
    assert (tap["s a round"], tap["ratio"]) == (6.0, 2.0)
    left_out = {"framework": "pfl-research", "clients are": "in one process", "note": "left out: no --pfl-python"}
    assert pfl == left_out


def test_clients_have_images_of_their_own_that_can_be_learned() -> None:
    torch.manual_seed(0)
    net, batches = small_cnn.SmallCnn(), small_cnn.loader(0, 200, 20)
    assert len(batches) == 10
    assert sum(parameter.numel() for parameter in net.parameters()) == 28_948  # as the command's description says
    x, _ = small_cnn.images(1, 200)
    assert torch.equal(x[:20], next(iter(batches))[0])
    assert not torch.equal(x, small_cnn.images(2, 200)[0])
    before = small_cnn.held_out_loss(net)
    for client in range(5):
        small_cnn.train(net, small_cnn.loader(client, 200, 20))
    assert small_cnn.held_out_loss(net) < before - 0.05


def test_a_framework_that_fails_is_a_note_with_its_last_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "HERE", tmp_path)
    (tmp_path / "run_it.py").write_text("raise SystemExit('no such package')")
    asked = small_cnn.Asked(3, 2, 2, 1, 2, 1, ray=False)
    assert command.run(command.Way("It", "run_it.py"), sys.executable, asked, 300) == {"note": "no such package"}


@pytest.mark.slow
def test_flower_and_tap_run_in_one_process(tmp_path: Path) -> None:
    sizes = ["--clients", "3", "--sample", "2", "--rounds", "3", "--steps", "2", "--batch", "4", "--repeats", "1"]
    arguments = ["--ways", "flower", "tap", "pfl", *sizes, "--json", str(tmp_path / "rows.json")]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.simulation", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    file = json.loads((tmp_path / "rows.json").read_text())
    assert {name: len(runs[0].get("seconds", [])) for name, runs in file["runs"].items()} == {
        "flower": 3,
        "tap": 3,
        "pfl": 0,
    }
    assert "left out: no --pfl-python" in done.stdout
