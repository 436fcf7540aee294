"""Federations of four clients in this process: of toys, and of client specs on the demo's data and backbone.

What the server does, and what a client does whatever its model, is shown on toys. Client specs are for what depends on them,
or on the model: a run of theirs takes as long as a hundred of toys.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import Tensor

from tap_flower.config import Config, Encoding, load_config, simulated_run
from tap_flower.core.components import cpu_state
from tap_flower.methods.session import Session
from tap_flower.server.strategy import TapStrategy
from tap_flower.wire import messages
from tests.grid import InProcessGrid, Replies, recorded
from tests.toys import TOYS, LowRankToy, Toy, toy_app


def source(name: str, split: str, start: int, stop: int) -> dict[str, Any]:
    return {"format": "packaged", "name": name, "split": split, "rows": [start, stop]}


def sources(name: str, offset: int, train: int) -> dict[str, Any]:
    return {
        "train": source(name, "train", offset, offset + train),
        "validation": source(name, "validation", offset, offset + 6),
        "test": source(name, "test", 0, 10),
    }


LANGUAGES = {
    "name": "languages",
    "kind": "text_classification",
    "modalities": ["text"],
    "domain": "names",
    "classes": ["en", "es", "pt", "it", "fr", "de", "id", "tr"],
    "columns": {"text": "text", "label": "label"},
}
DATES = {
    "name": "dates",
    "kind": "text_generation",
    "modalities": ["text"],
    "domain": "dates",
    "columns": {"text": "text", "target": "target"},
}
SHAPE_IMAGES = {
    "name": "shape_images",
    "kind": "image_generation",
    "modalities": ["image"],
    "domain": "shapes",
    "columns": {"image": "image"},
}
ANSWERS = {
    "name": "answers",
    "kind": "text_generation",
    "modalities": ["image", "text"],
    "domain": "visual_answering",
    "columns": {"image": "image", "text": "question", "target": "answer"},
}
CLIENTS = [
    {"name": "ann", "backbone": "demo", "tasks": [{**LANGUAGES, **sources("names", 0, 16)}]},
    {
        "name": "bob",
        "backbone": "demo",
        "tasks": [{**LANGUAGES, **sources("names", 20, 12)}, {**SHAPE_IMAGES, **sources("shapes", 0, 8)}],
    },
    {"name": "cleo", "backbone": "demo", "tasks": [{**ANSWERS, **sources("questions", 0, 8)}]},
    {"name": "dan", "backbone": "demo", "tasks": [{**DATES, **sources("dates", 0, 10)}]},
]
SETTINGS = [
    "rounds=2", "clients_per_round=4", "train.steps=2", "train.batch_size=4", "train.accumulation=1",
    "distill.iterations=2", "start_timeout=1", "round_timeout=60",
    "replacement.mode=hard", "replacement.before_stage_two=false", "replacement.after_stage_two=false",
    "distill.stage=distillation",
]  # fmt: skip


@cache
def plug_in_config(*settings: str) -> Config:
    """Not to be changed. To read settings takes longer than a round of toys."""
    return load_config("plug-in", settings=settings)


@dataclass
class ToyFederation:
    """Everything that is needed for a run of toys in this process."""

    folder: Path
    toys: Sequence[Toy] = field(default_factory=lambda: list(TOYS))
    settings: list[str] = field(default_factory=lambda: list(SETTINGS))

    @property
    def out(self) -> Path:
        return self.folder / "run"

    def state(self, client: str) -> Path:
        """The client's folder in the only run that it has seen."""
        (run,) = (self.out / "clients" / client).iterdir()
        return run

    def grid(self, **options: Any) -> InProcessGrid:
        """New nodes: they know of earlier runs what is in their clients' folders."""
        nodes = [{"partition-id": i} for i in range(len(self.toys))]
        return InProcessGrid(nodes, {}, toy_app(self.toys, self.out / "clients"), **options)

    def strategy(self, resume: bool = False) -> TapStrategy:
        return TapStrategy(config=deepcopy(plug_in_config(*self.settings)), run_folder=self.out, resume=resume)


@dataclass
class Federation:
    """Everything that is needed for a run of client specs in this process."""

    folder: Path
    config_file: Path
    settings: list[str] = field(default_factory=lambda: list(SETTINGS))
    clients: int = len(CLIENTS)

    @property
    def out(self) -> Path:
        return self.folder / "run"

    def state(self, client: str) -> Path:
        """The client's folder."""
        return self.out / "clients" / client

    def grid(self, **options: Any) -> InProcessGrid:
        run_config = {
            "preset": "demo",
            "config": str(self.config_file),
            "set": " ".join(self.settings),
            "out": str(self.out),
        }
        return InProcessGrid([{"partition-id": i} for i in range(self.clients)], run_config, **options)

    def strategy(self, resume: bool = False) -> TapStrategy:
        context = self.grid().contexts[100]
        config, out = simulated_run(context.run_config, context.run_id)
        return TapStrategy(config=deepcopy(config), run_folder=out, resume=resume)


