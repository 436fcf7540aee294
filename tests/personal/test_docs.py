"""What docs/use-personal-models.md does in Python, on a run of the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tap_flower.personal.answers import ClassAnswer, TextAnswer
from tap_flower.personal.export import export
from tests.docs_blocks import ROOT, blocks
from tests.personal.test_model import rows


def test_the_pages_python(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs" / "demo-seed41" / "clients").mkdir(parents=True)
    (tmp_path / "runs" / "demo-seed41" / "clients" / "client-4").symlink_to(run / "clients" / "bob")
    export(run / "clients" / "ann", tmp_path / "exported", "shapes")
    first, second = (row["image"] for row in rows("questions")[:2])
    first.save(tmp_path / "shape.png")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"first": first, "second": second}
    python = [b.text for b in blocks(ROOT / "docs" / "use-personal-models.md") if b.language == "python"]
    assert len(python) == 2

    exec(python[0], names)
    assert isinstance(names["answer"], TextAnswer)
    assert [type(answer) for answer in names["answers"]] == [TextAnswer, TextAnswer]
    exec(python[1].replace("digit.png", "shape.png").replace("digits", "shapes"), names)
    assert isinstance(names["answer"], ClassAnswer)
