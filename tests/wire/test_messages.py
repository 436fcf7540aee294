"""A federation in this process with each encoding; what a client holds is not sent to it again."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, Error, Message, RecordDict
from tap_flower.wire.updates import moved, restore
from torch import Tensor

from tap_flower.client.state import RECEIVED, ClientStore
from tap_flower.config import Encoding
from tap_flower.methods import tap
from tap_flower.methods.method import Memory, Participation
from tap_flower.methods.registry import METHODS
from tap_flower.report.events import read_events
from tap_flower.wire import messages
from tap_flower.wire.messages import LackingError
from tap_flower.wire.tensors import rounded
from tests.federations import Federation, Make, each_kind, federation_of, server_copies
from tests.grid import round_of
from tests.toys import TOYS, Toy

ANN, BOB, _, DAN = TOYS
LOSSY = [Encoding.bfloat16, Encoding.int8]


def of_type(all_messages: list[Message], message_type: str) -> list[Message]:
    return [m for m in all_messages if m.metadata.message_type == message_type]


def scales(shape: tuple[int, ...]) -> int:
    """Of int8: one for each row, and short rows are joined until 128 values or more share one."""
    rows, row = shape[0], math.prod(shape[1:])
    return math.ceil(rows / math.ceil(128 / row))


@each_kind
@pytest.mark.parametrize("encoding", LOSSY)
def test_a_run_with_rounded_messages(
    kind: str, tmp_path: Path, encoding: Encoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    # ann and bob: she shares all that she has with him
    federation = federation_of(kind, tmp_path, f"wire.encoding={encoding.name}", count=2)
    grid, strategy, starts = federation.grid(), federation.strategy(), server_copies(monkeypatch)
    masters: list[dict[str, Tensor]] = []
    update = strategy.roster.update

    def spy(tensors: dict[str, Tensor], *rest: Any) -> None:
        masters.append(dict(strategy.roster.tensors))
        update(tensors, *rest)

    strategy.roster.update = spy  # type: ignore[method-assign]
    results = strategy.start(grid).summary
    masters.append(strategy.roster.tensors)
    assert strategy.progress.dropped == 0
    assert len(masters) == 3
    for by_task in results["clients"].values():
        assert all(math.isfinite(v) for models in by_task.values() for m in models.values() for v in m.values())

    # A client starts from the server's values, rounded: bit for bit what the server can compute.
    manifests = strategy.roster.manifests
    by_client = {name: [tensors for client, tensors in starts if client == name] for name in manifests}
    for name, started in by_client.items():
        initial = manifests[name].initial_values(manifests[name].tensors, strategy.config.seed)
        assert len(started) == 3  # two rounds, stage 2
        assert all(torch.equal(started[0][n], initial[n]) for n in initial)
        for master, start in zip(masters, started, strict=True):
            sent = moved({n: master[n] for n in start}, initial, encoding)
            expected = restore({n: rounded(t, encoding) for n, t in sent.items()}, initial, encoding)
            assert all(torch.equal(start[n], expected[n]) for n in start)

    # What only bob has moves by exactly what he sent; the server's own values are not rounded.
    (reply,) = [
        messages.decode_tensors(m.content, encoding)
        for m in of_type(grid.received, messages.TRAIN)
        if m.metadata.src_node_id == strategy.roster.nodes["bob"] and messages.decode(m.content)["server_round"] == 2
    ]
    alone = manifests["bob"].tensors.keys() - manifests["ann"].tensors.keys()
    assert len(alone) == 4 if kind == "toys" else len(alone) > 20  # a toy's encoder of images, and a head
    for name in alone:
        torch.testing.assert_close(masters[2][name], masters[1][name] + reply[name], atol=1e-9, rtol=1e-6)

    # Bytes: both directions, all that is trained.
    shapes = [info.shape for manifest in manifests.values() for info in manifest.tensors.values()]
    values = sum(map(math.prod, shapes))
    each = 2 * values if encoding is Encoding.bfloat16 else values + 4 * sum(map(scales, shapes))
    up, down = results["bytes"]["up"], results["bytes"]["down"]
    assert down == sum(len(a.data) for m in grid.sent for a in m.content.array_records.get("tensors", {}).values())
    assert (up, down) == (2 * each, 3 * each)  # nothing for the evaluation

    # The residual is in the client's folder with the personal model, and stays there.
    wire = {a.data for m in grid.received for a in m.content.array_records.get("tensors", {}).values()}
    for name, manifest in manifests.items():
        store = ClientStore(federation.state(name), strategy.progress.run)
        kept = store.load()
        assert kept is not None
        assert kept.residual.keys() == kept.memory.models["personal"].keys() == manifest.tensors.keys()
        assert any(bool(t.any()) for t in kept.residual.values())
        assert not {t.numpy().tobytes() for t in kept.residual.values() if t.any()} & wire


def test_a_repeated_round_starts_from_the_residual_before_it(make_federation: Make) -> None:
    whole, crashed = (make_federation([ANN], "wire.encoding=int8") for _ in range(2))
    expected = whole.strategy().start(whole.grid()).summary
    grid = crashed.grid()

    def crash(message: Message, reply: Message) -> Message:
        if message.metadata.message_type == messages.TRAIN and round_of(message) == 2:
            raise KeyboardInterrupt
        return reply

    grid.tamper = crash
    with pytest.raises(KeyboardInterrupt):
        crashed.strategy().start(grid)
    assert crashed.strategy(resume=True).start(crashed.grid()).summary["clients"] == expected["clients"]
    found = []
    for federation in (whole, crashed):
        progress = json.loads((federation.out / "server" / "state.json").read_text())
        kept = ClientStore(federation.state("ann"), progress["run"]).load()
        assert kept is not None
        found.append(kept.residual)
    assert found[0]
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_a_broken_scale_names_client_and_tensor(make_federation: Make) -> None:
    federation = make_federation([ANN], "rounds=1", "wire.encoding=int8")

    def tamper(message: Message, reply: Message) -> Message:
        if message.metadata.message_type == messages.TRAIN:
            record = reply.content.array_records["tensors"]
            name, array = sorted(record.items())[0]
            data = struct.pack("<f", math.nan) + array.data[4:]
            changed = {**record, name: Array(array.dtype, array.shape, array.stype, data)}
            return Message(RecordDict({**reply.content, "tensors": ArrayRecord(changed)}), reply_to=message)
        return reply

    federation.strategy().start(federation.grid(tamper=tamper))
    (event,) = [e for e in read_events(federation.out) if e["event"] == "dropped"]
    assert event["who"] == "client 'ann'"
    assert event["problem"].startswith("tensor 'components.")
    assert "holds a value that is not finite: a scale" in event["problem"]


def test_a_component_that_did_not_change_does_not_travel(
    make_federation: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    component = "head/translation"

    def still(client: Any, server_round: int, received: Any, memory: Memory) -> Participation:
        done = tap.participate(client, server_round, received, memory)
        copy = {n: received[n] if "heads.translation" in n else value for n, value in done.returned.items()}
        return replace(done, returned=copy)

    monkeypatch.setitem(METHODS, "tap", replace(tap.METHOD, participate=still))
    federation = make_federation([DAN])
    grid, strategy = federation.grid(), federation.strategy()
    results = strategy.start(grid).summary
    assert strategy.progress.dropped == 0
    component_of = strategy.roster.component_of
    travelled = [
        {component_of[name] for name in messages.decode_tensors(m.content)}
        for some in (grid.sent, grid.received)
        for m in of_type(some, messages.TRAIN)
    ]
    others = set(component_of.values()) - {component}
    assert travelled == [others | {component}, others, others, others]  # down once, in the first round; never up
    manifest = strategy.roster.manifests["dan"]
    names = {n for n, c in component_of.items() if c == component}
    initial = manifest.initial_values(names, strategy.config.seed)
    assert all(torch.equal(strategy.roster.tensors[name], value) for name, value in initial.items())
    sent = results["bytes"]["per_component"][component]
    assert sent == {"down": sum(initial[n].nbytes + 128 for n in names), "up": 0}


def test_a_client_that_calls_a_component_unchanged_which_it_has_not_is_dropped(make_federation: Make) -> None:
    federation = make_federation([DAN], "rounds=1")

    def tamper(message: Message, reply: Message) -> Message:
        if message.metadata.message_type != messages.TRAIN:
            return reply
        values = {**messages.decode(reply.content), "unchanged": ["head/languages"]}
        arrays = messages.encode_tensors(messages.decode_tensors(reply.content))
        return Message(messages.encode(values, arrays), reply_to=message)

    federation.strategy().start(federation.grid(tamper=tamper))
    (event,) = [e for e in read_events(federation.out) if e["event"] == "dropped"]
    assert "has no component 'head/languages', which it calls unchanged" in event["problem"]


@pytest.mark.parametrize("loss", ["missing", "damaged", "old"])
def test_a_client_that_lost_what_it_held_gets_it_again(make_federation: Make, loss: str) -> None:
    federation = make_federation([ANN], "rounds=1")
    first: list[bytes] = []

    def lose(message: Message, reply: Message) -> Message:
        if message.metadata.message_type in (messages.TRAIN, messages.DISTILL):
            file = federation.state("ann") / RECEIVED
        if message.metadata.message_type == messages.TRAIN:
            first.append(file.read_bytes())
        if message.metadata.message_type == messages.DISTILL:
            file.unlink() if loss == "missing" else file.write_bytes(first[0][:70] if loss == "damaged" else first[0])
        return reply

    grid, strategy = federation.grid(tamper=lose), federation.strategy()
    results = strategy.start(grid).summary
    assert strategy.progress.dropped == 0
    sent = [len(messages.decode_tensors(m.content)) for m in of_type(grid.sent, messages.EVALUATE)]
    assert sent == [0, len(strategy.roster.manifests["ann"].tensors)]
    errors = [m.error for m in grid.received if m.has_error()]
    assert [error.code for error in errors] == [LackingError.CODE]
    assert "was to hold the server's tensors of round 1, and has" in errors[0].reason
    server, finetuned = (results["clients"]["ann"]["languages"][model] for model in ("server", "server+finetune"))
    assert server != finetuned


def test_a_client_that_always_lacks_something_is_dropped(make_federation: Make) -> None:
    federation = make_federation([ANN, BOB], "rounds=1")

    def tamper(message: Message, reply: Message) -> Message:
        ann = message.metadata.dst_node_id == 100 and message.metadata.message_type != messages.MANIFEST
        return Message(Error(LackingError.CODE, "I lack something"), reply_to=message) if ann else reply

    grid, strategy = federation.grid(tamper=tamper), federation.strategy()
    assert set(strategy.start(grid).summary["clients"]) == {"bob"}
    assert strategy.progress.dropped == 4  # a round, stage 2 twice, the evaluation


def test_the_server_knows_a_number_for_each_client_and_no_more(make_federation: Make) -> None:
    federation = make_federation([ANN, BOB], "rounds=1", "clients_per_round=1")
    grid, strategy = federation.grid(), federation.strategy()
    strategy.start(grid)
    assert strategy.roster.holds == {"ann": 1, "bob": 1}
    assert strategy.roster.tensors_for("bob") == ({}, 1)


def test_a_client_that_comes_back_with_another_task_is_refused(make_federation: Make) -> None:
    federation = make_federation([ANN, BOB])

    def change(message: Message, reply: Message) -> Message:
        trained = message.metadata.message_type == messages.TRAIN and message.metadata.dst_node_id == 100
        if trained and round_of(message) == 1:  # ann is gone, and comes back on another node
            federation.toys.append(Toy("ann", {**ANN.tasks, **DAN.tasks}))
            del grid.contexts[100]
            grid.contexts[102] = Context(1, 102, {"partition-id": 2}, RecordDict(), {})
        return reply

    grid, strategy = federation.grid(tamper=change), federation.strategy()
    assert set(strategy.start(grid).summary["clients"]) == {"bob"}
    problems = {e["problem"] for e in read_events(federation.out) if e["event"] == "dropped"}
    assert problems == {
        "client 'ann' has come back with the tasks ['languages', 'translation'], and had ['languages'] before: "
        "give it its client spec again, or another name"
    }


@pytest.mark.parametrize("encoding", LOSSY)
def test_tensors_of_client_specs_take_half_the_bytes_or_a_quarter(
    spec_federation: Federation, encoding: Encoding
) -> None:
    strategy = spec_federation.strategy()
    strategy._gather(spec_federation.grid())
    tensors = strategy.roster.tensors
    values = sum(tensor.numel() for tensor in tensors.values())
    found = messages.payload_bytes(messages.encode({}, messages.encode_tensors(tensors, encoding)))
    factor = 2.0 if encoding is Encoding.bfloat16 else 4.0
    assert 4 * values / sum(found.values()) == pytest.approx(factor, rel=0.06)
