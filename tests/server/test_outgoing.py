from __future__ import annotations

from typing import Any

import pytest
import torch
from tap_flower.wire.manifest import Manifest, TaskInfo, TensorInfo
from tap_flower.wire.updates import restore
from torch import Tensor

from tap_flower.config import Encoding
from tap_flower.core.components import Pair
from tap_flower.core.initial import Initial
from tap_flower.server.outgoing import Outgoing
from tap_flower.server.roster import Roster
from tap_flower.wire import messages
from tap_flower.wire import tensors as encodings
from tap_flower.wire.tensors import from_array

SHARED, OWN = "components.fusion.weight", "components.head/{}.weight"


def manifest(client: str, initial: Initial) -> Manifest:
    own = OWN.format(client)
    tensors = {SHARED: TensorInfo("fusion", (4, 3), initial), own: TensorInfo(f"head/{client}", (2, 3), initial)}
    task = TaskInfo(Pair(client, ("text",)), "text_classification", ("d",), 2, 10)
    return Manifest(client, "f", (task,), tensors, {client: frozenset({"fusion", f"head/{client}"})})


def roster(*initials: Initial) -> Roster:
    made = Roster(41)
    for node, initial in enumerate(initials):
        made.admit(node, manifest(f"client-{node}", initial))
    made.tensors = {name: value + 0.25 for name, value in made.tensors.items()}
    return made


@pytest.mark.parametrize("encoding", Encoding)
def test_every_client_can_restore_its_tensors(encoding: Encoding) -> None:
    clients = roster(Initial("normal", 0.02), Initial("normal", 0.02), Initial("uniform", 0.5))
    outgoing, error = Outgoing(clients, encoding), 0 if encoding is Encoding.float32 else 4e-3
    for name in clients.names:
        arrays, held = outgoing.arrays_for(name)
        sent = {tensor: from_array(array, encoding) for tensor, array in arrays.items()}
        own = clients.manifests[name]
        # The third client starts the shared tensor in another way: what rounds is sent relative to that.
        got = restore(sent, own.initial_values(sent, clients.seed), encoding)
        assert held is None
        assert got.keys() == {SHARED, OWN.format(name)}
        for tensor, value in got.items():
            torch.testing.assert_close(value, clients.tensors[tensor], atol=error, rtol=0)


def test_what_clients_share_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[Any] = []

    def counted(tensor: Tensor, encoding: Encoding) -> Any:
        encoded.append(tensor)
        return encodings.to_array(tensor, encoding)

    monkeypatch.setattr(messages, "to_array", counted)
    clients = roster(*[Initial("normal", 0.02)] * 5)
    outgoing = Outgoing(clients, Encoding.int8)
    sent = [outgoing.arrays_for(name)[0] for name in clients.names]
    assert len(encoded) == 1 + 5  # the shared tensor, and one of each client's own
    assert len({id(arrays[SHARED]) for arrays in sent}) == 1
