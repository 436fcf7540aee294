"""What tests of whole runs share: what was sent, means by hand, runs that end before their first round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from tap_flower.config import Encoding
from tap_flower.run.in_process import Tamper
from tap_flower.server.roster import Roster
from tap_flower.server.strategy import TapStrategy
from tap_flower.wire import messages
from tap_flower.wire.messages import ARRAYS, Manifest
from tests.grid import InProcessGrid, round_of

FLOAT = Encoding.float32
EVERYBODY = {"ann", "bob", "cleo", "dan"}
Change = Callable[[dict[str, Any]], None]


def broken(change: Change, node: int = 100, round_: int = 1) -> Tamper:
    """Changes the tensors of one reply."""

    def tamper(message: Message, reply: Message) -> Message | None:
        if (message.metadata.message_type, message.metadata.dst_node_id) != (messages.TRAIN, node):
            return reply
        if round_of(message) != round_:
            return reply
        tensors = dict(messages.tensors_of(reply.content, FLOAT))
        change(tensors)
        content = RecordDict(
            {
                **reply.content,
                ARRAYS: ArrayRecord({n: Array(np.asarray(t)) for n, t in tensors.items()}),
            }
        )
        return Message(content, reply_to=message)

    return tamper


def sent(grid: InProcessGrid, message_type: str) -> list[tuple[int, int, dict[str, Tensor]]]:
    """(round, node, tensors) of what the server sent."""
    return [
        (round_of(m), m.metadata.dst_node_id, messages.tensors_of(m.content, FLOAT))
        for m in grid.sent
        if m.metadata.message_type == message_type
    ]


def without_times(results: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in results.items() if key != "seconds"}


def weight(manifest: Manifest, tensor: str) -> int:
    """Training examples of the client's tasks that reach the tensor's component."""
    component = manifest.tensors[tensor].component
    return sum(task.examples for task in manifest.tasks if component in manifest.reach[task.task])


def means(returned: dict[str, dict[str, Tensor]], manifests: dict[str, Manifest]) -> dict[str, Tensor]:
    """Tensor -> mean over its holders, weighted by their examples (float64)."""
    found = {}
    for name in {name for tensors in returned.values() for name in tensors}:
        holders = {client: weight(manifests[client], name) for client, own in returned.items() if name in own}
        total = torch.stack([count * returned[client][name].double() for client, count in holders.items()]).sum(0)
        found[name] = total / sum(holders.values())
    return found


class Gathered(Exception):
    """Ends a run that has come far enough."""


def gathered(strategy: TapStrategy, grid: Grid) -> Roster:
    """The roster of a run before its first round."""

    def stop(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        raise Gathered

    with pytest.raises(Gathered):
        strategy.start(grid, evaluate_fn=stop)
    return strategy.roster


def is_train(message: Message) -> bool:
    return message.metadata.message_type == messages.TRAIN


def lost(message: Message, reply: Message) -> Message | None:
    """Ann does not answer when she is to train."""
    return None if message.metadata.dst_node_id == 100 and is_train(message) else reply
