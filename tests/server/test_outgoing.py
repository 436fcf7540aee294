from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

from tap_flower.config import Encoding
from tap_flower.core.initial import Initial
from tap_flower.errors import RunError
from tap_flower.server.outgoing import Outgoing, Values
from tap_flower.server.roster import Roster
from tap_flower.wire import tensors as encodings
from tap_flower.wire.messages import Manifest, TaskInfo, TensorInfo
from tap_flower.wire.tensors import decode_tensors, moved_to

SHARED, OWN = "components.fusion.weight", "components.head/{}.weight"


def manifest(client: str, initial: Initial) -> Manifest:
    own = OWN.format(client)
    tensors = {SHARED: TensorInfo("fusion", (4, 3), initial), own: TensorInfo(f"head/{client}", (2, 3), initial)}
    task = TaskInfo(client, ("text",), "text_classification", ("d",), 2, 10)
    reach = {client: frozenset({"fusion", f"head/{client}"})}
    return Manifest(client=client, fingerprint="f", tasks=(task,), tensors=tensors, reach=reach)


def roster(*initials: Initial) -> Roster:
    made = Roster(41)
    for node, initial in enumerate(initials):
        made.admit(node, manifest(f"client-{node}", initial))
    made.tensors = {name: value + 0.25 for name, value in made.tensors.items()}
    return made


def outgoing(made: Roster, encoding: Encoding) -> Outgoing:
    return Outgoing(made, Values({}).record(made.tensors), made.tensors, encoding)


@pytest.mark.parametrize("encoding", Encoding)
def test_every_client_can_restore_its_tensors(encoding: Encoding) -> None:
    clients = roster(Initial("normal", 0.02), Initial("normal", 0.02), Initial("uniform", 0.5))
    sending, error = outgoing(clients, encoding), 0 if encoding is Encoding.float32 else 4e-3
    for name in clients.names:
        sent = decode_tensors(sending.arrays_for(name), encoding)
        own = clients.manifests[name]
        # The third client starts the shared tensor in another way: what rounds is sent relative to that.
        got = moved_to(sent, clients.first_values(own, sent), encoding)
        assert got.keys() == {SHARED, OWN.format(name)}
        for tensor, value in got.items():
            torch.testing.assert_close(value, clients.tensors[tensor], atol=error, rtol=0)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The tensors that are encoded."""
    found: list[Tensor] = []
    to_array = encodings.to_array

    def counted(tensor: Tensor, encoding: Encoding) -> Any:
        found.append(tensor)
        return to_array(tensor, encoding)

    monkeypatch.setattr(encodings, "to_array", counted)
    return found


@pytest.mark.parametrize("encoding", Encoding)
def test_what_clients_share_is_encoded_once(encoding: Encoding, encoded: list[Tensor]) -> None:
    clients = roster(*[Initial("normal", 0.02)] * 5)
    sending = outgoing(clients, encoding)
    of_the_record = len(encoded)
    sent = [sending.arrays_for(name) for name in clients.names]
    assert of_the_record == 1 + 5  # the shared tensor, and one of each client's own
    assert len(encoded) - of_the_record == (0 if encoding is Encoding.float32 else 6)
    assert len({id(arrays[SHARED].data) for arrays in sent}) == 1


def test_what_has_not_changed_is_not_encoded_again(encoded: list[Tensor]) -> None:
    tensors = roster(*[Initial("normal", 0.02)] * 3).tensors
    values = Values({})
    first = values.record(tensors)
    changed = {**tensors, SHARED: tensors[SHARED] + 1}
    second = values.record(changed)
    assert len(encoded) == 4 + 1
    assert all((second[name].data is first[name].data) == (name != SHARED) for name in tensors)


def test_a_record_of_somebody_elses_is_decoded_and_ours_is_not() -> None:
    tensors = roster(Initial("normal", 0.02)).tensors
    values = Values({"frozen": Array(np.ones(2, np.float32))})
    record = values.record(tensors)
    assert record.keys() == {"frozen", *tensors}
    assert all(values.tensors(record, tensors)[name] is value for name, value in tensors.items())
    other = ArrayRecord({name: Array(2 * array.numpy()) for name, array in record.items()})
    found = values.tensors(other, tensors)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], 2 * value) for name, value in tensors.items())


def test_what_a_subclass_changes_in_a_record_counts() -> None:
    tensors = roster(Initial("normal", 0.02)).tensors
    values = Values({})
    record = values.record(tensors)
    record[SHARED], record["epoch"] = Array(2 * record[SHARED].numpy()), Array(np.ones(1, np.float32))
    found = values.take(record, tensors)
    assert torch.equal(found[SHARED], 2 * tensors[SHARED])
    assert found[OWN.format("client-0")] is tensors[OWN.format("client-0")]
    again = values.record(tensors)  # as they were
    assert again[SHARED].numpy().tolist() == tensors[SHARED].tolist()
    assert again["epoch"].numpy().tolist() == [1.0]
    values.take(
        ArrayRecord({name: again[name] for name in tensors}), tensors
    )  # a subclass's record of the tensors alone
    assert values.record(tensors).keys() == {"epoch", *tensors}


@pytest.mark.parametrize(
    ("array", "problem"),
    [(None, f"lack 1 of 2 tensors, such as '{SHARED}'"), (np.ones(3, np.float32), r"has shape \(3,\)")],
)
def test_arrays_that_a_subclass_has_broken_are_named(array: Any, problem: str) -> None:
    tensors = roster(Initial("normal", 0.02)).tensors
    values = Values({})
    record = values.record(tensors)
    if array is None:
        del record[SHARED]
    else:
        record[SHARED] = Array(array)
    with pytest.raises(RunError, match=problem):
        values.tensors(record, tensors)
