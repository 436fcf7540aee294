from __future__ import annotations

import pytest

from tap_flower.server.likely_mistakes import likely_mistakes

IMAGES = "image_classification"


def named(*tasks: str, kind: str = IMAGES) -> list[str]:
    """Sentences about clients with one task each, two of which are `digits`."""
    held = [("ann", "digits", IMAGES), ("bob", "digits", IMAGES), *((f"c{n}", t, kind) for n, t in enumerate(tasks))]
    return likely_mistakes(2, None, held)


@pytest.mark.parametrize("task", ["digit", "digtis", "Digits", "di-gits", "digits_"])
def test_a_task_that_is_probably_misspelt(task: str) -> None:
    (sentence,) = named(task)
    assert sentence == (
        f"task {task!r} is client 'c0''s alone, and 2 clients have 'digits': if both are one task, give it one name, or "
        f"nothing of its head is shared"
    )


@pytest.mark.parametrize("tasks", [("shapes",), ("digits_2",), ("digits",), ("digit", "digit"), ("digit_images",)])
def test_a_task_that_is_another_one(tasks: tuple[str, ...]) -> None:
    assert named(*tasks) == []


def test_another_kind_is_another_task() -> None:
    assert named("digit", kind="image_generation") == []


def test_more_clients_in_a_round_than_there_are() -> None:
    held = [("ann", "digits", IMAGES), ("bob", "shapes", IMAGES)]
    assert likely_mistakes(3, None, held) == [
        "clients_per_round = 3, and there are 2 clients: all of them train in every round"
    ]
    assert likely_mistakes(2, None, held) == likely_mistakes(3, 0.5, held) == likely_mistakes(3, None, []) == []
