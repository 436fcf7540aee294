"""Executes the missing runs of a sweep: several at once, each in a process of its own, on one part of the machine.

The processes are forked from one that has imported what a run needs, which takes several seconds. On a machine with GPUs
each imports it anew, since CUDA does not work in a fork of a process that has asked it anything.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path

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
        finished: called with each run's outcome.
    """
    context, free = _context(machine), list(_parts(jobs, machine))
    waiting = deque(run for run in runs if not run.done)
    running: dict[BaseProcess, tuple[PlannedRun, dict[str, str], float]] = {}
    with ends_when_told():
        try:
            while waiting or running:
                while waiting and free:
                    run, part = waiting.popleft(), free.pop(0)
                    process = context.Process(target=_begin, args=(run, _resumes(run), _log(run), part))
                    running[process] = run, part, time.monotonic()
                    process.start()
                wait([process.sentinel for process in running])
                for ended in [process for process in running if process.exitcode is not None]:
                    run, part, began = running.pop(ended)
                    free.append(part)
                    problem = "" if run.done else f"exit status {ended.exitcode}, see {_log(run)}"
                    finished(Outcome(run, time.monotonic() - began, problem))
        finally:
            _end([process for process in running if process.pid is not None])


def _end(processes: Sequence[BaseProcess]) -> None:
    """Ends processes; those that take long are killed."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + _PATIENCE
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        process.kill()


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


def _resumes(run: PlannedRun) -> bool:
    """Whether a run goes on; what ended before its first complete round is removed."""
    if (run.folder / "server" / "server.safetensors").exists():
        return True
    if run.folder.exists():
        shutil.rmtree(run.folder)
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    return False


def _log(run: PlannedRun) -> Path:
    """The run's log, which is beside its folder: that must be empty when the run starts."""
    return run.folder.with_name(f"{run.folder.name}.log")


def _parts(jobs: int, machine: Machine) -> Iterator[dict[str, str]]:
    """The environment variables of each job: its threads, and the GPU that it sees."""
    threads = str(max(1, machine.cores // jobs))
    for slot in range(jobs):
        gpu = {"CUDA_VISIBLE_DEVICES": str(slot % machine.gpus)} if machine.gpus else {}
        yield {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false", **gpu}
