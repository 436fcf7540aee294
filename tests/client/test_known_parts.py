"""A run tries a client's tasks once: later messages take what was found from a file of its state folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from torch import nn

import tap_flower.client.task
from tap_flower import Client, TapClientApp, TapStrategy, load_config
from tap_flower.client.known_parts import PARTS, KnownParts
from tap_flower.config import HyperParameters
from tap_flower.run.in_process import InProcessGrid
from tests.own_clients import Net, client, digits, make


class Normed(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.net = Net("digits")
        self.norm = nn.BatchNorm1d(3)
        self.spare = nn.Linear(width, 2)

    def see(self, images: Any) -> Any:
        return self.norm(self.net.see(images))


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The first task of each client that was tried."""
    found, parts_of = [], tap_flower.client.task.parts_of

    def spy(built: Any, tasks: Any, *more: Any) -> Any:
        found.append(tasks[0].pair.task)
        return parts_of(built, tasks, *more)

    monkeypatch.setattr(tap_flower.client.task, "parts_of", spy)
    return found


def outline(folder: Path, width: int = 4, run: str = "r", anew: bool = False, **more: Any) -> Any:
    made = Client("ann", lambda: Normed(width), [digits(0)], **more)
    return made.session(HyperParameters(), KnownParts(folder, run, anew)).outline


@pytest.mark.parametrize("buffers", ["personal", "average"])
def test_what_was_found_is_found_again(tmp_path: Path, tried: list[str], buffers: str) -> None:
    first, again = outline(tmp_path, buffers=buffers), outline(tmp_path, buffers=buffers)
    assert len(tried) == 1
    assert again.component_map == first.component_map
    assert list(again.component_map.component_of) == list(first.component_map.component_of)
    assert (again.moving, again.local) == (first.moving, first.local)
    assert "norm.running_mean" in again.moving
    assert {"spare.weight", "spare.bias"} <= again.local


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: outline(folder, width=5),
        lambda folder: outline(folder, run="another"),
        lambda folder: outline(folder, anew=True),
        lambda folder: outline(folder, buffers="average"),
        lambda folder: outline(folder, components={"all": ["*"]}),
        lambda folder: outline(folder, reach={"digits": ["net.*", "norm.*", "spare.*"]}),
        lambda folder: (folder / PARTS).write_text("{") and outline(folder),
        lambda folder: (folder / PARTS).write_text('{"run": "r"}') and outline(folder),
        lambda folder: (folder / PARTS).unlink() or outline(folder),
    ],
    ids=["shape", "run", "anew", "buffers", "components", "reach", "damaged", "incomplete", "missing"],
)
def test_what_does_not_fit_is_tried_anew(tmp_path: Path, tried: list[str], change: Callable[[Path], Any]) -> None:
    outline(tmp_path)
    change(tmp_path)
    assert len(tried) == 2


class NewProcess(ClientApp):
    """Answers each message as an app that has just been loaded."""

    def __call__(self, message: Message, context: Context) -> Message:
        app = TapClientApp()
        app.client()(make)
        return app(message, context)


def test_a_run_and_its_resume_try_each_client_once(tmp_path: Path, tried: list[str]) -> None:
    settings = ["rounds=2", "clients_per_round=3", "train.steps=2", "distill.iterations=2", "start_timeout=1"]
    nodes = [{"partition-id": number} for number in range(3)]
    grid = InProcessGrid(NewProcess(), nodes, {"state": str(tmp_path / "state")})
    first = [client(number).tasks[0].name for number in range(3)]

    def start(resume: bool) -> None:
        config = load_config("plug-in", settings=settings)
        TapStrategy(config=config, run_folder=tmp_path / "run", resume=resume).start(grid)

    start(resume=False)
    assert sorted(tried) == sorted(first)
    (tmp_path / "run" / "results.json").unlink()
    start(resume=True)
    assert sorted(tried) == sorted(first * 2)
