"""What the benchmarks measure with, and that they run."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import lora, measure, parity, plug_in, step
from benchmarks.workload import client
from tap_flower.models import cpu
from tap_flower.models.lora import lora_linear

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent


class Clock:
    """A clock that only moves when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def taking(self, *seconds: float) -> Callable[[], None]:
        """A function whose calls take these seconds, one after the other, and again from the first."""
        durations = iter(list(seconds) * 100)

        def run() -> None:
            self.now += next(durations)

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=made))
    return made


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


def test_the_operations_of_adapters_are_those_of_three_products() -> None:
    """[9, 6] by [6, 4] in the frozen map, [9, 6] by [6, 8] and [9, 8] by [8, 4] in the adapter, for each of two."""
    loras, x = lora.adapters(stack=2, size=6, features=4), torch.randn(2, 9, 6)
    for adapter in loras:
        adapter.eval()
    expected = 2 * 2 * 9 * (6 * 4 + 6 * 8 + 8 * 4)
    assert measure.count_flop(lambda: lora_linear(loras, x)) == expected


def test_a_step_costs_what_its_products_cost() -> None:
    """The frozen encoder needs no gradient of its weights: forward and backward cost about the same."""
    local = client("flava", "tiny", 0, 2, 8)
    model = local.model()
    (batch,) = step.batches_of(local, 2)
    forward = measure.count_flop(lambda: model(batch.task, batch.inputs))
    both = measure.count_flop(lambda: step.one_step(local, model, batch))
    assert 1.9 < both / forward < 2.6


@pytest.mark.slow
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


def test_seconds_are_the_median_without_the_first_run(clock: Clock) -> None:
    assert measure.once(clock.taking(7.0), CPU) == 7
    assert measure.seconds(clock.taking(100.0, 1.0, 4.0, 2.0), CPU, 3) == 2


