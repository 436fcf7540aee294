"""A sweep over a client of six examples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.federations import LANGUAGES, sources

SETTINGS = {
    "rounds": 2, "clients_per_round": 2, "train.steps": 2, "train.batch_size": 4, "train.accumulation": 1,
    "distill.iterations": 2, "start_timeout": 1,
}  # fmt: skip


@pytest.fixture
def write_sweep(tmp_path: Path) -> Any:
    def write(**values: Any) -> Path:
        clients = [
            {"name": name, "backbone": "demo", "tasks": [{**LANGUAGES, **sources("names", first, 8)}]}
            for name, first in (("ann", 0), ("bob", 20))
        ]
        (tmp_path / "clients.yaml").write_text(yaml.safe_dump({"clients": clients}))
        file = tmp_path / "sweep.yaml"
        settings = {**SETTINGS, **values.pop("set", {})}
        file.write_text(yaml.safe_dump({"config": "clients.yaml", "set": settings, **values}, sort_keys=False))
        return file

    return write
