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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from torch import Tensor

from tap_flower.client.state import PERSONAL, PREVIOUS, SERVER
from tap_flower.errors import StorageError
from tap_flower.files import read_record, read_tensors
from tap_flower.report.events import METRICS, read_events
from tap_flower.run.flower import QUIET, free_port

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
PATIENCE = 900.0
"""Seconds to wait for anything: a message takes a new process on the node, and these machines are slow."""


def script(page: str, first_words: str) -> str:
    """The code block of a page of the docs that begins with these words."""
    (found,) = re.findall(rf"```\n({re.escape(first_words)}.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    return str(found)


@dataclass
class Cluster:
    """Everything lies in one folder: certificates and keys, the SuperLink's database, states, the run, logs.

    Attributes:
        folder: of all this.
        app: the Flower app that is run; a folder whose name Flower takes.
        run_config: of the run, without its folder and whether it is resumed.
        superlink: its process.
        nodes: name -> process of each node that should be alive.
        run_id: Flower's, of the run that was submitted last.
    """

    folder: Path
    app: Path
    run_config: Mapping[str, str]
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

    def kill_superlink(self) -> None:
        """With its SuperExec and the ServerApp."""
        assert self.superlink is not None
        process, self.superlink = self.superlink, None
        kill(process)

    def server_app(self) -> psutil.Process:
        """The process of the run."""
        assert self.superlink is not None
        found = []
        for process in self.superlink.children(recursive=True):
            with suppress(psutil.Error):  # ended since it was listed, or not yet waited for
                if "flwr-serverapp" in " ".join(process.cmdline()):
                    found.append(process)
        assert len(found) == 1, f"{len(found)} ServerApps: {found}\n{self.log}"
        return found[0]

    def make_key(self, name: str, registered: bool = True) -> str:
        """The file of a node's private key, made where there is none."""
        key = f"{name}-key"
        if not (self.folder / key).exists():
            self._shell(script("deploy.md", "ssh-keygen").replace("hospital-a", name))
            if registered:
                answer = self.flwr("supernode", "register", f"{key}.pub", "dep")
                assert answer["success"], answer
        return key

    def start_node(self, name: str, *command: object) -> psutil.Popen:
        """Starts a node's process, which is told where the SuperLink is; a second start of one name is the same node."""
        where = ("--superlink", f"127.0.0.1:{self.port}", "--root-certificates", "ca.crt")
        return self._start(f"node-{name}", *command, *where)

    def kill_node(self, name: str) -> None:
        """With all that runs on it, as when a machine loses its power."""
        kill(self.nodes.pop(name))

    def end_node(self, name: str) -> None:
        """By SIGTERM to all of its processes, as systemd ends it."""
        process = self.nodes.pop(name)
        for each in [process, *process.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                each.terminate()
        assert process.wait(60) == 0

    def wait_for_nodes(self, count: int) -> None:
        """Waits until Flower takes so many nodes to be there; a look is a process of its own."""
        self.wait_for(lambda: self.online == count, f"{count} nodes online", every=1.0)

    @property
    def online(self) -> int:
        """How many nodes Flower takes to be there."""
        return sum(node["status"] == "online" for node in self.flwr("supernode", "list", "dep")["nodes"])

    def submit(self, resume: bool = False) -> None:
        """Starts the run, or goes on with it."""
        values = {**self.run_config, "out": str(self.out)}
        lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()] + [f"resume = {str(resume).lower()}"]
        (self.folder / "run.toml").write_text("\n".join(lines))
        answer = self.flwr("run", str(self.app), "dep", "--run-config", str(self.folder / "run.toml"))
        assert answer["success"], answer
        self.run_id = int(answer["run-id"])

    def flwr(self, *arguments: str) -> dict[str, Any]:
        """What a command of Flower's answers."""
        done = self._run([str(BIN / "flwr"), *arguments, "--format", "json"])
        return dict(json.loads(done[done.index("{") :]))

    def status(self, run_id: int) -> str:
        """Of a run, as Flower has it."""
        runs = self.flwr("ls", "dep", "--run-id", str(run_id)).get("runs") or [{}]
        return str(runs[0].get("status", "unknown"))

    def wait_for_status(self, run_id: int, status: str) -> None:
        """Waits until Flower says that a run has ended, which must be like this; a look is a process of its own."""

        def there() -> bool:
            found = self.status(run_id)
            assert found == status or not found.startswith("finished"), f"the run is {found}\n{self.log}"
            return found == status

        self.wait_for(there, f"status {status!r}", every=2.0)

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
        """Waits until something holds, and looks again after so many seconds; nothing that should live may end meanwhile."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, f"{what} has not come\n{self.log}"
            for name, process in {**self.nodes, **({"SuperLink": self.superlink} if self.superlink else {})}.items():
                assert process.poll() is None, f"{name} has ended while {what} was waited for\n{self.log}"
            time.sleep(every)

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Prints how long something took, for docs/deploy.md: `pytest -m slow -rP tests/deployment`."""
        began = time.monotonic()
        yield
        print(f"{what}: {time.monotonic() - began:.0f} s")

    def results(self) -> dict[str, Any]:
        """Waits for the end of the run, which Flower must have seen as well; what it found, without its seconds."""
        self.wait_for_event("end")
        found = json.loads((self.out / "results.json").read_text())
        self.wait_for_status(self.run_id, "finished:completed")
        return {key: value for key, value in found.items() if key != "seconds"}

    def state(self, name: str) -> Path:
        """A client's folder of the run."""
        (run,) = (self.folder / "state" / name).iterdir()
        return run

    def has_received(self, name: str, server_round: int) -> bool:
        """Whether a client has the server's tensors for its training in a round."""
        with suppress(StorageError, OSError, ValueError):  # not yet there
            return int(read_record(self.state(name) / SERVER)["round"]) == server_round
        return False

    def saved_state(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and record of the latest state of a client that is whole; nothing before the first."""
        for file in (PERSONAL, PREVIOUS):
            with suppress(StorageError, OSError, ValueError):  # not yet there, or just being replaced
                return read_tensors(self.state(name) / file)
        return {}, {}

    def saved_round(self, name: str) -> int:
        """The round of that state; 0 before the first."""
        return int(self.saved_state(name)[1].get("round", 0))

    def wait_for_state(self, name: str, server_round: int) -> None:
        """Waits until a client has saved its state of a round."""
        self.wait_for(lambda: self.saved_round(name) == server_round, f"{name}'s state of round {server_round}")

    def stop(self) -> None:
        """Ends everything, by pid."""
        for process in [*self.nodes.values(), *([self.superlink] if self.superlink else [])]:
            kill(process)
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


def kill(process: psutil.Process) -> None:
    """SIGKILL, to a process and to what it started."""
    with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        for each in [process, *process.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                each.send_signal(signal.SIGKILL)
        if isinstance(process, psutil.Popen):
            process.wait(30)


@contextmanager
def running(folder: Path, app: Path, **run_config: str) -> Iterator[Cluster]:
    """A cluster whose SuperLink is up; all its processes are gone afterwards."""
    cluster = Cluster(folder, app, run_config)
    try:
        cluster.start_superlink()
        yield cluster
    finally:
        cluster.stop()
