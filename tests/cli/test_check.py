from __future__ import annotations

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


def test_a_configuration_is_no_client_spec(command: Any, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("clients: []\n")
    code, _, err = command("check", str(tmp_path / "run.yaml"))
    assert code == 1
    assert "run.yaml is no client spec, but the configuration of a run: give a client's own file" in err.replace(
        "\n", " "
    )


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
