"""Runs what is missing of a sweep: several runs at once, each in a process of its own, on one part of the machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Lock

from tap_flower.resources import Machine
from tap_flower.simulation import ends_when_told
from tap_flower.sweeps.plan import PlannedRun

_PATIENCE = 10.0
"""Seconds that a run has to end before it is killed."""


@dataclass(frozen=True)
class Outcome:
    """What became of a run.

    Attributes:
        run: which.
        seconds: that it took.
        problem: why it failed, or nothing.
    """

    run: PlannedRun
    seconds: float
    problem: str


def execute(runs: Sequence[PlannedRun], jobs: int, machine: Machine, finished: Callable[[Outcome], None]) -> None:
    """Runs all that are not done yet.

    What was begun goes on from its last complete round. A failure leaves the others alone.

    Args:
        runs: in the order in which they start.
        jobs: how many run at once.
        machine: its cores and GPUs are shared among them.
        finished: is called with each run's outcome, in the thread of the caller.
    """
    processes = _Processes(jobs, machine)
    with ends_when_told(), ThreadPoolExecutor(jobs) as pool:
        waiting = {pool.submit(processes.run, run) for run in runs if not run.done}
        try:
            while waiting:
                ended, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for one in ended:
                    finished(one.result())
        finally:
            for one in waiting:
                one.cancel()
            processes.end()


class _Processes:
    """The processes of a sweep, each in a slot that is a part of the machine."""

    def __init__(self, jobs: int, machine: Machine) -> None:
        self._environments: SimpleQueue[dict[str, str]] = SimpleQueue()
        for environment in _environments(jobs, machine):
            self._environments.put(environment)
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock, self._ended = Lock(), False

    def run(self, run: PlannedRun) -> Outcome:
        """Runs one, and waits for it."""
        environment, began = self._environments.get(), time.monotonic()
        try:
            code = self._wait(run, {**os.environ, **environment})
        finally:
            self._environments.put(environment)
        problem = "" if run.done else f"exit status {code}, see {_log(run)}"
        return Outcome(run, time.monotonic() - began, problem)

    def end(self) -> None:
        """Ends what is running; nothing more is started."""
        with self._lock:
            self._ended, running = True, list(self._running)
        for process in running:
            process.terminate()
        deadline = time.monotonic() + _PATIENCE
        for process in running:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()

    def _wait(self, run: PlannedRun, environment: dict[str, str]) -> int:
        resume = (run.folder / "server" / "server.safetensors").exists()
        if not resume and run.folder.exists():
            shutil.rmtree(run.folder)  # it ended before its first complete round
        command = [sys.executable, "-m", "tap_flower.sweeps.worker", "--preset", run.preset, "--config", run.config]
        command += [
            "--set",
            " ".join(run.settings),
            "--out",
            str(run.folder.resolve()),
            *(["--resume"] if resume else []),
        ]
        run.folder.parent.mkdir(parents=True, exist_ok=True)
        with _log(run).open("ab") as output:
            with self._lock:
                if self._ended:
                    return -1
                process = subprocess.Popen(
                    command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
                )
                self._running.add(process)
            code = process.wait()
        with self._lock:
            self._running.discard(process)
        return code


def _log(run: PlannedRun) -> Path:
    """Beside the run's folder, which must be empty when it starts."""
    return run.folder.with_name(f"{run.folder.name}.log")


def _environments(jobs: int, machine: Machine) -> Iterator[dict[str, str]]:
    """For each slot: its threads, and the GPU that it sees."""
    threads = str(max(1, machine.cores // jobs))
    for slot in range(jobs):
        gpu = {"CUDA_VISIBLE_DEVICES": str(slot % machine.gpus)} if machine.gpus else {}
        yield {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false", **gpu}
