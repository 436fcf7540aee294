"""What the report says in words, on made-up results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from tap_flower.core.tasks import TASK_KINDS
from tap_flower.report import verdict
from tap_flower.report.result_tables import headline_table, side_by_side
from tap_flower.report.results import results
from tap_flower.report.run_record import RunRecord

KINDS = dict.fromkeys("abcdef", "image_classification") | {"p": "image_generation"}


def run(
    models: Mapping[str, Mapping[str, float]], method: str = "tap", clients: int = 2, name: str = "run",
    kinds: Mapping[str, str] = KINDS, seed: int = 1, **more: Any,
) -> RunRecord:  # fmt: skip
    """A run in which each client has each model's value of each task; the second client has .1 less accuracy."""

    def metrics(task: str, value: float, client: int) -> dict[str, float]:
        return {TASK_KINDS[kinds[task]].judged_by.metric: value - 0.1 * client}

    tasks = {task for by_task in models.values() for task in by_task}
    of = {
        f"client-{n}": {
            task: {model: metrics(task, by_task[task], n) for model, by_task in models.items() if task in by_task}
            for task in sorted(tasks)
        }
        for n in range(clients)
    }
    said: dict[str, Any] = {"missing": {}, "marks": {}, "dropped": {}, "privacy": None} | more
    found = results(
        preset="demo", method=method, seed=seed, rounds=3, clients=of, kinds={task: kinds[task] for task in tasks},
        headlines={task: TASK_KINDS[kinds[task]].judged_by for task in tasks},
        replacements={}, bytes_={"down": 1, "up": 1, "per_component": {}}, steps={}, seconds={"total": 1.0}, **said,
    )  # fmt: skip
    return RunRecord(name, found, [], "", {})


SIX = dict.fromkeys("abcdef", 0.5)


@pytest.mark.parametrize(
    ("server", "words"),
    [
        (dict.fromkeys("abcdef", 0.4), "on all 6 tasks"),
        (SIX | {"b": 0.6}, "on any of 6 tasks (equal on a, c, d, and 2 more)"),
        (dict.fromkeys("abcde", 0.4) | {"f": 0.6}, "on 5 of 6 tasks (not on f)"),
        (dict.fromkeys("abcd", 0.4) | {"e": 0.5, "f": 0.6}, "on 4 of 6 tasks (not on f; equal on e)"),
        (dict.fromkeys("abcdef", 0.6), "on any of 6 tasks"),
        (dict.fromkeys("abcd", 0.6) | {"e": 0.5, "f": 0.5}, "on any of 6 tasks (equal on e and f)"),
        (SIX, "on any of 6 tasks (equal on a, b, c, and 3 more)"),
        ({"a": 0.4} | dict.fromkeys("bcdef", 0.6), "on 1 of 6 tasks (not on b, c, d, and 2 more)"),
    ],
)
def test_a_run_compares_its_models(server: dict[str, float], words: str) -> None:
    first, worst, chance = verdict.verdict([[run({"server": server, "tap": SIX})]])
    beats = "does not beat" if "any" in words else "beats"
    assert first == f"TAP {beats} the federated model {words}."
    assert worst == f"By the worst client of each task: {first.partition(' (')[0].rstrip('.')}."
    assert chance == "There is one seed: a small difference may be chance."


@pytest.mark.parametrize(
    ("server", "words"),
    [
        (0.4, "beats the federated model on its only task, a."),
        (0.6, "does not beat the federated model on its only task, a."),
        (0.5, "does not beat the federated model on its only task, a (equal)."),
    ],
)
def test_a_run_of_one_task_and_one_client(server: float, words: str) -> None:
    first, chance = verdict.verdict([[run({"server": {"a": server}, "tap": {"a": 0.5}}, clients=1)]])
    assert first == f"TAP {words}"
    assert "one seed" in chance


def test_lower_is_better_where_the_kind_says_so() -> None:
    first, *_ = verdict.verdict([[run({"server": {"p": 0.8, "a": 0.4}, "tap": {"p": 0.9, "a": 0.5}})]])
    assert first == "TAP beats the federated model on 1 of 2 tasks (not on p)."


def test_all_models_of_a_run_are_compared() -> None:
    models = {"server": {"a": 0.4, "b": 0.4}, "server+finetune": {"a": 0.6, "b": 0.4}, "personal": {"a": 0.6, "b": 0.6}}
    first, *_ = verdict.verdict([[run({**models, "tap": {"a": 0.5, "b": 0.5}})]])
    assert first == (
        "TAP beats the federated model on both tasks and the fine-tuned federated model on 1 of 2 tasks "
        "(not on a); it does not beat the personal models before stage 2 on any of 2 tasks."
    )


def test_a_run_of_one_model_has_nothing_to_be_compared_with() -> None:
    assert verdict.verdict([[run({"server": SIX}, method="fedavg")]]) == [
        "There is nothing to compare the federated model with: no other model or method has a task in common with it."
    ]


