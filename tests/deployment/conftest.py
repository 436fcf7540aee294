"""Three hospitals with files of their own: texts in a CSV file, images in folders, sentences in a JSON file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml

from client_app.app import app
from tap_flower.config import load_config
from tap_flower.data import packaged
from tap_flower.federation.in_process import InProcessGrid
from tap_flower.federation.strategy import TapStrategy

from .cluster import SETTINGS

SHAPES = ["blue circle", "red circle"]
LANGUAGES = ["en", "es", "pt", "it", "fr", "de", "id", "tr"]
ROWS = {"train": 24, "validation": 6, "test": 8}


def _task(name: str, kind: str, modality: str, domain: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "kind": kind, "modalities": [modality], "domain": domain, **more}


def _client(name: str, task: dict[str, Any], sources: dict[str, dict[str, str]]) -> dict[str, Any]:
    return {"name": name, "backbone": "demo", "tasks": [{**task, **sources}]}


def _texts(folder: Path) -> dict[str, Any]:
    sources = {}
    for split, rows in ROWS.items():
        file = folder / f"{split}.csv"
        packaged.load("names", split).select(range(rows)).select_columns(["text", "label"]).to_csv(file)
        sources[split] = {"format": "csv", "path": str(file)}
    columns = {"text": "text", "label": "label"}
    task = _task("languages", "text_classification", "text", "names", classes=LANGUAGES, columns=columns)
    return _client("ann", task, sources)


def _images(folder: Path) -> dict[str, Any]:
    sources = {}
    for split, rows in ROWS.items():
        found = packaged.load("shapes", split)
        names = found.features["label"].names
        for shape in SHAPES:
            of_shape = [number for number, label in enumerate(found["label"]) if names[label] == shape]
            for number, row in enumerate(found.select(of_shape[: rows // 2])):
                file = folder / split / shape / f"{number}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                row["image"].save(file)
        sources[split] = {"format": "imagefolder", "path": str(folder / split)}
    columns = {"image": "image", "label": "label"}
    task = _task("shapes", "image_classification", "image", "shapes", classes=SHAPES, columns=columns)
    return _client("bob", task, sources)


def _sentences(folder: Path) -> dict[str, Any]:
    sources = {}
    for split, rows in ROWS.items():
        file = folder / f"{split}.json"
        found: datasets.Dataset = packaged.load("translation", split).select(range(rows))
        file.write_text("\n".join(json.dumps({"en": row["text"], "es": row["target"]}) for row in found))
        sources[split] = {"format": "json", "path": str(file)}
    columns = {"text": "en", "target": "es"}
    return _client("cleo", _task("translation", "text_generation", "text", "translation", columns=columns), sources)


@pytest.fixture(scope="session")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Client specs: ann, bob and cleo, with one pair each."""
    made = []
    for name, make in (("ann", _texts), ("bob", _images), ("cleo", _sentences)):
        folder = tmp_path_factory.mktemp(name)
        made.append(make(folder))
    return made


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, hospitals: list[dict[str, Any]]) -> dict[str, Any]:
    """What the same run gives in one process, without its seconds."""
    folder = tmp_path_factory.mktemp("undisturbed")
    nodes = []
    for spec in hospitals:
        file = folder / f"{spec['name']}.yaml"
        file.write_text(yaml.safe_dump(spec))
        nodes.append({"client-spec": str(file), "state-dir": str(folder / "state")})
    config = load_config("demo", "", SETTINGS.split())
    results = TapStrategy(config, folder / "run").start(InProcessGrid(app, nodes, {}))
    return {key: value for key, value in results.items() if key != "seconds"}
