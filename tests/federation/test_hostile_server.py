"""An intruder in the place of the server: a client refuses what is wrong in plain words, and its folder stays as it was."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from torch import Tensor

from tap_flower.config import Encoding, HyperParameters, plain
from tap_flower.wire import messages
from tap_flower.wire.messages import ARRAYS, FIELDS, REFUSED, TRAIN
from tests.federations import federation_of
from tests.grid import InProcessGrid

ANN = 100


@pytest.fixture(scope="module", params=["toys", "specs"])
def victim(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[InProcessGrid, Message, Path]:
    """A client after a round: its grid, the server's last training instruction, the client's folder."""
    settings = ["rounds=2", "train.steps=1", "distill.iterations=1"]
    federation = federation_of(request.param, tmp_path_factory.mktemp("victim"), *settings, count=1)
    grid = federation.grid()
    federation.strategy().start(grid)
    message = [m for m in grid.sent if m.metadata.message_type == TRAIN][-1]
    return grid, message, federation.state("ann")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def put(*path: str, value: Any) -> Callable[[RecordDict], None]:
    """Puts a value at a place of the plain values."""

    def change(content: RecordDict) -> None:
        whole = values = json.loads(str(content.config_records[FIELDS]["json"]))
        for key in path[:-1]:
            values = values[key]
        values[path[-1]] = value
        content[FIELDS] = ConfigRecord({"json": json.dumps(whole)})

    return change


def tensors(change: Callable[[dict[str, Tensor], str], Any]) -> Callable[[RecordDict], None]:
    def tamper(content: RecordDict) -> None:
        found = messages.tensors_of(content, Encoding.float32)
        change(found, sorted(found)[3])
        content[ARRAYS] = ArrayRecord({n: Array(np.asarray(t)) for n, t in found.items()})

    return tamper


def pickled(content: RecordDict) -> None:
    record = dict(content.array_records[ARRAYS])
    name = sorted(record)[3]
    record[name] = Array("float32", (1,), "numpy.ndarray", pickle.dumps(np.zeros(1)))
    content[ARRAYS] = ArrayRecord(record)


H = "hyper_parameters"
WRONG: list[Any] = [
    (put("protocol", value=2), "the server speaks protocol 2"),
    (put("version", value=2), "version is 2: Expected `str`"),
    (put("run", value="../../x"), "run is '../../x': Expected `str` matching regex"),
    (put("run", value="r" * 65), "Expected `str` matching regex"),
    (put("round", value=-1), "round is -1: Expected `int` >= 0"),
    (put("round", value=True), "round is True: Expected `int`"),
    (put("round", value=2**52), "round is 4503599627370496: Expected `int` <= 1000000"),
    (put("best", value="1"), "best is '1': Expected `int | null`"),
    (put("epochs", value=[]), "epochs is []: Expected `array` of length >= 1"),
    (put("epochs", value=[{"history": "../x", "start": 0}]), "epochs[0].history is '../x'"),
    (put("trackers", value="mlflow"), "contains unknown field `trackers`"),
    (put("client-spec", value="/etc/passwd"), "contains unknown field `client-spec`"),
    (put(H, value=[]), "hyper_parameters is []: Expected `object`"),
    (put(H, value={"backbone": "evil/hub"}), "the server: unknown key 'backbone'"),
    (put(H, value={"data": {"root": "/"}}), "the server: unknown key 'data"),
    (put(H, value={"clients": []}), "the server: unknown key 'clients'"),
    (put(H, value={"trackers": "wandb"}), "the server: unknown key 'trackers'"),
    (put(H, value={"metrics": {"bertscore": "evil/hub"}}), "the server: unknown key 'metrics"),
    (put(H, value={"templates": {"text": "{{ x }}"}}), "the server: unknown key 'templates'"),
    (put(H, "method", value="os.system"), "unknown method 'os.system'"),
    (put(H, "method", value="../../x"), "unknown method '../../x'"),
    (put(H, "method", value="${oc.env:HOME}"), "interpolations (${...}) are not accepted"),
    (put(H, "train", "steps", value=10**9), "train.steps = 1000000000 is out of bounds"),
    (put(H, "train", "steps", value="5x"), "train.steps"),
    (put(H, "train", "learning_rate", value=math.nan), "JSON is malformed"),
    (put(H, "train", "learning_rate", value=10**400), "int too large to convert to float"),
    (put(H, "train", "steps", value=None), "train.steps"),
    (put(H, "train", "learning_rate", value=10.0), "train.learning_rate = 10.0 is out of bounds: choose between 0 and 0.1"),
    (put(H, "train", "weight_decay", value=10.0), "train.weight_decay = 10.0 is out of bounds: choose between 0 and 0.5"),
    (put(H, "baselines", "per_fedavg_rate", value=10.0), "per_fedavg_rate = 10.0 is out of bounds: choose between 0 and 1"),
    (put(H, "baselines", "pfedme_rate", value=101.0), "their product is above 1, and w would go beyond θ"),
    (put(H, "model", "text_length", value=10**6), "model.text_length = 1000000 is out of bounds"),
    (put(H, "a", value=json.loads("[" * 40 + "]" * 40)), "the server: unknown key 'a'"),
    (lambda content: content.update(tap=ConfigRecord({"json": "{\"round\":" + "[" * 10**5})), "cannot be read"),
    (tensors(lambda t, n: t.pop(n)), "the server's message lacks 1 tensors"),
    (tensors(lambda t, n: t.update({"../x": t[n]})), "tensors that were not sent, such as '../x'"),
    (tensors(lambda t, n: t.update({n: torch.zeros(2, 2, 2)})), "has shape (2, 2, 2), not"),
    (tensors(lambda t, n: t.update({n: t[n].double()})), "is float64 in numpy.ndarray, not float32"),
    (tensors(lambda t, n: t[n].fill_(math.nan)), "holds a value that is not finite"),
    (tensors(lambda t, n: t[n].fill_(math.inf)), "holds a value that is not finite"),
    (pickled, "cannot be read"),
    (lambda content: content.pop(ARRAYS), "has no record 'arrays'"),
    (lambda content: content.update(more=ConfigRecord({"a": 1})), "has the record 'more'"),
    (lambda content: content.update(tap=ConfigRecord({"json": "nonsense"})), "cannot be read: JSON is malformed"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "problem"), WRONG)
def test_what_is_wrong_is_refused_and_the_clients_state_is_intact(
    victim: tuple[InProcessGrid, Message, Path], change: Any, problem: str
) -> None:
    grid, sent, folder = victim
    before, content = files(folder), RecordDict(dict(sent.content))
    change(content)
    reply = grid.answer(Message(content, dst_node_id=ANN, message_type=TRAIN))
    assert reply.has_error()
    assert reply.error.code == REFUSED
    assert problem in reply.error.reason
    assert "unexpected" not in reply.error.reason
    assert files(folder) == before


def test_what_the_server_may_set_are_numbers_and_choices_within_bounds() -> None:
    """No hyper-parameter is a text of the server's choice, but for the method's name, which is looked up in a table."""

    def leaves(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
        return [
            leaf
            for key, value in values.items()
            for leaf in (leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)])
        ]

    texts = {key for key, value in leaves(plain(HyperParameters())) if isinstance(value, str)}
    assert texts == {
        "method",
        "compute.precision",
        "distill.stage",
        "replacement.source",
        "replacement.evidence",
        "replacement.mode",
        "wire.encoding",
    }
