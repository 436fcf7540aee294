from __future__ import annotations

from typing import Any

import pytest

from tap_flower.core.components import Pair
from tap_flower.data.spec import Source, SpecError, client_spec

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
