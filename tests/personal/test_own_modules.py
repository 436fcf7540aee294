"""A run of a user's own modules: what was trained is found by the client's name, and reported."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from tap_flower import Client, TapClientApp, TapStrategy, load_config, load_module, load_personal
from tap_flower.cli import app
from tap_flower.client.module import unstable
from tap_flower.core.components import State
from tap_flower.errors import PersonalError, StorageError
from tap_flower.files import read_tensors, write_tensors
from tap_flower.run.in_process import InProcessGrid
from tests.own_clients import Net, digits, make

SETTINGS = ["rounds=1", "clients_per_round=3", "train.steps=2", "distill.iterations=2", "start_timeout=1"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `run` and `state`."""
    folder = tmp_path_factory.mktemp("own")
    client_app = TapClientApp()
    client_app.client()(make)
    grid = InProcessGrid(client_app, [{"partition-id": i} for i in range(3)], {"state": str(folder / "state")})
    TapStrategy(config=load_config("plug-in", settings=SETTINGS), run_folder=folder / "run").start(grid)
    return folder


def kept(place: Path, client: str, which: str) -> State:
    (file,) = place.glob(f"state/{client}/*/{which}.safetensors")
    return read_tensors(file)[0]


class Drawn(nn.Module):
    """Draws a frozen projection and two masks, of which one is not in its `state_dict`."""

    mask: torch.Tensor
    cache: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.still, self.head = nn.Linear(4, 6).requires_grad_(False), nn.Linear(6, 3)
        self.register_buffer("mask", torch.rand(6))
        self.register_buffer("cache", torch.rand(6), persistent=False)

    def see(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.still(x) * self.mask * self.cache)
        return out


@pytest.mark.parametrize("method", ["tap", "local"])
def test_what_model_draws_is_loaded_whatever_the_module_that_is_given_has_drawn(tmp_path: Path, method: str) -> None:
    used: list[torch.Tensor] = []

    def see(net: Drawn, batch: list[torch.Tensor]) -> torch.Tensor:
        used[:] = [*net.still.parameters(), net.mask, net.cache]
        return net.see(batch[0])

    client_app = TapClientApp()
    client_app.client()(lambda _: Client("ann", Drawn, [replace(digits(0), forward=see)], state_dir=tmp_path))
    settings = [*SETTINGS, "clients_per_round=1", f"method={method}"]
    strategy = TapStrategy(config=load_config("plug-in", settings=settings), run_folder=tmp_path / "run")
    strategy.start(InProcessGrid(client_app, [{}], {}))
    net = load_personal(Drawn(), "ann", state_dir=tmp_path)
    found = [*net.still.parameters(), net.mask, net.cache]
    assert all(one.equal(other) for one, other in zip(found, used, strict=True))


def test_what_model_draws_and_float32_cannot_hold_is_told(caplog: pytest.LogCaptureFixture) -> None:
    def model() -> nn.Module:
        net = Drawn()
        net.register_buffer("precise", torch.rand(6, dtype=torch.float64))
        net.register_buffer("far", torch.tensor([-torch.inf]))
        return net

    assert unstable(model, 1).keys() == {"still.weight", "still.bias", "mask", "cache"}
    assert "`model` builds 'precise' with other values each time" in caplog.text


def test_what_stage_2_has_made_is_loaded_by_name(place: Path) -> None:
    net = load_personal(Net("digits"), "ann", state_dir=place / "state")
    assert not net.training
    assert all(value.equal(net.state_dict()[name]) for name, value in kept(place, "ann", "tap").items())
    earlier = load_personal(Net("digits"), "ann", which="personal", state_dir=place / "state")
    assert earlier.image is not None
    assert earlier.image.weight.equal(kept(place, "ann", "personal")["image.weight"])
    wrapped = load_personal(nn.DataParallel(Net("digits")), "ann", state_dir=place / "state")
    assert wrapped.module.trunk[0].weight.equal(net.trunk[0].weight)


def test_the_newest_run_or_the_one_that_is_named(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (newest,) = (place / "state" / "bob").iterdir()
    tensors, record = read_tensors(newest / "personal.safetensors")
    older = newest.parent / "older"
    write_tensors(older / "personal.safetensors", {n: torch.zeros_like(v) for n, v in tensors.items()}, record)
    os.utime(older / "personal.safetensors", (1, 1))
    # By default the states are in Flower's home.
    monkeypatch.setenv("FLWR_HOME", str(place / "flower"))
    (place / "flower").mkdir()
    (place / "flower" / "tap-flower").symlink_to(place / "state")
    assert load_personal(Net("mood"), "bob").trunk[0].weight.count_nonzero() > 0
    for run in ("older", older):
        assert load_personal(Net("mood"), "bob", run).trunk[0].weight.count_nonzero() == 0


def test_what_cannot_be_loaded_is_told(place: Path) -> None:
    with pytest.raises(
        StorageError, match="client 'dan' has no run in .*/state/dan .did you mean 'ann'..: give the node's state-dir"
    ):
        load_personal(Net("digits"), "dan", state_dir=place / "state")
    with pytest.raises(StorageError, match="client 'ann' has no run 'last' in .*; it has [0-9a-f]{32}"):
        load_personal(Net("digits"), "ann", "last", state_dir=place / "state")
    (folder,) = (place / "state" / "ann").iterdir()
    with pytest.raises(PersonalError, match="is a folder of client 'ann', not of 'bob': name that client, or"):
        load_personal(Net("digits"), "bob", folder)
    with pytest.raises(PersonalError, match="has no model 'best': it has personal, server\\+finetune, tap"):
        load_module(Net("digits"), folder, "best")
    with pytest.raises(PersonalError, match="the module has the tensor 'heads.mood.bias', which the model lacks"):
        load_module(Net("digits", "mood"), folder)
    with pytest.raises(PersonalError, match="the model has the tensor 'heads.digits.bias', which the module lacks"):
        load_module(nn.ModuleDict({"trunk": Net("digits").trunk, "image": nn.Linear(4, 6)}), folder)
    with pytest.raises(PersonalError, match="tensor 'heads.digits.weight' has shape \\(3, 5\\) in the module and"):
        load_module(Net("digits", width=5), folder)


def test_a_report(place: Path) -> None:
    done = CliRunner().invoke(app, ["report", str(place / "run")])
    assert done.exit_code == 0, done.output
    assert "digits" in done.output
    assert "mood" in done.output
    assert "cleo" in (place / "run" / "report.html").read_text()
