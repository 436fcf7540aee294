"""The server's values as they are sent: each tensor is encoded once for all clients that get it."""

from __future__ import annotations

from collections.abc import Mapping

from flwr.app import Array, ArrayRecord
from torch import Tensor

from tap_flower.config import Encoding
from tap_flower.core.initial import Initial
from tap_flower.errors import RunError
from tap_flower.server.roster import Roster
from tap_flower.wire.tensors import decode_tensors, encode_tensors, moved_from


class Values:
    """The server's values as an ArrayRecord, and as tensors again.

    Tensors that have not changed since the record before are not encoded again, and a record made here is not decoded.

    Args:
        others: arrays that are in every record, although no client exchanges them.
    """

    def __init__(self, others: Mapping[str, Array]) -> None:
        self._others = dict(others)
        self._tensors: Mapping[str, Tensor] = {}
        self._arrays: Mapping[str, Array] = {}  # of these tensors; a record is the user's to change

    def record(self, tensors: Mapping[str, Tensor]) -> ArrayRecord:
        """The record of some tensors (float32), and the other arrays."""
        known = {name: self._arrays[name] for name, tensor in tensors.items() if self._tensors.get(name) is tensor}
        new = encode_tensors({n: tensor for n, tensor in tensors.items() if n not in known}, Encoding.float32)
        self._tensors, self._arrays = dict(tensors), {**known, **new}
        return ArrayRecord({**self._others, **self._arrays})

    def tensors(self, record: ArrayRecord, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors (float32) of a record.

        Args:
            record: from `record`, or one that a subclass of the strategy has made or changed.
            like: tensor name -> tensor, for all that are wanted.

        Raises:
            MessageError: an array is no float32 array.
            RunError: it is no record, or an array is missing, or has another shape.
        """
        if not isinstance(record, ArrayRecord):
            raise RunError(f"the strategy's arrays are a {type(record).__name__}: return an ArrayRecord")
        if missing := sorted(like.keys() - record.keys()):
            raise RunError(
                f"the strategy's arrays lack {len(missing)} of {len(like)} tensors, such as {missing[0]!r}: return all"
            )
        known = {name: self._tensors[name] for name in like if self._arrays.get(name) == record[name]}
        new = decode_tensors(ArrayRecord({n: record[n] for n in like if n not in known}), Encoding.float32)
        for name, tensor in new.items():
            if tensor.shape != like[name].shape:
                raise RunError(
                    f"the strategy's array {name!r} has shape {tuple(tensor.shape)}, not {tuple(like[name].shape)}: keep it"
                )
        return {name: known[name] if name in known else new[name] for name in like}

    def take(self, record: ArrayRecord, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`tensors`, for the values of a round; what else the record holds is in the records that follow."""
        found = self.tensors(record, like)
        self._others |= {name: array for name, array in record.items() if name not in like}
        return found


class Outgoing:
    """The encoded tensors of one phase, in which the server's values stay as they are.

    Args:
        roster: clients of the run.
        record: the server's values (float32).
        tensors: the server's values as tensors.
        encoding: encoding of the run.
    """

    def __init__(self, roster: Roster, record: ArrayRecord, tensors: Mapping[str, Tensor], encoding: Encoding) -> None:
        self._roster, self._record, self._tensors, self._encoding = roster, record, tensors, encoding
        # An encoding that rounds sends the difference to the first value, which is a client's to say.
        self._encoded: dict[tuple[str, Initial | None], Array] = {}

    def arrays_for(self, client: str) -> ArrayRecord:
        """The arrays of a client's tensors.

        Raises:
            MessageError: a tensor cannot be encoded.
        """
        manifest = self._roster.manifests[client]
        if self._encoding is Encoding.float32:
            return ArrayRecord({name: self._record[name] for name in manifest.tensors})
        keys = {name: (name, info.initial) for name, info in manifest.tensors.items()}
        new = {name: self._tensors[name] for name, key in keys.items() if key not in self._encoded}
        first = self._roster.first_values(manifest, new)
        encoded = encode_tensors(moved_from(new, first, self._encoding), self._encoding)
        self._encoded |= {keys[name]: array for name, array in encoded.items()}
        return ArrayRecord({name: self._encoded[key] for name, key in keys.items()})
