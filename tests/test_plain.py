"""Plain values that somebody else wrote: what is out of bounds."""

from __future__ import annotations

import pytest

from tap_flower import plain
from tap_flower.plain import (
    DEEPEST,
    PlainError,
    did_you_mean,
    parse_json,
    parse_yaml,
    printable,
    shown,
)

from .fuzz.corruption import bomb


def test_words_from_elsewhere_are_printable_and_short() -> None:
    assert printable("client 'ä' has 3 µ") == "client 'ä' has 3 µ"
    assert printable("\x1b[2J\x07a\nb\u202e\ud800") == "\\x1b[2J\\x07a\\nb\\u202e\\ud800"
    assert printable("x" * 5_000_000, 10) == "x" * 10 + "… (5,000,000 characters)"


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
        ("a:\n- 010", "010 in line 2 is the number 8 in YAML: put it in quotes, or write 8"),
        ("a: 1:30", "1:30 in line 1 is the number 90 in YAML"),
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
        "octal",
        "sexagesimal",
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


def test_a_long_value_is_shown_shortened() -> None:
    assert shown("ann") == "'ann'"
    assert len(shown("x" * 10**6)) < 150
    assert len(shown({str(n): ["x" * 1000] * 1000 for n in range(1000)})) < 5000


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("train.lr", "train.learning_rate"),
        ("train.LEARNING_RATE", "train.learning_rate"),
        ("train.stepz", "train.steps"),
    ],
)
def test_what_is_meant_by_a_word(word: str, meant: str) -> None:
    assert (
        did_you_mean(word, ["train.clip_norm", "train.learning_rate", "train.steps"]) == f" (did you mean {meant!r}?)"
    )
