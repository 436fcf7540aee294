"""Finds a client's models: in a run folder, or in the state folder of a node."""

from __future__ import annotations

from pathlib import Path

from tap_flower.client.description import DESCRIPTION, Description, TaskDescription, read_description
from tap_flower.errors import PersonalError, StorageError


def clients_in(run: Path) -> list[str]:
    """The names of the clients whose models a run folder holds, sorted."""
    return sorted(path.parent.name for path in run.glob(f"clients/*/{DESCRIPTION}"))


def client_folder(place: Path, client: str | None = None) -> Path:
    """Finds the folder with a client's models.

    Args:
        place: a run folder, or the folder of one client: RUN/clients/NAME, or on a node STATE-DIR/NAME/RUN.
        client: name of the client, where the run has several.

    Raises:
        PersonalError: there is no such client, or it must be named.
        StorageError: there are no models.
    """
    if (place / DESCRIPTION).exists():
        if client not in (None, read_description(place).client):
            raise PersonalError(f"{place} is one client's folder, not that of {client!r}: leave --client out")
        return place
    names = clients_in(place)
    if not names:
        raise StorageError(
            f"{place} holds no {DESCRIPTION}: give a run folder, or a client's own: RUN/clients/NAME, on a node "
            f"STATE-DIR/NAME/RUN (written by this version of tap-flower or a later one); the personal models of a project's "
            f"own modules are opened with `load_personal`, what `tap-flower export` has written with `load_export`"
        )
    return place / "clients" / _one_of(client, names, f"{place} has models of several clients", "--client", "client")


def chosen_task(task: str | None, described: Description) -> TaskDescription:
    """The task that is meant: the one of this name, or the client's only one.

    Raises:
        PersonalError: the client has no such task, or it must be named.
    """
    tasks = {one.name: one for one in described.tasks}
    return tasks[_one_of(task, list(tasks), "the client has several tasks", "--task", "task")]


def _one_of(name: str | None, known: list[str], several: str, option: str, what: str) -> str:
    if name is None and len(known) > 1:
        raise PersonalError(f"{several}: choose one with {option}: {', '.join(known)}")
    if name is not None and name not in known:
        raise PersonalError(f"there is no {what} {name!r}: use one of {', '.join(known)}")
    return known[0] if name is None else name
