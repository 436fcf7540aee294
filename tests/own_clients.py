"""Three clients whose modules differ: they share a trunk by the names of its tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flwr.app import Context
from torch.utils.data import DataLoader

from tap_flower import IMAGE_CLASSIFICATION, Client, Task
from tests.toys import REGRESSION, Net, pixels, words


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
