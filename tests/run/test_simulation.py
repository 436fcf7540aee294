"""How a simulation is started; tests/test_end_to_end.py runs one."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tap_flower.errors import ConfigError, SimulationError
from tap_flower.run import simulation
from tap_flower.run.resources import Resources
from tap_flower.run.simulation import Flower, Launch, app_folder, cause, simulate, superlink


def test_the_flower_app_is_in_the_source_tree() -> None:
    assert app_folder() == Path(__file__).parent.parent.parent


def test_the_cause_of_a_failed_run_is_the_last_exception_of_its_log() -> None:
    words = (
        'Traceback (most recent call last):\n  File "a.py"\nValueError: first\nray.exceptions.Lost: gone\nINFO: ended\n'
    )
    assert cause(words.replace("Lost", "LostError")) == (
        ": ray.exceptions.LostError: gone; the end of Flower's log:\n" + words.replace("Lost", "LostError").rstrip()
    )
    words += (
        "\x1b[91mERROR \x1b[0m: Traceback\ntap_flower.errors.ConfigError: rounds = 0 is out of bounds\nINFO: ended\n"
    )
    assert cause(words) == ": rounds = 0 is out of bounds"
    assert cause("INFO: ended\n") == ":\nINFO: ended"


def test_a_run_folder_below_a_file_is_told_before_flower_starts(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    launch = Launch("demo", "", (), tmp_path / "file" / "run", False, 2, Resources(1))
    with pytest.raises(ConfigError, match=r"file/run cannot be made, since .*file is a file: give another folder"):
        simulate(launch, lambda _: None)


@pytest.mark.parametrize("ends", [True, False])
def test_a_run_that_ends_while_its_status_is_asked_for_has_not_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: bool
) -> None:
    out = tmp_path / "run"

    @contextmanager
    def superlink(folder: Path) -> Iterator[Flower]:
        (folder / "flower.log").write_text("RuntimeError: no GPU\n")
        yield Flower(folder, {}, folder / "flower.log")

    def submit(*_: Any) -> int:
        out.mkdir()
        (out / "metrics.jsonl").write_text("")
        return 1

    def status(*_: Any) -> str:
        if ends:
            (out / "metrics.jsonl").write_text(json.dumps({"event": "end"}) + "\n")
        return "finished:completed" if ends else "finished:failed"

    for name, value in (("superlink", superlink), ("_submit", submit), ("status_of", status)):
        monkeypatch.setattr(simulation, name, value)
    monkeypatch.setattr(simulation, "read_results", lambda _: {"clients": {}})
    monkeypatch.setattr(simulation, "_FIRST_STATUS_SECONDS", 0.0)
    launch = Launch("demo", "", (), out, False, 2, Resources(1))
    if ends:
        assert simulate(launch, lambda _: None) == {"clients": {}}
    else:
        with pytest.raises(SimulationError, match="the run ended with status finished:failed: RuntimeError: no GPU"):
            simulate(launch, lambda _: None)


def test_what_a_superlink_has_started_ends_with_it(tmp_path: Path) -> None:
    """Also a process whose parent has ended, and one that is started while the others end, as Ray's are."""
    started = "trap 'sleep 1; sleep 600 & exit' TERM; echo $$ > shell; sleep 600 & wait"
    with superlink(tmp_path) as flower:
        subprocess.run(["setsid", "--fork", "sh", "-c", started], cwd=tmp_path, env=flower.environment, check=True)
        while not (tmp_path / "shell").exists():
            time.sleep(0.01)
        assert len(with_home(flower)) >= 4  # the SuperLink's, the shell, and what it waits for
    assert with_home(flower) == []


def with_home(flower: Flower) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("FLWR_HOME") == flower.environment["FLWR_HOME"]:
                found.append(process)
    return found
