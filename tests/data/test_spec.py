from __future__ import annotations

from typing import Any

import pytest

from tap_flower.core.components import Pair
from tap_flower.data.fields import Field
from tap_flower.data.spec import Source, client_spec
from tap_flower.errors import SpecError

SOURCE = {"format": "packaged", "name": "names", "split": "train", "rows": [0, 9]}
TASK: dict[str, Any] = {
    "name": "triage",
    "kind": "text_classification",
    "modalities": ["text"],
    "domain": "notes",
    "classes": ["urgent", "routine"],
    "columns": {"text": "text", "label": "label"},
    "train": SOURCE,
    "test": SOURCE,
}


def spec(**changes: Any) -> dict[str, Any]:
    task = {key: value for key, value in {**TASK, **changes}.items() if value is not None}
    if "columns" not in changes:
        task["columns"] = {
            role: name for role, name in TASK["columns"].items() if role not in task.get("templates", {})
        }
    return {"name": "hospital-a", "backbone": "demo", "tasks": [task]}


def test_a_spec_is_read() -> None:
    (task,) = client_spec(spec(margin=0.25)).tasks
    assert task.pair == Pair("triage", ("text",))
    assert task.margin == 0.25
    assert task.train == (Source("packaged", "names", "train", (0, 9)),)
    assert task.validation == ()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"kind": "smelling"}, "has kind 'smelling': use one of image_classification"),
        ({"modalities": ["sound"]}, r"has modalities \['sound'\]: use one or both of image, text"),
        (
            {"kind": "image_classification"},
            r"has kind 'image_classification' and modalities \['text'\]: name image among",
        ),
        ({"kind": "image_generation", "classes": None}, r"has kind 'image_generation' and .*: name image among them"),
        ({"modalities": ["image"]}, r"has kind 'text_classification' and modalities \['image'\]: name text among them"),
        (
            {"templates": {"text": "{{ a | random }}"}},
            "has a template for text that is wrong: No filter named 'random'",
        ),
        ({"classes": ["one"]}, "has 1 classes: list the names of at least two"),
        ({"columns": {"text": "text"}}, "names no column for label"),
        ({"margin": -1}, "has margin -1"),
        ({"batch_size": 0}, "has batch_size 0: use a whole number from 1"),
        ({"domain": "a/b"}, "has domain 'a/b': use 1 to 64 letters"),
        ({"domain": None}, "lacks domain"),
        ({"weight": 2}, "unknown key 'weight': use name, kind, modalities, domain, train, test, "),
        ({"trian": SOURCE}, r"unknown key 'trian' \(did you mean 'train'"),
        ({"train": {**SOURCE, "format": "xls"}}, "train has format 'xls': use one of"),
        ({"train": {**SOURCE, "rows": [5, 5]}}, r"train has rows \[5, 5\]"),
        ({"train": {**SOURCE, "splitt": "x"}}, r"unknown key 'splitt' \(did you mean 'split'"),
    ],
)
def test_a_wrong_spec_names_client_task_key_and_value(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(SpecError, match=f"client 'hospital-a': task 'triage'.*{problem}"):
        client_spec(spec(**changes))


def test_names_that_could_be_paths_are_refused() -> None:
    with pytest.raises(SpecError, match="has name '../x'"):
        client_spec({**spec(), "name": "../x"})


def test_no_or_double_tasks_are_refused() -> None:
    with pytest.raises(SpecError, match="has no tasks"):
        client_spec({**spec(), "tasks": []})
    with pytest.raises(SpecError, match="names the task 'triage' twice"):
        client_spec({**spec(), "tasks": [TASK, TASK]})


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"train": {"format": "csv"}}, "train lacks path, which format 'csv' needs"),
        (
            {"train": {"format": "csv", "path": "x", "split": "test"}},
            "train has split = 'test': format 'csv' takes path",
        ),
        ({"train": {"format": "hub", "name": "a/b"}}, "train lacks split"),
        ({"labels": [1]}, "has 1 labels for 2 classes"),
        ({"templates": {"text": "{{ a"}}, "has a template for text that is wrong: .*line 1"),
        ({"templates": {"label": "{{ a }}"}}, "reads label from '{{ a }}': name one column"),
        (
            {"columns": {"text": "a", "label": "b", "image": "c"}},
            "reads 'image', which it does not have: use label, text",
        ),
        ({"train": {**SOURCE, "domain": "a/b"}}, "train has domain 'a/b'"),
        ({"columns": TASK["columns"], "templates": {"text": "{{ a }}"}}, "reads 'text' from `columns` and from `templ"),
        ({"kind": "text_generation"}, "has classes, which kind 'text_generation' does not use: leave classes out"),
        ({"kind": "text_generation", "classes": None, "labels": [1]}, "has labels, which kind 'text_generation'"),
    ],
)
def test_a_wrong_source_or_field(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(SpecError, match=f"client 'hospital-a': task 'triage'.*{problem}"):
        client_spec(spec(**changes))


def test_a_sources_own_fields_come_before_the_tasks() -> None:
    own = {**SOURCE, "columns": {"label": "class"}, "templates": {"text": "{{ body }}"}}
    (task,) = client_spec(spec(train=[SOURCE, own])).tasks
    assert task.fields(task.train[0]) == {"text": Field(("text",)), "label": Field(("label",))}
    assert task.fields(task.train[1]) == {"text": Field(template="{{ body }}"), "label": Field(("class",))}


def test_a_number_of_classes_and_a_hash() -> None:
    found = client_spec(spec(classes=3))
    assert found.tasks[0].classes == ("0", "1", "2")
    assert found in {client_spec(spec(classes=3))}
    assert found != client_spec(spec(classes=3, columns={"text": "title", "label": "label"}))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"kind": ["text_classification"]}, r"has kind \['text_classification'\]: give a text"),
        ({"modalities": "text"}, "has modalities 'text': give a list"),
        ({"modalities": [["text"]]}, r"has modalities \[\['text'\]\]: use one or both"),
        ({"modalities": ["text", "text"]}, "name each once"),
        ({"domain": 7}, "has domain 7: give a text"),
        ({"domain": "a\0b"}, "leave the zero byte out"),
        ({"margin": "0.1"}, "has margin '0.1': give a number, written 0.1$"),
        ({"margin": "1e-3"}, "has margin '1e-3': give a number, written 0.001$"),
        ({"margin": "low"}, "has margin 'low': give a number$"),
        ({"margin": True}, "has margin True: give a number"),
        ({"margin": float("nan")}, "has margin nan: use a number of at least 0"),
        ({"margin": 10**400}, "has margin 1"),
        ({"batch_size": True}, "has batch_size True: give a whole number"),
        ({"classes": "ab"}, "has classes 'ab': give a list of names, or their number"),
        ({"classes": True}, "has classes True"),
        ({"classes": -1}, "has 0 classes"),
        ({"classes": 10**12}, "has 1000000000000 classes: use at most 65536"),
        ({"classes": ["a", "a"]}, "names the class 'a' twice"),
        ({"classes": ["a", {}]}, "has class {}: use texts and numbers"),
        ({"labels": [[1], [2]]}, r"has label \[1\]: use texts and numbers"),
        ({"columns": ["text", "label"]}, "has columns .*: give `key: value` lines"),
        ({"columns": {"text": 5, "label": "l"}}, "reads 'text' from 5: name a column, or list several"),
        ({"columns": {"text": [], "label": "l"}}, r"reads 'text' from \[\]"),
        ({"columns": {"text": "t", "label": "l", 3: "x"}}, "reads 3, which it does not have"),
        ({"templates": {"text": 5}}, "has the template 5 for 'text': write a text"),
        (
            {"templates": {"text": "{{ x | nonsense }}"}},
            "has a template for text that is wrong: No filter named 'nonsense'",
        ),
        ({"templates": {"text": "{{ " + "(" * 300 + "x" + ")" * 300 + " }}"}}, "has a template for text that is wrong"),
        ({"templates": {"text": "{{ " + "9" * 5000 + " }}"}}, "has a template for text that is wrong: ValueError"),
        ({"train": "names"}, "has train 'names': give a source or a list of them"),
        ({"train": ["names"]}, "train is 'names': write `key: value` lines"),
        ({"train": {**SOURCE, "rows": 5}}, "train has rows 5: give the first row"),
        ({"train": {**SOURCE, "rows": "ab"}}, "train has rows 'ab'"),
        ({"train": {**SOURCE, "rows": [0.5, 2]}}, r"train has rows \[0.5, 2\]"),
        ({"train": {**SOURCE, "shuffle": "no"}}, "train has shuffle 'no': give true or false"),
        ({"train": {**SOURCE, "format": ["csv"]}}, r"train has format \['csv'\]: give a text"),
        ({"train": {"format": "csv", "path": ["a"]}}, r"train has path \['a'\]: give a text"),
        ({"train": {**SOURCE, "columns": {"text": None}}}, "reads 'text' from None"),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(SpecError, match=f"client 'hospital-a': task 'triage'.*{problem}"):
        client_spec(spec(**changes))


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ([], r"client '\?' is \[\]: write `key: value` lines"),
        ({**spec(), "name": 5}, "client 5 has name 5: give a text"),
        ({**spec(), "name": "a\n"}, "use 1 to 64 letters"),
        ({**spec(), "backbone": {"a": 1}}, "has backbone {'a': 1}: give a text"),
        ({**spec(), "tasks": "triage"}, "has tasks 'triage': give a list"),
        ({**spec(), "tasks": ["triage"]}, r"task '\?' is 'triage': write `key: value` lines"),
        ({**spec(), "tasks": None}, "lacks tasks"),
    ],
)
def test_a_spec_of_other_types_is_refused(values: Any, problem: str) -> None:
    with pytest.raises(SpecError, match=problem):
        client_spec(values)
