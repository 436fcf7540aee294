"""What the benchmarks measure with, and that they run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import lora, measure, step
from benchmarks.workload import client
from tap_flower.models.backbones import bfloat16_products

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent


def test_operations_are_counted_as_by_hand() -> None:
    a, b = torch.randn(3, 5, requires_grad=True), torch.randn(5, 7, requires_grad=True)
    assert measure.count_flop(lambda: a @ b) == 2 * 3 * 5 * 7
    assert measure.count_flop(lambda: (a @ b).sum().backward()) == 3 * 2 * 3 * 5 * 7
    query = torch.randn(2, 4, 6, 8, requires_grad=True)
    attend = torch.nn.functional.scaled_dot_product_attention
    forward = (
        2 * (2 * 4 * 6 * 6 * 8) * 2
    )  # two products of [6, 8] and [8, 6], or [6, 6] and [6, 8], for each of 8 heads
    assert measure.count_flop(lambda: attend(query, query, query)) == forward
    assert measure.count_flop(lambda: attend(query, query, query).sum().backward()) == forward * 7 // 2


def test_a_step_costs_what_its_products_cost() -> None:
    """The frozen encoder needs no gradient of its weights: forward and backward cost about the same."""
    local = client("flava", "tiny", 0, 2, 8)
    model = local.model()
    batch = local.data.batch(local.holdings.spec.tasks[0], 2, torch.Generator().manual_seed(0), CPU)
    forward = measure.count_flop(lambda: model(batch.task, batch.inputs))
    both = measure.count_flop(lambda: step.one_step(local, model, batch))
    assert 1.9 < both / forward < 2.6


def test_peak_memory_is_of_the_time_since_it_was_reset() -> None:
    """Freed memory stays with the process, here in a hole that the next tensor does not fit into: it must not count."""
    code = """
import torch
from benchmarks import measure
cpu = torch.device("cpu")
held = torch.ones(512 << 20, dtype=torch.uint8)
behind = torch.ones(1 << 20, dtype=torch.uint8)
before = measure.peak_bytes(cpu)
del held
measure.reset_peak(cpu)
held = torch.ones(768 << 20, dtype=torch.uint8)
print(measure.peak_bytes(cpu) - before >> 20)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 200 < int(done.stdout) < 300


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_is_measured(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "step.json"
    arguments = ["--model", "vilt", "--size", "tiny", "--repeats", "1", "--dtype", dtype, "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["step", *arguments])
    step.main()
    rows = json.loads(file.read_text())["rows"]
    assert [row["task"] for row in rows] == ["image_generation", "agnews_text_classification", "all"]
    for row in rows:
        assert row["GFLOP/s"] == pytest.approx(row["GFLOP"] / row["seconds"])
        assert row["share"] > 0
        if dtype == "float32" or bfloat16_products():
            assert row["share"] < 2


def test_lora_is_compared_with_plain_operations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "SHAPES", ((2, 8, 6, 4),))
    monkeypatch.setattr(sys, "argv", ["lora", "--json", str(tmp_path / "lora.json")])
    lora.main()
    (row,) = json.loads((tmp_path / "lora.json").read_text())["rows"]
    assert row["ratio"] == pytest.approx(row["ours ms"] / row["plain ms"])
