"""Tensors on the wire: differences, their encodings, and error feedback. Nothing is pickled.

A client returns Δ = trained − received. The server sends its values: in float32 as they are, in an encoding that rounds as
the difference to the first value, which every client can compute. A difference is small, and so is the error of encoding
it. What the encoding took from a client's Δ, the client keeps and adds to its next one (error feedback, Seide et al.,
Interspeech 2014): over the rounds nothing is lost.

| encoding | bytes of a value | largest error |
|---|---|---|
| float32 | 4 | none |
| bfloat16 | 2 | 2⁻⁸ of the value |
| int8 | 1, and 4 for each scale | 1/254 of the largest magnitude under the same scale |

The rows of a tensor are the values under one index of its first axis. In int8 a row has a scale of its own, max|row| / 127;
rows of fewer than `SHARED` values are joined until they have as many, so that scales cost at most 1/32 of the values.
Every function here is deterministic: sender and receiver compute the same values, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from io import BytesIO
from typing import Any, TypeVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor
from torch.nn.functional import pad

from tap_flower.config import Encoding
from tap_flower.errors import MessageError
from tap_flower.plain import shown

SHARED = 128
"""Fewest values that share a scale."""
_STYPES = {
    Encoding.float32: "numpy.ndarray",
    Encoding.bfloat16: "tap-flower.bfloat16",
    Encoding.int8: "tap-flower.int8",
}
"""What Flower calls the serialization of an array: its own, which has no bfloat16, or ours."""
_LARGEST = 2.0**127
"""From here on a value might become infinite when it is rounded."""
_DIMENSIONS = 8
_LARGEST_SHAPE = 2**40
"""Product of a shape's sizes, each counted as 1 at least, from which on torch might not take it."""
_TINY = torch.finfo(torch.float32).tiny
_From = TypeVar("_From")
_To = TypeVar("_To")


