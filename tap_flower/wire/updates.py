"""What server and client send each other: tensors, or, where the encoding rounds, how far they have moved.

A difference is small, and so is the error of encoding it. The server sends how far a tensor has moved from its initial
value, which every client can compute; a client returns how far it has moved in training. What the encoding took from
that, the client keeps and adds to the difference of its next participation (error feedback): over the rounds nothing is
lost. The server adds a client's difference to its own value, which it keeps in float32, and not to the rounded one that
it sent: steps that are smaller than the encoding's add up there, until the clients see them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tap_flower.config import Encoding
from tap_flower.wire.tensors import EncodingError, rounded


@dataclass(frozen=True)
class Update:
    """What one participation returns.

    Attributes:
        tensors: name -> what is to be encoded and sent: the trained value in float32, else the difference.
        unchanged: components that training left as they were; their tensors are not sent.
        residual: name -> what the encoding has taken away; stays on the client. Empty in float32.
    """

    tensors: dict[str, Tensor]
    unchanged: frozenset[str]
    residual: dict[str, Tensor]


def moved(values: Mapping[str, Tensor], start: Mapping[str, Tensor], encoding: Encoding) -> dict[str, Tensor]:
    """What is sent for some values; `restore` gives them back.

    Args:
        values: name -> value (float32).
        start: name -> value that the receiver knows; not looked at in float32.
        encoding: of the run.
    """
    if encoding is Encoding.float32:
        return dict(values)
    return {name: value - start[name] for name, value in values.items()}


def make_update(
    received: Mapping[str, Tensor],
    trained: Mapping[str, Tensor],
    residual: Mapping[str, Tensor],
    component_of: Mapping[str, str],
    encoding: Encoding,
) -> Update:
    """What the client sends and keeps.

    Args:
        received: name -> value that training started from (float32, CPU).
        trained: name -> value that it ended with; the same names and shapes.
        residual: of the participation before; zero where a name is missing.
        component_of: name -> component.
        encoding: of the run.

    Raises:
        EncodingError: a value is not finite; the message names the tensor.
    """
    changed = {component_of[name] for name, value in trained.items() if not torch.equal(value, received[name])}
    unchanged = frozenset(component_of[name] for name in trained) - changed
    tensors = moved({n: value for n, value in trained.items() if component_of[n] in changed}, received, encoding)
    if encoding is Encoding.float32:
        return Update(tensors, unchanged, {})
    kept = {name: value for name, value in residual.items() if name in trained}
    for name, difference in tensors.items():
        if name in kept:
            difference += kept[name]
        try:
            kept[name] = difference - rounded(difference, encoding)
        except EncodingError as error:
            raise EncodingError(f"tensor {name!r} {error}") from error
    return Update(tensors, unchanged, kept)


def restore(sent: Mapping[str, Tensor], start: Mapping[str, Tensor], encoding: Encoding) -> dict[str, Tensor]:
    """The values that a message stands for.

    Args:
        sent: name -> what came, decoded. Names and shapes have not been checked: one that fits no tensor is left as it is.
        start: name -> what the differences are added to: the tensor's initial value on a client, the server's own value
            (not rounded by any encoding) on the server. Not looked at in float32.
        encoding: of the run.
    """
    if encoding is Encoding.float32:
        return dict(sent)
    return {
        name: start[name] + value if name in start and start[name].shape == value.shape else value
        for name, value in sent.items()
    }
