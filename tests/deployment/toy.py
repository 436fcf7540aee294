"""A deployment of the clients of `toy_app`, and the same run in one process."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tap_flower.config import load_config
from tap_flower.run.flower import free_port
from tap_flower.run.in_process import InProcessGrid
from tap_flower.server.strategy import TapStrategy

from . import cluster as real
from .cluster import BIN, Cluster
from .toy_app.toy.client_app import app

APP = Path(__file__).parent / "toy_app"
SETTINGS = (
    "train.steps=3 train.batch_size=8 train.learning_rate=0.03 distill.iterations=2 start_timeout=600 round_timeout=600"
)
"""Of a run. At this rate some personal models are replaced after the first round, and some are not."""


@dataclass(frozen=True)
class Faults:
    """Holds clients, by the files that `toy.faults` looks at.

    Attributes:
        cluster: where the clients are.
        folder: of these files.
    """

    cluster: Cluster
    folder: Path

    def hold(self, *names: str) -> None:
        """From now on, clients wait at the first optimiser step of whatever they train."""
        for name in names:
            (self.folder / f"{name}.hold").touch()

    def held(self, name: str) -> psutil.Process:
        """Waits until a client waits; the process that does so. It has received its message, and has written no state."""
        found: list[psutil.Process] = []

        def waits() -> bool:
            with suppress(OSError, ValueError, psutil.NoSuchProcess):  # not yet written, or of a process that has ended
                pid = (self.folder / f"{name}.held").read_text()
                process = psutil.Process(int(pid))
                if pid != self._passed(name) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            return bool(found)

        self.cluster.wait_for(waits, f"{name}'s training")
        assert "flwr-clientapp" in " ".join(found[0].cmdline())
        return found[0]

    def let_pass(self, *names: str) -> None:
        """Waits until clients wait, and has them go on; they wait again when they train next."""
        for name in names:
            process = self.held(name)
            (self.folder / f"{name}.passed").write_text(str(process.pid))

    def let_go(self, *names: str) -> None:
        """Clients wait no more."""
        for name in names:
            (self.folder / f"{name}.hold").unlink()

    def slow_disk(self, name: str) -> Path:
        """Has a client's disk not take its personal model; waits until it writes one. The file that does so."""
        (self.folder / f"{name}.slow").touch()
        self.let_go(name)
        found: list[Path] = []

        def writes() -> bool:
            found.extend(self.cluster.state(name).glob(".personal.safetensors.*.tmp"))
            return bool(found)

        self.cluster.wait_for(writes, f"{name}'s writing of the state")
        return found[0]

    def good_disk(self, name: str) -> None:
        """Has a client's disk work again."""
        (self.folder / f"{name}.slow").unlink()

    def answers(self, name: str) -> int:
        """How many messages a client has answered."""
        file = self.folder / f"{name}.answered"
        return len(file.read_text().splitlines()) if file.exists() else 0

    def _passed(self, name: str) -> str:
        file = self.folder / f"{name}.passed"
        return file.read_text() if file.exists() else ""


@contextmanager
def running(folder: Path, settings: str) -> Iterator[tuple[Cluster, Faults]]:
    """A cluster for the toy app whose SuperLink is up; all its processes are gone afterwards."""
    shutil.copytree(APP, folder / "toy")  # of this folder's own name, Flower would make no app
    (folder / "faults").mkdir()
    with real.running(folder, folder / "toy", set=f"{SETTINGS} {settings}") as cluster:
        yield cluster, Faults(cluster, folder / "faults")


def start_node(cluster: Cluster, name: str) -> None:
    """A SuperNode for one client of the app."""
    config = {"client": name, "state-dir": cluster.folder / "state", "faults": cluster.folder / "faults"}
    cluster.nodes[name] = cluster.start_node(
        name,
        BIN / "flower-supernode",
        *("--auth-supernode-private-key", cluster.make_key(name), "--port", free_port()),
        *("--node-config", " ".join(f'{key}="{value}"' for key, value in config.items())),
    )


def undisturbed(folder: Path, names: list[str], settings: str) -> dict[str, Any]:
    """What the same run finds in one process, without its seconds."""
    config = load_config("plug-in", "", f"{SETTINGS} {settings}".split())
    nodes = [{"client": name, "state-dir": str(folder / "state")} for name in names]
    results = TapStrategy(config=config, run_folder=folder / "run").start(InProcessGrid(app, nodes, {})).summary
    return {key: value for key, value in results.items() if key != "seconds"}
