"""The command `restore`: goes back to an earlier state of a client."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer
from filelock import FileLock
from rich.console import Console

from tap_flower.cli.common import say
from tap_flower.errors import StorageError

UNDONE = "personal.undone.safetensors"
"""Name of the file that keeps the replaced state."""


def restore_command(
    place: Annotated[
        Path,
        typer.Argument(
            metavar="STATE", help="A client's folder: STATE-DIR/NAME/RUN on a node, RUN/clients/NAME in a simulation."
        ),
    ],
    client: Annotated[str | None, typer.Option(help="Choose the client, where STATE is a run folder.")] = None,
    best: Annotated[
        bool, typer.Option("--best", help="Go back to the state with the best validation scores (`node --keep-best`).")
    ] = False,
) -> None:
    """Go back to a client's earlier state, for example after a round that has spoiled its model."""
    from tap_flower.client.state import FIRST, PERSONAL, PREVIOUS, SERVER
    from tap_flower.personal.folders import client_folder

    is_state = any((place / file).exists() for file in (PERSONAL, PREVIOUS))
    folder = place if is_state else client_folder(place, client)
    replaced, (undone, restored) = (folder / PERSONAL).exists(), go_back(folder, best)
    if undone is not None:
        words = f"back from round {undone} to round {restored}; the state of round {undone} is in {UNDONE}"
    else:
        words = f"back to round {restored}" + (f"; the damaged state is in {UNDONE}" if replaced else "")
    say(Console(), f"{folder}: {words}")
    state = {Path(file).stem for file in (PERSONAL, FIRST, SERVER)}
    if made := sorted({path.stem for path in folder.glob("*.safetensors") if "." not in path.stem} - state):
        say(Console(), f"what stage 2 has made stays as it is, and `predict` goes on using it: {', '.join(made)}")


def go_back(folder: Path, to_kept: bool) -> tuple[int | None, int]:
    """Puts a client's earlier state in place of its latest, which is kept as `personal.undone.safetensors`.

    Args:
        folder: the client's folder of a run.
        to_kept: goes back to the state with the best validation scores, in place of the one before the last round.

    Returns:
        The round of the state that was taken away, None where it is missing or cannot be read; and the round of that in
        its place.

    Raises:
        StorageError: there is no earlier state, or it is damaged.
    """
    from tap_flower.client.state import KEPT, PERSONAL, PREVIOUS
    from tap_flower.files import keep_as, read_record, read_tensors, write_json, write_tensors

    source = folder / (KEPT if to_kept else PREVIOUS)
    if not source.exists():
        raise StorageError(
            f"{folder} holds no {source.name}: "
            + (
                "its node keeps one where its configuration says keep-best=true"
                if to_kept
                else "the client has taken part in only one round"
            )
        )
    with FileLock(folder / ".lock"):
        tensors, record = read_tensors(source)  # with its checksum
        undone = None
        if (folder / PERSONAL).exists():
            with suppress(StorageError, KeyError):  # a damaged state is a reason to go back
                undone = int(read_record(folder / PERSONAL)["round"])
            keep_as(folder / PERSONAL, folder / UNDONE)
        write_tensors(folder / PERSONAL, tensors, record)
        write_json(folder / "state.json", record)
        (folder / PREVIOUS).unlink(missing_ok=True)
    return undone, int(record["round"])
