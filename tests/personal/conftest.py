"""A finished run of two clients, with every kind of task; its folder is not to be changed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

from tap_flower.report.results import RESULTS
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
    """Made by one of pytest's workers for all of them."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "personal"
    folder.mkdir(exist_ok=True)
    file = folder / "config.yaml"
    settings = [*SETTINGS, "train.steps=6", "distill.iterations=3", "train.batch_size=8"]
    federation = Federation(folder, file, settings, clients=len(CLIENTS))
    with FileLock(folder / ".lock"):
        if not (federation.out / RESULTS).exists():
            file.write_text(yaml.safe_dump({"clients": CLIENTS}))
            federation.strategy().start(federation.grid())
    return federation.out
