"""Valid inputs made wrong: a value in another place or of another type, and bytes that were flipped, cut or added."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Iterator
from random import Random
from typing import Any

import yaml

from .readers import Reader


def _nested(levels: int) -> Any:
    value: Any = 0
    for _ in range(levels):
        value = [value]
    return value


NUMBERS: list[Any] = [
    *(0, -1, 1, 2, 10**12, 2**53, 2**63, 10**18, 10**400, -(10**400), True, False),
    *(0.5, -0.0, 1e308, -1e308, float("nan"), float("inf")),
]
WORDS: list[Any] = [
    *("", "0", "a/b", "../x", "/etc/passwd", "a\0b", "\ud800", "\N{SNOWMAN}", "x" * 70, "x" * 5000, "???"),
    *(
        "${oc.env:HOME}",
        "{{ x",
        "{{ x | nonsense }}",
        "{{ " + "(" * 300 + "x" + ")" * 300 + " }}",
        "{{ 9" + "9" * 5000 + " }}",
    ),
    *("__metadata__", "best/w", "demo", "identity", "image", "text_generation"),
]
HOLDERS: list[Any] = [
    *(
        [],
        {},
        [[]],
        [{}],
        [None],
        [0, 0],
        [1, 2, 3],
        [10**6, 10**6],
        [-1, 2],
        [True, "a"],
        ["a"] * 300,
        _nested(20),
        _nested(100),
    ),
    *({"a": 1}, {"": None}, {"1": {"2": {}}}, {1: 2}, {f"k{n}": n for n in range(300)}, {"a": _nested(40)}),
]
NASTY = [None, *NUMBERS, *WORDS, *HOLDERS]
"""Values that take the place of others."""
ENDLESS = b"9" * 5_000
TEXTS = [
    *(
        b"",
        b"\0",
        b"null",
        b"[]",
        b"{}",
        b"[" * 100_000,
        b'{"a":' * 60_000,
        ENDLESS,
        b'{"a": ' + ENDLESS + b"}",
        b"NaN",
    ),
    *(b'"\\ud800"', b"\xff\xfe", b"\xef\xbb\xbf{}", b'{"round": 1e400}'),
    *(b"a: &a [*a]", b"a: &a {b: *a}", b"<<: 1", b"? [a]\n: 1", b"a: 2020-13-45", b"- " * 5_000, b"{" * 5_000),
    *(b"a: !!timestamp x", b"a: !!bool x", b"a: !!int ''", b"a: !!float x", b"a: !!binary x"),
    *(
        b"a: !!python/object/apply:os.system [id]",
        b"a: 0x" + b"f" * 5_000,
        b"a: 1:60:99",
        b"=",
        b"a: =",
        b"--- a\n--- b",
    ),
    *(b"%YAML 9.9\n---\na: 1", b"a: &x 1\nb: *y", b"\xc2\x85: \xe2\x80\xa8"),
]
"""Whole inputs."""


def bomb(merging: bool) -> bytes:
    """Aliases of aliases: nine lines that stand for 9^9 values, or keys."""
    lines = ["a0: &a0 {x: 1}" if merging else "a0: &a0 [x]"]
    for level in range(1, 10):
        names = ", ".join(f"*a{level - 1}" for _ in range(9))
        lines.append(f"a{level}: &a{level} " + (f"{{<<: [{names}]}}" if merging else f"[{names}]"))
    return "\n".join(lines).encode()


def corrupted(reader: Reader, seed: int) -> bytes:
    """An input for a reader, the same for the same seed: nearly always a valid one with one to three things wrong."""
    random = Random(seed)
    if random.random() < 0.01:
        return random.choice([*TEXTS, bomb(False), bomb(True)])
    data = random.choice(reader.valid)
    if reader.form == "bytes" or random.random() < 0.15:
        return _damaged(random, data)
    return _rewritten(random, reader.form, data)


def _damaged(random: Random, valid: bytes) -> bytes:
    data = bytearray(valid)
    for _ in range(random.randint(1, 3)):
        at = random.randint(0, len(data))
        match random.choice(["flip", "flip", "cut", "add", "twice", "drop"]):
            case "flip" if at < len(data):
                data[at] ^= 1 << random.randrange(8)
            case "cut":
                del data[at:]
            case "add":
                data[at:at] = random.randbytes(random.randint(1, 9))
            case "twice":
                data += data[at:]
            case _:
                del data[at : at + random.randint(1, 9)]
    return bytes(data)


def _rewritten(random: Random, form: str, data: bytes) -> bytes:
    """A valid input whose JSON or YAML has other values; the JSON in a header's metadata is changed in half the cases."""
    head, body, tail = _parts(data, form)
    values = yaml.safe_load(body) if form == "yaml" else json.loads(body)
    record = values.get("__metadata__") if form == "binary" else None
    if record is not None and random.random() < 0.5:
        record["tap_flower"] = json.dumps(_changed(random, json.loads(record["tap_flower"])))
    else:
        values = _changed(random, values)
    if form == "yaml":
        try:
            return yaml.safe_dump(values, allow_unicode=True).encode("utf-8", "surrogatepass")
        except ValueError:  # a number of 400 digits is too long for YAML's writer
            return repr(values).encode("utf-8", "surrogatepass")
    text = json.dumps(values).encode()
    if form == "binary":
        head = struct.pack("<Q", max(0, len(text) + random.choice([0, 0, 0, 0, 1, -1, 2**40])))
    return head + text + tail


def _parts(data: bytes, form: str) -> tuple[bytes, bytes, bytes]:
    """(before the text, the text, after it)."""
    if form == "binary":
        (length,) = struct.unpack("<Q", data[:8])
        return data[:8], data[8 : 8 + length], data[8 + length :]
    if form in ("array", "lines"):
        line, _, rest = data.partition(b"\n")
        return b"", line, b"\n" + rest
    return b"", data, b""


def _changed(random: Random, values: Any) -> Any:
    for _ in range(random.randint(1, 3)):
        places = list(_places(values))
        if not places or random.random() < 0.01:
            return _nasty(random)
        holder, key = random.choice(places)
        match random.choice(["set", "set", "set", "set", "drop", "key", "again", "swap"]):
            case "set":
                holder[key] = _nasty(random)
            case "drop":
                del holder[key]
            case "key" if isinstance(holder, dict):
                holder[random.choice(WORDS)] = holder.pop(key) if random.random() < 0.5 else _nasty(random)
            case "again" if isinstance(holder, list):
                holder += [copy.deepcopy(holder[key]) for _ in range(random.randint(1, 3))]
            case _:
                other, its_key = random.choice(places)
                holder[key] = copy.deepcopy(other[its_key])
    return values


def _nasty(random: Random) -> Any:
    return copy.deepcopy(random.choice(NASTY))


def _places(values: Any) -> Iterator[tuple[Any, Any]]:
    """(list or mapping, key) of every value."""
    found: list[tuple[Any, Any]] = []
    if isinstance(values, dict):
        found = list(values.items())
    elif isinstance(values, list):
        found = list(enumerate(values))
    for key, value in found:
        yield values, key
        yield from _places(value)
