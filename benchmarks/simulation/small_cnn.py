"""What every framework is given: clients' images, the model, local training; and how it tells its times. Torch is enough."""

from __future__ import annotations

import functools
import json
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

CLASSES, SIDE = 10, 28
LEARNING_RATE = 0.05
HELD_OUT = 500
"""Images that no client has."""
EVENT = "\x1e"
"""Begins the line with the result, as in `benchmarks.gpu.part`."""


@dataclass(frozen=True)
class Asked:
    """What a framework is to run.

    Attributes:
        clients: in all.
        sample: clients of a round.
        rounds: of which the first does not count.
        steps: optimiser steps of a client in a round: a pass over its images.
        batch: images of a step.
        cores: of this machine.
        ray: whether clients are Ray actors; else all is in one process.
    """

    clients: int
    sample: int
    rounds: int
    steps: int
    batch: int
    cores: int
    ray: bool


def asked() -> Asked:
    """What the command line of a framework's script says, as JSON."""
    return Asked(**json.loads(sys.argv[1]))


class SmallCnn(nn.Module):
    """Images [B, 1, 28, 28] -> logits [B, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(512, 30), nn.ReLU(), nn.Linear(30, CLASSES),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        """[B, 1, 28, 28] -> [B, 10]."""
        logits: Tensor = self.layers(images)
        return logits


def images(seed: int, count: int) -> tuple[Tensor, Tensor]:
    """Made-up images [count, 1, 28, 28], each its class's pattern and noise, and their classes [count] int64."""
    patterns = torch.randn(CLASSES, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    random = torch.Generator().manual_seed(seed)
    classes = torch.randint(CLASSES, (count,), generator=random)
    return patterns[classes] + 2 * torch.randn(count, 1, SIDE, SIDE, generator=random), classes


@functools.cache
def loader(client: int, rows: int, batch: int) -> DataLoader[tuple[Tensor, ...]]:
    """A client's images, in a fixed order."""
    return DataLoader(TensorDataset(*images(client + 1, rows)), batch)


def train(net: nn.Module, batches: DataLoader[tuple[Tensor, ...]]) -> float:
    """One pass of SGD; returns the last batch's loss."""
    optimizer = torch.optim.SGD(net.parameters(), lr=LEARNING_RATE)
    net.train()
    for x, y in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return loss.item()


@torch.no_grad()
def held_out_loss(net: nn.Module) -> float:
    """The mean cross-entropy on images that no client has."""
    x, y = images(2**31, HELD_OUT)
    return F.cross_entropy(net.eval()(x), y).item()


class Rounds:
    """The times at which rounds ended."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def end(self) -> None:
        """A round ends now; the first call is that of the beginning."""
        self.stamps.append(time.perf_counter())

    def tell(self, package: str, net: nn.Module) -> None:
        """Prints the result.

        Args:
            package: that ran, for its version.
            net: the final model.
        """
        found = {
            "version": version(package),
            "torch": torch.__version__,
            "seconds": [after - before for before, after in pairwise(self.stamps)],
            "loss": held_out_loss(net),
        }
        print(f"{EVENT}{json.dumps(found)}", flush=True)
