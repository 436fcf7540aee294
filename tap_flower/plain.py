"""Plain values that somebody else wrote, as JSON or YAML: within bounds, and of the types that are expected."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

import yaml

DEEPEST = 32
"""Levels of lists and mappings in each other; more are refused."""
MOST_VALUES = 4_000_000
"""Keys and values of one text, what aliases stand for included; more are refused."""
LONGEST_NUMBER = 64
"""Bits of a whole number; more are refused."""
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", list: "a list"}
_shortened = reprlib.Repr()
_shortened.maxstring = _shortened.maxother = _shortened.maxlong = 100


class PlainError(ValueError):
    """A text holds no plain values, or others than expected; the message says what is wrong."""


def shown(value: object) -> str:
    """A value for a message: its beginning, where it is long or deep."""
    return _shortened.repr(value)


def parse_json(text: str) -> Any:
    """The values of a JSON text.

    Raises:
        PlainError: it is no JSON, or is out of the bounds above, or holds a text that UTF-8 has no bytes for.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PlainError(f"it is no JSON: {error}") from error
    return _bounded(values)


def parse_yaml(text: str) -> Any:
    """The values of a YAML text; no object is ever made of it (`yaml.SafeLoader`).

    Raises:
        PlainError: as `parse_json` does.
    """
    try:
        values = yaml.load(text, _Loader)
    except Exception as error:  # beside YAMLError, whatever its makers of numbers and dates raise
        raise PlainError(f"it is no YAML: {error}") from error
    return _bounded(values)


def check_type(value: object, kind: Any, where: str) -> None:
    """Checks plain values against a type hint.

    Args:
        value: to check.
        kind: Any, bool, int (no bool), float (or int), str, list[...], dict[str, ...], or one of these `| None`.
        where: begins the message.

    Raises:
        PlainError: the value is of another type; the message names the place and the value.
    """
    if kind is Any:
        return
    if isinstance(kind, UnionType):
        if value is None:
            return
        (kind,) = (other for other in get_args(kind) if other is not NoneType)
    base, inner = get_origin(kind) or kind, get_args(kind)
    fits = isinstance(value, int | float if base is float else base)
    if not fits or (isinstance(value, bool) and base is not bool):
        raise PlainError(f"{where} is {shown(value)}, not {_WORDS.get(base, 'an object')}")
    if isinstance(value, list):
        for number, part in enumerate(value):
            check_type(part, inner[0], f"{where}[{number}]")
    elif isinstance(value, dict):
        for key, part in value.items():
            check_type(key, inner[0], f"a key of {where}")
            check_type(part, inner[1], f"{where}[{shown(key)}]")


def check_fields(values: Mapping[str, Any], kinds: Mapping[str, Any], where: str) -> None:
    """Checks that `values` has exactly the fields of `kinds`, and each of its type; see `check_type`.

    Raises:
        PlainError: a field is missing, unknown or of another type.
    """
    if missing := sorted(kinds.keys() - values.keys()):
        raise PlainError(f"{where} lacks {missing[0]}")
    if unknown := [key for key in values if key not in kinds]:
        raise PlainError(f"{where} has the unknown field {shown(unknown[0])}")
    for key, kind in kinds.items():
        check_type(values[key], kind, key)


class _Loader(yaml.SafeLoader):
    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MOST_VALUES:
            raise PlainError(f"a mapping has more than {MOST_VALUES:,} keys with those that it merges (<<)")


def _bounded(values: Any) -> Any:
    """`values` itself, if they are within bounds."""
    waiting, seen = [(values, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        seen += 1
        if depth >= DEEPEST and isinstance(value, dict | list | tuple | set):
            raise PlainError(f"it has more than {DEEPEST} levels: write it flatter")
        if isinstance(value, dict):
            waiting += [(part, depth + 1) for pair in value.items() for part in pair]
        elif isinstance(value, list | tuple | set):
            waiting += [(part, depth + 1) for part in value]
        elif isinstance(value, str) and not value.isascii():
            _check_text(value)
        elif isinstance(value, int) and value.bit_length() > LONGEST_NUMBER:
            raise PlainError(f"it holds a whole number of {value.bit_length()} bits: use at most {LONGEST_NUMBER}")
        if seen + len(waiting) > MOST_VALUES:
            raise PlainError(f"it has more than {MOST_VALUES:,} values, what aliases stand for included: use fewer")
    return values


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PlainError(f"it holds the text {shown(text)}, which is not Unicode: half of a character") from error
