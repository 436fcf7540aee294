"""`tap-flower fetch`, and that `simulate` looks for what it needs before anything starts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file

from tap_flower import hub
from tap_flower.cli import fetch
from tap_flower.cli.fetch import hub_names
from tap_flower.config import client_specs, load_config
from tap_flower.hub import demo_folder


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Stands for the hub: every model is the demo's with pickled weights. Gives what was downloaded."""
    folder = tmp_path / "hub"
    shutil.copytree(demo_folder(), folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    asked: list[tuple[str, dict[str, Any]]] = []

    def download(name: str, **options: Any) -> str:
        if options.get("local_files_only"):
            raise OSError("not here")
        asked.append((name, options))
        to = options.get("local_dir")
        if to is not None:
            shutil.copytree(folder, to)
        return str(to or folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(
        huggingface_hub.HfApi, "list_repo_files", lambda *_, **__: [path.name for path in folder.iterdir()]
    )
    return asked


def test_a_pickled_checkpoint_is_fetched_and_converted(served: Any, command: Any, tmp_path: Path) -> None:
    code, out, err = command("fetch", "owner/old", "--to", "here")
    assert code == 0, err
    assert (tmp_path / "here" / "model.safetensors").exists()
    assert f"backbone: {tmp_path / 'here'}" in out
    (_, options), *_ = served
    assert "pytorch_model*.bin*" in options["allow_patterns"]


def test_a_preset_is_fetched_whole(served: Any, command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr(fetch, "fetch_model", lambda name, revision: asked.append((name, "model")))
    monkeypatch.setattr(fetch, "fetch_data", lambda name, revision: asked.append((name, "dataset")))
    code, out, err = command("fetch", "flava")
    assert code == 0, err
    needed = hub_names(client_specs(load_config("flava")))
    assert asked == [(name, kind) for (name, _), kind in needed.items()]
    assert ("facebook/flava-full", "model") in asked
    assert ("sh0416/ag_news", "dataset") in asked
    assert f"1 of {len(needed)}: facebook/flava-full, 1,220 MB" in out
    assert "leave --to and --revision out" in command("fetch", "flava", "--to", "x")[2]


def test_a_simulation_looks_for_what_it_needs_first(
    served: Any, command: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(fetch, "answers", lambda: False)
    code, _, err = command("simulate", "--preset", "flava")
    assert code == 1
    assert "facebook/flava-full" in err
    assert "run `tap-flower fetch flava` with a network" in err
    assert not (tmp_path / "runs").exists()


def test_a_hub_that_does_not_answer_is_one_line(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no network\nand more")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", refuse)
    code, out, err = command("fetch", "owner/old")
    assert (code, err.strip()) == (1, "error: owner/old cannot be downloaded from the hub: no network")
    assert "Traceback" not in out
    assert hub.DEMO == "demo"


def test_a_damaged_checkpoint_is_told_without_advice_to_run_it(command: Any, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "pytorch_model.bin").write_bytes(b"x")
    code, _, err = command("fetch", "old")
    assert (code, "pytorch_model.bin is damaged, or holds other things than tensors: get another one" in err) == (
        1,
        True,
    )
    assert "weights_only" not in err


def test_a_preset_that_is_misspelt_is_told(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("404")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", refuse)
    assert "(presets are demo, flava" in command("fetch", "flawa")[2]
