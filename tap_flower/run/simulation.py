"""Runs a whole federation on this machine, through Flower's simulation runtime.

`flwr run` starts a SuperLink that it never stops, whose working directory and environment are those of the first run ever.
Here every run has a SuperLink of its own: a neutral working directory, its own `FLWR_HOME` and port, no installation of
dependencies, and an end.
"""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
import psutil

from tap_flower import errors
from tap_flower.errors import ConfigError, SimulationError
from tap_flower.files import identity
from tap_flower.plain import printable
from tap_flower.report.events import END, FAILED, METRICS, read_events
from tap_flower.report.results import read_results
from tap_flower.run.flower import environment, flower_program, free_port
from tap_flower.run.resources import Resources

CONNECTION = "tap-flower"
"""The name of the SuperLink in its own configuration of Flower."""
_START_SECONDS, _END_SECONDS, _KILL_SECONDS = 60.0, 15.0, 5.0
_DONE_SECONDS = 0.5
"""Seconds that Flower and Ray have to end after a run is over, when nothing of theirs is needed any more."""
_FIRST_STATUS_SECONDS, _STATUS_SECONDS = 10.0, 30.0
"""Seconds without the first event, or a new one, after which Flower is asked whether the run is still alive."""
_ERROR = re.compile(r"\b(?:[a-z_]\w*\.)*[A-Z]\w*(?:Error|Exception): .*")
"""An exception in a log, as Python writes it."""
_LINES = 25
"""Lines of a log that an error quotes."""


@dataclass(frozen=True)
class Launch:
    """A simulation to run.

    Attributes:
        preset: name of a preset.
        config: path of a YAML file, or nothing.
        settings: `key=value` strings.
        out: the run folder.
        resume: whether to resume the run in that folder.
        clients: number of clients, each on a node of its own.
        resources: each client's part of the machine.
    """

    preset: str
    config: str
    settings: tuple[str, ...]
    out: Path
    resume: bool
    clients: int
    resources: Resources


def app_folder() -> Path:
    """The folder of the Flower app: inside the package when installed from a wheel, else the source tree.

    Raises:
        SimulationError: it is in neither place.
    """
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "flower_app", package.parent):
        if (folder / "client_app" / "app.py").exists() and (folder / "pyproject.toml").exists():
            return folder
    raise SimulationError(f"the Flower app (client_app, server_app) is not beside {package}: install tap-flower again")


def simulate(
    launch: Launch, on_event: Callable[[dict[str, Any]], None], between: Callable[[], None] | None = None
) -> dict[str, Any]:
    """Runs a simulation to the end.

    Args:
        launch: the simulation.
        on_event: called with each event of `metrics.jsonl` as it is written.
        between: called several times a second while the run goes on.

    Returns:
        The content of `results.json`.

    Raises:
        ConfigError: the run folder cannot be made.
        SimulationError: Flower could not be started, or the run failed.
    """
    check_folder(launch.out)
    out = launch.out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    # The events of a resumed run are rewritten when it starts: wait for that.
    before = _file(out / METRICS)
    with (
        ends_when_told(),
        tempfile.TemporaryDirectory(prefix="tap-flower-") as work,
        superlink(Path(work)) as flower,
    ):
        run_id = _submit(launch, out, flower)
        seen, last, status = 0, time.monotonic(), ""
        while True:
            new = list(read_events(out, seen)) if _file(out / METRICS) != before else []
            for event in new:
                on_event(event)
                if event["event"] == FAILED:
                    raise SimulationError(event["problem"])
                if event["event"] == END:
                    return read_results(out)
            if status.startswith("finished"):  # and the events since it was asked for have been read
                words = flower.log.read_text(errors="replace") + log_of(flower, run_id)
                raise SimulationError(f"the run ended with status {status}{cause(words)}")
            seen, last = seen + len(new), time.monotonic() if new else last
            if time.monotonic() - last > (_STATUS_SECONDS if seen else _FIRST_STATUS_SECONDS):
                status, last = status_of(flower, run_id), time.monotonic()
            if between is not None:
                between()
            time.sleep(0.2)


def check_folder(folder: Path) -> None:
    """Checks that a folder is there, or can be made: no file has its name, or that of a folder above it.

    Raises:
        ConfigError: a file has.
    """
    there = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    if there.exists() and not there.is_dir():
        raise ConfigError(f"the folder {folder} cannot be made, since {there} is a file: give another folder")


