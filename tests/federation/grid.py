"""A Grid that calls the ClientApp in this process, and remembers what was sent."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flwr.app import Message

from client_app.app import app
from tap_flower.federation import in_process


class InProcessGrid(in_process.InProcessGrid):
    """Likewise; `sent` and `received` hold every message, the replies as they were before `tamper`."""

    def __init__(self, node_configs: list[dict[str, Any]], run_config: dict[str, Any], **options: Any) -> None:
        super().__init__(app, node_configs, run_config, **options)
        self.sent: list[Message] = []
        self.received: list[Message] = []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        self.sent += (pushed := list(messages))
        return super().push_messages(pushed)

    def answer(self, message: Message) -> Message:
        self.received.append(reply := super().answer(message))
        return reply
