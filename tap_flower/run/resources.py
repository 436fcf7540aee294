"""Shares a machine among the clients of a simulation: how many run at once, with how many cores, on what part of a GPU."""

from __future__ import annotations

import math
import os
import socket
from dataclasses import dataclass
from pathlib import Path

import psutil

from tap_flower.errors import ConfigError
from tap_flower.plain import counted

CLUSTER = "RAY_ADDRESS"
"""Environment variable with the address of a running Ray cluster, which the simulation then joins."""
MOST_CORES = 8
"""Most cores that a client gets by default: stage 2 and evaluation have all clients, and use more cores as more clients."""
MOST_ON_A_GPU = 4
"""Most clients that share a GPU by default: each holds a backbone and a CUDA context of its own."""
_CGROUP = Path("/sys/fs/cgroup")
_PATIENCE = 3.0
"""Seconds that a cluster has to answer."""
_RAY_UNITS = 10_000
"""Parts in which Ray counts a GPU."""


@dataclass(frozen=True)
class Machine:
    """A machine that clients share.

    Attributes:
        cores: processor cores that this process may use.
        gpus: number of GPUs that torch sees.
    """

    cores: int
    gpus: int


@dataclass(frozen=True)
class Resources:
    """A client's part of a machine.

    Attributes:
        cpus_per_client: processor cores of a client, and so its threads.
        on_a_gpu: number of clients that share one GPU; 0 computes on the processor.
        gpus: number of the machine's GPUs that are used.
        at_once: number of clients that run at the same time; None on a Ray cluster, where it depends on the cluster.
    """

    cpus_per_client: int
    on_a_gpu: int = 0
    gpus: int = 0
    at_once: int | None = None

    def federation_config(self) -> dict[str, float]:
        """The keys and values of Flower's federation configuration that give each client this part."""
        values: dict[str, float] = {"client-resources-num-cpus": self.cpus_per_client}
        if self.on_a_gpu:
            # Flower keeps the share in 32 bits and divides by it, Ray counts in 1/10000: 1/3 and 1/5 would come out one
            # client short. A bit less than the whole parts that fit is the same for Ray, and rounds to the right number.
            values["client-resources-num-gpus"] = (_RAY_UNITS // self.on_a_gpu) / _RAY_UNITS - 1e-6
        if self.at_once is not None:
            # Not the machine's cores: Flower starts a process for each client that fits, whether or not it has work.
            values["init-args-num-cpus"] = self.at_once * self.cpus_per_client
            if self.on_a_gpu:
                values["init-args-num-gpus"] = self.gpus
        return values

    def __str__(self) -> str:
        cores = f"{counted(self.cpus_per_client, 'core')} each"
        gpu = {0: "no GPU", 1: "a GPU each"}.get(self.on_a_gpu, f"{self.on_a_gpu} on a GPU")
        return f"{self.at_once or 'as many as fit'} at once, {cores}, {gpu}"


def this_machine() -> Machine:
    """The cores that this process may use (its affinity and its container's limit), and the GPUs that torch sees."""
    import torch  # which the command line does without until a command runs

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(max(1, int(min(cores, _quota(_CGROUP)))), torch.cuda.device_count())


def shared(
    machine: Machine, clients: int, clients_per_round: int, cpus: int | None = None, share: float | None = None
) -> Resources:
    """Shares a machine so that the clients of a round run at once, and use all of it.

    Args:
        machine: the machine.
        clients: number of clients of the run.
        clients_per_round: number of clients that train at the same time in stage 1.
        cpus: cores of a client; None chooses.
        share: part of a GPU that a client gets, 0 for none; None chooses.

    Raises:
        ConfigError: not even one client fits; the message names the option.
    """
    if cpus is not None and cpus > machine.cores:
        raise ConfigError(
            f"--cpus-per-client {cpus}: this process may use {machine.cores} cores, so no client fits: "
            f"choose at most {machine.cores}"
        )
    room = machine.cores // (cpus or 1)
    on_a_gpu = _on_a_gpu(machine, min(clients, clients_per_round, room), share)
    most = min(clients, room, machine.gpus * on_a_gpu if on_a_gpu else clients)
    # A share that was chosen by hand is used in full: stage 2 and evaluation have all clients.
    wanted = most if share else min(most, clients_per_round)
    cpus = cpus or max(1, min(MOST_CORES, machine.cores // wanted))
    return Resources(cpus, on_a_gpu, machine.gpus if on_a_gpu else 0, min(most, machine.cores // cpus))


def check_cluster(address: str) -> None:
    """Checks that a Ray cluster is there, before a run is started on it.

    Args:
        address: `auto` is a cluster that this machine belongs to, `local` a new one; else host:port.

    Raises:
        ConfigError: nothing answers.
    """
    if address == "local":
        return
    host, _, port = address.rpartition("://")[2].partition(":")
    try:
        if address != "auto":
            socket.create_connection((host, int(port or 6379)), _PATIENCE).close()
        elif not any(
            (process.info["name"] or "").startswith("gcs_server") for process in psutil.process_iter(["name"])
        ):
            raise OSError("no Ray runs on this machine")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"there is no Ray cluster at {address!r} ({error}): start it with `ray start`, or unset {CLUSTER} to run "
            f"on this machine alone"
        ) from error


def shared_cluster(cpus: int | None = None, share: float | None = None) -> Resources:
    """A client's part of a Ray cluster, whose size is not known here.

    Args:
        cpus: cores of a client; None is one.
        share: part of a GPU that a client gets; None is no GPU.

    Raises:
        ConfigError: a client would get more than one GPU.
    """
    return Resources(cpus or 1, _fitting(share) if share else 0)


def _on_a_gpu(machine: Machine, wanted: int, share: float | None) -> int:
    """How many clients share a GPU, 0 for none."""
    if share is None:
        return min(MOST_ON_A_GPU, math.ceil(wanted / machine.gpus)) if machine.gpus else 0
    if share == 0:
        return 0
    if not machine.gpus:
        raise ConfigError(
            f"--gpus-per-client {share:g}: torch sees no GPU on this machine: leave the option out, or look at "
            f"`nvidia-smi`, CUDA_VISIBLE_DEVICES and whether torch was installed with CUDA"
        )
    return _fitting(share)


def _fitting(share: float) -> int:
    """How many clients with this share of a GPU fit on one."""
    if not 1e-3 <= share <= 1:
        raise ConfigError(f"--gpus-per-client {share:g}: a client computes on one GPU: choose between 0.001 and 1")
    return int(1 / share + 1e-9)


def _quota(folder: Path) -> float:
    """The number of cores that a container's limit allows (cgroup version 2, or 1), infinity where there is none."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return float(quota) / float(period) if float(quota) > 0 else math.inf
    except (OSError, ValueError):  # no such file; "max"
        return math.inf
