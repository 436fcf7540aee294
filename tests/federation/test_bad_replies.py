"""Replies that cannot be used: each is named, and leaves no trace."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from tap_flower.data.batching import ClientData
from tap_flower.errors import DivergedError, RunError
from tap_flower.methods import tap
from tap_flower.methods.registry import METHODS
from tap_flower.report.events import read_events
from tap_flower.wire.messages import METRICS
from tap_flower.wire.tensors import decode_tensors
from tests.federation.runs import (
    EVERYBODY,
    FLOAT,
    Change,
    Gathered,
    broken,
    lost,
    means,
)
from tests.federations import (
    Federation,
    ToyFederation,
    Whole,
    each_kind,
    federation_of,
)
from tests.grid import Playback, Replies


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
    federation: ToyFederation, replies: Replies, change: Change, problem: str, caplog: pytest.LogCaptureFixture
) -> None:
    strategy = federation.strategy()
    results = strategy.start(Playback(replies, tamper=broken(change))).summary
    (event,) = [e for e in read_events(federation.out) if e["event"] == "dropped"]
    assert event["who"] == "client 'ann'"
    assert re.search(problem, event["problem"])
    assert f"the reply of client 'ann': {event['problem']}" in caplog.text
    assert not event["problem"].startswith("client")
    rounds = [e for e in read_events(federation.out) if e["event"] == "round"]
    assert rounds[0]["dropped"] == ["ann"]
    assert sorted(rounds[0]["clients"]) == ["bob", "cleo", "dan"]
    assert rounds[1]["dropped"] == []
    assert results["clients"].keys() == EVERYBODY
    assert all(bool(t.isfinite().all()) for t in strategy.roster.tensors.values())


@pytest.mark.parametrize(
    ("weight", "found"), [(None, "is missing"), ([1, 2], r"is \[1, 2\]"), (-1, "is -1"), (math.nan, "is nan")]
)
def test_a_weight_that_cannot_be_used_is_named_and_no_result_is_lost(
    federation: ToyFederation, replies: Replies, weight: Any, found: str, caplog: pytest.LogCaptureFixture
) -> None:
    record = MetricRecord({"train-loss": 1.0} if weight is None else {"train-loss": 1.0, "num-examples": weight})

    def of_ann(message: Message, reply: Message) -> Message:
        if message.metadata.dst_node_id != 100 or METRICS not in reply.content:
            return reply
        return Message(RecordDict({**reply.content, METRICS: record}), reply_to=message)

    result = federation.strategy().start(Playback(replies, tamper=of_ann))
    dropped = [(e["who"], e["problem"]) for e in read_events(federation.out) if e["event"] == "dropped"]
    assert [who for who, _ in dropped] == ["client 'ann'"] * 2  # of each round
    assert re.search(f"the metric 'num-examples', by which weighted_by_key weights the others, {found}", dropped[0][1])
    assert result.train_metrics_clientapp.keys() == {1, 2}
    assert result.clients.keys() == EVERYBODY
    assert (result.personalise_metrics_clientapp, result.evaluate_metrics_clientapp) == ({}, {})
    assert caplog.text.count("The clients' metrics are not aggregated: the metric 'num-examples'") == 2


def test_metrics_of_other_lengths_are_not_aggregated(
    federation: ToyFederation, replies: Replies, caplog: pytest.LogCaptureFixture
) -> None:
    def growing(message: Message, reply: Message) -> Message:
        if METRICS not in reply.content:
            return reply
        curve = MetricRecord({"num-examples": 1, "curve": [1.0] * (message.metadata.dst_node_id - 98)})
        return Message(RecordDict({**reply.content, METRICS: curve}), reply_to=message)

    result = federation.strategy().start(Playback(replies, tamper=growing))
    assert (result.clients.keys(), result.train_metrics_clientapp) == (EVERYBODY, {})
    assert "metric 'curve' has another length on some clients than on others" in caplog.text


@each_kind
def test_a_dropped_reply_leaves_no_trace(kind: str, tmp_path: Path, whole_toys: Whole, replies: Replies) -> None:
    """The server after a round with a bad reply equals the server after a round without that client."""
    found: list[dict[str, Tensor]] = []
    for number, tamper in enumerate((broken(nan), lost)):
        states: list[dict[str, Tensor]] = []

        def note(server_round: int, arrays: ArrayRecord, states: list[dict[str, Tensor]] = states) -> None:
            states.append(decode_tensors(arrays, FLOAT))
            if server_round == 1:
                raise Gathered

        federation = federation_of(kind, tmp_path / str(number), "round_timeout=1", "rounds=1")
        grid = Playback(replies, tamper=tamper) if kind == "toys" else federation.grid(tamper=tamper)
        with pytest.raises(Gathered):
            federation.strategy().start(grid, evaluate_fn=note)
        found.append(states[1])
        (event,) = [e for e in read_events(federation.out) if e["event"] == "dropped"]
        assert event["who"] == "client 'ann'"
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    if kind == "toys":  # and it is the mean of the others' replies
        returned = {name: own for name, own in whole_toys.returned(1).items() if name != "ann"}
        for name, mean in means(returned, whole_toys.strategy.roster.manifests).items():
            torch.testing.assert_close(found[0][name].double(), states[0][name].double() + mean, atol=1e-9, rtol=1e-6)


def test_a_client_that_fails_is_named_and_the_round_goes_on(
    federation: ToyFederation, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(client: Any, server_round: int, *rest: Any) -> Any:
        if (client.name, server_round) == ("bob", 1):
            raise DivergedError("the training loss of task 'languages' is nan: lower the learning rate")
        if (client.name, server_round) == ("cleo", 2):
            raise RuntimeError("cosmic ray")
        return tap.participate(client, server_round, *rest)

    monkeypatch.setitem(METHODS, "tap", replace(tap.METHOD, participate=fail))
    strategy = federation.strategy()
    results = strategy.start(federation.grid()).summary
    dropped = [(e["who"], e["problem"]) for e in read_events(federation.out) if e["event"] == "dropped"]
    assert [who for who, _ in dropped] == ["client 'bob'", "client 'cleo'"]
    assert dropped[0][1] == "the training loss of task 'languages' is nan: lower the learning rate"
    assert re.search(
        r"unexpected RuntimeError at test_bad_replies.py:\d+: the log of its node says more", dropped[1][1]
    )
    assert "cosmic ray" in capfd.readouterr().err
    rounds = [sorted(e["clients"]) for e in read_events(federation.out) if e["event"] == "round"]
    assert rounds == [["ann", "cleo", "dan"], ["ann", "bob", "dan"]]
    assert results["clients"].keys() == EVERYBODY


def test_a_simulation_of_client_specs_tells_what_went_wrong_on_a_client(
    spec_federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is one machine: nothing is a secret between its clients."""

    def fail(self: ClientData, split: str) -> dict[str, int]:
        raise RuntimeError("cosmic ray")

    monkeypatch.setattr(ClientData, "sizes", fail)
    with pytest.raises(RunError, match=r"unexpected RuntimeError at test_bad_replies.py:\d+: cosmic ray"):
        spec_federation.strategy().start(spec_federation.grid())
