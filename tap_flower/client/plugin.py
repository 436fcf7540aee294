"""Clients with a model of their own: the ClientApp of a user's project."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context
from flwr.clientapp import ClientApp

from tap_flower.client.app import app_over
from tap_flower.client.handlers import Handlers, Opened
from tap_flower.client.task import Client, ClientHoldings
from tap_flower.config import hyper_parameters
from tap_flower.methods.session import LocalClient
from tap_flower.wire.messages import Instruction


def client_app(make_client: Callable[[Context], Client]) -> ClientApp:
    """The ClientApp that takes part in runs of `TapStrategy` with a client of your own.

    Args:
        make_client: says who the client on this node is, and loads its data. A process calls it once for each node and run.
    """
    known: dict[tuple[str, int, str], tuple[Client, LocalClient]] = {}

    def open_client(context: Context, instruction: Instruction) -> Opened:
        settings = json.dumps(instruction.hyper_parameters, sort_keys=True)
        key = (instruction.run, context.node_id, settings)
        if key not in known:
            parameters = hyper_parameters(instruction.hyper_parameters)
            client = make_client(context)
            data = client.data(parameters.seed, parameters.needs_validation)
            known[key] = client, LocalClient(ClientHoldings(client, data), data, parameters)
        client, local = known[key]
        folder = context.node_config.get("state-dir") or client.state_dir or _home() / "tap-flower"
        return Opened(local, Path(str(folder)) / client.name / instruction.run)

    # A node in a simulation looks like one that is deployed: what may quote a client's data stays in its log.
    handlers = Handlers(open_client, quotes=lambda _: False)
    return app_over(lambda: handlers)


def _home() -> Path:
    """Flower's home."""
    return Path(os.environ.get("FLWR_HOME", Path.home() / ".flwr"))
