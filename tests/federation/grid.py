"""A Grid that calls the ClientApp in this process: a federation without servers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from client_app.app import app

Tamper = Callable[[Message, Message], Message | None]
"""(instruction, reply) -> what the server gets instead; None loses the reply."""


class InProcessGrid(Grid):
    """Each node is a Context; a message is answered when it is pulled.

    Args:
        node_configs: of each node; run_config likewise for all.
        run_config: Flower's run configuration.
        tamper: changes replies on their way.
        order: permutes the replies that are ready.
    """

    def __init__(
        self,
        node_configs: list[dict[str, Any]],
        run_config: dict[str, Any],
        tamper: Tamper = lambda _, reply: reply,
        order: Callable[[list[str]], list[str]] = lambda ids: ids,
    ) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self.contexts = {
            100 + i: Context(run_id=1, node_id=100 + i, node_config=config, state=RecordDict(), run_config=run_config)
            for i, config in enumerate(node_configs)
        }
        self.tamper, self.order = tamper, order
        self.sent: list[Message] = []
        self.received: list[Message] = []
        self._waiting: dict[str, Message] = {}
        self._ids = itertools.count(1)

    def set_run(self, run: Any) -> None:
        raise AssertionError("not used")

    @property
    def run(self) -> Any:
        raise AssertionError("not used")

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise AssertionError("not used")

    def get_node_ids(self) -> Iterable[int]:
        return list(self.contexts)

    def get_nodes(self) -> Iterable[Any]:
        raise AssertionError("not used")

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = message_id = f"m{next(self._ids)}"
            self.sent.append(message)
            self._waiting[message_id] = message
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = []
        for message_id in self.order([i for i in message_ids if i in self._waiting]):
            message = self._waiting.pop(message_id)
            reply = app(message, self.contexts[message.metadata.dst_node_id])
            self.received.append(reply)
            changed = self.tamper(message, reply)
            if changed is not None:
                replies.append(changed)
        return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise AssertionError("not used")
