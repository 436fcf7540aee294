"""A Grid that calls a ClientApp in this process, and remembers what was sent."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp

from client_app.app import app as spec_app
from tap_flower.run import in_process
from tap_flower.wire.messages import Instruction, decode


class InProcessGrid(in_process.InProcessGrid):
    """Likewise; `sent` and `received` hold every message, the replies as they were before `tamper`.

    Without an `app`, the nodes have tap-flower's own.
    """

    def __init__(
        self,
        node_configs: list[dict[str, Any]],
        run_config: dict[str, Any],
        app: ClientApp = spec_app,
        **options: Any,
    ) -> None:
        super().__init__(app, node_configs, run_config, **options)
        self.sent: list[Message] = []
        self.received: list[Message] = []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        self.sent += (pushed := list(messages))
        return super().push_messages(pushed)

    def answer(self, message: Message) -> Message:
        self.received.append(reply := super().answer(message))
        return reply


Replies = dict[tuple[str, int, int], RecordDict]
"""(message type, node, round) -> content of the node's reply."""


def round_of(message: Message) -> int:
    """Of an instruction."""
    return decode(message.content, Instruction, "the server").round


class Playback(InProcessGrid):
    """Nodes without clients: each answers as it did in the run of another grid.

    Whatever happens to a reply on its way, a run of the server then takes milliseconds.
    """

    def __init__(self, replies: Replies, **options: Any) -> None:
        super().__init__([{} for _ in {node for _, node, _ in replies}], {}, **options)
        self._replies = replies

    def answer(self, message: Message) -> Message:
        asked = message.metadata
        self.received.append(
            reply := Message(self._replies[asked.message_type, asked.dst_node_id, round_of(message)], reply_to=message)
        )
        return reply


def recorded(grid: InProcessGrid) -> Replies:
    """What the nodes of a grid have answered to the first message of each kind in a round.

    A node's second `query.values` brings it values; what it says to that is not looked at.
    """
    asked = {message.metadata.message_id: message for message in grid.sent}
    found: Replies = {}
    for reply in grid.received:
        message = asked[reply.metadata.reply_to_message_id]
        key = reply.metadata.message_type, reply.metadata.src_node_id, round_of(message)
        found.setdefault(key, reply.content)
    return found
