"""Studies: which runs they make, and what they measure."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Callable
from math import log2
from pathlib import Path
from typing import Any

import pytest
import yaml

from tap_flower.errors import ConfigError
from tap_flower.files import write_json
from tap_flower.study.heterogeneity import heterogeneity_study
from tap_flower.study.newcomers import newcomers_study
from tap_flower.study.studies import Study, margin_study, pairs_study
from tap_flower.study.theorem import pairs_in_theory


@pytest.fixture
def pairs(tmp_path: Path) -> Study:
    return pairs_study("demo", "", ["rounds=2"], [1, 2], tmp_path)


def clients_of(config: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load(Path(config).read_text())["clients"])


def test_a_pair_has_the_same_clients_and_examples_whatever_the_number_of_pairs(pairs: Study) -> None:
    by_task: dict[str, list[list[dict[str, Any]]]] = {}
    for run in pairs.runs:
        clients = clients_of(run.config)
        assert all(len(client["tasks"]) == 1 for client in clients)
        assert yaml.safe_load(Path(run.config).read_text())["clients_per_round"] == len(clients)
        for task in {client["tasks"][0]["name"] for client in clients}:
            by_task.setdefault(task, []).append([c for c in clients if c["tasks"][0]["name"] == task])
    assert len(by_task) >= 4
    for groups in by_task.values():
        assert all(group == groups[0] for group in groups)


def test_every_pair_is_once_in_a_group_of_each_size(pairs: Study) -> None:
    for seed in (1, 2):
        sizes: dict[int, Counter[str]] = {}
        for run in pairs.runs:
            if run.seed == seed:
                tasks = {client["tasks"][0]["name"] for client in clients_of(run.config)}
                sizes.setdefault(len(tasks), Counter()).update(tasks)
        assert sorted(sizes) == [1, 2, 3, 6]
        assert sizes[1] == sizes[2] == sizes[3] == sizes[6]
        assert set(sizes[1].values()) == {1}


def test_losses_are_relative_to_the_pair_alone(pairs: Study, tmp_path: Path) -> None:
    """Made-up losses: the server's grow by a tenth with each doubling, the personal ones stay."""
    for run in pairs.runs:
        tasks = sorted({client["tasks"][0]["name"] for client in clients_of(run.config)})
        losses = {"server": 2.0 + 0.2 * log2(len(tasks)), "personal": 1.0, "tap": 0.5}
        found = {task: {model: {"loss": loss} for model, loss in losses.items()} for task in tasks}
        keys = ("preset", "method", "seed", "rounds", "clients", "kinds", "replacements", "bytes")
        write_json(run.folder / "results.json", {"schema": 2, **{key: {} for key in keys}, "tasks": found})
    page = pairs.write(tmp_path)
    html = page.read_text()
    assert "Does one model for all serve each pair worse" in html
    assert "http://" not in html.replace("http://www.w3.org", "")
    with (tmp_path / "pairs.csv").open() as file:
        found = list(csv.DictReader(file))
    whole = [row for row in found if row["figure"] == "Test loss, relative to the pair alone"]
    rows = {(row["line"], row["pairs in the federation"]): row for row in whole}
    assert [float(rows["server", n]["mean"]) for n in "1236"] == pytest.approx(
        [1 + 0.1 * log2(n) for n in (1, 2, 3, 6)]
    )
    assert [float(rows["tap", n]["mean"]) for n in "1236"] == [1.0] * 4
    assert rows["server", "6"]["seeds"] == "2"
    slopes = {line: float(rows[line, "slope"]["mean"]) for line in ("server", "personal", "tap")}
    assert slopes == pytest.approx({"server": 0.1, "personal": 0.0, "tap": 0.0}, abs=1e-9)
    assert rows["server", "slope"]["seeds"] == "2"
    assert "What each doubling adds" in html
    of_pairs = [
        row for row in found if (row["line"], row["pairs in the federation"]) == ("server", "6") and row not in whole
    ]
    assert sum(int(row["seeds"]) for row in of_pairs) == 2 * 6  # six pairs a seed
    assert {float(row["mean"]) for row in of_pairs} == {2.0 + 0.2 * log2(6)}


def test_one_task_is_no_study(tmp_path: Path) -> None:
    config = tmp_path / "one.yaml"
    task = {"name": "a", "kind": "text_classification"}
    config.write_text(yaml.safe_dump({"clients": [{"name": "ann", "tasks": [task]}]}))
    with pytest.raises(ConfigError, match="needs clients with two tasks at least; 'demo' has 1"):
        pairs_study("demo", str(config), [], [1], tmp_path)


