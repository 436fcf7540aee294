"""Plain values that somebody else wrote: what is out of bounds, and what is of another type."""

from __future__ import annotations

from typing import Any

import pytest

from tap_flower import plain
from tap_flower.plain import (
    DEEPEST,
    PlainError,
    check_fields,
    check_type,
    parse_json,
    parse_yaml,
    shown,
)

from .fuzz.corruption import bomb


def test_values_come_as_they_are() -> None:
    assert parse_json('{"a": [1, 2.5, null, true, "ä"]}') == {"a": [1, 2.5, None, True, "ä"]}
    assert parse_yaml("a: [1, 2.5, null, true, ä]") == {"a": [1, 2.5, None, True, "ä"]}
    assert parse_json("[" * DEEPEST + "]" * DEEPEST) is not None


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "it is no JSON"),
        ("[" * 100_000, "it is no JSON"),
        ("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), "more than 32 levels"),
        ("9" * 5_000, "it is no JSON: Exceeds the limit"),
        (str(2**64), "a whole number of 65 bits"),
        ('["\\ud800"]', r"the text '\\ud800', which is not Unicode"),
        ("[" + "0," * 4_000_000 + "0]", "more than 4,000,000 values"),
    ],
    ids=["syntax", "recursion", "deep", "endless", "long", "surrogate", "many"],
)
def test_json_out_of_bounds_is_refused(text: str, problem: str) -> None:
    with pytest.raises(PlainError, match=problem):
        parse_json(text)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: [", "it is no YAML"),
        ("[" * 5_000, "it is no YAML"),
        ("a: &a [*a]", "more than 32 levels"),
        ("a: &a {b: *a}", "more than 32 levels"),
        (bomb(merging=False).decode(), "more than 4,000,000 values, what aliases stand for included"),
        ("a: 0x" + "f" * 5_000, "a whole number of 20000 bits"),
        ("a: 2020-13-45", "it is no YAML: month must be in 1..12"),
        ("a: !!timestamp x", "it is no YAML"),
        ("a: !!bool x", "it is no YAML"),
        ("a: !!int ''", "it is no YAML"),
        ("a: !!python/object/apply:os.system [id]", "it is no YAML: could not determine a constructor"),
    ],
    ids=[
        "syntax",
        "recursion",
        "itself",
        "itself 2",
        "bomb",
        "long",
        "date",
        "time",
        "bool",
        "int",
        "object",
    ],
)
def test_yaml_out_of_bounds_is_refused(text: str, problem: str) -> None:
    with pytest.raises(PlainError, match=problem):
        parse_yaml(text)


def test_yaml_that_merges_again_and_again_is_refused_or_small() -> None:
    """PyYAML counts a key once for each way that leads to it, and since 6.0.4 once."""
    found: object
    try:
        found = parse_yaml(bomb(merging=True).decode())
    except PlainError as error:
        found = str(error)
    small = {f"a{level}": {"x": 1} for level in range(10)}
    assert found == small or "a mapping has more than 4,000,000 keys" in str(found)


def test_the_keys_that_a_yaml_mapping_merges_count(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, z: 3, w: 4}"
    assert parse_yaml(text)["b"] == {"x": 1, "y": 2, "z": 3, "w": 4}
    monkeypatch.setattr(plain, "MOST_VALUES", 3)
    with pytest.raises(PlainError, match=r"a mapping has more than 3 keys with those that it merges"):
        parse_yaml(text)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (1, int), (1, float), (1.5, float), (True, bool), ("a", str), (None, int | None), (3, int | None), ([1], list[int]),
        ({"a": [0.5]}, dict[str, list[float]]), (object, Any),
    ],
)  # fmt: skip
def test_a_value_of_its_type_passes(value: object, kind: Any) -> None:
    check_type(value, kind, "x")


@pytest.mark.parametrize(
    ("value", "kind", "problem"),
    [
        (True, int, "x is True, not a whole number"),
        (1.0, int, "x is 1.0, not a whole number"),
        (False, float, "x is False, not a number"),
        (0, bool, "x is 0, not true or false"),
        (None, str, "x is None, not a text"),
        ("3", int | None, "x is '3', not a whole number"),
        ({}, list[int], "x is {}, not a list"),
        ([0, "a"], list[int], r"x\[1\] is 'a', not a whole number"),
        ([], dict[str, int], r"x is \[\], not an object"),
        ({1: 2}, dict[str, int], "a key of x is 1, not a text"),
        ({"a": {"b": None}}, dict[str, dict[str, int]], r"x\['a'\]\['b'\] is None, not a whole number"),
    ],
)
def test_a_value_of_another_type_is_named_with_its_place(value: object, kind: Any, problem: str) -> None:
    with pytest.raises(PlainError, match=problem):
        check_type(value, kind, "x")


def test_fields_are_exactly_those_that_are_known() -> None:
    check_fields({"a": 1, "b": None}, {"a": int, "b": int | None}, "it")
    with pytest.raises(PlainError, match="it lacks b"):
        check_fields({"a": 1}, {"a": int, "b": int | None}, "it")
    with pytest.raises(PlainError, match="it has the unknown field 'c'"):
        check_fields({"a": 1, "c": 2}, {"a": int}, "it")


def test_a_long_value_is_shown_shortened() -> None:
    assert shown("ann") == "'ann'"
    assert len(shown("x" * 10**6)) < 150
    assert len(shown({str(n): ["x" * 1000] * 1000 for n in range(1000)})) < 5000
