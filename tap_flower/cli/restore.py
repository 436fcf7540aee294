"""The command `restore`: goes back to a client's earlier state."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tap_flower.cli.common import say
from tap_flower.client.state import PERSONAL, UNDONE, go_back
from tap_flower.personal.folders import client_folder


def restore_command(
    place: Annotated[
        Path,
        typer.Argument(
            metavar="STATE", help="The client's folder of a run: STATE-DIR/NAME/RUN on a node, RUN/clients/NAME."
        ),
    ],
    client: Annotated[str | None, typer.Option(help="The client, where STATE is a run folder.")] = None,
    best: Annotated[
        bool, typer.Option("--best", help="Go back to the state with the best validation scores (`node --keep-best`).")
    ] = False,
) -> None:
    """Put a client's earlier state in place of its latest, for example after a round that has spoiled its model."""
    folder = place if (place / PERSONAL).exists() else client_folder(place, client)
    undone, restored = go_back(folder, best)
    say(
        Console(), f"{folder}: back from round {undone} to round {restored}; the state of round {undone} is in {UNDONE}"
    )
