"""A project in small for tests of clients: a net, its data, a loop and an evaluation of its own, and a federation of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from flwr.app import ConfigRecord, Context
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from tap_flower import IMAGE_CLASSIFICATION, Client, TapClientApp, TapResult, TapStrategy, Task, load_config
from tap_flower.config import HyperParameters
from tap_flower.run.in_process import InProcessGrid
from tests.toys import pixels

COMPONENTS = {"trunk": "trunk.*", "head/digits": "head.*"}
FEW = ["train.steps=2", "distill.iterations=2", "start_timeout=1"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.trunk(x)))


class Normed(Net):
    """With BatchNorm, which cannot be trained on one vector."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.trunk(x)))


def loader(count: int = 12, seed: int = 0, size: int = 4, **more: Any) -> DataLoader[Any]:
    return DataLoader(pixels(count, seed), batch_size=size, **more)


def task(train: Any = None, test: Any = None, **more: Any) -> Task:
    forward = {"forward": lambda net, batch: net(batch[0]), "target": lambda batch: batch[1]}
    train, test = loader() if train is None else train, loader(8, 1) if test is None else test
    return Task("digits", IMAGE_CLASSIFICATION, ["image"], train, test, **{**forward, **more})


class Loop:
    """A project's own loop and evaluation, which note what they were given."""

    def __init__(self, returns: Callable[[float], Any] = lambda loss: {"loss": loss, "epochs": 1}) -> None:
        self.returns = returns
        self.rows: list[torch.Tensor] = []
        self.rates: list[float] = []
        self.scored: list[int] = []

    def fit(self, net: nn.Module, data: DataLoader[Any], config: Mapping[str, Any]) -> Any:
        assert type(net) is Net
        self.rates.append(config["lr"])
        optimizer = torch.optim.SGD(net.parameters(), lr=config["lr"])
        losses = []
        for x, y in data:
            self.rows.append(x)
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return self.returns(sum(losses) / len(losses))

    def score(self, net: nn.Module, data: DataLoader[Any]) -> dict[str, float]:
        net.eval()
        losses = [F.cross_entropy(net(x), y).item() for x, y in data]
        right = [(net(x).argmax(1) == y).float().mean().item() for x, y in data]
        self.scored.append(len(losses))
        return {"loss": sum(losses) / len(losses), "accuracy": sum(right) / len(right)}

    def task(self, train: Any = None, **more: Any) -> Task:
        return task(train, **{"forward": None, "target": None, "fit": self.fit, "score": self.score, **more})


def federate(
    folder: Path, app: TapClientApp, *settings: str, nodes: int = 2, rate: float = 0.05, **more: Any
) -> TapResult:
    """One round of a federation in this process, and its second stage.

    Args:
        folder: the run folder is below it.
        app: a project's.
        settings: of the run.
        nodes: how many.
        rate: `lr` of the train config.
        more: `run_config`, and what else each node's config holds.
    """
    run_config = more.pop("run_config", {})
    config = load_config("plug-in", settings=["rounds=1", f"clients_per_round={nodes}", *FEW, *settings])
    grid = InProcessGrid(app, [{"partition-id": number, **more} for number in range(nodes)], run_config)
    return TapStrategy(config=config, run_folder=folder / "run").start(grid, train_config=ConfigRecord({"lr": rate}))


def run(folder: Path, tasks: Callable[[int], Task], *settings: str, **more: Any) -> TapResult:
    """`federate`, with a client of one task on each node."""
    app = TapClientApp()

    @app.client()
    def make(context: Context) -> Client:
        number = int(context.node_config["partition-id"])
        return Client(f"c{number}", Net, [tasks(number)], COMPONENTS, state_dir=folder / "state")

    return federate(folder, app, *settings, **more)


def session(of: Task, name: str = "ann", **settings: Any) -> Any:
    return Client(name, Net, [of]).session(HyperParameters(**settings))
