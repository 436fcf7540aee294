from __future__ import annotations

import math
import socket
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tap_flower.errors import ConfigError
from tap_flower.run import resources
from tap_flower.run.resources import Machine, Resources, check_cluster, shared, shared_cluster, this_machine


@pytest.mark.parametrize(
    ("cores", "clients", "clients_per_round", "cpus", "expected"),
    [
        (16, 30, 2, None, Resources(8, at_once=2)),
        (16, 30, 3, None, Resources(5, at_once=3)),
        (2, 10, 8, None, Resources(1, at_once=2)),
        (2, 10, 1, None, Resources(2, at_once=1)),
        (64, 30, 2, None, Resources(8, at_once=8)),  # stage 2 uses the others
        (64, 10, 8, None, Resources(8, at_once=8)),
        (64, 3, 8, None, Resources(8, at_once=3)),  # no process without a client
        (16, 30, 2, 4, Resources(4, at_once=4)),
        (16, 30, 2, 16, Resources(16, at_once=1)),
    ],
)
def test_cores(cores: int, clients: int, clients_per_round: int, cpus: int | None, expected: Resources) -> None:
    assert shared(Machine(cores, 0), clients, clients_per_round, cpus) == expected


@pytest.mark.parametrize(
    ("gpus", "clients_per_round", "cpus", "share", "expected"),
    [
        (1, 1, None, None, Resources(8, 1, 1, at_once=1)),
        (1, 2, None, None, Resources(8, 2, 1, at_once=2)),
        (2, 2, None, None, Resources(8, 1, 2, at_once=2)),
        (2, 3, None, None, Resources(5, 2, 2, at_once=3)),
        (1, 8, None, None, Resources(4, 4, 1, at_once=4)),  # no more than four on a GPU
        (8, 8, None, None, Resources(2, 1, 8, at_once=8)),
        (1, 8, 8, None, Resources(8, 2, 1, at_once=2)),  # cores for two
        (2, 2, None, 0.5, Resources(4, 2, 2, at_once=4)),
        (2, 2, None, 0.4, Resources(4, 2, 2, at_once=4)),  # a fifth would wait for the rests of both
        (1, 2, None, 0.1, Resources(1, 10, 1, at_once=10)),
        (2, 2, None, 1.0, Resources(8, 1, 2, at_once=2)),
        (2, 2, None, 0.0, Resources(8, 0, 0, at_once=2)),
    ],
)
def test_gpus(gpus: int, clients_per_round: int, cpus: int | None, share: float | None, expected: Resources) -> None:
    assert shared(Machine(16, gpus), 30, clients_per_round, cpus, share) == expected


@pytest.mark.parametrize(
    ("machine", "cpus", "share", "problem"),
    [
        (Machine(4, 0), 5, None, "--cpus-per-client 5: this process may use 4 cores.*choose at most 4"),
        (Machine(4, 0), None, 0.5, "--gpus-per-client 0.5: torch sees no GPU.*leave the option out"),
        (Machine(4, 2), None, 1.5, "--gpus-per-client 1.5: a client computes on one GPU: choose between 0.001 and 1"),
        (Machine(4, 2), None, 1e-9, "--gpus-per-client 1e-09: .*choose between"),
    ],
)
def test_what_leaves_no_room_is_refused(machine: Machine, cpus: int | None, share: float | None, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        shared(machine, 10, 2, cpus, share)


@given(
    cores=st.integers(1, 256), gpus=st.integers(0, 16), clients=st.integers(1, 100),
    clients_per_round=st.integers(1, 100), share=st.none() | st.floats(0.001, 1.0),
)  # fmt: skip
def test_flower_and_ray_start_as_many_as_planned(
    cores: int, gpus: int, clients: int, clients_per_round: int, share: float | None
) -> None:
    found = shared(Machine(cores, gpus), clients, clients_per_round, None, share if gpus else None)
    assert found.at_once is not None
    assert 1 <= found.at_once <= clients
    assert found.at_once * found.cpus_per_client <= cores
    keys = found.federation_config()
    # Flower's own count of the processes, with the share in 32 bits as its protocol has it ...
    actors = int(keys["init-args-num-cpus"] / keys["client-resources-num-cpus"])
    if found.on_a_gpu:
        kept = float(np.float32(keys["client-resources-num-gpus"]))
        actors = min(actors, int(keys["init-args-num-gpus"] / kept))
        # ... and Ray's of those that fit on one GPU, in 1/10000.
        assert 10_000 // max(1, round(kept * 10_000)) * gpus >= actors
    assert actors == found.at_once


def test_a_cluster_gets_what_is_asked_for() -> None:
    assert shared_cluster().federation_config() == {"client-resources-num-cpus": 1}
    assert shared_cluster(4, 0.5).federation_config() == {
        "client-resources-num-cpus": 4,
        "client-resources-num-gpus": pytest.approx(0.5, abs=1e-5),
    }
    assert shared_cluster(1, 0.0) == Resources(1)


def test_a_cluster_that_is_not_there_is_told_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "process_iter", lambda _: [])
    with pytest.raises(ConfigError, match=r"there is no Ray cluster at 'auto' \(no Ray runs on this machine\): start"):
        check_cluster("auto")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        check_cluster(f"127.0.0.1:{port}")
        check_cluster(f"ray://127.0.0.1:{port}")
    for address in (f"127.0.0.1:{port}", "127.0.0.1:port"):
        with pytest.raises(ConfigError, match=f"there is no Ray cluster at '{address}' .* or unset RAY_ADDRESS"):
            check_cluster(address)
    check_cluster("local")


def test_only_cores_that_this_process_may_use_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(resources, "_CGROUP", tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 3, 5, 6, 9}, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert this_machine() == Machine(5, 3)
    (tmp_path / "cpu.max").write_text("250000 100000\n")
    assert this_machine() == Machine(2, 3)
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert this_machine() == Machine(1, 3)


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "max 100000\n"}, math.inf),
        ({"cpu.max": "400000 100000\n"}, 4.0),
        ({"cpu/cpu.cfs_quota_us": "150000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
        ({}, math.inf),
    ],
)
def test_the_limit_of_a_container(tmp_path: Path, files: dict[str, str], cores: float) -> None:
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert resources._quota(tmp_path) == cores
