"""`TapClientApp`: the ClientApp whose clients take part in TAP."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import Mod

from tap_flower.errors import ConfigError

if TYPE_CHECKING:
    from tap_flower.client.handlers import Handlers
    from tap_flower.client.task import Client
    from tap_flower.config import HyperParameters

_OF_VALUES = ("flwr.clientapp.mod.centraldp_mods", "flwr.clientapp.mod.localdp_mod")
"""Modules of Flower's mods that clip or blur what a client has trained."""
MakeClient = Callable[..., Any]
"""(context) or (context, hyper-parameters) -> `Client`."""


class TapClientApp(ClientApp):
    """A Flower ClientApp that answers the messages of `TapStrategy`.

    Nothing heavy is imported before the first message: Flower's simulation loads the app in a process that handles none, and
    would start Ray only after the imports.

    Args:
        mods: Flower's mods, around every message.
        quotes: whether the server may be told what went wrong where the words may quote this node's data, such as a label.
            By default they go to the node's log alone.

    Raises:
        ConfigError: a mod is one of Flower's for differential privacy, which expect values in a reply.

    Example:
        >>> app = TapClientApp()
        >>> @app.client()
        ... def client(context):
        ...     return Client("ann", Net, [Task("digits", IMAGE_CLASSIFICATION, ["image"], train, test, forward, target)])
    """

    def __init__(self, mods: list[Mod] | None = None, quotes: Callable[[Context], bool] = lambda _: False) -> None:
        for mod in mods or []:
            if getattr(mod, "__module__", None) in _OF_VALUES:
                name = getattr(mod, "__name__", type(mod).__name__)
                raise ConfigError(
                    f"{name} cannot be among the mods: it takes what a client returns for values, and it is a difference; "
                    f"set aggregation.clip_norm or privacy.epsilon of the run instead"
                )
        super().__init__(mods=mods)
        self._quotes = quotes
        self._make_client: MakeClient | None = None
        self._handlers: Handlers | None = None

        types = self.query("manifest"), self.query("values"), self.train(), self.train("personalise"), self.evaluate()
        for register in types:
            register(lambda message, context: self._loaded().answer(message, context))

    def client(self) -> Callable[[MakeClient], MakeClient]:
        """Registers the function that makes the client of a node; a process calls it once for each node and run.

        The function takes Flower's `Context`, and if it has a second parameter without a default the run's
        `HyperParameters`.
        """

        def register(make: MakeClient) -> MakeClient:
            try:
                inspect.signature(make).bind(None)  # the context alone
            except TypeError:
                self._make_client = make
            else:
                self._make_client = lambda context, _: make(context)
            return make

        return register

    def _loaded(self) -> Handlers:
        from tap_flower.client.handlers import Handlers

        if self._make_client is None:
            raise RuntimeError("the TapClientApp has no client: decorate the function that makes it with @app.client()")
        if self._handlers is None:
            self._handlers = Handlers(self._make_client, self._quotes)
        return self._handlers


def spec_client_app() -> TapClientApp:
    """The ClientApp of nodes whose client a client spec describes: tap-flower's own."""
    # A simulated node has no client spec of its own: it is on the server's machine, which may be told everything.
    app = TapClientApp(quotes=lambda context: "client-spec" not in context.node_config)

    @app.client()
    def client(context: Context, settings: HyperParameters) -> Client:
        from tap_flower.client.from_spec import client_of_node

        return client_of_node(context, settings)

    return app
