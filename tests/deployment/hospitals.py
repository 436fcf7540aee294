"""Three hospitals with files of their own: texts in a CSV file, images in folders, sentences in a JSON file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets

from tap_flower.data import packaged

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
        found: datasets.Dataset = packaged.load("dates", split).select(range(rows))
        file.write_text("\n".join(json.dumps({"written": row["text"], "day": row["target"]}) for row in found))
        sources[split] = {"format": "json", "path": str(file)}
    columns = {"text": "written", "target": "day"}
    return _client("cleo", _task("dates", "text_generation", "text", "dates", columns=columns), sources)


def make_hospitals(folder: Path) -> list[dict[str, Any]]:
    """Client specs: ann, bob and cleo, with one pair each, and their files in the folder."""
    made = []
    for name, make in (("ann", _texts), ("bob", _images), ("cleo", _sentences)):
        (folder / name).mkdir(parents=True)
        made.append(make(folder / name))
    return made
