"""A federation in this process with each encoding."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from torch import Tensor

from tap_flower.client.state import StateFolder
from tap_flower.config import Encoding
from tap_flower.errors import RunError
from tap_flower.report.events import read_events
from tap_flower.wire import messages
from tap_flower.wire.messages import ARRAYS, Report
from tap_flower.wire.tensors import decode_tensors, encode_tensors, moved_from, moved_to
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

    def note(server_round: int, arrays: ArrayRecord) -> None:
        masters.append(decode_tensors(arrays, Encoding.float32))

    results = strategy.start(grid, evaluate_fn=note).summary
    assert strategy.progress.dropped == {}
    assert len(masters) == 3
    for by_task in results["clients"].values():
        assert all(math.isfinite(v) for models in by_task.values() for m in models.values() for v in m.values())

    # A client starts from the server's values, rounded: bit for bit what the server can compute.
    manifests = strategy.roster.manifests
    by_client = {name: [tensors for client, tensors in starts if client == name] for name in manifests}
    for name, started in by_client.items():
        first = strategy.roster.first_values(manifests[name], manifests[name].tensors)
        assert len(started) == 3  # two rounds, stage 2
        assert all(torch.equal(started[0][n], first[n]) for n in first)
        for master, start in zip(masters, started, strict=True):
            sent = encode_tensors(moved_from({n: master[n] for n in start}, first, encoding), encoding)
            expected = moved_to(decode_tensors(sent, encoding), first, encoding)
            assert all(torch.equal(start[n], expected[n]) for n in start)

    # What only bob has moves by exactly what he sent; the server's own values are not rounded.
    (reply,) = [
        messages.tensors_of(m.content, encoding)
        for m in of_type(grid.received, messages.TRAIN)
        if m.metadata.src_node_id == strategy.roster.nodes["bob"]
        and messages.decode(m.content, Report, "bob").round == 2
    ]
    alone = manifests["bob"].tensors.keys() - manifests["ann"].tensors.keys()
    assert len(alone) == 4 if kind == "toys" else len(alone) > 20  # a toy's encoder of images, and a head
    for name in alone:
        torch.testing.assert_close(masters[2][name], masters[1][name] + reply[name], atol=1e-9, rtol=1e-6)

    # Bytes: both directions, all that is trained.
    shapes = [info.shape for manifest in manifests.values() for info in manifest.tensors.values()]
    values = sum(map(math.prod, shapes))
    each = 2 * values if encoding is Encoding.bfloat16 else values + 4 * sum(map(scales, shapes))
    total, first = results["bytes"], results["bytes"]["first_values"]
    for way, travelled in (("down", grid.sent), ("up", grid.received)):
        assert total[way] == sum(
            len(a.data) for m in travelled for a in m.content.array_records.get(ARRAYS, {}).values()
        )
    rounds = (total["up"] - first["up"], total["down"] - first["down"])
    assert rounds == (2 * each, 4 * each)  # down: two rounds, stage 2, evaluation

    # The residual is in the client's folder with the personal model, and stays there.
    wire = {a.data for m in grid.received for a in m.content.array_records.get(ARRAYS, {}).values()}
    for name, manifest in manifests.items():
        state = StateFolder(federation.state(name), strategy.progress.run, strategy.progress.epochs).load()
        assert state is not None
        assert state.residual.keys() == state.memory.models["personal"].keys() == manifest.tensors.keys()
        assert any(bool(t.any()) for t in state.residual.values())
        assert not {t.numpy().tobytes() for t in state.residual.values() if t.any()} & wire


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
        epochs = [messages.Epoch(**epoch) for epoch in progress["epochs"]]
        state = StateFolder(federation.state("ann"), progress["run"], epochs).load()
        assert state is not None
        found.append(state.residual)
    assert found[0]
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_a_broken_scale_names_client_and_tensor(make_federation: Make) -> None:
    federation = make_federation([ANN], "rounds=1", "wire.encoding=int8")

    def tamper(message: Message, reply: Message) -> Message:
        if message.metadata.message_type == messages.TRAIN:
            record = reply.content.array_records[ARRAYS]
            name, array = sorted(record.items())[0]
            data = struct.pack("<f", math.nan) + array.data[4:]
            changed = {**record, name: Array(array.dtype, array.shape, array.stype, data)}
            return Message(RecordDict({**reply.content, ARRAYS: ArrayRecord(changed)}), reply_to=message)
        return reply

    with pytest.raises(
        RunError, match="round 1: 0 of 1 clients have given a usable answer, min_replies is 1: client 'ann': tensor"
    ):
        federation.strategy().start(federation.grid(tamper=tamper))
    (event,) = [e for e in read_events(federation.out) if e["event"] == "dropped"]
    assert event["who"] == "client 'ann'"
    assert event["problem"] == "tensor 'heads.languages.bias' holds a value that is not finite: a scale"


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
    found_values: list[ArrayRecord] = []

    class FirstValues(Exception):
        pass

    def stop(server_round: int, arrays: ArrayRecord) -> Any:
        found_values.append(arrays)
        raise FirstValues

    with pytest.raises(FirstValues):
        spec_federation.strategy().start(spec_federation.grid(), evaluate_fn=stop)
    tensors = decode_tensors(found_values[0], Encoding.float32)
    values = sum(tensor.numel() for tensor in tensors.values())
    found = {name: len(array.data) for name, array in encode_tensors(tensors, encoding).items()}
    factor = 2.0 if encoding is Encoding.bfloat16 else 4.0
    assert 4 * values / sum(found.values()) == pytest.approx(factor, rel=0.06)
