from __future__ import annotations

from typing import Any

import pytest

from tap_flower.core.components import Pair
from tap_flower.data.spec import Field, Source, SpecError, client_spec

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
        ({"classes": ["one"]}, "has 1 classes: list the names of at least two"),
        ({"columns": {"text": "text"}}, "names no column for label"),
        ({"margin": -1}, "has margin -1"),
        ({"batch_size": 0}, "has batch_size 0: use a whole number from 1"),
        ({"domain": "a/b"}, "has domain 'a/b': use 1 to 64 letters"),
        ({"domain": None}, "lacks domain"),
        ({"trian": SOURCE}, "unknown key 'trian': did you mean 'train'"),
        ({"train": {**SOURCE, "format": "xls"}}, "train has format 'xls': use one of"),
        ({"train": {**SOURCE, "rows": [5, 5]}}, r"train has rows \[5, 5\]"),
        ({"train": {**SOURCE, "splitt": "x"}}, "unknown key 'splitt': did you mean 'split'"),
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
