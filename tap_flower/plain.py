"""Plain values that somebody else wrote, as JSON or YAML: within bounds."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any

import msgspec
import yaml

DEEPEST = 32
"""Levels of lists and mappings in each other; more are refused."""
MOST_VALUES = 4_000_000
"""Keys and values of one text, what aliases stand for included; more are refused."""
LONGEST_NUMBER = 64
"""Bits of a whole number; more are refused."""
_UNLIKE = re.compile(r"[-+]?(0[0-9_]+|.*:.*)")
"""Whole numbers that YAML 1.1 reads as nobody means them: 010 is 8, and 1:30 is 90."""
_shortened = reprlib.Repr()
_shortened.maxstring = _shortened.maxother = _shortened.maxlong = 100


class PlainError(ValueError):
    """A text holds no plain values; the message says what is wrong."""


def shown(value: object) -> str:
    """A value for a message: its beginning, where it is long or deep."""
    return _shortened.repr(value)


def printable(text: str, most: int = 1000) -> str:
    """Words from elsewhere for a log or a terminal: one line, without control characters, cut where they are long.

    Args:
        text: the words.
        most: characters of them that are taken.
    """
    rest = f"… ({len(text):,} characters)" if len(text) > most else ""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:most]) + rest


def as_text(value: object) -> str:
    """A plain value as a text: booleans as in YAML (`true`), whole numbers without a fraction (1.0 is `1`)."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value)


def counted(number: int, noun: str) -> str:
    """A number of things in words: `1 round`, `2 rounds`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def install(extra: str) -> str:
    """The command that installs an extra of tap-flower, for errors."""
    return f"pip install 'tap-flower[{extra}]' (from a checkout: pip install -e '.[{extra}]')"


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(keys with dots between, value) of nested mappings."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


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
                    raise PlainError(
                        f"the key {shown(key.value)} appears twice, in lines {before} and {line}: keep one"
                    )
                lines[key.tag, key.value] = line
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """A whole number; one that other readers, and people, read as another number is refused."""
        value = int(super().construct_yaml_int(node))
        if _UNLIKE.fullmatch(node.value):
            line = node.start_mark.line + 1
            raise PlainError(
                f"{node.value} in line {line} is the number {value} in YAML: put it in quotes, or write {value}"
            )
        return value

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MOST_VALUES:
            raise PlainError(f"a mapping has more than {MOST_VALUES:,} keys with those that it merges (<<)")


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


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


def with_value(problem: str, text: str) -> str:
    """Msgspec's message with the value that it is about, where its path leads to one."""
    path = re.search(r" - at `\$((?:\.\w+|\[\d+\])+)`$", problem)
    if path is None:
        return problem
    try:
        value: Any = msgspec.json.decode(text)
    except (msgspec.MsgspecError, RecursionError, UnicodeError):  # malformed behind the field that has failed
        return problem
    for key, index in re.findall(r"\.(\w+)|\[(\d+)\]", path[1]):
        if not isinstance(value, dict if key else list):
            return problem
        value = value[key] if key else value[int(index)]
    return f"{path[1].lstrip('.')} is {shown(value)}: {problem[: path.start()]}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'tap'?)` with the known word that is most like another one, in capitals or not; else nothing.

    An abbreviation is known by the first letters of a name's parts: `train.lr` is `train.learning_rate`.
    """
    lower = {name.lower(): name for name in known}
    short = {re.sub(r"([a-z])[a-z]*(_|$)", r"\1", name): name for name in lower.values() if "_" in name}
    near = [short[word]] if word in short else get_close_matches(word[:64].lower(), lower, n=1, cutoff=0.5)
    return f" (did you mean {lower.get(near[0], near[0])!r}?)" if near else ""


def same_backbone(one: str, other: str) -> bool:
    """Whether two fingerprints agree, BACKBONE-TOKENIZER each; one without a tokenizer's part leaves that open."""
    return all(mine == its for mine, its in zip(one.split("-"), other.split("-"), strict=False))
