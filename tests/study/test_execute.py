"""Sweeps that are really run, each run in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.cluster_utils import Cluster
from ray.exceptions import WorkerCrashedError

from tap_flower.config import to_yaml
from tap_flower.errors import ConfigError, SimulationError
from tap_flower.report.results import read_results
from tap_flower.run.resources import Machine
from tap_flower.server.strategy import TapStrategy
from tap_flower.study.execute import Outcome, Share, _keep, _outcome, cluster, execute, share_of
from tap_flower.study.plan import PlannedRun, read_sweep
from tap_flower.study.worker import Task, _own_folder, run_task
from tests.grid import InProcessGrid

PATIENCE = 1800.0
"""Seconds after which what is waited for has failed; the machine may be busy with other tests."""


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
    runs = read_sweep(write_sweep(seeds=[5], methods=["tap", "fedavg"]), tmp_path / "out").runs
    file = tmp_path / "broken.yaml"
    file.write_text((tmp_path / "clients.yaml").read_text().replace("names", "gone"))
    broken = replace(runs[0], label="broken", config=str(file), folder=tmp_path / "out" / "broken" / "seed-5")
    outcomes: dict[str, Outcome] = {}
    with cluster() as machines:
        execute([broken, *runs], share_of(machines, 3, None, 0), lambda o: outcomes.__setitem__(o.run.label, o))
        assert outcomes["broken"].problem.startswith(
            "RunError: node 100 cannot take part: client 'ann': "
        )  # and leaves the others alone
        assert outcomes["broken"].problem.endswith(f", see {broken.log}")
        assert "Traceback" in broken.log.read_text()
        assert [outcomes[label].problem for label in ("tap", "fedavg")] == ["", ""]
        again: list[Outcome] = []
        execute(runs, Share(1, 0), again.append)
        assert again == []  # all were there
    for run in runs:
        assert numbers(run) == here(run, tmp_path / "here" / run.label)


@pytest.mark.slow
def test_a_cluster_of_two_machines_runs_again_what_was_killed(write_sweep: Any, tmp_path: Path) -> None:
    """Each machine has room for one run. Both processes are killed after a round of `tap`, and then a machine."""
    runs = read_sweep(write_sweep(seeds=[5], methods=["tap", "fedavg"], set={"rounds": 8}), tmp_path / "out").runs
    options = {"num_cpus": 1, "object_store_memory": 10**8}
    two = Cluster(initialize_head=True, head_node_args=options)
    second = two.add_node(**options)
    outcomes: list[Outcome] = []
    killed: list[int] = []
    open_then: list[bool] = []

    def kill_workers() -> None:
        """Kills all processes of runs, and a machine once both runs are at work again."""
        wait_for(runs[0].folder / "server" / "server.safetensors")
        killed.extend(process.pid for process in workers())
        for process in workers():
            process.kill()
        wait_for(runs[1].folder / "server" / "server.safetensors")
        open_then.extend(not run.done for run in runs)
        two.remove_node(second)

    try:
        with cluster(two.address) as machines:
            assert machines == [Machine(1, 0), Machine(1, 0)]
            with pytest.raises(ConfigError, match="no machine has room for a run with 2 cores and 0 GPUs: the largest"):
                share_of(machines, 2, 2, None)
            killer = threading.Thread(target=kill_workers)
            killer.start()
            execute(runs, share_of(machines, 2, None, None), outcomes.append)
            killer.join()
    finally:
        two.shutdown()
    assert killed
    assert open_then == [True, True]
    assert [outcome.problem for outcome in outcomes] == ["", ""]
    for run in runs:
        assert numbers(run) == here(run, tmp_path / "here" / run.label)


def workers() -> list[psutil.Process]:
    """Processes that execute a run."""
    return [p for p in psutil.process_iter(["cmdline"]) if "ray::run_task" in " ".join(p.info["cmdline"] or [])]


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_a_machine_without_the_folder_sends_its_results_back(write_sweep: Any, tmp_path: Path) -> None:
    (run,) = read_sweep(write_sweep(seeds=[5], methods=["local"]), tmp_path / "out").runs
    elsewhere = str(tmp_path / "not" / "here" / "seed-5")
    task = Task(run.preset, to_yaml(run.resolved), elsewhere, f"{elsewhere}.log", "run 1", str(tmp_path), 1)
    _, problem, files = run_task(task)
    assert problem == ""
    assert files.keys() == {"", "config.yaml", "metrics.jsonl", "results.json"}
    assert json.loads(files["results.json"])["clients"].keys() == {"ann", "bob"}
    assert not Path(elsewhere).parent.exists()
    assert not list(Path(tempfile.gettempdir()).glob(_own_folder(task).name))
    _keep(run, files)
    assert run.done
    assert numbers(run) == here(run, tmp_path / "here")


@pytest.mark.slow
def test_a_killed_sweep_loses_at_most_the_run_in_progress(write_sweep: Any, tmp_path: Path) -> None:
    file, out = write_sweep(seeds=[5], methods=["fedavg", "tap"], set={"rounds": 4}), tmp_path / "out"
    command = [sys.executable, "-c", "from tap_flower.cli import main; main()", "sweep", str(file), "--out", str(out)]
    command += ["--cpus-per-run", "2"]
    sweep = read_sweep(file, out)
    first, second = sweep.runs
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ})
    checkpoint = second.folder / "server" / "server.safetensors"
    deadline = time.monotonic() + PATIENCE
    while not checkpoint.exists():
        assert process.poll() is None, process.communicate()[0].decode()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    process.wait(PATIENCE)
    psutil.wait_procs(children, PATIENCE)
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
    ("machines", "runs", "wanted", "expected"),
    [
        ([Machine(8, 0)], 2, (None, None), Share(4, 0)),
        ([Machine(2, 0)], 5, (None, None), Share(1, 0)),
        ([Machine(2, 0)], 5, (2, None), Share(2, 0)),
        ([Machine(8, 2)], 4, (None, None), Share(4, 1)),
        ([Machine(8, 2)], 4, (None, 0.5), Share(2, 0.5)),
        ([Machine(8, 2), Machine(64, 0)], 4, (None, None), Share(4, 1)),
        ([Machine(4, 0), Machine(2, 0)], 1, (None, None), Share(4, 0)),
    ],
)
def test_runs_share_the_machines(
    machines: list[Machine], runs: int, wanted: tuple[int | None, float | None], expected: Share
) -> None:
    assert share_of(machines, runs, *wanted) == expected


@pytest.mark.parametrize("gpus", [1.5, -1.0])
def test_a_share_of_gpus_that_cannot_be_had_is_an_error(gpus: float) -> None:
    with pytest.raises(ConfigError, match=f"--gpus-per-run {gpus:g}: choose a part of one GPU"):
        share_of([Machine(8, 4)], 2, None, gpus)


def test_a_cluster_that_is_not_there_is_an_error_with_a_remedy() -> None:
    with pytest.raises(ConfigError, match="there is no Ray cluster at '127.0.0.1:1' .* start it with `ray start`"):
        cluster("127.0.0.1:1").__enter__()


def test_a_run_whose_process_is_killed_again_and_again_has_failed(
    write_sweep: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run,) = read_sweep(write_sweep(seeds=[5], methods=["local"]), tmp_path / "out").runs

    def killed(_: Any) -> Any:
        raise WorkerCrashedError

    monkeypatch.setattr("ray.get", killed)
    outcome = _outcome(run, object())
    assert outcome.problem.startswith("WorkerCrashedError: The worker died unexpectedly")
    assert outcome.problem.endswith(f"see {run.log}")


def test_a_cluster_that_cannot_be_started_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**options: Any) -> None:
        assert options["_temp_dir"] == "/short/ray"
        raise RuntimeError("no room in /dev/shm")

    monkeypatch.setenv("RAY_TMPDIR", "/short")
    monkeypatch.setattr("ray.init", broken)
    with pytest.raises(SimulationError, match="Ray does not start: no room in /dev/shm"):
        cluster().__enter__()
