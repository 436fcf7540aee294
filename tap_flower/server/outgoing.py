"""The server's tensors as they are sent: each is encoded once for all clients that get it."""

from __future__ import annotations

from flwr.app import Array

from tap_flower.config import Encoding
from tap_flower.core.initial import Initial
from tap_flower.server.roster import Roster
from tap_flower.wire.messages import encode_tensors
from tap_flower.wire.updates import moved


class Outgoing:
    """The encoded tensors of one phase, in which the server's values stay as they are.

    Args:
        roster: of the run.
        encoding: likewise.
    """

    def __init__(self, roster: Roster, encoding: Encoding) -> None:
        self._roster, self._encoding = roster, encoding
        # An encoding that rounds sends the difference to the initial value, which is a client's to say.
        self._encoded: dict[tuple[str, Initial], Array] = {}

    def arrays_for(self, client: str) -> tuple[dict[str, Array], int | None]:
        """As `Roster.tensors_for`, encoded.

        Raises:
            MessageError: a tensor cannot be encoded.
        """
        tensors, held = self._roster.tensors_for(client)
        manifest = self._roster.manifests[client]
        keys = {name: (name, manifest.tensors[name].initial) for name in tensors}
        new = {name: tensor for name, tensor in tensors.items() if keys[name] not in self._encoded}
        exact = self._encoding is Encoding.float32
        initial = {} if exact else manifest.initial_values(new, self._roster.seed)
        for name, array in encode_tensors(moved(new, initial, self._encoding), self._encoding).items():
            self._encoded[keys[name]] = array
        return {name: self._encoded[key] for name, key in keys.items()}, held
