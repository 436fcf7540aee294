"""Intruders among the clients: a wrong reply is dropped by name and leaves no trace.

Honest replies are recorded once and played back, so that each case takes milliseconds; one of them is changed.
"""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable, Iterable
from io import StringIO
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from rich.console import Console
from torch import Tensor

from tap_flower.cli.progress import RunProgress
from tap_flower.config import Config, Encoding
from tap_flower.errors import RunError
from tap_flower.report.events import read_events
from tap_flower.server.strategy import TapStrategy
from tap_flower.wire import messages
from tap_flower.wire.messages import ARRAYS, EVALUATE, FIELDS, MANIFEST, PERSONALISE, TRAIN
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
    assert strategy.progress.dropped == {}
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
        strategy.start(Changed(replies, changed), timeout=0.1)
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
        values = json.loads(str(content.config_records[FIELDS]["json"]))
        change(values)
        changed = RecordDict({**content, FIELDS: ConfigRecord({"json": json.dumps(values)})})
        return [Message(changed, reply_to=message)]

    return tamper


def with_tensors(change: Callable[[dict[str, Tensor], str], Any]) -> Change:
    """Changes a reply's tensors; the second argument is the name of one of them."""

    def tamper(message: Message, content: RecordDict) -> list[Message]:
        tensors = messages.tensors_of(content, Encoding.float32)
        change(tensors, sorted(tensors)[7])
        arrays = ArrayRecord({n: Array(np.asarray(t)) for n, t in tensors.items()})
        return [Message(RecordDict({**content, ARRAYS: arrays}), reply_to=message)]

    return tamper


def with_array(**fields: Any) -> Change:
    """Changes what one array of a reply says of itself."""

    def tamper(message: Message, content: RecordDict) -> list[Message]:
        record = dict(content.array_records[ARRAYS])
        name = sorted(record)[7]
        old = record[name]
        parts = {"dtype": old.dtype, "shape": old.shape, "stype": old.stype, "data": old.data, **fields}
        record[name] = Array(**parts)
        return [Message(RecordDict({**content, ARRAYS: ArrayRecord(record)}), reply_to=message)]

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
    ("absurd value", with_tensors(fill(1e30)), "holds 1e+30; values of 4096 or more are refused"),
    ("absurd norm", with_tensors(lambda t, _: [x.fill_(5000.0) for x in t.values()]), "holds 5000; values of 4096 or"),
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
    ("examples zero", with_values(put("examples", "languages", value=0)), "Expected `int` >= 1 - at `$.examples[...]`"),
    ("examples negative", with_values(put("examples", "languages", value=-5)), "Expected `int` >= 1"),
    ("examples 10^18", with_values(put("examples", "languages", value=EVIL)), "Expected `int` <= 2147483648"),
    ("examples bool", with_values(put("examples", "languages", value=True)), "Expected `int`, got `bool`"),
    ("examples float", with_values(put("examples", "languages", value=12.0)), "Expected `int`, got `float`"),
    ("examples other", with_values(put("examples", "languages", value=13)), "the manifest {'languages': 12"),
    ("examples of another task", with_values(put("examples", "digits", value=3)), "'digits': 3} examples, the manifest"),
    ("loss", with_values(put("losses", "languages", value=math.nan)), "JSON is malformed"),
    ("loss infinite", with_values(put("losses", "languages", value=math.inf)), "JSON is malformed"),
    ("loss huge", with_values(put("losses", "languages", value=1e306)), "Expected `float` < 1e+305"),
    ("loss text", with_values(put("losses", "languages", value="0.1")), "Expected `float`, got `str`"),
    ("loss of another task", with_values(put("losses", "digits", value=0.1)), "losses names the task 'digits', not one"),
    ("replacements", with_values(put("replacements", "languages", value=-1)), "Expected `int` >= 0"),
    ("steps", with_values(put("steps", value=1e9)), "steps is 1000000000.0: Expected `int`, got `float`"),
    ("round before", with_values(put("round", value=0)), "the reply is for round 0, not 1"),
    ("round after", with_values(put("round", value=7)), "the reply is for round 7, not 1"),
    ("a field more", with_values(put("client", value="ann")), "contains unknown field `client`"),
    ("a field less", with_values(lambda values: values.pop("losses")), "missing required field `losses`"),
    ("deep", with_values(put("losses", value=json.loads("[" * 50 + "]" * 50))), "Expected `object`, got `array`"),
    ("deeper", with_record(FIELDS, ConfigRecord({"json": "[" * 10**5})), "Expected `object`, got `array`"),
    ("no JSON", with_record(FIELDS, ConfigRecord({"json": "{"})), "cannot be read: Input data was truncated"),
    ("no record", with_record(FIELDS, MetricRecord({"json": 1})), "has no record 'tap'"),
    ("record more", with_record("extra", ConfigRecord({"a": 1})), "has the record 'extra', which the protocol"),
    ("tensors more", with_record("tensors2", one_tensor("x")), "has the record 'tensors2'"),
    ("impostor", impostor, "node 100 answered for it; its own node is 101"),
    ("error", lambda m, _: [Message(Error(7, "boom"), reply_to=m)], "boom (Flower's error 7)"),
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