@contextmanager
def ends_when_told() -> Iterator[None]:
    """Makes SIGTERM an orderly end, as Ctrl-C is one, in which what was started ends too. Only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclass(frozen=True)
class Flower:
    """A running SuperLink: its working directory, the environment of commands to it, and its log."""

    folder: Path
    environment: dict[str, str]
    log: Path


@contextmanager
def superlink(folder: Path) -> Iterator[Flower]:
    """Runs a SuperLink for one run, and ends it with everything that it has started.

    Args:
        folder: an empty folder for its files.

    Raises:
        SimulationError: it does not start.
    """
    port, home = free_port(), folder / "flwr"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
        f'address = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    flower = Flower(folder, {**environment(), "FLWR_HOME": str(home)}, folder / "flower.log")
    with flower.log.open("wb") as log:
        process = subprocess.Popen(
            [
                *(flower_program("flower-superlink"), "--insecure", "--simulation"),
                *("--isolation", "subprocess", "--disable-runtime-dependency-installation"),
                *("--host", "127.0.0.1", "--port", str(port)),
            ],
            cwd=folder,
            env=flower.environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    patience = _END_SECONDS
    try:
        deadline = time.monotonic() + _START_SECONDS
        while not _answers(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SimulationError(
                    f"Flower's SuperLink did not start{cause(flower.log.read_text(errors='replace'))}"
                )
            time.sleep(0.1)
        yield flower
        patience = _DONE_SECONDS
    finally:
        _end(process, home, patience)


def _end(process: subprocess.Popen[bytes], home: Path, patience: float) -> None:
    """Ends the SuperLink and its processes: asks first, then kills those that have not ended after `patience` seconds.

    What Ray starts has sessions of its own, and may start while its parent ends. It is known by its `FLWR_HOME`.
    """
    asked, deadline = set[psutil.Process](), time.monotonic() + patience
    while (family := _family(process, home)) and time.monotonic() < deadline + _KILL_SECONDS:
        for member in family:
            with suppress(psutil.NoSuchProcess):
                if time.monotonic() > deadline:
                    member.kill()
                elif member not in asked:
                    asked.add(member)
                    member.terminate()
        psutil.wait_procs(family, 0.2)
    process.wait()


def _family(process: subprocess.Popen[bytes], home: Path) -> list[psutil.Process]:
    """The SuperLink, its descendants, and every other process with this `FLWR_HOME`, without those that have ended."""
    found = set[psutil.Process]()
    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(process.pid)
        found = {root, *root.children(recursive=True)}
    for other in psutil.process_iter():
        with suppress(psutil.Error):
            if other.environ().get("FLWR_HOME") == str(home):
                found.add(other)
    return [member for member in found if _runs(member)]


def _runs(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


def _submit(launch: Launch, out: Path, flower: Flower) -> int:
    # A TOML file, since `--run-config` on the command line takes values with quotes and spaces apart.
    values = {
        "preset": launch.preset,
        "config": str(Path(launch.config).resolve()) if launch.config else "",
        "set": shlex.join(launch.settings),
        "out": str(out),
        "resume": launch.resume,
    }
    run_config = flower.folder / "run.toml"
    run_config.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))
    federation = {"num-supernodes": launch.clients, **launch.resources.federation_config()}
    told = " ".join(f"{key}={value}" for key, value in federation.items())
    options = ("--run-config", str(run_config), "--federation-config", told)
    answer = flwr(flower, "run", str(app_folder()), CONNECTION, *options)
    if not answer.get("success", False):
        raise SimulationError(f"Flower did not take the run: {answer.get('error-message', answer)}")
    return int(answer["run-id"])


def status_of(flower: Flower, run_id: int) -> str:
    """Flower's status of a run, such as `finished:completed`; `unknown` where Flower does not know the run."""
    answer = flwr(flower, "ls", CONNECTION, "--run-id", str(run_id))
    runs = answer.get("runs") or [{}]
    return str(runs[0].get("status", "unknown"))


def log_of(flower: Flower, run_id: int) -> str:
    """What the server of a run has logged; the SuperLink's own log does not hold it."""
    return _flwr(flower, "log", str(run_id), CONNECTION, "--show").stdout


def flwr(flower: Flower, *arguments: str) -> dict[str, Any]:
    """Runs a `flwr` command with `--format json`, and returns its answer.

    Raises:
        SimulationError: the command failed.
    """
    done = _flwr(flower, *arguments, "--format", "json")
    start = done.stdout.find("{")
    try:
        answer = json.loads(done.stdout[start:])
    except ValueError as error:
        raise SimulationError(f"flwr {arguments[0]} failed: {(done.stderr or done.stdout).strip()}") from error
    return dict(answer)


def _flwr(flower: Flower, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [flower_program("flwr"), *arguments],
        cwd=flower.folder,
        env=flower.environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def _answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", timeout=1.0, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def _file(path: Path) -> tuple[int, ...]:
    """A value that changes when the file is replaced, not when it grows; empty where there is no file."""
    return (identity(path) or ())[:2]


def cause(words: str) -> str:
    """`: ` and what ended a run: an error of this package alone, or else the last exception of a log and the log's end."""
    found = _ERROR.findall(words)
    kind, _, said = found[-1].partition(": ") if found else ("", "", "")
    if kind.startswith(f"{errors.__name__}."):
        return f": {printable(said)}"
    told = f" {printable(found[-1])}; the end of Flower's log:" if found else ""
    return f":{told}\n" + "\n".join(words.splitlines()[-_LINES:])
