"""Intruders among the clients: a wrong reply is dropped by name and leaves no trace.

Honest replies are recorded once and played back, so that each case takes milliseconds; one of them is changed.
"""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from torch import Tensor

from tap_flower.config import Config
from tap_flower.errors import RunError, TapStrategy
from tap_flower.report.events import read_events
from tap_flower.wire import messages
from tap_flower.wire.messages import DISTILL, EVALUATE, MANIFEST, TRAIN
from tests.federations import federation_of_toys
from tests.grid import Playback, Replies, recorded
from tests.toys import TOYS

ANN, BOB = 100, 101
EVIL = 10**18
Change = Callable[[Message, RecordDict], list[Message]]


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Replies]:
    """A run of ann and bob: its configuration, and what each of them answered to each message."""
    federation = federation_of_toys(tmp_path_factory.mktemp("recorded"), TOYS[:2], "rounds=1")
    grid, strategy = federation.grid(), federation.strategy()
    strategy.start(grid)
    assert strategy.progress.dropped == 0
    strategy.config.round_timeout = 0.1  # less than a configuration may say: nobody waits long for who is silent
    return strategy.config, recorded(grid)


class Changed(Playback):
    """`change` may put something else in the place of a reply: nothing, or several."""

    def __init__(self, replies: Replies, change: Change) -> None:
        super().__init__(replies)
        self._change = change

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        asked = [self._waiting.pop(i) for i in message_ids if i in self._waiting]
        return [reply for message in asked for reply in self._change(message, self.answer(message).content)]


