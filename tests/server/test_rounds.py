"""The average of a round without privacy: clipping of differences that are too long."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord
from torch import Tensor

from tap_flower.config import Encoding
from tap_flower.core.averaging import LARGEST_WEIGHT
from tap_flower.core.initial import Initial
from tap_flower.errors import MessageError, RunError
from tap_flower.methods.method import Combine, ServerHalf
from tap_flower.report.events import read_events
from tap_flower.server.roster import Roster
from tap_flower.server.rounds import MethodAverage, WeightedAverage
from tap_flower.wire.messages import Manifest, TaskInfo, TensorInfo
from tap_flower.wire.tensors import decode_tensors
from tests.federations import Make
from tests.toys import TOYS

SIZES = {"trunk": 3, "head/a": 2, "head/b": 2}


def manifest(name: str, tasks: dict[str, int]) -> Manifest:
    """A client with some of the tasks a and b, name -> examples; each has a head, and all share the trunk."""
    components = ["trunk", *(f"head/{task}" for task in tasks)]
    return Manifest(
        client=name,
        fingerprint="f",
        tasks=tuple(TaskInfo(t, ("text",), "text_classification", ("d",), 2, n) for t, n in tasks.items()),
        tensors={f"{c}.w": TensorInfo(c, (SIZES[c],), Initial("constant", 1.0)) for c in components},
        reach={task: frozenset({"trunk", f"head/{task}"}) for task in tasks},
    )


def roster(**tasks: dict[str, int]) -> Roster:
    """Clients by name; all server tensors are 1."""
    made = Roster(1)
    for node, (name, own) in enumerate(sorted(tasks.items())):
        made.admit(node, manifest(name, own))
    return made


def difference(made: Roster, client: str, **changes: list[float]) -> dict[str, Tensor]:
    """What a client returns: some changes, 0 where none is given; `head_a` is head/a."""
    values = {f"{key.replace('_', '/')}.w": torch.tensor(change) for key, change in changes.items()}
    return {n: values.get(n, torch.zeros(made.tensors[n].shape)) for n in made.manifests[client].tensors}


def test_a_long_update_is_scaled_down_and_told(caplog: pytest.LogCaptureFixture) -> None:
    made, told = roster(ann={"a": 30}, bob={"a": 10}), list[Any]()
    with caplog.at_level(logging.WARNING):
        average = WeightedAverage(made, ["ann", "bob"], 6.5, lambda *event, **values: told.append((event, values)))
        average.add("ann", difference(made, "ann", trunk=[0.0, 2.0, 0.0]))
        assert told == []
        average.add("bob", difference(made, "bob", trunk=[3.0, 4.0, 0.0], head_a=[12.0, 0.0]))  # ‖·‖ = 13
    assert told == [(("clipped",), {"client": "bob", "norm": 13.0, "clip_norm": 6.5})]
    assert caplog.messages == ["the update of client 'bob' has norm 13: scaled down to aggregation.clip_norm = 6.5"]
    tensors = average.finish()
    # (30 · (0, 2, 0) + 10 · (1.5, 2, 0)) / 40, and (10 · 6) / 40
    assert tensors["trunk.w"].tolist() == pytest.approx([1.375, 3.0, 1.0])
    assert tensors["head/a.w"].tolist() == pytest.approx([2.5, 1.0])


@pytest.mark.parametrize("clip_norm", [5.0, None])
def test_an_update_as_long_as_it_may_be_is_taken_as_it_is(clip_norm: float | None) -> None:
    made, told = roster(ann={"a": 1}), list[Any]()
    average = WeightedAverage(made, ["ann"], clip_norm, lambda *event, **values: told.append(event))
    average.add("ann", difference(made, "ann", trunk=[3.0, 4.0, 0.0]))
    tensors = average.finish()
    assert tensors["trunk.w"].tolist() == [4.0, 5.0, 1.0]
    assert tensors["head/a.w"].tolist() == [1.0, 1.0]
    assert told == []


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (torch.tensor([1.0, math.inf, 0.0]), "'trunk.w' holds a value that is not finite"),
        (torch.zeros(4), r"'trunk.w' has shape \(4,\), not \(3,\)"),
        (torch.zeros(3, dtype=torch.float64), "'trunk.w' is torch.float64"),
    ],
)
@pytest.mark.parametrize("clip_norm", [1.0, None])
def test_a_bad_update_is_refused_with_clipping_as_without(bad: Tensor, problem: str, clip_norm: float | None) -> None:
    made, told = roster(ann={"a": 1}), list[Any]()
    average = WeightedAverage(made, ["ann"], clip_norm, lambda *event, **values: told.append(event))
    with pytest.raises(MessageError, match=f"^client 'ann': .*{problem}"):
        average.add("ann", {**difference(made, "ann"), "trunk.w": bad})
    assert told == []
    assert all(value is made.tensors[name] for name, value in average.finish().items())


@pytest.mark.parametrize("combine", [lambda found, _: found.mean(), lambda found, _: found], ids=["scalar", "stack"])
def test_a_combination_of_another_shape_is_refused(combine: Combine) -> None:
    made = roster(ann={"a": 1})
    average = MethodAverage(ServerHalf(combine), {}, 1, made, ["ann"], None, lambda *_, **__: None)
    average.add("ann", difference(made, "ann", trunk=[3.0, 4.0, 0.0]))
    with pytest.raises(
        RunError, match="the method's server half gave '.*' a value that is not finite, or of another name"
    ):
        average.finish()


def test_a_clients_update_in_a_run(make_federation: Make) -> None:
    federation = make_federation(TOYS[:1], "aggregation.clip_norm=1e-4", "method=fedavg", "rounds=1")
    values: list[dict[str, Tensor]] = []  # alone: the mean is its update

    def note(server_round: int, arrays: ArrayRecord) -> None:
        values.append(decode_tensors(arrays, Encoding.float32))

    federation.strategy().start(federation.grid(), evaluate_fn=note)
    moved = [values[1][name].double() - value for name, value in values[0].items()]
    length = math.sqrt(sum(float(change.square().sum()) for change in moved))
    (event,) = [e for e in read_events(federation.out) if e["event"] == "clipped"]
    assert (event["round"], event["client"], event["clip_norm"]) == (1, "ann", 1e-4)
    assert event["norm"] > 1e-3
    assert length == pytest.approx(1e-4, rel=1e-2)  # float32 values: some steps are rounded away


def test_a_client_that_states_many_examples_and_never_answers_moves_no_component() -> None:
    made = roster(ann={"a": 100}, bob={"a": 300}, eve={"a": LARGEST_WEIGHT})
    average = WeightedAverage(made, ["ann", "bob", "eve"], None, lambda *_, **__: None)
    average.add("ann", difference(made, "ann", trunk=[4e-5, 0.0, -8e-6]))
    average.add("bob", difference(made, "bob", trunk=[8e-5, 0.0, 8e-6]))
    found = average.finish()["trunk.w"].double() - 1
    assert found.tolist() == pytest.approx([7e-5, 0.0, 4e-6], abs=1e-7)  # values of 1 have steps of 1.2e-7
