"""Calls of functions that a user wrote: what they raise is told by line, and what they get stays as it is."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from tap_flower.errors import ClientError, TapFlowerError, defined_at, users_line

log = logging.getLogger("tap_flower")


@contextmanager
def of_the_user(what: str, *functions: object) -> Iterator[None]:
    """Names the line of the user's own code that an error comes from; its words, which may quote data, go to the log."""
    try:
        yield
    except TapFlowerError:
        raise
    except Exception as error:
        log.exception("%s failed", what)
        places = [
            users_line(error) or "; ".join(dict.fromkeys(filter(None, map(defined_at, functions)))),
            "the log of the node says more",
        ]
        raise ClientError(f"{what} raised {type(error).__name__}: {', '.join(filter(None, places))}") from error


@contextmanager
def left_alone(what: str, batch: Any) -> Iterator[None]:
    """Refuses a call that changes its batch, with which a second model is called afterwards; it may add to the batch.

    Args:
        what: the call, as an error names it.
        batch: what it gets.

    Raises:
        ClientError: an entry is gone, or is another tensor; the message names it.
    """
    before = dict(_entries(batch))
    versions = _versions(before)
    yield
    after = dict(_entries(batch))
    now = _versions(after)
    changed = [name for name, version in versions.items() if name in after and now.get(name) != version]
    if wrong := [name for name in before if name not in after] + changed:
        entry = f"{wrong[0]!r} of its batch" if wrong[0] else "its batch"
        raise ClientError(
            f"{what} {'changes' if wrong[0] in after else 'removes'} {entry}, which a second model, the teacher of stage 2, "
            f"is called with, too: let it work on a copy, such as `x.clone()` of a tensor or `dict(batch)`"
        )


def _entries(batch: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Path and value of what a batch holds in mappings, lists, tuples."""
    if isinstance(batch, Mapping):
        inside = batch.items()
    elif isinstance(batch, list | tuple):
        inside = dict(enumerate(batch)).items()
    else:
        yield name, batch
        return
    for key, value in inside:
        yield from _entries(value, f"{name}.{key}" if name else str(key))


def _versions(entries: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Name -> identity of a tensor, and how often it was changed in place."""
    tensors = ((name, value) for name, value in entries.items() if isinstance(value, Tensor))
    return {name: (id(value), 0 if value.is_inference() else value._version) for name, value in tensors}
