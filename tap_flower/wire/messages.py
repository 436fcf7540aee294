"""The wire: what is in a message, and how it is checked.

Every message has a ConfigRecord `tap` with the one key `json`, and, where tensors travel, an ArrayRecord `tensors`. Tensors
are trainable and by name, in the encoding of the run. Nothing else is ever sent; nothing is pickled. Here is what all
messages share, and what the server asks; what clients answer is in `manifest` and `reports`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar, cast

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from torch import Tensor

import tap_flower
from tap_flower.config import Encoding
from tap_flower.data.spec import NAME
from tap_flower.plain import PlainError, check_fields, check_type, parse_json, shown
from tap_flower.wire.tensors import EncodingError, from_array, to_array

PROTOCOL = 4
LARGEST_NUMBER = 1e305
"""Magnitude from which on a loss, score or metric is refused: a thousand smaller ones have a finite sum."""
MANIFEST, TRAIN, DISTILL, EVALUATE = "query.manifest", "train", "train.distill", "evaluate"
_PLAIN, _TENSORS = "tap", "tensors"
_From = TypeVar("_From")
_To = TypeVar("_To")


class MessageError(ValueError):
    """A message is not what the protocol says; the text names the field and the value."""


class LackingError(RuntimeError):
    """The server left out tensors that the client was to hold, and it does not: they are to be sent again."""

    CODE = 1002


@dataclass(frozen=True)
class Instruction:
    """What the server sends.

    Attributes:
        run: identity of the run.
        server_round: counted from 1; 0 in a manifest query.
        hyper_parameters: nested plain values of `config.HyperParameters`.
        state: number of complete rounds that the server's tensors come from.
        held: the `state` as of which the client is known to hold all of its tensors; those that have not changed since
            are left out. None where the message has them all.
        best: where the run may stop early, its best round so far: the client keeps its state as of then, and goes on from it
            in stage 2. 0 before there is one, None where the run does not stop early.
    """

    run: str
    server_round: int
    hyper_parameters: dict[str, Any]
    state: int = 0
    held: int | None = None
    best: int | None = None


def encode(values: Mapping[str, Any], arrays: Mapping[str, Array] | None = None) -> RecordDict:
    """The content of a message.

    Args:
        values: plain values, nested.
        arrays: tensors by name, from `encode_tensors`, or None where the message carries none.
    """
    content = RecordDict({_PLAIN: ConfigRecord({"json": json.dumps(values)})})
    if arrays is not None:
        content[_TENSORS] = ArrayRecord(dict(arrays))
    return content


def encode_tensors(tensors: Mapping[str, Tensor], encoding: Encoding = Encoding.float32) -> dict[str, Array]:
    """Tensors (float32) as they travel, by name.

    Raises:
        MessageError: a tensor is not finite.
    """
    return {name: _named(name, to_array, tensor, encoding) for name, tensor in tensors.items()}


def decode(content: RecordDict) -> dict[str, Any]:
    """The plain values of a message.

    Raises:
        MessageError: there are none.
    """
    record = content.config_records.get(_PLAIN)
    text = None if record is None else record.get("json")
    if not isinstance(text, str):
        raise MessageError(f"the message has no record {_PLAIN!r} with a text 'json': it is not one of tap-flower's")
    if unknown := sorted(content.keys() - {_PLAIN, _TENSORS}):
        raise MessageError(f"the message has the record {shown(unknown[0])}, which the protocol does not know")
    try:
        values = parse_json(text)
        check_type(values, dict[str, Any], "the whole")
    except PlainError as error:
        raise MessageError(f"the message's plain values cannot be read: {error}") from error
    return cast(dict[str, Any], values)


def refuse_tensors(content: RecordDict) -> None:
    """Checks that a message carries plain values alone.

    Raises:
        MessageError: it has tensors.
    """
    if _TENSORS in content:
        raise MessageError(f"the message has the record {_TENSORS!r}, which does not belong in it")


def decode_tensors(content: RecordDict, encoding: Encoding = Encoding.float32) -> dict[str, Tensor]:
    """The tensors of a message (float32), as they came: names, shapes and values are the receiver's to check.

    Raises:
        MessageError: there are none, or one is not in `encoding`.
    """
    record = content.array_records.get(_TENSORS)
    if record is None:
        raise MessageError(f"the message has no record {_TENSORS!r}")
    return {name: _named(name, from_array, array, encoding) for name, array in record.items()}


def _named(name: str, convert: Callable[[_From, Encoding], _To], value: _From, encoding: Encoding) -> _To:
    try:
        return convert(value, encoding)
    except EncodingError as error:
        raise MessageError(f"tensor {shown(name)} {error}") from error


def payload_bytes(content: RecordDict) -> dict[str, int]:
    """Tensor name -> bytes on the wire."""
    record = content.array_records.get(_TENSORS)
    return {} if record is None else {name: len(array.data) for name, array in record.items()}


def instruction(message: Message) -> Instruction:
    """Reads what the server wants.

    Raises:
        MessageError: another protocol or package version, or a malformed instruction.
    """
    values = decode(message.content)
    check_version(values, "the server")
    check_values(values, _INSTRUCTION, "the instruction")
    server_round, state = whole(values, "round", 0), whole(values, "state", 0)
    if not NAME.fullmatch(values["run"]):
        raise MessageError(f"run is {shown(values['run'])}, not 1 to 64 letters and digits")
    held, best = (None if values.get(key) is None else whole(values, key, 0) for key in ("held", "best"))
    return Instruction(values["run"], server_round, values["hyper_parameters"], state, held, best)


def encode_instruction(wanted: Instruction, arrays: Mapping[str, Array] | None = None) -> RecordDict:
    """What `instruction` reads, with the client's tensors."""
    values = asdict(wanted)
    values["round"] = values.pop("server_round")
    return encode({**version(), **values}, arrays)


