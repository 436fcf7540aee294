"""Metrics of a task: numbers by name."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from tap_flower.errors import ClientError

MOST_METRICS = 100
"""Metrics that a model may have of a task."""
WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_+.-]{0,63}")
"""Name of a metric."""

log = logging.getLogger("tap_flower")


def numbers_by_name(what: str, returned: Mapping[Any, Any], most: int | None = None) -> dict[str, float]:
    """What a user's function returned as numbers by name. Errors do not quote it: the server gets them, without data.

    Args:
        what: the function, as an error names it.
        returned: names and numbers; tensors of one value are numbers, too.
        most: how many there may be; None: any.

    Raises:
        ClientError: a name cannot be used, a value is no number, or there are too many.
    """
    if most is not None and len(returned) > most:
        raise ClientError(
            f"{what} returned {len(returned)} numbers, and at most {most} are taken: leave some out, or return their mean"
        )
    found = {}
    for name, value in returned.items():
        if not WORD.fullmatch(str(name)):
            log.error("%s returned a metric named %r", what, name)
            raise ClientError(
                f"{what} returned a metric whose name the node's log shows: use letters, digits, '_', '+', '.' and '-'"
            )
        try:
            found[str(name)] = float(value)
        except (TypeError, ValueError, RuntimeError) as error:  # torch's, of a tensor with several values
            log.error("%s returned %s = %r", what, name, value)
            raise ClientError(
                f"{what} returned {name} of type {type(value).__name__}: return numbers by name"
            ) from error
    return found
