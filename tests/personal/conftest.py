"""A finished run of two clients, with every kind of task; its folder is not to be changed."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.federations import ANSWERS, LANGUAGES, SETTINGS, SHAPE_IMAGES, Federation, sources

SHAPES = {
    "name": "shapes",
    "kind": "image_classification",
    "modalities": ["image"],
    "domain": "shapes",
    "classes": 24,
    "columns": {"image": "image", "label": "label"},
}
CLIENTS = [
    {
        "name": "ann",
        "backbone": "demo",
        "tasks": [{**SHAPES, **sources("shapes", 0, 24)}, {**SHAPE_IMAGES, **sources("shapes", 0, 24)}],
    },
    {
        "name": "bob",
        "backbone": "demo",
        "tasks": [{**LANGUAGES, **sources("names", 0, 32)}, {**ANSWERS, **sources("questions", 0, 32)}],
    },
]


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("personal")
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump({"clients": CLIENTS}))
    settings = [*SETTINGS, "train.steps=6", "distill.iterations=3", "train.batch_size=8"]
    federation = Federation(folder, file, settings, clients=len(CLIENTS))
    federation.strategy().start(federation.grid())
    return federation.out
