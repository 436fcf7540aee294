from __future__ import annotations

from typing import Any

import pytest

from tap_flower.config import client_specs, load_config, presets
from tap_flower.data.spec import client_spec
from tap_flower.server.likely_mistakes import (
    fewer_batches_than_tasks,
    frozen_and_trained,
    likely_mistakes,
    one_list_of_classes,
    without_effect,
)

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


@pytest.mark.parametrize(("one", "other"), [("verdict", "verdicts"), ("Boxes", "boxes")])
def test_two_tasks_of_one_client_each_that_are_probably_one(one: str, other: str) -> None:
    held = [("ann", one, IMAGES), ("bob", other, IMAGES)]
    assert likely_mistakes(2, None, held) == [
        f"task {one!r} is client 'ann''s alone, and client 'bob' has {other!r}: if both are one task, give it one name, or "
        f"nothing of its head is shared"
    ]
    assert likely_mistakes(1, None, [("ann", one, IMAGES), ("ann", other, IMAGES)]) == []


def test_what_one_client_trains_and_another_freezes() -> None:
    built = {"ann": ["head.a", "trunk"], "bob": ["head.b", "trunk"], "cleo": []}
    assert frozen_and_trained({"ann": ["head.a", "trunk"], "bob": ["head.b"], "cleo": ["trunk"]}, built) == [
        "client 'ann' trains 'trunk', and client 'bob' does not, which keeps the run's first values there: set "
        "`requires_grad` on both, or on neither"
    ]
    trained = {"ann": ["head.a", "trunk"], "bob": ["head.b", "trunk"], "cleo": ["head.b"]}
    assert frozen_and_trained(trained, built) == []


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


def test_tasks_that_have_no_turn() -> None:
    held = [("ann", "digits", IMAGES), ("bob", "digits", IMAGES), ("bob", "shapes", IMAGES), ("bob", "boxes", IMAGES)]
    short = load_config("plug-in", settings=["train.steps=1", "train.accumulation=2", "distill.iterations=2"])
    assert fewer_batches_than_tasks(short, held) == [
        "client 'bob' has 3 tasks, and a participation has train.steps · train.accumulation = 2 batches of one task "
        "each: it leaves tasks out, drawn anew each time; raise train.steps"
    ]
    assert fewer_batches_than_tasks(load_config("plug-in"), held) == fewer_batches_than_tasks(short, []) == []


def test_personal_models_that_stage_1_does_not_train() -> None:
    assert without_effect(load_config()) == []
    (sentence,) = without_effect(load_config(settings=["rounds=4"]))
    assert sentence.startswith("train.personal_from = 7 and rounds = 4: stage 1 trains no personal model")
    assert without_effect(load_config(settings=["rounds=4", "method=ditto"])) == []


def test_options_of_client_specs_on_modules_of_ones_own() -> None:
    config = load_config("plug-in", settings=["compute.precision=bfloat16", "model.layers=2", "train.steps=3"])
    assert without_effect(config) == []
    (sentence,) = without_effect(config, own_modules=True)
    assert sentence == (
        "model.layers = 2, compute.precision = bfloat16: without effect on clients with modules of their own"
    )
    assert without_effect(load_config("plug-in"), own_modules=True) == []


def test_a_warm_up_that_does_not_reach_the_peak() -> None:
    (sentence,) = without_effect(load_config(settings=["train.start_learning_rate=5e-4"]))
    assert sentence == (
        "train.warmup_rounds = 20 and rounds = 8: the learning rate does not reach train.learning_rate = 0.001, and ends at "
        "0.000675"
    )
    assert without_effect(load_config(settings=["train.start_learning_rate=5e-4", "train.warmup_rounds=7"])) == []


def test_a_backbone_that_no_client_has() -> None:
    config = load_config(settings=["backbone=facebook/flava-full"])
    assert without_effect(config) == []  # the preset's clients name none
    config.clients = [{"name": "ann", "backbone": "demo"}]
    assert without_effect(config) == ["backbone = facebook/flava-full is used by no client: each names its own, demo"]


def test_two_names_for_one_list_of_classes() -> None:
    def spec(client: str, name: str, classes: list[str] | int) -> Any:
        source = {"format": "csv", "path": "x.csv"}
        task = {
            "name": name, "kind": "text_classification", "modalities": ["text"], "domain": name, "classes": classes,
            "columns": {"text": "a", "label": "b"}, "train": source, "test": source,
        }  # fmt: skip
        return client_spec({"name": client, "backbone": "demo", "tasks": [task]})

    moods = ["bad", "good"]
    assert one_list_of_classes([spec("ann", "north", moods), spec("bob", "south", moods)]) == [
        "tasks 'north' (client 'ann') and 'south' (client 'bob') have one list of classes: if both are one task, give it "
        "one name, or nothing of its head is shared"
    ]
    assert one_list_of_classes([spec("ann", "north", moods), spec("bob", "north", moods)]) == []
    assert one_list_of_classes([spec("ann", "north", moods), spec("bob", "south", [*moods, "fair"])]) == []
    assert one_list_of_classes([spec("ann", "north", 2), spec("bob", "south", 2)]) == []
    assert [one_list_of_classes(client_specs(load_config(name))) for name in presets()] == [[]] * len(presets())
