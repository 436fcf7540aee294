"""A federation of four small clients on the demo's data and backbone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from tap_flower.config import load_config
from tap_flower.federation.strategy import TapStrategy

from .grid import InProcessGrid


def source(name: str, split: str, start: int, stop: int) -> dict[str, Any]:
    return {"format": "packaged", "name": name, "split": split, "rows": [start, stop]}


def sources(name: str, offset: int, train: int) -> dict[str, Any]:
    return {
        "train": source(name, "train", offset, offset + train),
        "validation": source(name, "validation", offset, offset + 6),
        "test": source(name, "test", 0, 10),
    }


LANGUAGES = {
    "name": "languages",
    "kind": "text_classification",
    "modalities": ["text"],
    "domain": "names",
    "classes": ["en", "es", "pt", "it", "fr", "de", "id", "tr"],
    "columns": {"text": "text", "label": "label"},
}
TRANSLATION = {
    "name": "translation",
    "kind": "text_generation",
    "modalities": ["text"],
    "domain": "translation",
    "columns": {"text": "text", "target": "target"},
}
SHAPE_IMAGES = {
    "name": "shape_images",
    "kind": "image_generation",
    "modalities": ["image"],
    "domain": "shapes",
    "columns": {"image": "image"},
}
ANSWERS = {
    "name": "answers",
    "kind": "text_generation",
    "modalities": ["image", "text"],
    "domain": "visual_answering",
    "columns": {"image": "image", "text": "question", "target": "answer"},
}
CLIENTS = [
    {"name": "ann", "backbone": "demo", "tasks": [{**LANGUAGES, **sources("names", 0, 16)}]},
    {
        "name": "bob",
        "backbone": "demo",
        "tasks": [{**LANGUAGES, **sources("names", 20, 12)}, {**SHAPE_IMAGES, **sources("shapes", 0, 8)}],
    },
    {"name": "cleo", "backbone": "demo", "tasks": [{**ANSWERS, **sources("questions", 0, 8)}]},
    {"name": "dan", "backbone": "demo", "tasks": [{**TRANSLATION, **sources("translation", 0, 10)}]},
]
SETTINGS = [
    "rounds=2", "clients_per_round=4", "train.steps=2", "train.batch_size=4", "train.accumulation=1",
    "distill.iterations=2", "start_timeout=1", "round_timeout=60",
]  # fmt: skip


@dataclass
class Federation:
    """Everything that is needed for a run in this process."""

    folder: Path
    config_file: Path
    settings: list[str] = field(default_factory=lambda: list(SETTINGS))
    clients: int = len(CLIENTS)

    @property
    def out(self) -> Path:
        return self.folder / "run"

    def grid(self, **options: Any) -> InProcessGrid:
        run_config = {
            "preset": "demo",
            "config": str(self.config_file),
            "set": " ".join(self.settings),
            "out": str(self.out),
        }
        return InProcessGrid([{"partition-id": i} for i in range(self.clients)], run_config, **options)

    def strategy(self, resume: bool = False) -> TapStrategy:
        config = load_config("demo", str(self.config_file), self.settings)
        return TapStrategy(config, self.out, resume)


@pytest.fixture
def make_federation(tmp_path: Path) -> Callable[..., Federation]:
    made = 0

    def make(clients: list[dict[str, Any]] | None = None) -> Federation:
        nonlocal made
        made += 1
        folder = tmp_path / f"federation-{made}"
        folder.mkdir()
        file = folder / "config.yaml"
        file.write_text(yaml.safe_dump({"clients": CLIENTS if clients is None else clients}))
        return Federation(folder, file, clients=len(CLIENTS if clients is None else clients))

    return make


@pytest.fixture
def federation(make_federation: Callable[..., Federation]) -> Federation:
    return make_federation()
