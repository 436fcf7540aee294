"""Executes the missing runs of a sweep: several at once, each in a process of its own, on one part of the machine.

The processes are forked from one that has imported what a run needs, which takes several seconds. On a machine with GPUs
each imports it anew, since CUDA does not work in a fork of a process that has asked it anything.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from queue import SimpleQueue
from threading import Lock

from tap_flower.run.resources import Machine
from tap_flower.run.simulation import ends_when_told
from tap_flower.study.plan import PlannedRun

_PATIENCE = 10.0
"""Seconds that a run has to end by itself before it is killed."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run.

    Attributes:
        run: the run.
        seconds: seconds that it took.
        problem: why it failed, or nothing.
    """

    run: PlannedRun
    seconds: float
    problem: str


def execute(runs: Sequence[PlannedRun], jobs: int, machine: Machine, finished: Callable[[Outcome], None]) -> None:
    """Executes all runs that are not done yet.

    A run that was begun goes on from its last complete round. A failure leaves the others alone.

    Args:
        runs: the runs, in the order in which they start.
        jobs: number of runs at once.
        machine: the machine whose cores and GPUs they share.
        finished: called with each run's outcome, in the thread of the caller.
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
    """The processes of a sweep, each on a part of the machine."""

    def __init__(self, jobs: int, machine: Machine) -> None:
        self._parts: SimpleQueue[dict[str, str]] = SimpleQueue()
        for part in _parts(jobs, machine):
            self._parts.put(part)
        self._context = _context(machine)
        self._running: set[BaseProcess] = set()
        self._lock, self._ended = Lock(), False

    def run(self, run: PlannedRun) -> Outcome:
        """Executes a run, and waits for it."""
        part, began = self._parts.get(), time.monotonic()
        try:
            code = self._wait(run, part)
        finally:
            self._parts.put(part)
        problem = "" if run.done else f"exit status {code}, see {_log(run)}"
        return Outcome(run, time.monotonic() - began, problem)

    def end(self) -> None:
        """Ends the runs that are going on; no other one is started."""
        with self._lock:
            self._ended = True
            running = list(self._running)
        for process in running:
            process.terminate()
        deadline = time.monotonic() + _PATIENCE
        while self._running and time.monotonic() < deadline:
            time.sleep(0.05)
        with self._lock:
            for process in self._running:
                process.kill()

    def _wait(self, run: PlannedRun, part: Mapping[str, str]) -> int | None:
        resume = (run.folder / "server" / "server.safetensors").exists()
        if not resume and run.folder.exists():
            shutil.rmtree(run.folder)  # it ended before its first complete round
        run.folder.parent.mkdir(parents=True, exist_ok=True)
        process = self._context.Process(target=_begin, args=(run, resume, _log(run), part))
        with self._lock:
            if self._ended:
                return -1
            process.start()
            self._running.add(process)
        process.join()
        with self._lock:
            self._running.discard(process)
        return process.exitcode


def _context(machine: Machine) -> ForkServerContext | SpawnContext:
    if machine.gpus or "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tap_flower.study.worker"])
    return context


def _begin(run: PlannedRun, resume: bool, log: Path, part: Mapping[str, str]) -> None:
    """The main function of a process."""
    os.environ.update(part)  # before an import may ask CUDA for its devices
    from tap_flower.study.worker import run_alone

    run_alone(run, resume, log, threads=int(part["OMP_NUM_THREADS"]))


def _log(run: PlannedRun) -> Path:
    """The run's log, which is beside its folder: that must be empty when the run starts."""
    return run.folder.with_name(f"{run.folder.name}.log")


def _parts(jobs: int, machine: Machine) -> Iterator[dict[str, str]]:
    """The environment variables of each job: its threads, and the GPU that it sees."""
    threads = str(max(1, machine.cores // jobs))
    for slot in range(jobs):
        gpu = {"CUDA_VISIBLE_DEVICES": str(slot % machine.gpus)} if machine.gpus else {}
        yield {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false", **gpu}
