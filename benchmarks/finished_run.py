"""The clients of a finished simulation, opened again with what they and the server had after stage 1."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tap_flower.client.from_spec import client_from_spec
from tap_flower.client.node import Node
from tap_flower.client.state import PERSONAL, SERVER
from tap_flower.config import Config, client_specs, load_config, read_yaml
from tap_flower.core.components import State
from tap_flower.files import read_tensors
from tap_flower.methods.session import Session


def configuration(run: Path) -> Config:
    """The configuration of a run."""
    file = run / "config.yaml"
    return load_config(str(read_yaml(file)["preset"]), str(file))


def clients(run: Path, config: Config) -> Iterator[tuple[Session, State, State]]:
    """(client at work, the server's tensors for it, its personal model) for every client of a run.

    Args:
        run: the run folder; its clients' states must be there.
        config: the run's configuration, changed where a benchmark wants it.
    """
    for spec in client_specs(config):
        session = client_from_spec(Node(spec, None, None, "", config.metrics), config).session(config)
        folder = run / "clients" / spec.name
        server, kept = (read_tensors(folder / file)[0] for file in (SERVER, PERSONAL))
        yield session, server, {name: value for name, value in kept.items() if name in server}