def check_version(values: Mapping[str, Any], sender: str) -> None:
    """Refuses another protocol or another version of tap-flower.

    Raises:
        MessageError: with both versions.
    """
    theirs, ours = (values.get("protocol"), values.get("version")), tuple(version().values())
    if theirs != ours:
        found = f"protocol {str(theirs[0])[:40]} of tap-flower {str(theirs[1])[:40]}"
        raise MessageError(
            f"{sender} speaks {found}, here is protocol {ours[0]} of tap-flower {ours[1]}: install the same version on the "
            f"server and on every node"
        )


def version() -> dict[str, Any]:
    """What `check_version` checks."""
    return {"protocol": PROTOCOL, "version": tap_flower.__version__}


def whole(values: Mapping[str, Any], key: str, low: int) -> int:
    """The value of a key, a whole number from `low` on.

    Raises:
        MessageError: it is anything else.
    """
    value = values.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value < 2**53:
        raise MessageError(f"{key} is {shown(value)}, not a whole number from {low} on")
    return value


def check_number(value: float, what: str) -> None:
    """Refuses what is not finite, or too large.

    Raises:
        MessageError: with the value.
    """
    if not abs(value) < LARGEST_NUMBER:
        raise MessageError(f"{what} is {value!r}, not a finite number below {LARGEST_NUMBER:g}")


def check_name(value: str, what: str) -> None:
    """Refuses what cannot be a name.

    Raises:
        MessageError: with the value.
    """
    if not NAME.fullmatch(value):
        raise MessageError(f"{what} is {shown(value)}, not 1 to 64 letters, digits, '-' and '_'")


def check_values(values: Mapping[str, Any], kinds: Mapping[str, Any], where: str) -> None:
    """Refuses values that lack a field, or have one that is unknown or of another type.

    Raises:
        MessageError: with the field.
    """
    try:
        check_fields(values, kinds, where)
    except PlainError as error:
        raise MessageError(str(error)) from error


VERSION = {"protocol": int, "version": str}
"""Field -> its type, of what `version` gives."""
_INSTRUCTION = {
    **VERSION,
    "run": str,
    "round": int,
    "hyper_parameters": dict[str, Any],
    "state": int,
    "held": int | None,
    "best": int | None,
}
"""Field -> its type, of the plain values of an instruction."""