HOSTILE = "\x1b[2J\x1b]0;owned\x07[/red]\n" * 300_000
"""9 MB that clear a terminal, set its title, and end a markup that never began."""


@pytest.mark.parametrize("message_type", [MANIFEST, TRAIN, EVALUATE])
def test_the_words_of_an_error_are_bounded_and_printable(
    play: Play, message_type: str, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(message: Message, _: RecordDict) -> list[Message]:
        return [Message(Error(7, HOSTILE), reply_to=message)]

    if message_type == MANIFEST:
        with pytest.raises(RunError) as refused:
            play(message_type, fail)
        problems = [str(refused.value)]
    else:
        _, events = play(message_type, fail)
        problems = [e["problem"] for e in events if e["event"] == "dropped"]
        with RunProgress(Console(file=(shown := StringIO()))) as progress:
            for event in events:
                progress.show(event)
        assert "owned" in shown.getvalue()
        assert "\x1b" not in shown.getvalue()
    assert problems
    for text in (*problems, *(r.getMessage() for r in caplog.records if r.name == "tap_flower")):
        assert "owned" in text
        assert text.isprintable()
        assert len(text) < 5000


def test_what_nobody_else_has_keeps_its_value_bit_for_bit(play: Play) -> None:
    strategy, _ = play(TRAIN, with_tensors(fill(math.nan)))
    manifests = strategy.roster.manifests
    initial = strategy.roster.first_values(manifests["bob"], manifests["bob"].tensors)
    alone = initial.keys() - manifests["ann"].tensors.keys()
    assert alone == {f"{layer}.{part}" for layer in ("image", "heads.shape_images") for part in ("weight", "bias")}
    assert all(torch.equal(strategy.roster.tensors[name], initial[name]) for name in alone)


def test_a_second_reply_is_dropped_by_name_and_the_first_one_counts_once(play: Play) -> None:
    def twice(message: Message, content: RecordDict) -> list[Message]:
        (other,) = with_tensors(fill(3.0))(message, content)
        return [Message(content, reply_to=message), other]

    once, _ = play(TRAIN, lambda message, content: [Message(content, reply_to=message)])
    strategy, events = play(TRAIN, twice)
    (event,) = [e for e in events if e["event"] == "dropped"]
    assert (event["who"], event["problem"]) == ("client 'bob'", "it answered a second time")
    assert all(torch.equal(t, once.roster.tensors[name]) for name, t in strategy.roster.tensors.items())


BAD_LATER: list[Any] = [
    (PERSONALISE, with_record(ARRAYS, one_tensor("x")), "has the record 'arrays', which does not belong in it"),
    (PERSONALISE, with_values(put("losses", "languages", value=math.inf)), "JSON is malformed"),
    (PERSONALISE, with_values(put("round", value=0)), "the reply is for round 0, not 1"),
    (PERSONALISE, impostor, "node 100 answered for it"),
    (EVALUATE, with_record(ARRAYS, one_tensor("x")), "has the record 'arrays', which does not belong in it"),
    (EVALUATE, with_values(put("metrics", "languages", "tap", "loss", value=math.nan)), "JSON is malformed"),
    (EVALUATE, with_values(put("metrics", "languages", "tap", "loss", value=1e308)), "Expected `float` < 1e+305"),
    (EVALUATE, with_values(put("metrics", "languages", "tap", "loss", value="1")), "Expected `float`, got `str`"),
    (EVALUATE, with_values(put("metrics", "languages", "<script>", value={"loss": 1.0})), "Expected `str` matching"),
    (
        EVALUATE,
        with_values(put("metrics", "languages", "tap", value={f"m{i}": 1.0 for i in range(101)})),
        "Expected `object` of length <= 100",
    ),
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
    results = json.loads((strategy.run_folder / "results.json").read_text())
    assert results["clients"].keys() == ({"ann"} if message_type == EVALUATE else {"ann", "bob"})
    assert all(math.isfinite(v) for by in results["tasks"].values() for m in by.values() for v in m.values())


def tensor(
    component: str, shape: list[int], distribution: str, scale: float, name: str = "heads.languages.x"
) -> Callable[[dict[str, Any]], None]:
    def change(values: dict[str, Any]) -> None:
        initial = {"distribution": distribution, "scale": scale}
        values["tensors"][name] = {"component": component, "shape": shape, "initial": initial}

    return change


BAD_MANIFESTS: list[Any] = [
    (put("protocol", value=3), "node 101 speaks protocol 3 of tap-flower"),
    (put("version", value=2), "version is 2: Expected `str`"),
    (put("fingerprint", value="0123456789abcdef"), "client 'bob' has a backbone with fingerprint 0123456789abcdef"),
    (put("client", value="ann"), "client 'ann' is already there on node 100: node 101 is refused"),
    (put("client", value="../bob"), "client is '../bob': Expected `str` matching regex"),
    (put("client", value="bob\0"), "Expected `str` matching regex"),
    (put("client", value="bob\n"), "Expected `str` matching regex"),
    (put("client", value="b" * 65), "Expected `str` matching regex"),
    (put("client", value=7), "client is 7: Expected `str`, got `int`"),
    (put("tasks", value=[]), "tasks is []: Expected `array` of length >= 1"),
    (lambda v: v["tasks"].append(v["tasks"][0]), "tasks are ['languages', 'shape_images', 'languages'], reach"),
    (lambda v: v["tasks"][0].update(examples=EVIL), f"tasks[0].examples is {EVIL}: Expected `int`"),
    (lambda v: v["tasks"][0].update(examples=2**31), f"the tasks have {2**31 + 8} examples, more than {2**31}"),
    (lambda v: v["tasks"][0].update(examples=0), "tasks[0].examples is 0: Expected `int` >= 1"),
    (lambda v: v["tasks"][0].update(examples=True), "tasks[0].examples is True"),
    (lambda v: v["tasks"][0].update(kind="a smell"), "tasks[0].kind is 'a smell'"),
    (lambda v: v["tasks"][0].update(domains=["a/b"]), "tasks[0].domains[0] is 'a/b'"),
    (lambda v: v["tasks"][0].update(modalities=["text", "text"]), "names a modality twice: ('text', 'text')"),
    (lambda v: v["tasks"][0].update(modalities=[]), "tasks[0].modalities is []"),
    (tensor("head/languages", [10**12], "constant", 0.0), "Expected `int` <= 1073741824"),
    (tensor("head/languages", [2**29, 2], "constant", 0.0), "values, more than 1073741824"),
    (tensor("head/languages", [2**30] * 8, "constant", 0.0), "values, more than 1073741824"),
    (tensor("head/languages", [-3, -4], "constant", 0.0), "Expected `int` >= 1"),
    (tensor("head/languages", [0], "constant", 0.0), "Expected `int` >= 1"),
    (tensor("head/languages", [1] * 9, "constant", 0.0), "Expected `array` of length <= 8"),
    (tensor("head/languages", [3], "identity", 1.0), "an identity has 2 to 5 dimensions"),
    (tensor("head/languages", [3], "cauchy", 1.0), "Invalid enum value 'cauchy'"),
    (tensor("head/languages", [3], "normal", -1.0), "it is never negative"),
    (tensor("head/languages", [3], "constant", 1e9), "values from 256 on are refused"),
    (tensor("head/languages", [3], "constant", math.nan), "JSON is malformed"),
    (put("tensors", "heads.x", value={"component": "head/languages", "shape": [3]}), "missing required field `initial`"),
    (tensor("head/digits", [3], "constant", 0.0), "no pair reaches these components"),
    (tensor("../x", [3], "constant", 0.0), "Expected `str` matching regex"),
    (tensor("head/languages", [3], "constant", 0.0, name="residual:x"), "Expected `str` matching regex"),
    (tensor("head/languages", [3], "constant", 0.0, name="../x"), "Expected `str` matching regex"),
    (tensor("head/languages", [3], "constant", 0.0, name="x" * 257), "Expected `str` of length <= 256"),
    (put("reach", "digits", value=["head/languages"]), "reach is about ['digits', 'languages'"),
    (put("classes", value=["en", "es"]), "contains unknown field `classes`"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "problem"), BAD_MANIFESTS)
def test_a_bad_manifest_is_refused_by_name_before_anything_is_allocated(play: Play, change: Any, problem: str) -> None:
    with pytest.raises(RunError) as refused:
        play(MANIFEST, with_values(change))
    assert problem in str(refused.value)
    assert "node 101 cannot take part: " in str(refused.value)


def test_an_impostor_cannot_introduce_another_node(play: Play) -> None:
    with pytest.raises(RunError, match=r"node 101 cannot take part: node 100 answered for it"):
        play(MANIFEST, impostor)
