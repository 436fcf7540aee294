"""Sweeps that are really run, each run in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from tap_flower.report.results import read_results
from tap_flower.run.resources import Machine
from tap_flower.server.strategy import TapStrategy
from tap_flower.study.execute import Outcome, _context, _parts, execute
from tap_flower.study.plan import PlannedRun, read_sweep
from tests.grid import InProcessGrid


def numbers(run: PlannedRun) -> dict[str, Any]:
    return {key: value for key, value in read_results(run.folder).items() if key != "seconds"}


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    found: dict[str, float] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def here(run: PlannedRun, folder: Path) -> dict[str, Any]:
    """The same run in this process, as the tests of the federation do it."""
    run_config = {"preset": run.preset, "config": run.config, "set": " ".join(run.settings), "out": str(folder)}
    grid = InProcessGrid([{"partition-id": n} for n in range(2)], run_config)
    found = TapStrategy(config=run.resolved, run_folder=folder).start(grid).summary
    return {key: value for key, value in found.items() if key != "seconds"}


@pytest.mark.slow
def test_runs_give_the_numbers_of_any_other_runtime(write_sweep: Any, tmp_path: Path) -> None:
    """`tests/test_end_to_end.py` shows that Flower's own processes give these numbers, too."""
    sweep = read_sweep(write_sweep(seeds=[5], methods=["tap", "fedavg"]), tmp_path / "out")
    outcomes: list[Outcome] = []
    execute(sweep.runs, 2, Machine(2, 0), outcomes.append)
    assert sorted(o.run.label for o in outcomes) == ["fedavg", "tap"]
    assert not any(o.problem for o in outcomes)
    for run in sweep.runs:
        assert numbers(run) == here(run, tmp_path / "here" / run.label)
    execute(sweep.runs, 2, Machine(2, 0), outcomes.append)
    assert len(outcomes) == 2  # all were there


def has_imported_a_run() -> None:
    sys.exit("tap_flower.study.worker" not in sys.modules)


@pytest.mark.slow
@pytest.mark.parametrize(("gpus", "exit_status"), [(0, 0), (1, 1)])
def test_without_gpus_a_process_begins_with_what_a_run_imports(gpus: int, exit_status: int) -> None:
    process = _context(Machine(2, gpus)).Process(target=has_imported_a_run)
    process.start()
    process.join(120)
    assert process.exitcode == exit_status


@pytest.mark.slow
def test_a_failed_run_leaves_the_others_alone(write_sweep: Any, tmp_path: Path) -> None:
    broken, good = read_sweep(write_sweep(seeds=[5], methods=["tap", "fedavg"]), tmp_path / "out").runs
    runs = [replace(broken, config=str(tmp_path / "gone.yaml")), good]
    outcomes: dict[str, Outcome] = {}
    # As on a machine with a GPU, where processes are not forked.
    execute(runs, 1, Machine(2, 1), lambda outcome: outcomes.__setitem__(outcome.run.label, outcome))
    assert outcomes["fedavg"].problem == ""
    assert outcomes["tap"].problem.startswith("exit status 1, see ")
    log = Path(outcomes["tap"].problem.removeprefix("exit status 1, see "))
    assert "gone.yaml" in log.read_text()


@pytest.mark.slow
def test_a_killed_sweep_loses_at_most_the_run_in_progress(write_sweep: Any, tmp_path: Path) -> None:
    file, out = write_sweep(seeds=[5], methods=["fedavg", "tap"], set={"rounds": 4}), tmp_path / "out"
    command = [sys.executable, "-c", "from tap_flower.cli import main; main()", "sweep", str(file), "--out", str(out)]
    command += ["--jobs", "1"]
    sweep = read_sweep(file, out)
    first, second = sweep.runs
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ})
    checkpoint = second.folder / "server" / "server.safetensors"
    deadline = time.monotonic() + 300
    while not checkpoint.exists():
        assert process.poll() is None, process.communicate()[0].decode()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    psutil.wait_procs(children, 30)
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    assert first.done
    assert not second.done
    kept = (first.folder / "results.json").stat().st_mtime_ns
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (first.folder / "results.json").stat().st_mtime_ns == kept
    # Sums are added in another order with another number of threads.
    assert flat(numbers(second)["tasks"]) == pytest.approx(flat(here(second, tmp_path / "here")["tasks"]), rel=1e-4)
    assert "2 runs, 1 of them finished" in done.stdout
    assert {"table.md", "table.csv", "table.tex"} <= {path.name for path in out.iterdir()}
    assert "languages" in (out / "table.md").read_text()


@pytest.mark.parametrize(
    ("jobs", "machine", "expected"),
    [
        (2, Machine(8, 0), [("4", None), ("4", None)]),
        (3, Machine(2, 0), [("1", None)] * 3),
        (4, Machine(8, 2), [("2", "0"), ("2", "1"), ("2", "0"), ("2", "1")]),
    ],
)
def test_runs_share_the_machine(jobs: int, machine: Machine, expected: list[tuple[str, str | None]]) -> None:
    found = [(e["OMP_NUM_THREADS"], e.get("CUDA_VISIBLE_DEVICES")) for e in _parts(jobs, machine)]
    assert found == expected
