"""Who may take part: names, bounds of the whole run, and tasks that mean the same on all clients."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest

from tap_flower import IMAGE_CLASSIFICATION, Client, Task
from tap_flower.client.description import hash_of_classes
from tap_flower.config import Admission
from tap_flower.core.initial import Initial
from tap_flower.errors import MessageError, RunError
from tap_flower.server.roster import Roster
from tap_flower.wire.messages import Manifest, TensorInfo
from tests.federations import Make
from tests.server.test_rounds import manifest, roster


def admitted(first: Manifest, second: Manifest, **admission: Any) -> Roster:
    made = Roster(1, admission=Admission(**admission))
    made.admit(1, first)
    made.admit(2, second)
    return made


def with_task(name: str, **changes: Any) -> Manifest:
    made = manifest(name, {"a": 5})
    return msgspec.structs.replace(made, tasks=(msgspec.structs.replace(made.tasks[0], **changes),))


HASH = hash_of_classes("run", "a", ["cat", "dog"])


@pytest.mark.parametrize(
    ("first", "second", "problem"),
    [
        ({}, {"kind": "regression"}, "the kind regression on client 'bob' but text_classification on 'ann'"),
        ({}, {"head_size": 3}, "the number of classes 3 on client 'bob' but 2 on 'ann'"),
        (
            {"class_hash": HASH},
            {"class_hash": hash_of_classes("run", "a", ["dog", "cat"])},
            "other classes on client .* list the same classes in the same order on both",
        ),
        (
            {},
            {"headline": "accuracy"},
            "the headline accuracy ↓ on client 'bob' but loss ↓ on 'ann': judge both by one",
        ),
    ],
)
def test_one_task_means_the_same_on_all_clients(first: dict[str, Any], second: dict[str, Any], problem: str) -> None:
    with pytest.raises(MessageError, match=f"^task 'a' has {problem}"):
        admitted(with_task("ann", **first), with_task("bob", **second))


@pytest.mark.parametrize("second", [{}, {"head_size": 0}, {"class_hash": HASH}, {"modalities": ("image", "text")}])
def test_what_a_client_says_nothing_of_is_not_compared(second: dict[str, Any]) -> None:
    assert admitted(with_task("ann"), with_task("bob", **second)).names == ["ann", "bob"]
    assert admitted(with_task("ann", class_hash=HASH), with_task("bob", **second)).names == ["ann", "bob"]


def test_the_hash_of_classes_is_of_their_order_their_task_and_the_run() -> None:
    assert re.fullmatch("[0-9a-f]{16}", HASH)
    others = [("run2", "a", ["cat", "dog"]), ("run", "b", ["cat", "dog"]), ("run", "a", ["dog", "cat"])]
    others += [("run", "a", ["cat", "dog", "cow"]), ("run", "a", ['cat", "dog'])]
    assert len({HASH, *(hash_of_classes(*other) for other in others)}) == 6
    assert hash_of_classes("run", "a", []) == ""


def test_clients_with_classes_in_another_order_are_refused_by_name(make_federation: Make) -> None:
    federation = make_federation()
    federation.toys = federation.toys[:2]
    federation.settings.append("clients_per_round=2")
    grid = federation.grid()
    clients = {0: ["en", "es", "pt"], 1: ["es", "en", "pt"]}
    make = Client.__init__

    def named(self: Client, name: str, model: Any, tasks: Any, *rest: Any) -> None:
        order = clients[["ann", "bob"].index(name)]
        tasks = [Task(**{**vars(t), "classes": order if t.name == "languages" else ()}) for t in tasks]
        make(self, name, model, tasks, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Client, "__init__", named)
        with pytest.raises(RunError, match="task 'languages' has other classes on client 'bob' than on"):
            federation.strategy().start(grid)
    assert not [m for m in grid.received if b"pt" in str(m.content.config_records["tap"]["json"]).encode().split(b'"')]


def test_a_client_that_comes_back_with_other_tensors_is_told_which() -> None:
    made = roster(ann={"a": 5})
    made.leave("ann")
    with pytest.raises(MessageError, match=r"client 'ann' now has other tensors than before \('x.0' is new\): use"):
        made.admit(7, many("ann", "x", 1))


def many(name: str, prefix: str, count: int, size: int = 1) -> Manifest:
    made = manifest(name, {"a": 5})
    more = {f"{prefix}.{i}": TensorInfo("trunk", (size,), Initial("constant", 0.0)) for i in range(count)}
    return msgspec.structs.replace(made, tensors={**made.tensors, **more})


@pytest.mark.parametrize(
    ("second", "bounds", "problem"),
    [
        (many("bob", "x", 0), {"most_clients": 1}, "2 clients, more than admission.most_clients = 1"),
        (many("bob", "y", 6), {"most_tensors": 12}, "13 tensors, more than admission.most_tensors = 12"),
        (
            many("bob", "y", 1, 2**20),
            {"most_gigabytes": 0.004},
            "0.00419434 gigabytes, more than admission.most_gigabytes = 0.004",
        ),
    ],
)
def test_the_bounds_are_those_of_the_whole_run(second: Manifest, bounds: dict[str, Any], problem: str) -> None:
    made = Roster(1, admission=Admission(**bounds))
    made.admit(1, many("ann", "x", 5))
    made.keep_only(set())  # it has gone, and counts nonetheless
    before = dict(made.tensors)
    with pytest.raises(MessageError, match=f"^with client 'bob' the run would have {problem}: raise it"):
        made.admit(2, second)
    assert made.tensors.keys() == before.keys()
    made.admit(3, many("ann", "x", 5))  # a client that comes back brings nothing new


def test_eighty_thousand_tensors_are_refused_by_default() -> None:
    with pytest.raises(MessageError, match="80,?002 tensors, more than admission.most_tensors = 20000"):
        Roster(1).admit(1, many("eve", "x", 80_000))


def test_names_and_backbone_can_be_pinned() -> None:
    with pytest.raises(MessageError, match="client 'eve' is not one of the 1 in admission.clients"):
        admitted(manifest("ann", {"a": 1}), manifest("eve", {"a": 1}), clients=["ann"])
    with pytest.raises(
        MessageError, match="client 'ann' has a backbone with fingerprint f, not admission.fingerprint = g"
    ):
        Roster(1, admission=Admission(fingerprint="g")).admit(1, manifest("ann", {"a": 1}))
    Roster(1, admission=Admission(clients=["ann"], fingerprint="f")).admit(1, manifest("ann", {"a": 1}))


def test_clients_agree_on_weights_and_tokenizer() -> None:
    ann = msgspec.structs.replace(manifest("ann", {"a": 1}), fingerprint="f-words")
    bob = manifest("bob", {"a": 1})  # its version says nothing of the tokenizer
    admitted(ann, bob)
    bob = msgspec.structs.replace(bob, fingerprint="f-others")
    with pytest.raises(MessageError, match=r"fingerprint f-others, client 'ann' has f-words \(weights-tokenizer\)"):
        admitted(ann, bob)
    for pinned in ("f", "f-words"):
        Roster(1, admission=Admission(fingerprint=pinned)).admit(1, ann)
    with pytest.raises(MessageError, match=r"fingerprint f-words, not admission.fingerprint = f-others"):
        Roster(1, admission=Admission(fingerprint="f-others")).admit(1, ann)


def test_a_classes_tuple_is_a_part_of_a_task() -> None:
    task = Task("a", IMAGE_CLASSIFICATION, ["image"], [], [], classes=["cat", "dog"])
    assert list(task.classes) == ["cat", "dog"]