def federation_of_toys(folder: Path, toys: Sequence[Toy] = TOYS, *settings: str) -> ToyFederation:
    """A federation of toys that all take part in every round, unless a setting says otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    return ToyFederation(folder, list(toys), [*SETTINGS, f"clients_per_round={len(toys)}", *settings])


def federation_of_specs(folder: Path, clients: Sequence[dict[str, Any]] = CLIENTS, *settings: str) -> Federation:
    """A federation of client specs that all take part in every round and train both models, but for what a setting says."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump({"clients": list(clients)}))
    everyone = f"clients_per_round={len(clients)}"
    return Federation(folder, file, [*SETTINGS, everyone, "train.personal_from=1", *settings], clients=len(clients))


@pytest.fixture(scope="module", autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    """What is written can be read at once; only a power failure would tell the difference."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _: None)
        yield


Make = Callable[..., ToyFederation]
MakeSpecs = Callable[..., Federation]


@pytest.fixture
def make_federation(tmp_path: Path) -> Make:
    """(toys, settings) -> a federation of them in a folder of its own."""
    numbers = itertools.count(1)
    return lambda *given: federation_of_toys(tmp_path / f"federation-{next(numbers)}", *given)


@pytest.fixture
def federation(make_federation: Make) -> ToyFederation:
    return make_federation()


@pytest.fixture
def make_spec_federation(tmp_path: Path) -> MakeSpecs:
    """(client specs, settings) -> a federation of them in a folder of its own."""
    numbers = itertools.count(1)
    return lambda *given: federation_of_specs(tmp_path / f"spec-federation-{next(numbers)}", *given)


@pytest.fixture
def spec_federation(make_spec_federation: MakeSpecs) -> Federation:
    return make_spec_federation()


each_kind = pytest.mark.parametrize("kind", ["toys", pytest.param("specs", marks=pytest.mark.slow)])
"""Kinds of clients: toys, and in the slow tier client specs."""


def federation_of(kind: str, folder: Path, *settings: str, count: int = 4) -> ToyFederation | Federation:
    """The first clients of a kind, for what is shown on both."""
    if kind == "toys":
        return federation_of_toys(folder, TOYS[:count], *settings)
    if kind == "low-rank":
        return federation_of_toys(folder, [LowRankToy(toy.name, toy.tasks) for toy in TOYS[:count]], *settings)
    return federation_of_specs(folder, CLIENTS[:count], *settings)


@dataclass(frozen=True)
class Whole:
    """A run that has ended; `started` is (client, tensors) of every server copy before it trained."""

    kind: str
    federation: ToyFederation | Federation
    grid: InProcessGrid
    strategy: TapStrategy
    results: dict[str, Any]
    started: list[tuple[str, dict[str, Tensor]]]

    def returned(self, server_round: int) -> dict[str, dict[str, Tensor]]:
        """Client -> differences that it returned."""
        names = {node: name for name, node in self.strategy.roster.nodes.items()}
        return {
            names[m.metadata.src_node_id]: messages.tensors_of(m.content, Encoding.float32)
            for m in self.grid.received
            if m.metadata.message_type == messages.TRAIN
            and messages.decode(m.content, messages.Report, "the client").round == server_round
        }


def server_copies(patch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Tensor]]]:
    """(client, tensors) of every server copy before it trains, from now on."""
    found: list[tuple[str, dict[str, Tensor]]] = []
    train = Session.train

    def spy(self: Session, model: Any, optimisation: Any, **names: Any) -> dict[str, float]:
        if names["noise"][-1] == "server":
            found.append((self.name, cpu_state(model)))
        return train(self, model, optimisation, **names)

    patch.setattr(Session, "train", spy)
    return found


def run_whole(kind: str, folder: Path) -> Whole:
    federation = federation_of(kind, folder)
    grid, strategy = federation.grid(), federation.strategy()
    with pytest.MonkeyPatch.context() as patch:
        started = server_copies(patch)
        return Whole(kind, federation, grid, strategy, strategy.start(grid).summary, started)


@pytest.fixture(scope="session")
def whole_toys(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return run_whole("toys", tmp_path_factory.mktemp("toys"))


@pytest.fixture(scope="session")
def whole_specs(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return run_whole("specs", tmp_path_factory.mktemp("specs"))


@pytest.fixture(scope="session", params=["toys", "specs"])
def whole(request: pytest.FixtureRequest) -> Whole:
    """A run of four clients, two rounds; not to be changed."""
    found: Whole = request.getfixturevalue(f"whole_{request.param}")
    return found


@pytest.fixture(scope="module")
def replies(whole_toys: Whole) -> Replies:
    """Of a whole run of toys: a test plays them back, changed."""
    return recorded(whole_toys.grid)