def test_methods_are_compared_by_their_results_and_over_seeds() -> None:
    taps = [run({"server": {"a": 0.1}, "tap": {"a": value}}, seed=n) for n, value in enumerate((0.5, 0.9))]
    local = [run({"local": {"a": v, "b": 0.9}}, method="local", seed=n) for n, v in enumerate((0.55, 0.65))]
    ditto = [run({"server": {"a": 0.8}, "ditto": {"a": 0.8}, "zz": {"a": 0.1}}, method="ditto")]
    first, worst = verdict.verdict([local, taps, ditto])
    # Over the seeds TAP has .7 in the mean of "a" (and .65 over the clients), training alone .6; "b" is not TAP's.
    assert first == "TAP beats training alone on its only task, a; it does not beat ditto on its only task, a."
    assert worst == f"By the worst client of each task: {first}"
    table = verdict.method_table([local, taps, ditto])
    assert list(table.header) == ["task", "metric", "training alone: local", "TAP: tap", "ditto: ditto"]
    assert table.rows[0] == ["a", "accuracy ↑", "0.550 ± 0.071 (0.500)", "0.650 ± 0.283 (0.600)", "0.750 (0.700)"]
    assert table.best == {(0, 4)}
    assert table.rows[1][2:] == ["0.850 ± 0.000 (0.800)", "–", "–"]


def test_a_method_that_is_not_installed_is_judged_by_the_last_model_that_is_shown() -> None:
    first, *_ = verdict.verdict([[run({"server": SIX, "theirs": SIX}, method="theirs")]])
    assert first.startswith("Theirs does not beat the federated model")


def test_two_groups_of_one_method_have_their_folders_names() -> None:
    first, *_ = verdict.verdict([[run({"tap": SIX}, name="one")], [run({"tap": {"a": 0.6}}, name="two")]])
    assert first == "TAP (one) does not beat TAP (two) on its only task, a."


def test_a_task_of_another_kind_or_metric_is_not_compared() -> None:
    """By the last run's metric, the squared error of the first would be an accuracy, and the better one."""
    pictures = run({"tap": {"a": 1.18, "b": 0.5}}, name="one", kinds=KINDS | {"a": "image_generation"})
    labels = run({"tap": {"a": 0.5, "b": 0.6}}, name="two")
    words = (
        "ask 'a' is not compared: by this name runs have image_generation judged by mse and image_classification "
        "judged by accuracy"
    )
    first, _, told, _ = verdict.verdict([[pictures], [labels]])
    assert (first, told) == ("TAP (one) does not beat TAP (two) on its only task, b.", f"T{words}.")
    table = verdict.method_table([[pictures], [labels]])
    assert [row[0] for row in table.rows] == [row[0] for row in side_by_side([[pictures], [labels]]).rows] == ["b"]
    assert f"t{words}" in table.note
    alone = [[replace(one, results=one.results | {"tasks": {}})] for one in (pictures, labels)]
    assert verdict.verdict(alone)[1] == f"T{words}."


def test_runs_of_one_seed_are_no_repetitions() -> None:
    twice = [run({"server": SIX, "tap": SIX}, seed=seed) for seed in (41, 41)]
    told, chance = verdict.verdict([twice])[-2:]
    assert told == "There are 2 runs of seed 41, which are no independent repetitions."
    assert chance == "There is one seed: a small difference may be chance."
    assert "there are 2 runs of seed 41, which are no" in headline_table([one.results for one in twice]).note
    assert not [said for said in verdict.verdict([[*twice[:1], run({"tap": SIX}, seed=42)]]) if "seed" in said]


def test_who_was_missing() -> None:
    assert verdict.attendance(run({"tap": SIX}).results) == "All 2 clients were evaluated."
    assert verdict.attendance(run({"tap": SIX}, clients=1).results) == "The one client was evaluated."
    one = run({"tap": SIX}, missing={"zoe": "gone"}, dropped={"client 'zoe'": 1})
    assert verdict.attendance(one.results) == ("1 of 3 clients is missing. 1 reply could not be used.")
    many = run({"tap": SIX}, missing=dict.fromkeys("uvwxyz", "gone"), dropped={"client 'u'": 2, "client 'v'": 1})
    assert verdict.attendance(many.results) == ("6 of 8 clients are missing. 3 replies could not be used.")


def test_privacy_in_words() -> None:
    assert (
        verdict.privacy(run({"tap": SIX}).results)
        == "No differential privacy: no noise was added to what clients sent."
    )
    parts = {"x": {"rounds": 0}, "y": {"rounds": 4}}
    spent = {"epsilon": 7.5, "epsilon_requested": 8.0, "delta": 1e-5, "components": parts}
    assert verdict.privacy(run({"tap": SIX}, privacy=spent).results) == (
        "Differentially private towards other clients: ε 7.5 of 8 was spent, at δ 1e-05; 1 of 2 components were released."
    )
