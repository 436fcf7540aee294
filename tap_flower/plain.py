"""Plain values that somebody else wrote, as JSON or YAML: within bounds."""

from __future__ import annotations

import json
import reprlib
from typing import Any

import yaml

DEEPEST = 32
"""Levels of lists and mappings in each other; more are refused."""
MOST_VALUES = 4_000_000
"""Keys and values of one text, what aliases stand for included; more are refused."""
LONGEST_NUMBER = 64
"""Bits of a whole number; more are refused."""
_shortened = reprlib.Repr()
_shortened.maxstring = _shortened.maxother = _shortened.maxlong = 100


class PlainError(ValueError):
    """A text holds no plain values; the message says what is wrong."""


def shown(value: object) -> str:
    """A value for a message: its beginning, where it is long or deep."""
    return _shortened.repr(value)


def as_text(value: object) -> str:
    """A plain value as a text: booleans as in YAML (`true`), whole numbers without a fraction (1.0 is `1`)."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value)


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
    except PlainError:
        raise
    except Exception as error:  # beside YAMLError, whatever its makers of numbers and dates raise
        raise PlainError(f"it is no YAML: {error}") from error
    return _bounded(values)


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """A mapping as it is written. YAML's own loaders take the last of two equal keys."""
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and not key.tag.endswith(":merge"):
                line = key.start_mark.line + 1
                if (key.tag, key.value) in lines:
                    before = lines[key.tag, key.value]
                    raise PlainError(f"the key {shown(key.value)} stands twice, in lines {before} and {line}: keep one")
                lines[key.tag, key.value] = line
        return node

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
