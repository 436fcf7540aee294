"""A Grid that calls a ClientApp in this process: a federation without servers, for sweeps, benchmarks and tests."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

Tamper = Callable[[Message, Message], Message | None]
"""(instruction, reply) -> what the server gets instead; None loses the reply."""


class InProcessGrid(Grid):
    """Each node is a Context; a message is answered when it is pulled.

    Args:
        app: of every node.
        node_configs: of each node.
        run_config: Flower's run configuration, of all nodes.
        tamper: changes replies on their way.
        order: permutes the replies that are ready.
    """

    def __init__(
        self,
        app: ClientApp,
        node_configs: Sequence[Mapping[str, Any]],
        run_config: dict[str, Any],
        tamper: Tamper = lambda _, reply: reply,
        order: Callable[[list[str]], list[str]] = lambda ids: ids,
    ) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self.app = app
        self.contexts = {
            100 + i: Context(
                run_id=1, node_id=100 + i, node_config=dict(config), state=RecordDict(), run_config=run_config
            )
            for i, config in enumerate(node_configs)
        }
        self.tamper, self.order = tamper, order
        self._waiting: dict[str, Message] = {}
        self._ids = itertools.count(1)

    def _unused(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("not used")

    set_run = create_message = get_nodes = _unused
    run = property(_unused)

    def get_node_ids(self) -> Iterable[int]:
        """All nodes."""
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Takes messages; returns their identities."""
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = message_id = f"m{next(self._ids)}"
            self._waiting[message_id] = message
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Has the app answer those that wait; returns the replies."""
        replies = []
        for message_id in self.order([i for i in message_ids if i in self._waiting]):
            message = self._waiting.pop(message_id)
            reply = self.tamper(message, self.answer(message))
            if reply is not None:
                replies.append(reply)
        return replies

    def answer(self, message: Message) -> Message:
        """The app's reply."""
        return self.app(message, self.contexts[message.metadata.dst_node_id])

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Sends and waits for all replies; there is nothing to time out."""
        del timeout
        return self.pull_messages(self.push_messages(messages))
