"""Three clients whose modules differ: they share a trunk by the names of its tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from flwr.app import Context
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from tap_flower import IMAGE_CLASSIFICATION, Client, Task, TaskKind

REGRESSION = TaskKind.of(
    "regression",
    lambda output, target: (output - target).square().mean(-1),
    lambda student, teacher, target, temperature: (student - teacher).square().mean(-1),
)


class Net(nn.Module):
    """Two inputs, one trunk, a head for each task."""

    def __init__(self, *heads: str, width: int = 6) -> None:
        super().__init__()
        self.image = nn.Linear(4, width) if "digits" in heads else None
        self.words = nn.GRU(3, width, batch_first=True) if "mood" in heads else None
        self.trunk = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width))
        self.heads = nn.ModuleDict({name: nn.Linear(width, {"digits": 3, "mood": 2}[name]) for name in heads})

    def see(self, pixels: Tensor) -> Tensor:
        assert self.image is not None
        return self.heads["digits"](self.trunk(torch.relu(self.image(pixels))))

    def read(self, words: Tensor) -> Tensor:
        assert self.words is not None
        return self.heads["mood"](self.trunk(self.words(words)[0][:, -1]))


def pixels(count: int, seed: int) -> Dataset[Any]:
    """The class is the largest of the first three numbers."""
    x = torch.rand(count, 4, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, x[:, :3].argmax(1))


def words(count: int, seed: int) -> Dataset[Any]:
    """The target is the sum over the words, of the first two numbers each."""
    x = torch.rand(count, 5, 3, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, x.sum(1)[:, :2])


def digits(seed: int, **more: Any) -> Task:
    return Task(
        "digits",
        IMAGE_CLASSIFICATION,
        ["image"],
        pixels(64, seed),
        pixels(32, seed + 100),
        forward=lambda net, batch: net.see(batch[0]),
        target=lambda batch: batch[1],
        **more,
    )


def mood(seed: int, **more: Any) -> Task:
    return Task(
        "mood",
        REGRESSION,
        ["words"],
        DataLoader(words(48, seed), batch_size=8),
        words(16, seed + 100),
        forward=lambda net, batch: net.read(batch[0]),
        target=lambda batch: batch[1],
        **more,
    )


def client(number: int, **more: Any) -> Client:
    """ann has digits, bob the mood, cleo both."""
    if number == 0:
        return Client("ann", lambda: Net("digits"), [digits(0)], **more)
    if number == 1:
        return Client("bob", lambda: Net("mood"), [mood(1)], **more)
    return Client("cleo", lambda: Net("digits", "mood"), [digits(2), mood(3)], **more)


def make(context: Context) -> Client:
    return client(int(context.node_config["partition-id"]), state_dir=Path(str(context.run_config["state"])))