def test_a_pair_whose_second_stage_has_failed_is_left_out_of_its_seed(pairs: Study, tmp_path: Path) -> None:
    for run in pairs.runs:
        tasks = sorted({client["tasks"][0]["name"] for client in clients_of(run.config)})
        found = {task: {model: {"loss": 1.0} for model in ("server", "personal", "tap")} for task in tasks}
        if failed := run.seed == 2 and len(tasks) == 6:
            del found[tasks[0]]["tap"]
        keys = ("preset", "method", "seed", "rounds", "clients", "kinds", "replacements", "bytes")
        write_json(run.folder / "results.json", {"schema": 2, **{key: {} for key in keys}, "tasks": found})
    assert failed
    assert f"6 pairs, seed 2: task &#39;{tasks[0]}&#39; has no results of tap" in pairs.write(tmp_path).read_text()
    with (tmp_path / "pairs.csv").open() as file:
        assert {row["figure"]: row["seeds"] for row in csv.DictReader(file)}[tasks[0]] == "1"


STUDIES: dict[str, Callable[..., Any]] = {
    "pairs": lambda settings, seeds, out: pairs_study("demo", "", settings, seeds, out),
    "margin": lambda settings, seeds, out: margin_study("demo", "", settings, seeds, [0.0], out),
    "newcomers": lambda settings, seeds, out: newcomers_study("demo", "", settings, seeds, ["tap"], 0.2, out),
    "skew": lambda settings, seeds, out: heterogeneity_study("demo", "", settings, seeds, ["tap"], [1.0], out),
    "theory": lambda settings, seeds, out: pairs_in_theory(seeds, 1.0, print),
}


@pytest.mark.parametrize("study", STUDIES)
def test_a_seed_that_is_given_twice_is_not_two_seeds(study: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--seed 41 is given twice: give it once"):
        STUDIES[study]([], [41, 42, 41], tmp_path)


def test_no_other_option_of_a_study_is_given_twice(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--margin 0.01 is given twice"):
        margin_study("demo", "", [], [1], [0.01, 0.01], tmp_path)
    with pytest.raises(ConfigError, match="--method tap is given twice"):
        newcomers_study("demo", "", [], [1], ["tap", "tap"], 0.2, tmp_path)
    with pytest.raises(ConfigError, match="--method tap is given twice"):
        heterogeneity_study("demo", "", [], [1], ["tap", "tap"], [1.0], tmp_path)
    with pytest.raises(ConfigError, match="--alpha 1 is given twice"):
        heterogeneity_study("demo", "", [], [1], ["tap"], [1.0, 1.0], tmp_path)


@pytest.mark.parametrize(
    ("study", "setting"),
    [
        *((study, setting) for study in STUDIES if study != "theory" for setting in ("seed=5", "method=fedavg")),
        *((study, "clients=[]") for study in ("pairs", "newcomers", "skew")),
        ("pairs", "clients_per_round=2"),
        ("margin", "replacement.margin.text_classification=0.7"),
        ("margin", "replacement={margin: {text_classification: 0.7}}"),
    ],
)
def test_what_a_study_decides_cannot_be_set(study: str, setting: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"--set {re.escape(setting)}, which would be overridden: "):
        STUDIES[study](["rounds=2", setting], [1], tmp_path)


def test_margins_that_are_close_have_folders_of_their_own(tmp_path: Path) -> None:
    study = margin_study("demo", "", [], [1], [0.01, 0.010000001], tmp_path)
    assert [str(run.folder.relative_to(tmp_path)) for run in study.runs] == [
        "margin-0.01/seed-1", "margin-0.010000001/seed-1",
    ]  # fmt: skip


def test_margins(tmp_path: Path) -> None:
    study = margin_study("demo", "", ["rounds=2"], [1, 2], [0.0, 0.5], tmp_path)
    assert len(study.runs) == 4
    assert {run.resolved.replacement.margin.text_generation for run in study.runs} == {0.0, 0.5}
    for run in study.runs:
        margin = run.resolved.replacement.margin.text_generation
        found = {"t": {model: {"accuracy": 0.5 + margin, "loss": 1.0} for model in ("personal", "tap")}}
        values = {"kinds": {"t": "text_classification"}, "replacements": {"ann": {"t": 3 - int(4 * margin)}}}
        keys = ("preset", "method", "seed", "rounds", "clients", "bytes")
        write_json(run.folder / "results.json", {"schema": 2, **{key: {} for key in keys}, **values, "tasks": found})
    found["t"].pop("tap")  # of the last run, whose stage 2 has failed
    write_json(run.folder / "results.json", {"schema": 2, **{key: {} for key in keys}, **values, "tasks": found})
    page = study.write(tmp_path).read_text()
    assert "margin 0.5, seed 2: task &#39;t&#39; has no results of tap, and is left out." in page
    with (tmp_path / "margin.csv").open() as file:
        rows = {(row["figure"], row["line"], float(row["margin"])): float(row["mean"]) for row in csv.DictReader(file)}
    assert rows["t", "tap", 0.5] == rows["Mean of scores", "tap", 0.5] == 1.0
    assert [rows["Replacements", "replacements", margin] for margin in (0.0, 0.5)] == [3.0, 1.0]
