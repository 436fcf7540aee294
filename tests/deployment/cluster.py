"""A SuperLink and SuperNodes as real processes on this machine, with TLS and node authentication."""

from __future__ import annotations

import json
import os
import re
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from tap_flower.federation.store import RECEIVED
from tap_flower.flower_commands import QUIET, free_port
from tap_flower.reporting.events import METRICS, read_events
from tap_flower.storage import StorageError, read_record

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
PATIENCE = 1200.0
"""Seconds to wait for anything: a message takes a new process on the node, and these machines are slow."""
SETTINGS = (
    "clients=[] rounds=3 clients_per_round=3 train.steps=1 train.batch_size=4 train.accumulation=1 "
    "distill.iterations=1 model.text_length=40 start_timeout=600 round_timeout=600"
)


def script(page: str, first_words: str) -> str:
    """The code block of a page of the docs that begins with these words."""
    (found,) = re.findall(rf"```\n({re.escape(first_words)}.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    return str(found)


def processes_within(parent: psutil.Process, word: str) -> list[psutil.Process]:
    """The living processes that `parent` started, at any depth, with this word in their command line."""
    found = []
    for process in parent.children(recursive=True):
        with suppress(psutil.Error):  # ended since it was listed
            if word in " ".join(process.cmdline()):
                found.append(process)
    return found


@dataclass
class Cluster:
    """Everything lies in one folder: certificates and keys, the SuperLink's database, specs, states, the run, logs.

    Attributes:
        folder: of all this.
        settings: of the run.
    """

    folder: Path
    settings: str = SETTINGS
    superlink: psutil.Popen | None = None
    nodes: dict[str, psutil.Popen] = field(default_factory=dict)
    run_id: int = 0

    def __post_init__(self) -> None:
        self.port = free_port()
        self.environment = {
            **os.environ,
            **QUIET,
            "FLWR_HOME": str(self.folder / "flwr"),
            "HOME": str(self.folder),
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",  # as in the process of the test: the last bits of a sum depend on it
        }
        (self.folder / "flwr").mkdir(parents=True)
        (self.folder / "flwr" / "config.toml").write_text(
            f'[superlink]\ndefault = "dep"\n\n[superlink.dep]\naddress = "127.0.0.1:{self.port}"\n'
            f'root-certificates = "{self.folder / "ca.crt"}"\n'
        )
        self._shell(script("deploy.md", "openssl req -x509").replace("SERVER", "localhost"))

    @property
    def out(self) -> Path:
        """The run folder."""
        return self.folder / "run"

    @property
    def log(self) -> str:
        """The end of all logs, for a failed assertion."""
        return "\n\n".join(
            f"== {file.name}\n" + "\n".join(file.read_text(errors="replace").splitlines()[-15:])
            for file in sorted(self.folder.glob("*.log"))
        )

    def start_superlink(self) -> None:
        """With TLS, node authentication and a database."""
        self.superlink = self._start(
            "superlink",
            BIN / "flower-superlink",
            *("--ssl-ca-certfile", "ca.crt", "--ssl-certfile", "server.crt", "--ssl-keyfile", "server.key"),
            *("--enable-supernode-auth", "--disable-runtime-dependency-installation"),
            *("--port", self.port, "--database", "state.db"),
        )
        self.wait_for(self._answers, "the SuperLink")

    def _answers(self) -> bool:
        with suppress(httpx.HTTPError):
            authority = ssl.create_default_context(cafile=self.folder / "ca.crt")
            return httpx.get(f"https://localhost:{self.port}/health", verify=authority, timeout=1.0).is_success
        return False

    def start_node(self, spec: dict[str, Any], registered: bool = True) -> None:
        """`tap-flower node` for a client; a second start of one name is the same node."""
        name = str(spec["name"])
        (self.folder / f"{name}.yaml").write_text(yaml.safe_dump(spec))
        key = f"{name}-key"
        if not (self.folder / key).exists():
            self._shell(script("deploy.md", "ssh-keygen").replace("hospital-a", name))
            if registered:
                answer = self.flwr("supernode", "register", f"{key}.pub", "dep")
                assert answer["success"], answer
        self.nodes[name] = self._start(
            f"node-{name}",
            BIN / "tap-flower",
            *("node", f"{name}.yaml", "--superlink", f"127.0.0.1:{self.port}", "--root-certificates", "ca.crt"),
            *("--key", key, "--state-dir", "state"),
        )

    def submit(self, resume: bool = False) -> None:
        """Starts the run, or goes on with it."""
        values = {"preset": "demo", "set": self.settings, "out": str(self.out)}
        lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()] + [f"resume = {str(resume).lower()}"]
        (self.folder / "run.toml").write_text("\n".join(lines))
        answer = self.flwr("run", str(ROOT), "dep", "--run-config", str(self.folder / "run.toml"))
        assert answer["success"], answer
        self.run_id = int(answer["run-id"])

    def flwr(self, *arguments: str) -> dict[str, Any]:
        """What a command of Flower's answers."""
        done = self._run([str(BIN / "flwr"), *arguments, "--format", "json"])
        return dict(json.loads(done[done.index("{") :]))

    @property
    def status(self) -> str:
        """Of the run, as Flower has it."""
        runs = self.flwr("ls", "dep", "--run-id", str(self.run_id)).get("runs") or [{}]
        return str(runs[0].get("status", "unknown"))

    @property
    def events(self) -> list[dict[str, Any]]:
        """Of the run so far."""
        return list(read_events(self.out)) if (self.out / METRICS).exists() else []

    def wait_for_event(self, event: str, **values: Any) -> dict[str, Any]:
        """The first event of a kind with these values; the run must not fail before."""
        found: list[dict[str, Any]] = []

        def there() -> bool:
            for each in self.events:
                if each["event"] == event and values.items() <= each.items():
                    found.append(each)
                    return True
                assert each["event"] != "failed" or event == "failed", f"{each['problem']}\n{self.log}"
            return False

        self.wait_for(there, f"event {event!r} {values or ''}")
        return found[0]

    def wait_for(self, condition: Callable[[], object], what: str, every: float = 0.1) -> None:
        """Waits until something holds; looks after so many seconds again."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, f"{what} has not come\n{self.log}"
            time.sleep(every)

    def wait_for_the_end(self) -> str:
        """Waits until Flower says that the run has finished, and how; a look is a process of its own."""
        self.wait_for(lambda: self.status.startswith("finished"), "the end of the run", every=5.0)
        return self.status

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Prints how long something took, for docs/reliability.md: `pytest -rP tests/deployment`."""
        began = time.monotonic()
        yield
        print(f"{what}: {time.monotonic() - began:.0f} s")

    def results(self) -> dict[str, Any]:
        """Waits for the end of the run."""
        self.wait_for_event("end")
        return dict(json.loads((self.out / "results.json").read_text()))

    def state(self, name: str) -> Path:
        """A client's folder of the run."""
        (run,) = (self.folder / "state" / name).iterdir()
        return run

    def in_training(self, name: str, server_round: int) -> psutil.Process:
        """Waits until a client trains in a round; the process that does so."""

        def received() -> bool:
            with suppress(StorageError, OSError, ValueError):  # not yet there
                return int(read_record(self.state(name) / RECEIVED)["state"]) == server_round - 1
            return False

        self.wait_for(received, f"{name}'s training in round {server_round}")
        return max(processes_within(self.nodes[name], "clientapp"), key=psutil.Process.create_time)

    def kill(self, process: psutil.Process) -> None:
        """SIGKILL, to it and to what it started, as when a machine loses its power."""
        with suppress(psutil.NoSuchProcess):
            for each in [process, *process.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):
                    each.send_signal(signal.SIGKILL)
            if isinstance(process, psutil.Popen):
                process.wait(30)

    def stop(self) -> None:
        """Ends everything, by pid."""
        for process in [*self.nodes.values(), *([self.superlink] if self.superlink else [])]:
            self.kill(process)
        for process in psutil.process_iter():  # what these had left behind when they were killed
            with suppress(psutil.Error):
                if process.environ().get("FLWR_HOME") == self.environment["FLWR_HOME"]:
                    process.kill()

    def _start(self, name: str, *command: object) -> psutil.Popen:
        with (self.folder / f"{name}.log").open("ab") as log:
            return psutil.Popen(
                [str(part) for part in command],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def _shell(self, commands: str) -> str:
        return self._run(["bash", "-euc", commands])

    def _run(self, command: Sequence[str]) -> str:
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@contextmanager
def running(folder: Path, settings: str = "") -> Iterator[Cluster]:
    """A cluster whose SuperLink is up; all its processes are gone afterwards."""
    cluster = Cluster(folder, f"{SETTINGS} {settings}".strip())
    try:
        cluster.start_superlink()
        yield cluster
    finally:
        cluster.stop()