Play = Callable[..., tuple[TapStrategy, list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def play(honest: tuple[Config, Replies], tmp_path_factory: pytest.TempPathFactory) -> Play:
    """Runs the server over replies, of which bob's of one type are changed: (strategy, its events)."""
    config, replies = honest

    def run(message_type: str, change: Change) -> tuple[TapStrategy, list[dict[str, Any]]]:
        def changed(message: Message, content: RecordDict) -> list[Message]:
            if (message.metadata.message_type, message.metadata.dst_node_id) == (message_type, BOB):
                return change(message, content)
            return [Message(content, reply_to=message)]

        out = tmp_path_factory.mktemp("run")
        strategy = TapStrategy(config=config, run_folder=out)
        strategy.start(Changed(replies, changed))
        return strategy, list(read_events(out))

    return run


@pytest.fixture(scope="module")
def without(play: Play) -> dict[str, Tensor]:
    """The server's tensors after a round in which bob did not answer."""
    return play(TRAIN, silent)[0].roster.tensors


def silent(message: Message, content: RecordDict) -> list[Message]:
    """Bob does not answer."""
    return []


def with_values(change: Callable[[dict[str, Any]], Any]) -> Change:
    """Changes a reply's plain values."""

    def tamper(message: Message, content: RecordDict) -> list[Message]:
        values = messages.decode(content)
        change(values)
        changed = RecordDict({**content, "tap": ConfigRecord({"json": json.dumps(values)})})
        return [Message(changed, reply_to=message)]

    return tamper


def with_tensors(change: Callable[[dict[str, Tensor], str], Any]) -> Change:
    """Changes a reply's tensors; the second argument is the name of one of them."""

    def tamper(message: Message, content: RecordDict) -> list[Message]:
        tensors = messages.decode_tensors(content)
        change(tensors, sorted(tensors)[7])
        arrays = ArrayRecord({n: Array(np.asarray(t)) for n, t in tensors.items()})
        return [Message(RecordDict({**content, "tensors": arrays}), reply_to=message)]

    return tamper


def with_array(**fields: Any) -> Change:
    """Changes what one array of a reply says of itself."""

    def tamper(message: Message, content: RecordDict) -> list[Message]:
        record = dict(content.array_records["tensors"])
        name = sorted(record)[7]
        old = record[name]
        parts = {"dtype": old.dtype, "shape": old.shape, "stype": old.stype, "data": old.data, **fields}
        record[name] = Array(**parts)
        return [Message(RecordDict({**content, "tensors": ArrayRecord(record)}), reply_to=message)]

    return tamper


def with_record(name: str, record: Any) -> Change:
    """Adds a record to a reply."""
    return lambda message, content: [Message(RecordDict({**content, name: record}), reply_to=message)]


def fill(value: float) -> Callable[[dict[str, Tensor], str], None]:
    def change(tensors: dict[str, Tensor], name: str) -> None:
        tensors[name].view(-1)[-1] = value

    return change


def put(*path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Puts a value at a place of nested mappings."""

    def change(values: dict[str, Any]) -> None:
        for key in path[:-1]:
            values = values[key]
        values[path[-1]] = value

    return change


def impostor(message: Message, content: RecordDict) -> list[Message]:
    """Ann's node answers in the place of bob's."""
    reply = Message(content, reply_to=message)
    reply.metadata.__dict__["_src_node_id"] = ANN
    return [reply]


def one_tensor(name: str) -> ArrayRecord:
    return ArrayRecord({name: Array(np.zeros(2, np.float32))})


BAD_UPDATES: list[Any] = [
    ("nan", with_tensors(fill(math.nan)), "holds a value that is not finite"),
    ("infinity", with_tensors(fill(math.inf)), "holds a value that is not finite"),
    ("minus infinity", with_tensors(fill(-math.inf)), "holds a value that is not finite"),
    ("absurd value", with_tensors(fill(1e30)), "holds 1e+30; values from 4096 on are refused"),
    ("absurd norm", with_tensors(lambda t, _: [x.fill_(5000.0) for x in t.values()]), "holds 5000; values from 4096"),
    ("shape", with_tensors(lambda t, n: t.update({n: torch.zeros(2, 2, 2)})), "has shape (2, 2, 2), not"),
    ("transposed", with_tensors(lambda t, n: t.update({n: t[n][None]})), "has shape (1, "),
    ("dtype", with_tensors(lambda t, n: t.update({n: t[n].double()})), "is float64 in numpy.ndarray, not float32"),
    ("name", with_tensors(lambda t, n: t.update({"backbone.x": t.pop(n)})), "the reply lacks 1 tensors"),
    ("more", with_tensors(lambda t, n: t.update({"../../x": t[n]})), "tensors that were not sent, such as '../../x'"),
    ("missing", with_tensors(lambda t, n: t.pop(n)), "the reply lacks 1 tensors, such as"),
    ("none", with_tensors(lambda t, n: t.clear()), "the reply lacks 1"),
    ("pickle", with_array(stype="cloudpickle", data=pickle.dumps(1)), "is float32 in cloudpickle, not float32 in numpy"),
    ("pickle in npy", with_array(data=pickle.dumps(1)), "cannot be read"),
    ("header", with_array(data=Array(np.zeros(3, np.float32)).data), "has shape (3,) in its data, not"),
    ("huge shape", with_array(shape=(2**40, 2**40)), "has the impossible shape"),
    ("examples zero", with_values(put("examples", "languages", value=0)), "languages is 0, not a whole number from 1"),
    ("examples negative", with_values(put("examples", "languages", value=-5)), "languages is -5, not a whole number"),
    ("examples 10^18", with_values(put("examples", "languages", value=EVIL)), f"languages is {EVIL}, not a whole number"),
    ("examples bool", with_values(put("examples", "languages", value=True)), "languages is True, not a whole number"),
    ("examples float", with_values(put("examples", "languages", value=12.0)), "languages is 12.0, not a whole number"),
    ("examples other", with_values(put("examples", "languages", value=13)), "the manifest {'languages': 12"),
    ("examples of another task", with_values(put("examples", "digits", value=3)), "examples is {"),
    ("loss", with_values(put("losses", "languages", value=math.nan)), "the loss of task 'languages' is nan, not a finite"),
    ("loss text", with_values(put("losses", "languages", value="0.1")), "losses['languages'] is '0.1', not a number"),
    ("replacements", with_values(put("replacements", "languages", value=-1)), "languages is -1, not a whole number"),
    ("steps", with_values(put("steps", value=1e9)), "steps is 1000000000.0, not a whole number"),
    ("unchanged", with_values(put("unchanged", value=["head/digits"])), "has no component 'head/digits'"),
    ("round before", with_values(put("server_round", value=0)), "the reply is for round 0, not 1"),
    ("round after", with_values(put("server_round", value=7)), "the reply is for round 7, not 1"),
    ("a field more", with_values(put("client", value="ann")), "the report has the unknown field 'client'"),
    ("a field less", with_values(lambda values: values.pop("losses")), "the report lacks losses"),
    ("deep", with_values(put("losses", value=json.loads("[" * 50 + "]" * 50))), "more than 32 levels"),
    ("no JSON", with_record("tap", ConfigRecord({"json": "{"})), "cannot be read: it is no JSON"),
    ("no record", with_record("tap", MetricRecord({"json": 1})), "has no record 'tap'"),
    ("record more", with_record("extra", ConfigRecord({"a": 1})), "has the record 'extra', which the protocol"),
    ("tensors more", with_record("tensors2", one_tensor("x")), "has the record 'tensors2'"),
    ("impostor", impostor, "node 100 answered for it; its own node is 101"),
    ("error", lambda m, _: [Message(Error(7, "boom"), reply_to=m)], "boom (code 7)"),
    ("silent", silent, "no answer in time"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "problem"), [case[1:] for case in BAD_UPDATES], ids=[case[0] for case in BAD_UPDATES]
)
def test_a_bad_update_is_dropped_by_name_and_leaves_no_trace(
    play: Play, without: dict[str, Tensor], change: Any, problem: str, caplog: pytest.LogCaptureFixture
) -> None:
    strategy, events = play(TRAIN, change)
    dropped = [e for e in events if e["event"] == "dropped"]
    assert {e["who"] for e in dropped} == {"client 'bob'"}
    assert any(problem in e["problem"] for e in dropped), dropped
    assert "dropped the reply of client 'bob'" in caplog.text
    assert problem in caplog.text
    (trained,) = [e for e in events if e["event"] == "round"]
    assert (trained["dropped"], list(trained["clients"])) == (["bob"], ["ann"])
    values = strategy.roster.tensors
    assert values.keys() == without.keys()
    assert all(torch.equal(value, without[name]) for name, value in values.items())
    assert strategy.progress.replacements.keys() == {"ann"}
    assert set(strategy.progress.steps) == {"ann", "bob"}  # of stage 2, in which bob is honest again
    assert events[-1]["event"] == "end"


def test_what_nobody_else_has_keeps_its_value_bit_for_bit(play: Play) -> None:
    strategy, _ = play(TRAIN, with_tensors(fill(math.nan)))
    manifests = strategy.roster.manifests
    initial = manifests["bob"].initial_values(manifests["bob"].tensors, strategy.config.seed)
    alone = initial.keys() - manifests["ann"].tensors.keys()
    assert alone == {
        f"components.{layer}.{part}" for layer in ("image", "heads.shape_images") for part in ("weight", "bias")
    }
    assert all(torch.equal(strategy.roster.tensors[name], initial[name]) for name in alone)


def test_a_second_reply_is_dropped_by_name_and_the_first_one_counts_once(play: Play) -> None:
    def twice(message: Message, content: RecordDict) -> list[Message]:
        (other,) = with_tensors(fill(3.0))(message, content)
        return [Message(content, reply_to=message), other]

    once, _ = play(TRAIN, lambda message, content: [Message(content, reply_to=message)])
    strategy, events = play(TRAIN, twice)
    (event,) = [e for e in events if e["event"] == "dropped"]
    assert (event["who"], event["problem"]) == ("client 'bob'", "it answered a second time (code 1003)")
    assert all(torch.equal(t, once.roster.tensors[name]) for name, t in strategy.roster.tensors.items())


BAD_LATER: list[Any] = [
    (DISTILL, with_record("tensors", one_tensor("x")), "has the record 'tensors', which does not belong in it"),
    (DISTILL, with_values(put("losses", "languages", value=math.inf)), "the loss of task 'languages' is inf"),
    (DISTILL, impostor, "node 100 answered for it"),
    (EVALUATE, with_record("tensors", one_tensor("x")), "has the record 'tensors', which does not belong in it"),
    (EVALUATE, with_values(put("metrics", "languages", "tap", "loss", value=math.nan)), "loss of task 'languages'"),
    (EVALUATE, with_values(put("metrics", "languages", "tap", "loss", value=-math.inf)), "-inf, not a finite number"),
    (EVALUATE, with_values(put("metrics", "languages", "tap", "loss", value=1e308)), "1e+308, not a finite number"),
    (EVALUATE, with_values(put("metrics", "languages", "tap", "loss", value="1")), "is '1', not a number"),
    (EVALUATE, with_values(put("metrics", "languages", "<script>", value={"loss": 1.0})), "are no names of a model"),
    (EVALUATE, with_values(put("metrics", value={})), "the metrics are about [], not about the tasks"),
    (EVALUATE, with_values(put("metrics", "digits", value={})), "not about the tasks"),
]


@pytest.mark.parametrize(("message_type", "change", "problem"), BAD_LATER)
def test_a_bad_reply_after_the_rounds_is_dropped_by_name(
    play: Play, message_type: str, change: Any, problem: str
) -> None:
    strategy, events = play(message_type, change)
    dropped = [e for e in events if e["event"] == "dropped"]
    assert {e["who"] for e in dropped} == {"client 'bob'"}
    assert any(problem in e["problem"] for e in dropped), dropped
    results = json.loads((strategy.folder / "results.json").read_text())
    assert results["clients"].keys() == ({"ann"} if message_type == EVALUATE else {"ann", "bob"})
    assert all(math.isfinite(v) for by in results["tasks"].values() for m in by.values() for v in m.values())


def tensor(*info: Any, name: str = "components.head/languages.x") -> Callable[[dict[str, Any]], None]:
    def change(values: dict[str, Any]) -> None:
        values["tensors"][name] = list(info)

    return change


BAD_MANIFESTS: list[Any] = [
    (put("protocol", value=3), "client 'bob' speaks protocol 3 of tap-flower"),
    (put("version", value="9.9"), "of tap-flower 9.9, here is protocol 4"),
    (put("fingerprint", value="0123456789abcdef"), "client 'bob' has a backbone with fingerprint 0123456789abcdef"),
    (put("client", value="ann"), "client 'ann' is already there on node 100: node 101 is refused"),
    (put("client", value="../bob"), "client is '../bob', not 1 to 64 letters"),
    (put("client", value="bob\0"), "not 1 to 64 letters"),
    (put("client", value="b" * 65), "not 1 to 64 letters"),
    (put("client", value=7), "client is 7, not a text"),
    (put("tasks", value=[]), "tasks are [], reach is about"),
    (lambda v: v["tasks"].append(v["tasks"][0]), "tasks are ['languages', 'shape_images', 'languages'], reach"),
    (lambda v: v["tasks"][0].update(examples=EVIL), f"examples is {EVIL}, not a whole number"),
    (lambda v: v["tasks"][0].update(examples=0), "examples is 0, not a whole number from 1 on"),
    (lambda v: v["tasks"][0].update(examples=True), "examples is True"),
    (lambda v: v["tasks"][0].update(kind="a smell"), "a task, kind, domain or modality is 'a smell'"),
    (lambda v: v["tasks"][0].update(domains=["a/b"]), "a task, kind, domain or modality is 'a/b'"),
    (lambda v: v["tasks"][0]["pair"].update(modalities=["text", "text"]), "has modalities ['text', 'text']"),
    (tensor("head/languages", [10**12], "constant", 0.0), "the shape (1000000000000,) is impossible, or has more than"),
    (tensor("head/languages", [2**28, 2], "constant", 0.0), "values, more than 536870912"),
    (tensor("head/languages", [2**31] * 8, "constant", 0.0), "is impossible"),
    (tensor("head/languages", [-3, -4], "constant", 0.0), "is impossible"),
    (tensor("head/languages", [0], "constant", 0.0), "is impossible"),
    (tensor("head/languages", [1] * 9, "constant", 0.0), "has more than 8 dimensions"),
    (tensor("head/languages", [3], "identity", 1.0), "an identity has 2 to 5 dimensions"),
    (tensor("head/languages", [3], "cauchy", 1.0), "unknown distribution 'cauchy'"),
    (tensor("head/languages", [3], "normal", -1.0), "it is never negative"),
    (tensor("head/languages", [3], "constant", 1e9), "values from 256 on are refused"),
    (tensor("head/languages", [3], "constant", math.nan), "the scale is nan"),
    (tensor("head/languages", [3], "constant"), "not a component, a shape, a distribution and a scale"),
    (tensor("head/digits", [3], "constant", 0.0), "no pair reaches these components"),
    (tensor("../x", [3], "constant", 0.0), "'../x' is no name of a tensor or component"),
    (tensor("head/languages", [3], "constant", 0.0, name="__metadata__"), "'__metadata__': its name does not begin"),
    (tensor("head/languages", [3], "constant", 0.0, name="best/x"), "its name does not begin with 'components.'"),
    (put("reach", "digits", value=["head/languages"]), "reach is about ['digits', 'languages'"),
    (put("classes", value=["en", "es"]), "has the unknown field 'classes'"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "problem"), BAD_MANIFESTS)
def test_a_bad_manifest_is_refused_by_name_before_anything_is_allocated(play: Play, change: Any, problem: str) -> None:
    with pytest.raises(RunError) as refused:
        play(MANIFEST, with_values(change))
    assert problem in str(refused.value)
    assert "node 101 cannot take part: client " in str(refused.value)


def test_an_impostor_cannot_introduce_another_node(play: Play) -> None:
    with pytest.raises(RunError, match=r"node 101 cannot take part: node 100 answered for it"):
        play(MANIFEST, impostor)
