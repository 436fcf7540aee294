"""A federation in this process: what must hold whatever the numbers are."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import yaml
from flwr.app import Array, ArrayRecord, Message, RecordDict
from torch import Tensor

from tap_flower.config import ConfigError, client_specs
from tap_flower.core.aggregation import Aggregator
from tap_flower.core.tasks import TASK_KINDS
from tap_flower.federation import exchange, messages
from tap_flower.federation.strategy import RunError
from tap_flower.methods.spec_client import exchanged
from tap_flower.reporting.checks import exchange_line
from tap_flower.reporting.events import read_events
from tap_flower.storage import StorageError, read_tensors

from .conftest import CLIENTS, LANGUAGES, Federation, sources
from .grid import InProcessGrid

Make = Callable[..., Federation]


def sent(grid: InProcessGrid, message_type: str) -> list[tuple[int, int, dict[str, Tensor]]]:
    """(round, node, tensors) of what the server sent."""
    return [
        (messages.decode(m.content)["round"], m.metadata.dst_node_id, messages.decode_tensors(m.content))
        for m in grid.sent
        if m.metadata.message_type == message_type
    ]


def without_times(results: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in results.items() if key != "seconds"}


def test_a_whole_run(federation: Federation) -> None:
    grid, strategy = federation.grid(), federation.strategy()
    results = strategy.start(grid)
    assert strategy.progress.dropped == 0
    assert results == json.loads((federation.out / "results.json").read_text())
    assert results["schema"] == 1
    assert set(results["clients"]) == {"ann", "bob", "cleo", "dan"}
    for client, by_task in results["clients"].items():
        assert by_task.keys() == strategy.roster.manifests[client].reach.keys()
        for task, by_model in by_task.items():
            assert set(by_model) == {"server", "server+finetune", "personal", "tap"}
            for metrics in by_model.values():
                assert all(math.isfinite(value) for value in metrics.values())
                assert TASK_KINDS[results["kinds"][task]].headline in metrics
    mean = np.mean([results["clients"][name]["languages"]["tap"]["accuracy"] for name in ("ann", "bob")])
    assert results["tasks"]["languages"]["tap"]["accuracy"] == pytest.approx(mean)
    for name in ("ann", "bob", "cleo", "dan"):
        folder = federation.out / "clients" / name
        assert {p.name for p in folder.iterdir()} >= {"personal.safetensors", "tap.safetensors", "state.json"}
    assert (federation.out / "config.yaml").exists()
    total = results["bytes"]
    assert total["down"] == sum(c["down"] for c in total["per_component"].values()) > total["up"] > 0
    assert [e["event"] for e in read_events(federation.out)][-1] == "end"


def test_two_runs_with_one_seed_are_equal_whatever_the_order_of_replies(make_federation: Make) -> None:
    found = []
    for order in (lambda ids: ids, lambda ids: ids[::-1]):
        federation = make_federation()
        found.append(without_times(federation.strategy().start(federation.grid(order=order))))
    assert found[0] == found[1]
    other = make_federation()
    other.settings.append("seed=5")
    assert without_times(other.strategy().start(other.grid()))["clients"] != found[0]["clients"]


def test_after_aggregation_every_client_starts_from_exactly_the_servers_tensors(federation: Federation) -> None:
    grid, strategy = federation.grid(), federation.strategy()
    strategy.start(grid)
    first = {node: tensors for round_, node, tensors in sent(grid, messages.TRAIN) if round_ == 1}
    replies = {
        m.metadata.src_node_id: messages.decode_tensors(m.content)
        for m in grid.received
        if m.metadata.message_type == messages.TRAIN and messages.decode(m.content)["server_round"] == 1
    }
    assert len(first) == len(replies) == 4
    names = {node: name for name, node in strategy.roster.nodes.items()}
    examples = {node: strategy.roster.manifests[names[node]].examples_per_component for node in names}
    component_of = strategy.roster.component_of
    compared = 0
    for _, _, tensors in [row for row in sent(grid, messages.TRAIN) if row[0] == 2]:
        for name, value in tensors.items():
            holders = [other for other in replies if name in replies[other]]
            weights = torch.tensor([examples[h][component_of[name]] for h in holders], dtype=torch.float64)
            stacked = torch.stack([replies[h][name].double() for h in holders])
            mean = torch.tensordot(weights / weights.sum(), stacked, dims=1)
            torch.testing.assert_close(value.double(), mean, atol=1e-9, rtol=1e-6)
            compared += 1
    assert compared > 300
    moved = [n for n, v in first[100].items() if not torch.equal(v, strategy.roster.tensors[n])]
    assert len(moved) > 0.9 * len(first[100])


def test_the_client_trains_what_it_received(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    from tap_flower.core.components import cpu_state
    from tap_flower.methods.local import LocalClient

    started: list[dict[str, Tensor]] = []
    train = LocalClient.train

    def spy(self: LocalClient, model: Any, optimisation: Any, **names: Any) -> dict[str, float]:
        if names["noise"][-1] == "server":
            started.append(cpu_state(model))
        return train(self, model, optimisation, **names)

    monkeypatch.setattr(LocalClient, "train", spy)
    grid = federation.grid()
    federation.strategy().start(grid)
    received = [tensors for _, _, tensors in sent(grid, messages.TRAIN) + sent(grid, messages.DISTILL)]
    assert len(started) == len(received) == 12
    for start, tensors in zip(started, received, strict=True):
        assert start.keys() == tensors.keys()
        assert all(torch.equal(start[name], tensors[name]) for name in start)


def test_a_component_that_nobody_returned_keeps_its_value(federation: Federation) -> None:
    federation.settings.append("clients_per_round=1")
    grid, strategy = federation.grid(), federation.strategy()
    before: list[dict[str, Tensor]] = []
    result = Aggregator.result

    def spy(self: Aggregator) -> dict[str, Tensor]:
        before.append(dict(self._previous))
        return result(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Aggregator, "result", spy)
        strategy.start(grid)
    states = [*before[1:], strategy.roster.tensors]
    rounds = [tensors.keys() for _, _, tensors in sent(grid, messages.TRAIN)]
    assert len(rounds) == 2
    for old, new, trained in zip(before, states, rounds, strict=True):
        kept = old.keys() - trained
        assert kept
        assert all(torch.equal(old[name], new[name]) for name in kept)
        assert any(not torch.equal(old[name], new[name]) for name in trained)


def test_a_check_tells_the_tensors_and_bytes_of_the_manifest(federation: Federation) -> None:
    grid, strategy = federation.grid(), federation.strategy()
    strategy._gather(grid)
    assert strategy.roster.manifests.keys() == {"ann", "bob", "cleo", "dan"}
    for spec in client_specs(strategy.config):
        tensors = exchanged(spec, strategy.config.model)
        manifest = strategy.roster.manifests[spec.name].tensors
        assert {name: tuple(t.shape) for name, t in tensors.items()} == {n: i.shape for n, i in manifest.items()}
        megabytes = sum(math.prod(info.shape) * 4 for info in manifest.values()) / 1e6
        assert f"{len(manifest)} tensors, {megabytes:.3f} MB of values to the client" in exchange_line(tensors)
        arrays = messages.encode_tensors(strategy.roster.tensors_for(spec.name)[0])
        on_the_wire = messages.payload_bytes(messages.encode({}, arrays))
        header = 128  # of an array
        assert on_the_wire == {name: tensor.nbytes + header for name, tensor in tensors.items()}


def test_messages_hold_the_tensors_of_the_clients_own_pairs_and_nothing_else(federation: Federation) -> None:
    grid, strategy = federation.grid(), federation.strategy()
    strategy.start(grid)
    names = {node: name for name, node in strategy.roster.nodes.items()}
    checked = 0
    for message in [*grid.sent, *grid.received]:
        if message.metadata.message_type == messages.MANIFEST:
            assert not message.content.array_records
            continue
        assert set(message.content.keys()) <= {"tap", "tensors"}
        if "tensors" not in message.content:
            continue
        tensors = messages.decode_tensors(message.content)
        node = message.metadata.dst_node_id if message in grid.sent else message.metadata.src_node_id
        if message.metadata.message_type == messages.EVALUATE:
            assert not tensors  # the client holds them from stage 2
        else:
            assert tensors.keys() == strategy.roster.manifests[names[node]].tensors.keys()
        assert not any(name.startswith("backbone.") for name in tensors)
        checked += 1
    assert checked == 4 * (2 + 2 + 1 + 1)  # two rounds there and back, stage 2 and evaluation there
    text_only = strategy.roster.manifests["ann"].tensors
    assert not any("image" in name or "generation" in name or "shapes" in name for name in text_only)


def test_nothing_of_a_personal_model_is_in_a_message(federation: Federation) -> None:
    grid = federation.grid()
    federation.strategy().start(grid)
    wire: set[bytes] = set()
    text = ""
    for message in [*grid.sent, *grid.received]:
        record = message.content.array_records.get("tensors", {})
        wire |= {array.numpy().tobytes() for array in record.values()}
        text += json.dumps(messages.decode(message.content))
    personal = 0
    for name in ("ann", "bob", "cleo", "dan"):
        for file in ("personal", "tap", "server+finetune"):
            tensors, _ = read_tensors(federation.out / "clients" / name / f"{file}.safetensors")
            # A tensor that is all zeros, or still at its initial value, is no secret.
            secret = {t.numpy().tobytes() for t in tensors.values() if t.unique().numel() > 1}
            shared = len(secret & wire)
            assert shared == 0, (name, file, shared)
            personal += len(secret)
        losses = json.loads((federation.out / "clients" / name / "state.json").read_text())["record"]["personal_losses"]
        assert losses
        assert not any(str(loss) in text for loss in losses.values())
    assert personal > 500
    assert '"classes"' not in text
    assert "columns" not in text


Change = Callable[[dict[str, Any]], None]


def broken(change: Change, node: int = 100, round_: int = 1) -> Callable[[Message, Message], Message | None]:
    """Changes the tensors of one reply."""

    def tamper(message: Message, reply: Message) -> Message | None:
        if (message.metadata.message_type, message.metadata.dst_node_id) != (messages.TRAIN, node):
            return reply
        if messages.decode(message.content)["round"] != round_:
            return reply
        tensors = dict(messages.decode_tensors(reply.content))
        change(tensors)
        content = RecordDict(
            {
                "tap": reply.content["tap"],
                "tensors": ArrayRecord({n: Array(np.asarray(t)) for n, t in tensors.items()}),
            }
        )
        return Message(content, reply_to=message)

    return tamper


def first_name(tensors: dict[str, Any]) -> str:
    return sorted(tensors)[0]


def nan(tensors: dict[str, Any]) -> None:
    tensors[first_name(tensors)].view(-1)[0] = math.nan


def shape(tensors: dict[str, Any]) -> None:
    tensors[first_name(tensors)] = torch.zeros(2, 2, 2)


def dtype(tensors: dict[str, Any]) -> None:
    tensors[first_name(tensors)] = tensors[first_name(tensors)].double()


def unknown(tensors: dict[str, Any]) -> None:
    tensors["backbone.secret"] = torch.zeros(1)


def missing(tensors: dict[str, Any]) -> None:
    del tensors[first_name(tensors)]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (nan, "holds a value that is not finite"),
        (shape, r"has shape \(2, 2, 2\), not"),
        (dtype, "is float64 in numpy.ndarray, not float32"),
        (unknown, "tensors that were not sent, such as 'backbone.secret'"),
        (missing, "the reply lacks 1 tensors"),
    ],
)
def test_a_bad_reply_is_dropped_and_logged_and_the_round_goes_on(
    federation: Federation, change: Change, problem: str, caplog: pytest.LogCaptureFixture
) -> None:
    grid, strategy = federation.grid(tamper=broken(change)), federation.strategy()
    results = strategy.start(grid)
    (event,) = [e for e in read_events(federation.out) if e["event"] == "dropped"]
    assert event["who"] == "client 'ann'"
    assert re.search(problem, event["problem"])
    assert event["problem"] in caplog.text
    rounds = [e for e in read_events(federation.out) if e["event"] == "round"]
    assert rounds[0]["dropped"] == ["ann"]
    assert sorted(rounds[0]["clients"]) == ["bob", "cleo", "dan"]
    assert rounds[1]["dropped"] == []
    assert set(results["clients"]) == {"ann", "bob", "cleo", "dan"}
    assert all(bool(t.isfinite().all()) for t in strategy.roster.tensors.values())


def test_a_dropped_reply_leaves_no_trace(make_federation: Make) -> None:
    """The server after a round with a bad reply equals the server after a round without that client."""
    found = []
    for tamper in (broken(nan), lambda m, r: None if m.metadata.dst_node_id == 100 and _is_train(m) else r):
        federation = make_federation()
        federation.settings += ["rounds=1", "round_timeout=1"]
        strategy = federation.strategy()
        strategy.start(federation.grid(tamper=tamper))
        found.append(strategy.roster.tensors)
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def _is_train(message: Message) -> bool:
    return message.metadata.message_type == messages.TRAIN


def test_a_client_that_fails_is_named_and_the_round_goes_on(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tap_flower.core.training import DivergedError
    from tap_flower.methods import tap
    from tap_flower.methods.registry import METHODS

    def fail(client: Any, server_round: int, *rest: Any) -> Any:
        if (client.holdings.name, server_round) == ("bob", 1):
            raise DivergedError("the training loss of task 'languages' is nan: lower the learning rate")
        if (client.holdings.name, server_round) == ("cleo", 2):
            raise RuntimeError("cosmic ray")
        return tap.participate(client, server_round, *rest)

    monkeypatch.setitem(METHODS, "tap", replace(tap.METHOD, participate=fail))
    strategy = federation.strategy()
    strategy.start(federation.grid())
    dropped = [(e["who"], e["problem"]) for e in read_events(federation.out) if e["event"] == "dropped"]
    assert [who for who, _ in dropped] == ["client 'bob'", "client 'cleo'"]
    assert dropped[0][1] == "the training loss of task 'languages' is nan: lower the learning rate (code 1001)"
    assert re.search(r"unexpected RuntimeError at test_federation.py:\d+: cosmic ray", dropped[1][1])
    rounds = [sorted(e["clients"]) for e in read_events(federation.out) if e["event"] == "round"]
    assert rounds == [["ann", "cleo", "dan"], ["ann", "bob", "dan"]]


def test_fewer_nodes_than_clients_is_an_error_that_says_who_is_missing(federation: Federation) -> None:
    grid, strategy = federation.grid(), federation.strategy()
    del grid.contexts[102]
    with pytest.raises(RunError, match=r"3 of 4 clients are there.*without cleo.*num-supernodes=4"):
        strategy.start(grid)


def test_a_node_too_many_is_refused_and_the_run_goes_on(federation: Federation) -> None:
    federation.clients += 1
    federation.settings.append("rounds=1")
    assert set(federation.strategy().start(federation.grid())["clients"]) == {"ann", "bob", "cleo", "dan"}
    (problem, *_) = [e["problem"] for e in read_events(federation.out) if e["event"] == "dropped"]
    assert re.search("more nodes than the 4 clients.*num-supernodes=4", problem)


def test_a_second_node_of_one_name_is_refused_while_the_first_is_there(federation: Federation) -> None:
    federation.settings += ["rounds=1", "clients_per_round=3"]
    federation.config_file.write_text(yaml.safe_dump({"clients": CLIENTS[:3]}))
    grid, strategy = federation.grid(), federation.strategy()
    grid.contexts[103].node_config["partition-id"] = 0
    assert set(strategy.start(grid)["clients"]) == {"ann", "bob", "cleo"}
    assert strategy.roster.nodes["ann"] == 100
    problems = {e["problem"] for e in read_events(federation.out) if e["event"] == "dropped"}
    assert any("client 'ann' is already there on node 100: node 103 is refused" in problem for problem in problems)


def test_where_a_refused_node_is_needed_the_run_says_why_it_cannot_start(federation: Federation) -> None:
    grid, strategy = federation.grid(), federation.strategy()
    grid.contexts[101].node_config["partition-id"] = 0
    with pytest.raises(RunError, match="node 101 cannot take part: client 'ann' is already there on node 100"):
        strategy.start(grid)


def test_tasks_of_one_name_with_other_classes_are_refused(make_federation: Make) -> None:
    clash = {**LANGUAGES, "classes": [*LANGUAGES["classes"], "xx"], **sources("names", 40, 8)}
    federation = make_federation([*CLIENTS[:1], {"name": "zoe", "backbone": "demo", "tasks": [clash]}])
    with pytest.raises(RunError, match=r"shape \(9.*\) on client 'zoe' but \(8.*\) on 'ann'.*rename one"):
        federation.strategy().start(federation.grid())


def test_another_version_is_refused(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    grid, strategy = federation.grid(), federation.strategy()
    version = messages.version
    calls = iter(range(10**6))
    monkeypatch.setattr(messages, "version", lambda: {**version(), "version": "9.9" if next(calls) == 0 else "0.1.0"})
    with pytest.raises(RunError, match=r"the server speaks protocol 4 of tap-flower 9.9.*install the same version"):
        strategy.start(grid)


@pytest.mark.parametrize("crash_round", [1, 2])
def test_a_resumed_run_gives_the_results_of_an_uninterrupted_one(make_federation: Make, crash_round: int) -> None:
    whole = make_federation()
    expected = without_times(whole.strategy().start(whole.grid()))

    crashed = make_federation()
    grid = crashed.grid()
    pulls = 0

    def crash(message: Message, reply: Message) -> Message | None:
        nonlocal pulls
        pulls += _is_train(message) and messages.decode(message.content)["round"] == crash_round
        if pulls == 3:  # three clients have trained, and kept their new personal models
            raise KeyboardInterrupt
        return reply

    grid.tamper = crash
    with pytest.raises(KeyboardInterrupt):
        crashed.strategy().start(grid)
    if crash_round == 1:  # there is no complete round to go on from
        with pytest.raises(StorageError):
            crashed.strategy(resume=True)
        return
    resumed = without_times(crashed.strategy(resume=True).start(crashed.grid()))
    assert resumed == expected
    assert [e["round"] for e in read_events(crashed.out) if e["event"] == "round"] == [1, 2]


def test_resuming_with_another_configuration_is_refused(federation: Federation) -> None:
    federation.strategy().start(federation.grid())
    federation.settings.append("rounds=3")
    with pytest.raises(ConfigError, match=r"another configuration \(rounds differ\)"):
        federation.strategy(resume=True)


def test_sampling_goes_by_names_not_by_node_ids(federation: Federation) -> None:
    federation.settings += ["clients_per_round=2", "rounds=1"]
    strategy = federation.strategy()
    strategy.start(federation.grid())
    roster = strategy.roster
    rounds = [roster.sample(r, 2) for r in range(1, 60)]
    roster.nodes = {name: 9000 - node for name, node in roster.nodes.items()}
    assert [roster.sample(r, 2) for r in range(1, 60)] == rounds
    assert {name for names in rounds for name in names} == {"ann", "bob", "cleo", "dan"}
    assert all(len(set(names)) == 2 for names in rounds)


def test_a_new_client_with_a_new_pair_may_join_in_any_round(make_federation: Make) -> None:
    federation = make_federation()
    federation.settings += ["rounds=3"]
    grid, strategy = federation.grid(), federation.strategy()
    late = grid.contexts.pop(103)
    strategy.config.clients = strategy.config.clients[:3]
    known: list[set[str]] = []

    def join(message: Message, reply: Message) -> Message:
        if _is_train(message) and messages.decode(message.content)["round"] == 1:
            grid.contexts[103] = late
            known.append(set(strategy.roster.tensors))
        return reply

    grid.tamper = join
    results = strategy.start(grid)
    assert "dan" in results["clients"]
    assert "head/translation" not in {n.split(".")[1] for n in known[0]}
    first = next(t for r, node, t in sent(grid, messages.TRAIN) if node == 103)
    manifest = strategy.roster.manifests["dan"]
    new = [name for name in first if name not in known[0]]
    assert new
    for name in new:
        info = manifest.tensors[name]
        assert torch.equal(first[name], info.initial.value(name, info.shape, strategy.config.seed))


def test_a_deployed_node_is_configured_on_the_node(federation: Federation, tmp_path: Path) -> None:
    grid = federation.grid()
    for node, client in zip(grid.contexts.values(), CLIENTS, strict=True):
        spec = tmp_path / f"{client['name']}.yaml"
        spec.write_text(yaml.safe_dump(client))
        node.node_config = {"client-spec": str(spec), "state-dir": str(tmp_path / "state")}
        node.run_config = {"preset": "nonsense", "out": "/nonexistent"}  # what a server says of these is not read
    results = federation.strategy().start(grid)
    assert set(results["clients"]) == {"ann", "bob", "cleo", "dan"}
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
    federation: Federation, node_config: dict[str, Any], problem: str, caplog: pytest.LogCaptureFixture
) -> None:
    grid = federation.grid()
    grid.contexts[100].node_config = node_config
    told = "client spec is wrong, or does not fit its data: the log of the node says where" if node_config else problem
    with pytest.raises(RunError, match=told):
        federation.strategy().start(grid)
    assert not node_config or problem in caplog.text


def test_a_busy_superlink_is_asked_again(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    federation.settings.append("rounds=1")
    monkeypatch.setattr(exchange, "_AGAIN", 0.0)
    grid, failures = federation.grid(), {"get_node_ids": 2, "push_messages": 1, "pull_messages": 3}
    for name in list(failures):
        real = getattr(grid, name)

        def busy(*arguments: Any, real: Any = real, name: str = name) -> Any:
            failures[name] -= 1
            if failures[name] >= 0:
                request = httpx.Request("POST", "https://superlink")
                raise httpx.HTTPStatusError("busy", request=request, response=httpx.Response(500, request=request))
            return real(*arguments)

        monkeypatch.setattr(grid, name, busy)
    assert set(federation.strategy().start(grid)["clients"]) == {"ann", "bob", "cleo", "dan"}
    assert all(count < 0 for count in failures.values())


@pytest.mark.parametrize(("status", "patience"), [(403, 60.0), (500, 0.0)])
def test_a_superlink_that_refuses_or_stays_busy_ends_the_run(
    status: int, patience: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "_PATIENCE", patience)
    request = httpx.Request("POST", "https://superlink")

    def refuse() -> None:
        raise httpx.HTTPStatusError("no", request=request, response=httpx.Response(status, request=request))

    with pytest.raises(httpx.HTTPStatusError):
        exchange.patiently(refuse)
