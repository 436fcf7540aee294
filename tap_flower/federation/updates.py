"""What a client returns: its trained tensors, or, where the encoding rounds, how far they have moved.

A difference is small, and so is the error of encoding it. What the encoding took away, the client keeps and adds to the
difference of its next participation (error feedback): over the rounds nothing is lost. The server adds a difference to
its own value, which it keeps in float32, and not to the rounded one that it sent: steps that are smaller than the
encoding's add up there, until the clients see them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tap_flower.config import Encoding
from tap_flower.federation.encodings import EncodingError, rounded


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
    moved = {component_of[name] for name, value in trained.items() if not torch.equal(value, received[name])}
    unchanged = frozenset(component_of[name] for name in trained) - moved
    tensors = {name: value for name, value in trained.items() if component_of[name] in moved}
    if encoding is Encoding.float32:
        return Update(tensors, unchanged, {})
    kept = {name: value for name, value in residual.items() if name in trained}
    for name, value in tensors.items():
        difference = value - received[name]
        if name in kept:
            difference += kept[name]
        try:
            kept[name] = difference - rounded(difference, encoding)
        except EncodingError as error:
            raise EncodingError(f"tensor {name!r} {error}") from error
        tensors[name] = difference
    return Update(tensors, unchanged, kept)


def restore(sent: Mapping[str, Tensor], current: Mapping[str, Tensor], encoding: Encoding) -> dict[str, Tensor]:
    """The values that a client's update stands for.

    Args:
        sent: name -> what came, decoded. Names and shapes have not been checked: one that fits no tensor is left as it is.
        current: name -> the server's own value (float32), not rounded by any encoding.
        encoding: of the run.
    """
    if encoding is Encoding.float32:
        return dict(sent)
    return {
        name: current[name] + value if name in current and current[name].shape == value.shape else value
        for name, value in sent.items()
    }
