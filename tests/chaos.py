"""Kills server and nodes at random moments: `python -m tests.chaos FOLDER --seed 1 --kills 20`.

Each is a process. They speak through a folder of files, which takes Flower's place: a node that is killed is known to be
gone at once, and a kill costs a second, not a minute. After each kill of the server the run is resumed with a random subset
of the nodes, at least one. Runs follow each other until so many processes have been killed; the last one is completed with
everybody there. What must hold is in `Chaos.check` and `check_metrics`.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
import signal
import sys
import time
import traceback
import uuid
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from tap_flower.client.state import PERSONAL, PREVIOUS, StateFolder
from tap_flower.config import HyperParameters
from tap_flower.core.training import evaluate
from tap_flower.report.events import read_events
from tap_flower.server import checkpoint
from tap_flower.server.strategy import TapStrategy
from tests.federations import plug_in_config
from tests.toys import TOYS, toy_app

SETTINGS = (
    "rounds=8", "clients_per_round=3", "train.steps=2", "train.batch_size=4", "train.accumulation=1",
    "distill.iterations=2", "start_timeout=2", "round_timeout=10",
)  # fmt: skip
NAMES = [toy.name for toy in TOYS]
_LOOK = 0.01
"""Seconds between looks at a folder."""


def _write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(pickle.dumps(content))
    temporary.replace(path)


def _alive(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


class FolderGrid(Grid):
    """Messages are files: `in/NODE/ID`, and the reply `out/ID`; `nodes/NODE` holds the node's process id."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._node_of: dict[str, int] = {}

    def set_run(self, run: Any) -> None:
        raise AssertionError("not used", run)

    @property
    def run(self) -> Any:
        raise AssertionError("not used")

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise AssertionError("not used", args, kwargs)

    def get_nodes(self) -> Iterable[Any]:
        raise AssertionError("not used")

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise AssertionError("not used", messages, timeout)

    def get_node_ids(self) -> Iterable[int]:
        return [int(file.name) for file in (self.folder / "nodes").glob("[0-9]*") if _alive(int(file.read_text()))]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = message_id = uuid.uuid4().hex
            self._node_of[message_id] = node = message.metadata.dst_node_id
            _write(self.folder / "in" / str(node) / f"{time.time_ns()}-{message_id}", (time.time(), message))
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        here, found = set(self.get_node_ids()), []
        for message_id in message_ids:
            file = self.folder / "out" / message_id
            if file.exists():
                found.append(pickle.loads(file.read_bytes()))
            elif (node := self._node_of[message_id]) not in here:
                asked = Message(RecordDict(), node, "train")
                asked.metadata.__dict__["_message_id"] = message_id
                found.append(Message(Error(ErrorCode.NODE_UNAVAILABLE, "node unavailable"), reply_to=asked))
        return found


def be_node(folder: Path, number: int) -> None:
    """Answers what it is sent, until it is killed. What was sent before it began is left alone, as with Flower."""
    node, app = 100 + number, toy_app(TOYS, folder / "states")
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, node, 1
    context = Context(1, node, {"partition-id": number}, RecordDict(), {})
    began, inbox = time.time(), folder / "in" / str(node)
    (folder / "nodes").mkdir(exist_ok=True)
    (folder / "nodes" / f".{node}").write_text(str(os.getpid()))
    (folder / "nodes" / f".{node}").replace(folder / "nodes" / str(node))
    while True:
        for file in sorted(inbox.glob("[0-9]*")):
            when, message = pickle.loads(file.read_bytes())
            file.unlink()
            if began < when and time.time() < when + message.metadata.ttl:
                _write(folder / "out" / file.name.partition("-")[2], app(message, context))
        time.sleep(_LOOK)


