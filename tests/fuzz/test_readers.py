"""Whatever comes, a reader takes it or says what is wrong: 20,000 inputs and more, valid ones made wrong and raw bytes."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from . import coverage_guided
from .corruption import corrupted
from .readers import Reader, readers

INPUTS = {
    "instruction": 800, "manifest": 1600, "report": 800, "metrics": 600, "hyper_parameters": 100, "record": 800,
    "array float32": 800, "array bfloat16": 500, "array int8": 500,
    "personal": 500, "server": 300, "second stage": 300, "checkpoint": 500, "tensors": 300, "json": 300,
    "decisions": 300, "description": 150, "spec": 600, "config": 50, "setting": 50,
}  # fmt: skip
"""Reader -> how many inputs it is given."""


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Reader]]:
    with pytest.MonkeyPatch.context() as patch:
        yield readers(tmp_path_factory.mktemp("readers"), patch)


def test_every_reader_has_inputs(every: dict[str, Reader]) -> None:
    assert INPUTS.keys() == every.keys()
    assert sum(INPUTS.values()) + coverage_guided.RUNS >= 20_000


@pytest.mark.parametrize("name", INPUTS)
def test_a_reader_takes_what_is_valid(every: dict[str, Reader], name: str) -> None:
    if name != "record":  # each of its messages is for one of the decoders only
        assert all(every[name].attempt(data) for data in every[name].valid)


@pytest.mark.parametrize("share", [0.05, pytest.param(1.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", INPUTS)
def test_whatever_comes_is_read_or_refused(
    every: dict[str, Reader], name: str, share: float, record_property: pytest.RecordProperty
) -> None:
    reader, count, taken, refused = every[name], max(5, round(share * INPUTS[name])), 0, 0

    @settings(
        max_examples=count,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.one_of(*[st.integers(0, 2**64).map(lambda seed: corrupted(reader, seed))] * 9, st.binary(max_size=100)))
    def attempt(data: bytes) -> None:
        nonlocal taken, refused
        if reader.attempt(data):
            taken += 1
        else:
            refused += 1

    attempt()
    record_property("inputs", taken + refused)
    print(f"{name}: {taken + refused} inputs, {refused} refused")
    assert taken + refused >= count
    # The inputs are wrong, and seen to be; of few, a tenth may not be.
    assert name in ("server", "record") or refused > (count // 10 if share == 1 else 0)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris has no wheel for this platform")
def test_inputs_that_reach_new_code_are_read_or_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", coverage_guided.__name__, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert f"Done {coverage_guided.RUNS} runs" in done.stderr
