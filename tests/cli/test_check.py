from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml


def write_spec(folder: Path, **changes: Any) -> str:
    (folder / "train.csv").write_text("note,urgency\na dog runs,urgent\nthe law [asks],routine\na red hill,maybe\n")
    (folder / "good.csv").write_text("note,urgency\na dog runs,urgent\nthe law [asks],routine\n")
    task = {
        "name": "triage", "kind": "text_classification", "modalities": ["text"], "domain": "notes",
        "classes": ["urgent", "routine"], "columns": {"text": "note", "label": "urgency"},
        "train": {"format": "csv", "path": "good.csv"}, "test": {"format": "csv", "path": "good.csv"},
    }  # fmt: skip
    values = {"name": "hospital-a", "backbone": "demo", "tasks": [task | changes]}
    (folder / "spec.yaml").write_text(yaml.safe_dump(values))
    return str(folder / "spec.yaml")


def test_a_good_client_spec_is_checked(command: Any, tmp_path: Path) -> None:
    code, out, _ = command("check", write_spec(tmp_path), "--set", "model.text_length=12")
    assert code == 0
    assert "urgent 1 (50%)" in out
    assert "[CLS] a dog runs [SEP]" in out
    assert "[CLS] the law [ asks ] [SEP]" in out  # no markup of the terminal
    assert "before texts are cut at 12" in out
    assert out.endswith("no problems found\n")


def test_all_clients_of_a_configuration_are_checked(command: Any, tmp_path: Path) -> None:
    good = yaml.safe_load(Path(write_spec(tmp_path)).read_text())
    bad = yaml.safe_load(Path(write_spec(tmp_path, train={"format": "csv", "path": "train.csv"})).read_text())
    without = {key: value for key, value in good.items() if key != "backbone"}  # the run's
    run = {"model": {"text_length": 12}, "clients": [without, bad | {"name": "hospital-b"}, "hospital-c", good]}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    code, out, _ = command("check", str(tmp_path / "run.yaml"), "--json", "found.json")
    assert code == 1
    assert "before texts are cut at 12" in out
    found = json.loads((tmp_path / "found.json").read_text())["clients"]
    assert [one["client"] for one in found] == ["hospital-a", "hospital-b", None, "hospital-a"]
    assert found[0]["problems"] == ["two clients are named 'hospital-a': give every client its own name"]
    assert found[0]["tasks"]["triage"]["train"]["classes"] == {"urgent": 1, "routine": 1}
    assert (
        f"client 'hospital-b': task 'triage': train '{tmp_path}/train.csv' has label 'maybe'" in found[1]["problems"][0]
    )
    assert "hospital-c" in found[2]["problems"][0]
    assert "3 problems found" in out


def test_clients_that_do_not_fit_each_other_are_a_problem(command: Any, tmp_path: Path) -> None:
    good = yaml.safe_load(Path(write_spec(tmp_path)).read_text())
    turned = yaml.safe_load(Path(write_spec(tmp_path, classes=["routine", "urgent"])).read_text())
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"clients": [good, turned | {"name": "hospital-b"}]}))
    code, out, _ = command("check", str(tmp_path / "run.yaml"))
    assert code == 1
    assert (
        "task 'triage' of client 'hospital-b' has other classes than on client 'hospital-a', or in another order" in out
    )


def test_two_names_for_one_list_of_classes_are_noted(command: Any, tmp_path: Path) -> None:
    one, other = (yaml.safe_load(Path(write_spec(tmp_path, name=name)).read_text()) for name in ("north", "south"))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"clients": [one, other | {"name": "hospital-b"}]}))
    code, out, _ = command("check", str(tmp_path / "run.yaml"))
    assert code == 0
    assert "note: tasks 'north' (client 'hospital-a') and 'south' (client 'hospital-b') have one list of" in out


def test_two_configurations_are_refused(command: Any, tmp_path: Path) -> None:
    for name in ("run.yaml", "more.yaml"):
        (tmp_path / name).write_text("clients: []\n")
    code, _, err = command("check", "run.yaml", "--config", "more.yaml")
    assert code == 1
    assert "run.yaml is the configuration of a run, and so is --config more.yaml: give one of them" in err


def test_a_configuration_without_clients_has_nothing_to_check(command: Any, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("clients: []\n")
    code, _, err = command("check", str(tmp_path / "run.yaml"))
    assert code == 1
    assert "run.yaml has no clients: list their specs under `clients`" in err.replace("\n", " ")


def test_all_problems_of_a_client_spec_are_listed(command: Any, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    spec = write_spec(
        tmp_path,
        train={"format": "csv", "path": "train.csv"},
        test={"format": "hub", "name": "owner/none", "split": "test"},
    )
    (tmp_path / "spec.yaml").write_text((tmp_path / "spec.yaml").read_text().replace(": demo", ": owner/model"))
    code, out, err = command("check", spec, "--data-root", str(tmp_path / "here"))
    assert code == 1
    for problem in (
        "has label 'maybe' in row 2",
        "test needs 'owner/none' 'test', which is not in data.root (neither",
        "backbone 'owner/model' gives no tokenizer",
        "is fetched with `tap-flower fetch owner/model`",
        "4 problems found",
    ):
        assert problem in out
    assert "Traceback" not in out + err


@pytest.mark.parametrize(("content", "problem"), [(None, "cannot be read"), ("- 1", "holds no keys")])
def test_a_spec_that_cannot_be_read(command: Any, tmp_path: Path, content: str | None, problem: str) -> None:
    if content is not None:
        (tmp_path / "spec.yaml").write_text(content)
    code, _, err = command("check", str(tmp_path / "spec.yaml"))
    assert code == 1
    assert problem in err
