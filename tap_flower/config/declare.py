"""How an option of the configuration is declared."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def option(default: Any, text: str, low: float | None = None, high: float | None = None) -> Any:
    """A field of a configuration dataclass: default, help text, inclusive bounds. With the default None it may be null."""
    return field(default=default, metadata={"help": text, "low": low, "high": high, "optional": default is None})


def collection(kind: type[Any], text: str) -> Any:
    """A field of a configuration dataclass that holds a list or a dictionary, empty by default."""
    return field(default_factory=kind, metadata={"help": text, "low": None, "high": None})
