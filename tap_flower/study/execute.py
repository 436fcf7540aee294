"""Executes the missing runs of a sweep as Ray tasks, on this machine or on a cluster."""

from __future__ import annotations

import logging
import os
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from tap_flower.config import to_yaml
from tap_flower.errors import ConfigError, SimulationError
from tap_flower.files import write_atomically
from tap_flower.plain import counted
from tap_flower.run.flower import environment
from tap_flower.run.resources import Machine, check_cluster, this_machine
from tap_flower.run.simulation import ends_when_told
from tap_flower.study.plan import PlannedRun
from tap_flower.study.worker import Task, run_task

TRIES = 3
"""How often a run is begun again whose process was killed."""
_STORE_BYTES = 100_000_000
"""Shared memory for what Ray's tasks exchange: here, small files."""


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


@dataclass(frozen=True)
class Share:
    """What a run gets of the machines.

    Attributes:
        cpus: processor cores, and so its threads.
        gpus: GPUs, or a part of one.
    """

    cpus: int
    gpus: float

    def __str__(self) -> str:
        gpu = f" and {self.gpus:g} GPU{'s' * (self.gpus > 1)}" if self.gpus else ""
        return f"{counted(self.cpus, 'core')}{gpu} each"


@contextmanager
def cluster(address: str = "local") -> Iterator[list[Machine]]:
    """Joins a Ray cluster, or starts one on this machine that ends with the block.

    Args:
        address: `local`, `auto` for the cluster that this machine belongs to, or HOST:PORT.

    Yields:
        The machines of the cluster.

    Raises:
        ConfigError: there is no such cluster.
        SimulationError: Ray does not start.
    """
    check_cluster(address)
    options: dict[str, Any] = {"address": address}
    if address == "local":  # whatever RAY_ADDRESS says
        here = this_machine()
        options |= {"num_cpus": here.cores, "num_gpus": here.gpus, "include_dashboard": False}
        options |= {"object_store_memory": _STORE_BYTES}
        if short := environment().get("RAY_TMPDIR"):
            options["_temp_dir"] = f"{short}/ray"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of Ray's own settings
            ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        raise SimulationError(f"Ray does not start: {error}") from error
    try:
        alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        yield [Machine(int(found.get("CPU", 0)), int(found.get("GPU", 0))) for found in alive]
    finally:
        ray.shutdown()


def share_of(machines: Sequence[Machine], runs: int, cpus: int | None, gpus: float | None) -> Share:
    """Shares machines among runs so that all cores are used.

    Args:
        machines: the machines.
        runs: number of runs.
        cpus: cores of a run; None chooses.
        gpus: GPUs of a run, such as 0.5; None is one where there are any.

    Raises:
        ConfigError: no machine has room for one run, or a run would have two GPUs and a half.
    """
    if gpus is not None and (gpus < 0 or (gpus > 1 and not float(gpus).is_integer())):
        raise ConfigError(f"--gpus-per-run {gpus:g}: choose a part of one GPU, such as 0.5, or a whole number")
    gpus = float(any(machine.gpus for machine in machines)) if gpus is None else gpus
    able = [machine for machine in machines if machine.gpus >= gpus]
    at_once = sum(int(machine.gpus / gpus) if gpus else machine.cores for machine in able)
    cores = sum(machine.cores for machine in able)
    most = max((machine.cores for machine in able), default=0)
    cpus = cpus or max(1, min(most, cores // max(1, min(runs, at_once))))
    if cpus > most:
        has = f"{most} cores and {max((machine.gpus for machine in machines), default=0)} GPUs"
        raise ConfigError(f"no machine has room for a run with {cpus} cores and {gpus:g} GPUs: the largest has {has}")
    return Share(cpus, gpus)


def execute(runs: Sequence[PlannedRun], share: Share, finished: Callable[[Outcome], None]) -> None:
    """Executes all runs that are not done yet, in a cluster that was joined.

    A run that was begun goes on from its last complete round, also after its process was killed. A failure leaves the other
    runs alone. A run's files are in its folder where the run's machine has it too, and are else sent back, without models.

    Args:
        runs: the runs, in the order in which they start.
        share: what each gets of the machines.
        finished: called with each run's outcome.
    """
    task = ray.remote(run_task).options(num_cpus=share.cpus, num_gpus=share.gpus, max_retries=TRIES)
    with ends_when_told():
        running = {task.remote(_task(run, share.cpus)): run for run in runs if not run.done}
        while running:
            for ended in ray.wait(list(running))[0]:
                finished(_outcome(running.pop(ended), ended))


def _task(run: PlannedRun, threads: int) -> Task:
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    mark = f"run {uuid.uuid4()} of {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
    with run.log.open("a") as file:
        file.write(mark)
    folder, log, here = (str(path.resolve()) for path in (run.folder, run.log, Path()))
    start = "" if run.start is None else str(run.start.resolve())
    return Task(run.preset, to_yaml(run.resolved), folder, log, mark, here, threads, start, run.rounds)


def _outcome(run: PlannedRun, ended: Any) -> Outcome:
    try:
        seconds, problem, files = ray.get(ended)
    except RayTaskError as error:
        return Outcome(run, 0.0, f"{error.cause}, see {run.log}")
    except RayError as error:  # of a process that was killed again and again, say
        return Outcome(run, 0.0, f"{type(error).__name__}: {error}, see {run.log}")
    _keep(run, files)
    return Outcome(run, seconds, f"{problem}, see {run.log}" if problem else "")


def _keep(run: PlannedRun, files: Mapping[str, bytes]) -> None:
    """Writes what was sent back: the log, and the files of the run folder, the results last."""
    if log := files.get(""):
        with run.log.open("ab") as file:
            file.write(log)
    for name in sorted(files.keys() - {""}, key=lambda name: name == "results.json"):
        write_atomically(run.folder / name, files[name])
