"""The errors that tap-flower raises on purpose. A message names the thing, the value and the remedy."""

from __future__ import annotations

import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NOT_THE_USERS = tuple({str(Path(__file__).parent), *map(sysconfig.get_path, ("stdlib", "purelib", "platlib"))})
_TASK = "in task "


class TapFlowerError(Exception):
    """Base of all errors that tap-flower raises on purpose."""


class BackboneError(TapFlowerError, ValueError):
    """A backbone cannot be found or used."""


class ClientError(TapFlowerError, ValueError):
    """A client is not defined as it must be: its model, its tasks or its data do not fit together."""


class ConfigError(TapFlowerError, ValueError):
    """A configuration, or a setting, is wrong."""


class DivergedError(TapFlowerError, RuntimeError):
    """Training produced a loss that is not finite."""


class MessageError(TapFlowerError, ValueError):
    """What a peer sent cannot be used: a field, a tensor or a client does not fit the protocol or the federation."""


class PersonalError(TapFlowerError, ValueError):
    """A model cannot be used as it was asked for."""


class RunError(TapFlowerError, RuntimeError):
    """A run cannot start or go on."""


class SimulationError(TapFlowerError, RuntimeError):
    """A simulation failed."""


class SpecError(TapFlowerError, ValueError):
    """A client spec is wrong, or does not fit its data."""


class StateLostError(TapFlowerError, RuntimeError):
    """A client's folder has lost what a run cannot go on without; the server gives it again."""


class StorageError(TapFlowerError, RuntimeError):
    """A file cannot be read or written, or its content is damaged."""


@contextmanager
def in_task(task: str) -> Iterator[None]:
    """Notes the task in which an error comes up; `task_of` reads it."""
    try:
        yield
    except Exception as error:
        if task_of(error) is None:
            error.add_note(f"{_TASK}{task}")
        raise


def task_of(error: BaseException) -> str | None:
    """The task in which an error came up, where that is known."""
    notes = getattr(error, "__notes__", ())
    return next((note.removeprefix(_TASK) for note in notes if note.startswith(_TASK)), None)


def users_line(error: BaseException) -> str | None:
    """FILE:LINE of the last line of a user's own code that an error came through; None where there is none."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith((*_NOT_THE_USERS, "<")):
            return f"{Path(frame.filename).name}:{frame.lineno}"
    return None


def defined_at(function: object) -> str | None:
    """FILE:LINE of the beginning of a user's own function; None where it is none."""
    code = getattr(function, "__code__", None)
    if code is None or code.co_filename.startswith((*_NOT_THE_USERS, "<")):
        return None
    return f"{Path(code.co_filename).name}:{code.co_firstlineno}"