@pytest.mark.parametrize("speed", [1e12, 1e9])
def test_the_speed_of_a_product_is_found_on_fast_and_slow_machines(
    speed: float, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = []

    def mm(a: Tensor, b: Tensor, out: Tensor) -> None:
        sides.append(len(a))
        clock.now += 2 * len(a) ** 3 / speed

    monkeypatch.setattr(torch, "mm", mm)
    assert measure.matmul_speed(torch.float32, CPU) == pytest.approx(speed)
    # On the slow one the product of side 1024 would take 2.1 s.
    assert max(sides) == (2048 if speed == 1e12 else 512)


def test_a_row_of_a_step_is_as_by_hand(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, took = torch.randn(3, 5), torch.randn(5, 7), clock.taking(0.5)

    def run() -> None:
        torch.mm(a, b)
        took()

    speeds = iter([1000.0, 3000.0] * 3)
    monkeypatch.setattr(step, "matmul_speed", lambda dtype, device: next(speeds))
    peaks = iter([4e9, 6e9, 5e9])
    monkeypatch.setattr(step, "peak_bytes", lambda device: next(peaks))
    row = step.measured(run, torch.float32, CPU, 3)
    # 210 operations in half a second are 420 a second, of 2000 on average.
    assert row == {
        "GFLOP": pytest.approx(210e-9),
        "seconds": 0.5,
        "GFLOP/s": pytest.approx(420e-9),
        "share": pytest.approx(0.21),
        "peak GB": 6.0,
    }
    speeds, peaks = iter([1000.0, 3000.0]), iter([1e9])
    assert step.measured(run, torch.float32, CPU, 1, flop=1000)["share"] == pytest.approx(1.0)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_step_is_measured(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "step.json"
    arguments = ["--model", "vilt", "--size", "tiny", "--batch", "1", "--length", "8", "--repeats", "1"]
    arguments += ["--dtype", dtype, "--json", str(file)]
    asked = []

    def matmul_speed(dtype: torch.dtype, device: torch.device) -> float:
        asked.append((dtype, device))
        return 1e12

    monkeypatch.setattr(step, "matmul_speed", matmul_speed)
    monkeypatch.setattr(sys, "argv", ["step", *arguments])
    step.main()
    image, text, both = json.loads(file.read_text())["rows"]
    assert [row["task"] for row in (image, text, both)] == ["image_generation", "agnews_text_classification", "all"]
    assert both["GFLOP"] == pytest.approx(image["GFLOP"] + text["GFLOP"])
    assert image["GFLOP"] > text["GFLOP"] > 0  # 50 tokens and an image to generate, against 8
    assert all(row["seconds"] > 0 and row["peak GB"] > 0.05 for row in (image, text, both))
    assert set(asked) == {(getattr(torch, dtype), CPU)}


def test_the_two_forms_of_lora_that_are_compared_give_equal_results() -> None:
    torch.manual_seed(0)
    loras, x = lora.adapters(stack=2, size=6, features=4, dropout=0.0), torch.randn(2, 9, 6, requires_grad=True)
    parameters = [x, *(p for adapter in loras for p in (adapter.A, adapter.B))]
    weights = torch.randn(2, 9, 4)
    outputs = [run(loras, x) for run in (lora.ours, lora.plain)]
    torch.testing.assert_close(*outputs)
    gradients = [torch.autograd.grad((output * weights).sum(), parameters) for output in outputs]
    for ours, plain in zip(*gradients, strict=True):
        assert plain.abs().max() > 0.1
        torch.testing.assert_close(ours, plain)


def test_lora_is_compared_with_plain_operations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(run: partial[None], device: torch.device, repeats: int) -> float:
        run()
        assert all(adapter.A.grad is not None for adapter in run.args[1])
        return {lora.ours: 0.003, lora.plain: 0.006}[run.args[0]]

    monkeypatch.setattr(lora, "seconds", seconds)
    monkeypatch.setattr(lora, "SHAPES", ((2, 8, 6, 4),))
    monkeypatch.setattr(sys, "argv", ["lora", "--json", str(tmp_path / "lora.json")])
    lora.main()
    (row,) = json.loads((tmp_path / "lora.json").read_text())["rows"]
    assert row == {"shape": "[2, 8, 6] -> 4", "ours ms": 3.0, "plain ms": 6.0, "ratio": 0.5}


def test_a_plug_in_client_is_compared_with_flowers_fedavg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plug_in, "MODELS", {"linear": lambda: torch.nn.Linear(3072, plug_in.CLASSES)})
    few = ["--clients", "2", "--rounds", "2", "--steps", "1", "--repeats", "2"]
    monkeypatch.setattr(sys, "argv", ["plug_in", *few, "--json", str(tmp_path / "rows.json")])
    plug_in.main()
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [(row["loop"], row["method"]) for row in rows] == [
        ("own", "fedavg"), ("own", "tap"), ("ours", "fedavg"), ("ours", "tap"),
    ]  # fmt: skip
    assert all(row["ratio"] > 0 and row["s"] > 0 for row in rows)


def test_a_table_has_a_column_for_what_any_row_has() -> None:
    rows: list[Mapping[str, Any]] = [{"batch": 8, "share": 0.123456}, {"batch": 64, "note": "out of memory"}]
    assert measure.markdown(rows).splitlines() == [
        "| batch | share | note |",
        "| --- | --- | --- |",
        "| 8 | 0.1235 |  |",
        "| 64 |  | out of memory |",
    ]


# --- Parity ---------------------------------------------------------------------------------------


def test_a_deviation_is_relative_where_values_are_large() -> None:
    reference = torch.tensor([0.5, -20.0])
    assert parity.deviation(torch.tensor([0.6, -20.0]), reference) == pytest.approx(0.1)
    assert parity.deviation(torch.tensor([0.5, -10.0]), reference) == pytest.approx(0.5)
    assert parity.deviation(torch.tensor([0.5, math.nan]), reference) == math.inf
    with pytest.raises(ValueError, match=r"shape \(1,\), its reference \(2,\)"):
        parity.deviation(torch.zeros(1), reference)


def test_a_deviation_of_gradients_is_that_of_the_worst_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([0.0, 2.0])}
    found = {"a": torch.tensor([3.0, 4.1]), "b": torch.tensor([0.1, 2.0])}
    with pytest.raises(ValueError, match="2 gradients are compared, fewer than 50"):
        parity.gradient_deviation(found, reference)
    monkeypatch.setattr(parity, "FEWEST_GRADIENTS", 2)
    assert parity.gradient_deviation(found, reference) == pytest.approx(0.05)  # 0.1 of 5, and 0.1 of 2
    assert parity.gradient_deviation({"a": found["a"]}, reference) == math.inf
    assert parity.norm_deviation(reference, {"a": 5.0, "b": 1.6, "c": None}) == pytest.approx(0.25)
    assert parity.norm_deviation(reference, {"a": 5.0, "b": None}) == math.inf
    assert parity.norm_deviation(reference, {"a": 5.0, "b": 2.0, "c": 1.0}) == math.inf
    # A norm of 1e-9 that should be 0 is 1e-4 of the smallest one that counts.
    assert parity.relative(1e-9, 0.0) == pytest.approx(1e-4)


def test_only_float32_is_judged() -> None:
    rows = [
        {"case": "a", "task": "t", "dtype": "float32", "cpu: values": 9e-5, "cpu: gradients": 2e-4, "limit": ""},
        {"case": "a", "task": "t", "dtype": "bfloat16", "cpu: values": 0.1, "cpu: gradients": 0.1, "limit": ""},
        {"case": "b", "task": "t", "dtype": "float32", "cpu: values": math.inf, "cpu: gradients": 0.0, "limit": ""},
    ]
    first, second = parity.problems(rows)
    assert first == "a: task 't': cpu: gradients deviates by 0.0002 in float32, not by less than 0.0001"
    assert second.startswith("b: task 't': cpu: values deviates by inf")


def test_a_wrong_kernel_of_training_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The golden numbers are of evaluation mode and cannot tell; the comparison with the CPU's evaluation mode does."""
    right = cpu._frozen_backward
    monkeypatch.setattr(cpu, "_frozen_backward", lambda *arguments: right(*arguments) * 1.001)
    case = next(case for case in parity.cases(parity.GOLDEN) if case.folder.name == "flava_p1_l1")
    row = next(iter(parity.compare(case, CPU)))
    assert row["limit"] == "NOT BELOW"
    (problem,) = parity.problems([row])
    assert problem.startswith("flava_p1_l1: task 'agnews_text_classification': cpu: gradients deviates by 0.00")