def make_update(
    received: Mapping[str, Tensor], trained: Mapping[str, Tensor], residual: Mapping[str, Tensor], encoding: Encoding
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The difference that a client returns of one round, and what it keeps.

    Args:
        received: tensor name -> value that training started from (float32, CPU).
        trained: tensor name -> value that it ended with; equal names and shapes.
        residual: from the client's round before; zero where a name is missing.
        encoding: encoding of the run.

    Returns:
        The difference, tensor name -> Δ (float32) with the residual of the rounds before, as it is to be encoded; and the
        residual, tensor name -> what the encoding takes from it (float32), empty in float32.

    Raises:
        MessageError: a value is not finite; the message names the tensor.
    """
    difference = {name: value - received[name] for name, value in trained.items()}
    if encoding is Encoding.float32:
        return difference, {}
    for name in difference.keys() & residual.keys():
        difference[name] += residual[name]
    decoded = decode_tensors(encode_tensors(difference, encoding), encoding)
    return difference, {name: value - decoded[name] for name, value in difference.items()}


def moved_from(values: Mapping[str, Tensor], first: Mapping[str, Tensor], encoding: Encoding) -> dict[str, Tensor]:
    """What the server sends for its values: themselves in float32, else how far they have moved from the first ones."""
    if encoding is Encoding.float32:
        return dict(values)
    return {name: value - first[name] for name, value in values.items()}


def moved_to(sent: Mapping[str, Tensor], first: Mapping[str, Tensor], encoding: Encoding) -> dict[str, Tensor]:
    """The values that `moved_from` was given, up to the encoding's error.

    Names and shapes have not been checked yet: what fits no first value is returned as it came.
    """
    if encoding is Encoding.float32:
        return dict(sent)
    return {
        name: first[name] + value if name in first and first[name].shape == value.shape else value
        for name, value in sent.items()
    }


def encode_tensors(tensors: Mapping[str, Tensor], encoding: Encoding) -> ArrayRecord:
    """Tensors (float32, CPU) as Flower sends them.

    Raises:
        MessageError: a value is not finite, or too large; the message names the tensor.
    """
    return ArrayRecord({name: _named(name, to_array, tensor, encoding) for name, tensor in tensors.items()})


def decode_tensors(record: ArrayRecord, encoding: Encoding) -> dict[str, Tensor]:
    """Tensors (float32, CPU) as they came: names, shapes and values are the receiver's to check.

    Raises:
        MessageError: an array is not in `encoding`; the message names it.
    """
    return {name: _named(name, from_array, array, encoding) for name, array in record.items()}


def _named(name: str, convert: Callable[[_From, Encoding], _To], value: _From, encoding: Encoding) -> _To:
    try:
        return convert(value, encoding)
    except MessageError as error:
        raise MessageError(f"tensor {shown(name)} {error}") from error


def to_array(tensor: Tensor, encoding: Encoding) -> Array:
    """A tensor as Flower sends it.

    Args:
        tensor: float32, on the CPU.
        encoding: encoding of the run.

    Raises:
        MessageError: a value is not finite, or too large to be encoded.
    """
    largest = float(tensor.abs().max()) if tensor.numel() else 0.0
    if not largest < _LARGEST:
        raise MessageError(f"holds {largest:g}, which cannot be sent: lower the learning rate, or look at the data")
    if encoding is Encoding.float32:
        return Array(tensor.numpy())
    pack = _pack_bfloat16 if encoding is Encoding.bfloat16 else _pack_int8
    return Array(encoding.value, tuple(tensor.shape), _STYPES[encoding], pack(tensor))


def from_array(array: Array, encoding: Encoding) -> Tensor:
    """The tensor that `to_array` was given, up to the encoding's error (float32, CPU).

    Args:
        array: as it came; nothing about it is taken for granted.
        encoding: encoding of the run.

    Raises:
        MessageError: it is in another encoding, or its data are not what shape and encoding say.
    """
    if (array.stype, array.dtype) != (_STYPES[encoding], encoding.value):
        found = f"{array.dtype[:40]} in {array.stype[:40]}"
        raise MessageError(f"is {found}, not {encoding.value} in {_STYPES[encoding]}")
    shape = tuple(array.shape)
    if len(shape) > _DIMENSIONS or min(shape, default=0) < 0:
        raise MessageError(f"has the impossible shape {shown(shape)}")
    if math.prod(max(size, 1) for size in shape) >= _LARGEST_SHAPE:
        raise MessageError(f"has the impossible shape {shown(shape)}")
    values = math.prod(shape)
    if encoding is Encoding.float32:
        return _from_numpy(array, values)
    expected = 2 * values if encoding is Encoding.bfloat16 else 4 * _scales(shape) + values
    if len(array.data) != expected:
        raise MessageError(f"has {len(array.data)} bytes, not the {expected} of {shape} in {encoding.value}")
    unpack = _unpack_bfloat16 if encoding is Encoding.bfloat16 else _unpack_int8
    return unpack(array.data, shape) if values else torch.zeros(shape)


def _from_numpy(array: Array, values: int) -> Tensor:
    """What `np.load` would make of it, but nothing is allocated on the word of a header."""
    end = 10 + int.from_bytes(array.data[8:10], "little")
    try:
        shape, in_columns, dtype = _header(array.data[:end])
    except Exception as error:  # whatever NumPy's parser of headers raises
        raise MessageError(f"cannot be read: {str(error)[:200]}") from error
    if dtype != np.float32:
        raise MessageError(f"is {dtype}, not float32")
    if shape != array.shape:
        raise MessageError(f"has shape {shown(shape)} in its data, not {shown(array.shape)}")
    rest = memoryview(array.data)[end:]
    if len(rest) != 4 * values:
        raise MessageError(f"has {len(rest)} bytes of values, not the {4 * values} of {shape} in float32")
    found = np.frombuffer(rest, dtype).reshape(shape, order="F" if in_columns else "C")
    return torch.from_numpy(np.array(found, dtype=np.float32, order="C"))


@lru_cache(1024)
def _header(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, order and dtype from the beginning of an array in NumPy's format; the same ones come again and again.

    NumPy refuses what is longer than 10,000 bytes, and so the memory of those that were read is bounded.
    """
    file = BytesIO(data)
    version = np.lib.format.read_magic(file)
    if version != (1, 0):
        raise ValueError(f"it is of version {version} of NumPy's format")
    return np.lib.format.read_array_header_1_0(file)


def _pack_bfloat16(tensor: Tensor) -> bytes:
    bits = tensor.reshape(-1).to(torch.bfloat16).view(torch.int16).numpy()
    return bits.astype("<i2", copy=False).tobytes()


def _unpack_bfloat16(data: bytes, shape: Sequence[int]) -> Tensor:
    bits = torch.from_numpy(np.frombuffer(data, "<i2").astype(np.int16))
    return bits.view(torch.bfloat16).float().view(shape)


def _values_of_a_scale(shape: Sequence[int]) -> int:
    """A row, or as many rows as it takes to have `SHARED` values; 1-D tensors have rows of one value."""
    row = math.prod(shape[1:])
    return row * -(-SHARED // row)


def _scales(shape: Sequence[int]) -> int:
    values = math.prod(shape)
    return -(-values // _values_of_a_scale(shape)) if values else 0


def _pack_int8(tensor: Tensor) -> bytes:
    """The scales (float32, little endian), then the values."""
    flat = tensor.reshape(-1)
    if not flat.numel():
        return b""
    length = _values_of_a_scale(tensor.shape)
    blocks = pad(flat, (0, -flat.numel() % length)).view(-1, length)
    scales = blocks.abs().amax(1) / 127
    scales[scales < _TINY] = 0.0  # a division by it would overflow; its values are nothing
    steps = (blocks / torch.where(scales > 0, scales, 1.0)[:, None]).round_().clamp_(-127, 127)
    values = steps.to(torch.int8).view(-1)[: flat.numel()]
    return scales.numpy().astype("<f4", copy=False).tobytes() + values.numpy().tobytes()


def _unpack_int8(data: bytes, shape: Sequence[int]) -> Tensor:
    count, values = _scales(shape), math.prod(shape)
    scales = torch.from_numpy(np.frombuffer(data, "<f4", count).astype(np.float32))
    if not bool(scales.isfinite().all()):
        raise MessageError("holds a value that is not finite: a scale")
    steps = torch.from_numpy(np.frombuffer(data, np.int8, values, offset=4 * count).astype(np.float32))
    return steps.mul_(scales.repeat_interleave(_values_of_a_scale(shape))[:values]).view(shape)
