"""An exported task computes what the client's model computes, and needs nothing but its folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
from huggingface_hub import ModelCard
from safetensors import safe_open

from tap_flower.client.description import DESCRIPTION, read_description
from tap_flower.errors import PersonalError, StorageError
from tap_flower.hub import demo_folder
from tap_flower.models import load
from tap_flower.personal.export import card, export, load_export
from tests.personal.test_personal_model import rows

INPUTS: dict[str, dict[str, Any]] = {
    "shapes": {"image": "image"},
    "shape_images": {"image": "image"},
    "languages": {"text": "text"},
    "answers": {"image": "image", "text": "question"},
}
TASKS = {"shapes": ("ann", "shapes"), "shape_images": ("ann", "shapes"), "languages": ("bob", "names"),
         "answers": ("bob", "questions")}  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_an_export_answers_as_the_model_does(
    run: Path, tmp_path: Path, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, data = TASKS[task]
    inputs = {name: [row[column] for row in rows(data)] for name, column in INPUTS[task].items()}
    expected = export(run / "clients" / client, tmp_path / "out", task, run=run).predict(task, **inputs)

    monkeypatch.setattr(load, "load_backbone", None)  # the checkpoint is not asked for
    exported = load_export(tmp_path / "out")
    assert list(exported.tasks) == [task]
    for one, other in zip(exported.predict(task, **inputs), expected, strict=True):
        if task == "answers":
            assert one.text == other.text
        elif task == "shape_images":
            assert one.mse == pytest.approx(other.mse, rel=1e-4)
        else:
            assert one.label == other.label
            assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        names = list(file.keys())
        assert file.metadata() == {"format": "pt"}
    assert not [name for name in names if name.endswith((".A", ".B"))]
    other_modality = {"shapes": "text_layers", "shape_images": "text_layers", "languages": "image_layers"}.get(task)
    assert not [name for name in names if other_modality and other_modality in name]


def test_the_model_card_is_one_of_the_hubs_and_has_the_clients_metrics(run: Path, tmp_path: Path) -> None:
    export(run / "clients" / "bob", tmp_path / "with", "languages", "server", run)
    card = ModelCard.load(tmp_path / "with" / "README.md")
    found = json.loads((run / "results.json").read_text())["clients"]["bob"]["languages"]["server"]
    assert card.data.eval_results is not None
    assert {result.metric_type: result.metric_value for result in card.data.eval_results} == found
    assert (card.data.license, card.data.pipeline_tag) == ("apache-2.0", "text-classification")
    assert f"| accuracy | {found['accuracy']:.4f} |" in card.text
    assert "Classes: en, es, pt, it, fr, de, id, tr." in card.text
    assert 'model.predict("languages", text=...)' in card.text

    export(run / "clients" / "bob", tmp_path / "without", "answers")
    card = ModelCard.load(tmp_path / "without" / "README.md")
    assert card.data.eval_results is None
    assert card.data.pipeline_tag == "visual-question-answering"
    assert "Metrics" not in card.text
    assert 'model.predict("answers", image=..., text=...)' in card.text


def test_an_export_does_not_say_where_the_backbone_lies(run: Path, tmp_path: Path) -> None:
    local, client = tmp_path / "home" / "anna" / "flava", tmp_path / "client"
    shutil.copytree(demo_folder(), local)
    shutil.copytree(run / "clients" / "ann", client)
    description = json.loads((client / DESCRIPTION).read_text())
    (client / DESCRIPTION).write_text(json.dumps({**description, "backbone": str(local)}))
    export(client, tmp_path / "out", "shapes")
    for file in ("README.md", "config.json"):
        text = (tmp_path / "out" / file).read_text()
        assert "anna" not in text
        assert "flava" in text
    described = msgspec.structs.replace(read_description(client), backbone="owner/unlisted")
    assert ModelCard(card(described, "shapes", "tap", {})).data.base_model == "owner/unlisted"


def test_what_cannot_be_exported_or_loaded_is_told(run: Path, tmp_path: Path) -> None:
    folder = run / "clients" / "ann"
    with pytest.raises(PersonalError, match=r"is not empty: give another folder"):
        export(folder, folder, "shapes")
    with pytest.raises(PersonalError, match=r"has no task 'shape': use one of shapes, shape_images"):
        export(folder, tmp_path / "out", "shape")
    assert not (tmp_path / "out").exists()
    with pytest.raises(StorageError, match=r"config.json cannot be read"):
        load_export(folder)
    export(folder, tmp_path / "out", "shapes")
    assert str(demo_folder()) not in (tmp_path / "out" / "config.json").read_text()
    with pytest.raises(PersonalError, match=r"device 'gpu' cannot be used \(.*\): give cpu, cuda or cuda:1"):
        load_export(tmp_path / "out", "gpu")
    shutil.copy(folder / "tap.safetensors", tmp_path / "out" / "model.safetensors")
    with pytest.raises(StorageError, match=r"is not what its config.json says: .* tensors are missing or"):
        load_export(tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text('{"model": "tap"}')
    with pytest.raises(StorageError, match=r"config.json is damaged, or was not written by `tap-flower export`"):
        load_export(tmp_path / "out")
