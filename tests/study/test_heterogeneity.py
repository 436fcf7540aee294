"""Label skew: how rows are dealt, and which runs the study makes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml

from tap_flower.errors import ConfigError
from tap_flower.files import write_json
from tap_flower.study.heterogeneity import dealt, heterogeneity_study
from tests.federations import DATES, LANGUAGES, source, sources


def test_clients_draw_by_their_own_distribution_and_no_row_twice() -> None:
    labels = ["a"] * 10 + ["b"] * 10 + ["c"] * 10
    weights = [{"a": 1.0, "b": 0.0, "c": 0.0}, {"a": 0.0, "b": 0.5, "c": 0.5}, {"a": 1.0, "b": 0.0, "c": 0.0}]
    one, two, three = dealt(labels, [5, 8, 9], weights, seed=1)
    assert [len(rows) for rows in (one, two, three)] == [5, 8, 9]
    assert len({*one, *two, *three}) == 22
    assert {labels[row] for row in one} == {"a"}
    assert {labels[row] for row in two} == {"b", "c"}
    assert Counter(labels[row] for row in three)["a"] == 5  # then all ten are gone, and others must do
    assert dealt(labels, [5, 8, 9], weights, seed=1) == [one, two, three]
    assert dealt(labels, [5, 8, 9], weights, seed=2) != [one, two, three]


def client(name: str, first: int) -> dict[str, Any]:
    """Its test rows are those of all; the names of a language stand together, so that no client has two by itself."""
    split = {"train": source("names", "train", first, first + 120), "test": source("names", "test", 0, 60)}
    return {"name": name, "backbone": "demo", "tasks": [{**LANGUAGES, **split}]}


def test_the_clients_of_a_task_share_out_its_rows_anew(tmp_path: Path) -> None:
    other = {"name": "dan", "backbone": "demo", "tasks": [{**DATES, **sources("dates", 0, 10)}]}
    clients = [*(client(name, 120 * n) for n, name in enumerate(("ann", "bob", "cleo"))), other]
    (tmp_path / "clients.yaml").write_text(yaml.safe_dump({"clients": clients}))
    study = heterogeneity_study(
        "demo", str(tmp_path / "clients.yaml"), [], [1], ["tap"], [0.05, 50.0], tmp_path / "out"
    )
    assert [run.label for run in study.runs] == [
        f"{method}, alpha-{alpha}" for alpha in ("0.05", "50") for method in ("tap", "local")
    ]
    largest = {}
    for run in (study.runs[0], study.runs[2]):
        made = yaml.safe_load(Path(run.config).read_text())["clients"]
        assert made[3] == other  # is left as it was
        texts: dict[str, list[str]] = {}
        shares = []
        for one in made[:3]:
            (task,) = one["tasks"]
            for split, count in (("train", 60), ("test", 10)):
                assert task[split]["format"] == "disk"
                rows = datasets.load_from_disk(task[split]["path"])
                assert len(rows) == count
                texts.setdefault(split, []).extend(rows["text"])
                shares.append(max(Counter(map(str, rows["label"])).values()) / count)
        assert len(set(texts["test"])) == 30  # no row twice
        largest[run.label] = sum(shares) / len(shares)
    assert largest["tap, alpha-0.05"] > 0.5 > largest["tap, alpha-50"]
    for run in study.runs:
        keys = ("preset", "method", "seed", "rounds", "clients", "kinds", "replacements", "bytes")
        tasks = {"languages": {"local": {"accuracy": 0.5}}}  # stage 2 of `tap` has failed
        write_json(run.folder / "results.json", {"schema": 2, **{key: {} for key in keys}, "tasks": tasks})
    page = study.write(tmp_path).read_text()
    assert "tap, alpha-50, seed 1: task &#39;languages&#39; has no results of tap, and is left out." in page


def test_paths_of_images_still_lead_to_them(tmp_path: Path) -> None:
    task = {"name": "t", "kind": "image_classification", "modalities": ["image"], "domain": "d", "classes": ["a", "b"]}
    clients = []
    for name in ("ann", "bob"):
        split = {"format": "csv", "path": "scans/rows.csv", "rows": [0, 20] if name == "ann" else [20, 40]}
        whole = {**task, "columns": {"image": "file", "label": "label"}, "train": split, "test": split}
        clients.append({"name": name, "backbone": "demo", "tasks": [whole]})
    (tmp_path / "scans").mkdir()
    rows = "".join(f"{n}.png,{'ab'[n % 2]}\n" for n in range(40))
    (tmp_path / "scans" / "rows.csv").write_text(f"file,label\n{rows}")
    (tmp_path / "clients.yaml").write_text(yaml.safe_dump({"clients": clients}))
    study = heterogeneity_study("demo", str(tmp_path / "clients.yaml"), [], [1], ["tap"], [1.0], tmp_path / "out")
    made = yaml.safe_load(Path(study.runs[0].config).read_text())["clients"]
    files = datasets.load_from_disk(made[0]["tasks"][0]["train"]["path"])["file"]
    assert {Path(file).parent for file in files} == {tmp_path / "scans"}


def test_what_cannot_be_skewed_is_an_error(tmp_path: Path) -> None:
    def plan(clients: list[dict[str, Any]], alpha: float) -> None:
        (tmp_path / "clients.yaml").write_text(yaml.safe_dump({"clients": clients}))
        heterogeneity_study("demo", str(tmp_path / "clients.yaml"), [], [1], ["tap"], [alpha], tmp_path / "out")

    with pytest.raises(ConfigError, match="needs a classification task that several clients have: there is none"):
        plan([client("ann", 0)], 1.0)
    with pytest.raises(ConfigError, match="alpha = 0: the concentration of a Dirichlet distribution is above 0"):
        plan([client("ann", 0), client("bob", 0)], 0.0)
    two = client("bob", 0)
    two["tasks"][0]["train"] = [two["tasks"][0]["train"]] * 2
    with pytest.raises(ConfigError, match="task 'languages': its train rows are of several data sets"):
        plan([client("ann", 0), two], 1.0)