def be_server(folder: Path) -> None:
    """Begins the run, or goes on with it."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    run = folder / "run"
    resume = (run / "server" / "server.safetensors").exists()
    strategy = TapStrategy(config=deepcopy(plug_in_config(*SETTINGS)), run_folder=run, resume=resume)
    strategy.start(FolderGrid(folder))


def fork(be: Callable[..., None], *arguments: Any, log: Path) -> int:
    """A process of its own, with all that has been imported; its id."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        be(*arguments)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Chaos:
    """A federation whose processes are killed.

    Attributes:
        kills: how many there have been, by victim.
        failures: problems with which the run has failed by itself; it says why, and is resumed.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.nodes: dict[str, int] = {}
        self.server = 0
        self.kills = {"server": 0, "node": 0}
        self.failures: list[str] = []
        folder.mkdir(parents=True)

    def start_node(self, name: str) -> None:
        number = NAMES.index(name)
        self.nodes[name] = fork(be_node, self.folder, number, log=self.folder / f"{name}.log")

    def start_server(self) -> None:
        self.server = fork(be_server, self.folder, log=self.folder / "server.log")

    def kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)

    def ended(self) -> bool:
        """Whether the server has ended by itself: the run is complete, or says why it has failed."""
        pid, status = os.waitpid(self.server, os.WNOHANG)
        if not pid:
            return False
        self.server = 0
        last = list(read_events(self.folder / "run"))[-1]
        if status == 0:
            assert last["event"] == "end"
        else:
            assert last["event"] == "failed", (self.folder / "server.log").read_text()[-3000:]
            assert last["problem"]
            self.failures.append(last["problem"])
        return True

    def run(self, kills: int) -> dict[str, Any]:
        """Kills at most so many times, then lets the run end; returns the results."""
        while sum(self.kills.values()) < kills and not self.over:
            if not self.server:
                self.gather(self.random.sample(NAMES, self.random.randint(1, len(NAMES))))
                self.start_server()
            time.sleep(self.random.uniform(0.0, 3.0))
            if self.ended():
                continue
            if self.random.random() < 0.5:
                self.kill(self.server)
                self.server = 0
                self.kills["server"] += 1
            else:
                name = self.random.choice(sorted(self.nodes))
                self.kill(self.nodes.pop(name))
                self.kills["node"] += 1
                if not self.nodes or self.random.random() < 0.5:
                    self.start_node(name)
            self.check()
        if not self.over:
            self.gather(NAMES)
        deadline = time.monotonic() + 900
        while not self.over:
            if not self.server:
                self.start_server()
            while not self.ended():
                assert time.monotonic() < deadline, "the run does not end"
                time.sleep(0.1)
        self.check()
        found: dict[str, Any] = json.loads((self.folder / "run" / "results.json").read_text())
        return found

    @property
    def over(self) -> bool:
        return not self.server and (self.folder / "run" / "results.json").exists()

    def gather(self, names: list[str]) -> None:
        """Has these nodes there, and no others."""
        for name in set(self.nodes) - set(names):
            self.kill(self.nodes.pop(name))
        for name in set(names) - set(self.nodes):
            self.start_node(name)

    def check(self) -> None:
        """No personal model is lost: every client has a state that is whole, of the last round that counts for it."""
        file = self.folder / "run" / "server"
        if not (file / "server.safetensors").exists():
            return
        progress = checkpoint.load(file).progress
        for name, last in progress.took_part.items():
            found = StateFolder(self.folder / "states" / name / progress.run, progress.run, progress.epochs)
            files = [f for f in (PERSONAL, PREVIOUS) if (found.folder / f).exists()]
            assert files, f"{name} has no state"
            state = found.load(before_round=progress.round + 1)
            assert state is not None, f"{name} has no state that counts"
            assert state.round >= last, f"{name} has the state of round {state.round}, the server that of {last}"
        assert progress.marks == {}, progress.marks
        rounds = [e["round"] for e in read_events(self.folder / "run") if e["event"] == "round"]
        assert rounds == list(range(1, len(rounds) + 1)), rounds

    def stop(self) -> None:
        for pid in [*self.nodes.values(), *([self.server] if self.server else [])]:
            with suppress(OSError):
                self.kill(pid)


def check_metrics(folder: Path, results: dict[str, Any]) -> None:
    """The metrics of each client are those of the models that it keeps, computed anew."""
    progress = checkpoint.load(folder / "run" / "server").progress
    assert set(results["clients"]) | set(results["missing"]) == set(NAMES)
    for toy in TOYS:
        if toy.name not in results["clients"]:
            assert results["missing"][toy.name]
            continue
        session = toy.client(folder / "states").session(HyperParameters())
        states = StateFolder(folder / "states" / toy.name / progress.run, progress.run, progress.epochs)
        latest = states.load()
        models = {**states.load_models(["server+finetune", "tap"])}
        if latest is not None:
            models["personal"] = latest.memory.models["personal"]
        for model, state in models.items():
            found = evaluate(session.model(state), session.kinds, session.batches("test"))
            for task, metrics in found.items():
                told = results["clients"][toy.name][task][model]
                assert all(abs(told[name] - value) < 1e-5 for name, value in metrics.items()), (toy.name, model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kills", type=int, default=20)
    arguments = parser.parse_args()
    from tap_flower.client import handlers  # noqa: F401 - so that no process has to import it

    torch.set_num_threads(1)
    os.fsync = lambda _: None  # a killed process loses nothing that it has written; only a power failure would
    began, number, kills = time.monotonic(), 0, Counter[str]()
    told: Counter[str] = Counter()
    while kills.total() < arguments.kills:
        number += 1
        chaos = Chaos(arguments.folder / str(number), arguments.seed + number)
        try:
            results = chaos.run(arguments.kills - kills.total())
        finally:
            chaos.stop()
        check_metrics(chaos.folder, results)
        kills.update(chaos.kills)
        told.update(failed=len(chaos.failures), missing=len(results["missing"]), marked=len(results["marks"]))
    print(json.dumps({**kills, "runs": number, **told, "seconds": round(time.monotonic() - began)}))


if __name__ == "__main__":
    main()
