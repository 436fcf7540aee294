"""Too few nodes and too many, other versions, clients that come later, nodes' own settings."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import yaml
from flwr.app import Message

import tap_flower
from tap_flower.errors import ConfigError, RunError
from tap_flower.report.events import read_events
from tap_flower.server.server_run import ServerRun
from tap_flower.wire import messages
from tests.federation.runs import (
    EVERYBODY,
    gathered,
    is_train,
    sent,
)
from tests.federations import (
    CLIENTS,
    LANGUAGES,
    Federation,
    MakeSpecs,
    ToyFederation,
    sources,
)
from tests.grid import Playback, Replies, round_of


def test_fewer_nodes_than_clients_is_an_error_that_says_who_is_missing(spec_federation: Federation) -> None:
    grid, strategy = spec_federation.grid(), spec_federation.strategy()
    del grid.contexts[102]
    with pytest.raises(RunError, match=r"3 of 4 clients are there.*without cleo.*num-supernodes=4"):
        strategy.start(grid)


def test_fewer_nodes_than_a_round_has_clients_is_an_error_that_counts_them(federation: ToyFederation) -> None:
    grid, strategy = federation.grid(), federation.strategy()
    del grid.contexts[102]
    with pytest.raises(RunError, match=r"3 of 4 clients are there after 1 s: start more nodes .*num-supernodes=4"):
        strategy.start(grid)


def test_a_node_too_many_is_told_how_many_there_are(spec_federation: Federation) -> None:
    spec_federation.clients += 1
    assert set(gathered(spec_federation.strategy(), spec_federation.grid()).names) == EVERYBODY
    (event,) = [e for e in read_events(spec_federation.out) if e["event"] == "dropped"]
    assert event["who"] == "node 104"
    assert re.search("more nodes than the 4 clients.*num-supernodes=4", event["problem"])


def test_a_node_too_many_is_refused_and_the_run_goes_on(federation: ToyFederation) -> None:
    federation.settings.append("rounds=1")
    grid, strategy = federation.grid(), federation.strategy()
    grid.contexts[104] = replace(grid.contexts[103], node_id=104, node_config={"partition-id": 4})  # of four
    assert strategy.start(grid).summary["clients"].keys() == EVERYBODY
    problems = {(e["who"], e["problem"]) for e in read_events(federation.out) if e["event"] == "dropped"}
    assert {who for who, _ in problems} == {"node 104"}
    assert all("unexpected IndexError at toys.py" in problem for _, problem in problems)


def test_a_second_node_of_one_name_is_refused_while_the_first_is_there(federation: ToyFederation) -> None:
    federation.settings += ["rounds=1", "clients_per_round=3"]
    grid, strategy = federation.grid(), federation.strategy()
    grid.contexts[103].node_config["partition-id"] = 0
    assert set(strategy.start(grid).summary["clients"]) == {"ann", "bob", "cleo"}
    assert strategy.roster.nodes["ann"] == 100
    problems = {e["problem"] for e in read_events(federation.out) if e["event"] == "dropped"}
    assert any("client 'ann' is already there on node 100: node 103 is refused" in problem for problem in problems)


def test_where_a_refused_node_is_needed_the_run_says_why_it_cannot_start(federation: ToyFederation) -> None:
    grid, strategy = federation.grid(), federation.strategy()
    grid.contexts[101].node_config["partition-id"] = 0
    with pytest.raises(RunError, match="node 101 cannot take part: client 'ann' is already there on node 100"):
        strategy.start(grid)


def test_tasks_of_one_name_with_other_classes_are_refused(make_spec_federation: MakeSpecs) -> None:
    clash = {**LANGUAGES, "classes": [*LANGUAGES["classes"], "xx"], **sources("names", 40, 8)}
    federation = make_spec_federation([*CLIENTS[:1], {"name": "zoe", "backbone": "demo", "tasks": [clash]}])
    with pytest.raises(ConfigError, match=r"task 'languages' of client 'zoe' has other classes than on client 'ann'"):
        federation.strategy().start(federation.grid())


def of_version(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """The server says that it is of another version."""
    instruction = ServerRun._instruction
    other = partial(msgspec.structs.replace, **changes)
    monkeypatch.setattr(ServerRun, "_instruction", lambda self, number: other(instruction(self, number)))


def test_another_protocol_is_refused(federation: ToyFederation, monkeypatch: pytest.MonkeyPatch) -> None:
    grid, strategy = federation.grid(), federation.strategy()
    of_version(monkeypatch, protocol=messages.PROTOCOL + 1, version="9.9.0")
    with pytest.raises(
        RunError, match=r"the server speaks protocol 8 of tap-flower '9.9.0'.*install one minor version"
    ):
        strategy.start(grid)


def test_another_patch_version_works(federation: ToyFederation, monkeypatch: pytest.MonkeyPatch) -> None:
    minor, _, patch = tap_flower.__version__.rpartition(".")
    of_version(monkeypatch, version=f"{minor}.{int(patch) + 1}")
    result = federation.strategy().start(federation.grid())
    assert set(result.clients) == EVERYBODY
    assert result.missing == {}


def test_sampling_goes_by_names_not_by_node_ids(federation: ToyFederation, replies: Replies) -> None:
    roster = gathered(federation.strategy(), Playback(replies))
    rounds = [roster.sample(r, 2) for r in range(1, 60)]
    roster.nodes = {name: 9000 - node for name, node in roster.nodes.items()}
    assert [roster.sample(r, 2) for r in range(1, 60)] == rounds
    assert {name for names in rounds for name in names} == EVERYBODY
    assert all(len(set(names)) == 2 for names in rounds)


def test_a_new_client_with_a_new_pair_may_join_in_any_round(federation: ToyFederation) -> None:
    federation.settings += ["rounds=3", "clients_per_round=3"]
    grid, strategy = federation.grid(), federation.strategy()
    late = grid.contexts.pop(103)
    known: list[set[str]] = []

    def join(message: Message, reply: Message) -> Message:
        if is_train(message) and round_of(message) == 1:
            grid.contexts[103] = late
            strategy.config.clients_per_round = 4
            known.append(set(strategy.roster.tensors))
        return reply

    grid.tamper = join
    results = strategy.start(grid).summary
    assert "dan" in results["clients"]
    assert not any("translation" in name for name in known[0])
    first = next(t for r, node, t in sent(grid, messages.TRAIN) if node == 103)
    manifest = strategy.roster.manifests["dan"]
    new = {name for name in first if name not in known[0]}
    assert new == {"heads.translation.weight", "heads.translation.bias"}
    for name, value in strategy.roster.first_values(manifest, new).items():
        assert torch.equal(first[name], value)


def test_a_deployed_node_is_configured_on_the_node(make_spec_federation: MakeSpecs, tmp_path: Path) -> None:
    federation = make_spec_federation(CLIENTS[:2], "rounds=1", "train.steps=1", "distill.iterations=1")
    grid = federation.grid()
    for node, client in zip(grid.contexts.values(), CLIENTS[:2], strict=True):
        spec = tmp_path / f"{client['name']}.yaml"
        spec.write_text(yaml.safe_dump(client))
        node.node_config = {"client-spec": str(spec), "state-dir": str(tmp_path / "state")}
        node.run_config = {"preset": "nonsense", "out": "/nonexistent"}  # what a server says of these is not read
    results = federation.strategy().start(grid).summary
    assert set(results["clients"]) == {"ann", "bob"}
    (run,) = (tmp_path / "state" / "ann").iterdir()
    assert (run / "tap.safetensors").exists()
    assert not (federation.out / "clients").exists()


@pytest.mark.parametrize(
    ("node_config", "problem"),
    [
        ({}, "the node has no client-spec: start it with --node-config"),
        ({"client-spec": "none.yaml"}, "no state-dir"),
        ({"client-spec": "none.yaml", "state-dir": "x"}, "client spec 'none.yaml' cannot be read"),
    ],
)
def test_a_badly_configured_node_says_what_to_do(
    make_spec_federation: MakeSpecs, node_config: dict[str, Any], problem: str, caplog: pytest.LogCaptureFixture
) -> None:
    federation = make_spec_federation(CLIENTS[:1])
    grid = federation.grid()
    grid.contexts[100].node_config = node_config
    told = "client spec is wrong, or does not fit its data: the log of the node says where" if node_config else problem
    with pytest.raises(RunError, match=told):
        federation.strategy().start(grid)
    assert not node_config or problem in caplog.text
