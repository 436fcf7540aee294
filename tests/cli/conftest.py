"""What the tests of commands share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tap_flower import cli
from tap_flower.core.headline import Headline
from tap_flower.report.results import results


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """Runs `tap-flower ARGUMENTS` in an empty folder: exit code, standard output, standard error."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["tap-flower", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


def finished_run(folder: Path) -> dict[str, Any]:
    models = {"server": {"loss": 2.0, "accuracy": 0.25}, "tap": {"loss": 1.0, "accuracy": 0.75}}
    pictures = {"server": {"loss": 0.125, "mse": 0.125}, "tap": {"loss": 0.5, "mse": 0.5}}
    found = results(
        preset="demo",
        method="tap",
        seed=41,
        rounds=3,
        clients={"ann": {"read": models, "paint": pictures}, "bob": {"read": {"tap": {"loss": 3.0, "accuracy": 0.5}}}},
        kinds={"read": "text_classification", "paint": "image_generation"},
        headlines={"read": Headline("accuracy", True), "paint": Headline("mse", False)},
        replacements={"ann": {"read": 2, "paint": 0}, "bob": {"read": 1}},
        bytes_={"down": 3_000_000, "up": 1_000_000, "per_component": {}},
        steps={"ann": 12, "bob": 6},
        missing={},
        marks={},
        dropped={},
        seconds={"total": 1.0},
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(found))
    return found
