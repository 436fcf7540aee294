"""A ClientApp over handlers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

if TYPE_CHECKING:
    from tap_flower.client.handlers import Handlers


def app_over(handlers: Callable[[], Handlers]) -> ClientApp:
    """The ClientApp that answers every message of the protocol.

    Args:
        handlers: imports them. The first message calls it: Flower's simulation loads the app in a process that handles none,
            and would start Ray only after the import of what the clients need.
    """
    app = ClientApp()

    @app.query("manifest")
    def manifest(message: Message, context: Context) -> Message:
        return handlers().manifest(message, context)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return handlers().train(message, context)

    @app.train("distill")
    def distill(message: Message, context: Context) -> Message:
        return handlers().distill(message, context)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return handlers().evaluate(message, context)

    return app
