"""Newcomers: who is held out, and what a run of stage 2 alone starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from flwr.app import ArrayRecord

from tap_flower.config import to_yaml
from tap_flower.errors import ConfigError
from tap_flower.files import read_tensors
from tap_flower.server.server_run import final_values
from tap_flower.server.strategy import TapStrategy
from tap_flower.study.newcomers import _held_out, newcomers_study
from tap_flower.study.plan import STEPS
from tap_flower.study.worker import Task, _run
from tests.federations import LANGUAGES, Make, plug_in_config, sources
from tests.toys import TOYS, Toy


def held_by(*clients: str) -> list[dict[str, Any]]:
    """Clients a, b, …, with the tasks whose letters they are given."""
    return [
        {"name": name, "tasks": [{"name": task} for task in tasks]}
        for name, tasks in zip("abcd", clients, strict=False)
    ]


def test_every_task_of_a_newcomer_is_held_by_a_member() -> None:
    for seed in range(8):
        assert _held_out(held_by("xy", "x", "y", "z"), 0.5, seed) in ({"a"}, {"b", "c"})
        assert len(_held_out(held_by("x", "x", "x", "x"), 0.5, seed)) == 2
        assert len(_held_out(held_by("x", "x", "x", "x"), 1.0, seed)) == 3
    with pytest.raises(ConfigError, match="needs a client whose tasks others have, too"):
        _held_out(held_by("x", "y"), 0.5, 1)


def test_members_train_and_newcomers_run_stage_2_from_their_last_values(tmp_path: Path) -> None:
    clients = [
        {"name": name, "backbone": "demo", "tasks": [{**LANGUAGES, **sources("names", first, 8)}]}
        for name, first in (("ann", 0), ("bob", 20))
    ]
    (tmp_path / "clients.yaml").write_text(yaml.safe_dump({"clients": clients}))
    settings, out = ["rounds=3", "distill.iterations=7"], tmp_path / "out"
    federations, sweep = newcomers_study("demo", str(tmp_path / "clients.yaml"), settings, [1], ["tap"], 0.5, out)
    (federation,), runs = federations, sweep.budgets[STEPS]
    names = [
        [client["name"] for client in yaml.safe_load(Path(run.config).read_text())["clients"]]
        for run in (federation, runs["tap", 1], runs["local", 1])
    ]
    assert names[1] == names[2]
    assert sorted(names[0] + names[1]) == ["ann", "bob"]
    assert runs["tap", 1].start == federation.folder
    assert runs["local", 1].start is None
    assert (federation.rounds, runs["tap", 1].rounds, runs["local", 1].rounds) == (None, 0, 0)
    assert runs["tap", 1].resolved.distill.iterations == 7
    assert "distill.iterations=14" in runs["local", 1].settings  # TAP's teacher and student take as many
    assert sweep.reference == "local"


def test_a_run_without_rounds_begins_with_the_servers_last_values(make_federation: Make) -> None:
    first = make_federation(TOYS[:2])
    first.strategy().start(first.grid())
    alone, newcomer = (make_federation([Toy("eve", {"languages": 12})]) for _ in range(2))
    expected = alone.strategy().start(alone.grid(), num_rounds=0).summary
    found = newcomer.strategy().start(newcomer.grid(), final_values(first.out), num_rounds=0).summary
    models, others = (each["clients"]["eve"]["languages"] for each in (found, expected))
    assert models["personal"] == models["server"]
    assert others["personal"] == others["server"] != models["server"]
    assert (found["rounds"], found["steps"]) == (0, {"eve": 4})
    trained = read_tensors(first.out / "server" / "server.safetensors")[0]
    received = read_tensors(newcomer.state("eve") / "server.safetensors")[0]
    assert received.keys() == {name for name in trained if "shape_images" not in name and not name.startswith("image")}
    assert all(bool((trained[name] == value).all()) for name, value in received.items())


def test_the_worker_starts_from_the_run_that_it_is_given(
    make_federation: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make_federation(TOYS[:1])
    first.strategy().start(first.grid())
    given: list[tuple[ArrayRecord | None, int | None]] = []
    monkeypatch.setattr(TapStrategy, "start", lambda _, grid, arrays, rounds: given.append((arrays, rounds)))
    for start in ("", str(first.out)):
        task = Task("plug-in", to_yaml(plug_in_config()), str(tmp_path / "run"), "", "", "", 1, start, 0)
        assert _run(task, tmp_path / "run") == ""
    assert given[0] == (None, 0)
    arrays, rounds = given[1]
    assert rounds == 0
    assert arrays is not None
    assert arrays.keys() == final_values(first.out).keys()
    gone = Task("plug-in", to_yaml(plug_in_config()), str(tmp_path / "run"), "", "", "", 1, str(tmp_path / "gone"))
    assert "StorageError" in _run(gone, tmp_path / "run")
