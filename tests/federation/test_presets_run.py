"""The paper's thirty clients, end to end, on small data of the real form."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoModel

from tap_flower.config import load_config
from tap_flower.data import sources
from tap_flower.federation.strategy import TapStrategy
from tests.checkpoints import tiny_flava, tiny_vilt
from tests.mirror import KEYS, ROWS, write_mirror

from .grid import InProcessGrid

CLIENTS = 30
SETTINGS = [
    "rounds=2", "clients_per_round=8", "train.steps=1", "train.batch_size=2", "train.accumulation=1",
    "distill.iterations=1", "model.text_length=24", "start_timeout=1", "round_timeout=600",
]  # fmt: skip


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mirror")
    write_mirror(root)
    return root


@pytest.mark.parametrize(("preset", "make", "image_tasks"), [("flava", tiny_flava, 3), ("vilt", tiny_vilt, 1)])
def test_all_thirty_clients(
    preset: str,
    make: Callable[[Path], None],
    image_tasks: int,
    mirror: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make(tmp_path / "checkpoint")
    known = load_config(preset).datasets
    settings = [
        *SETTINGS,
        *(f"datasets.{key}.rows={ROWS}" for key in KEYS if key in known),
        f"data.root={mirror}",
        f"backbone={tmp_path / 'checkpoint'}",
    ]
    sources._opened.cache_clear()
    opened: list[Dataset] = []
    load = sources._load
    monkeypatch.setattr(sources, "_load", lambda *a, **k: opened.append(load(*a, **k)) or opened[-1])
    read: list[str] = []
    load_model = AutoModel.from_pretrained
    monkeypatch.setattr(AutoModel, "from_pretrained", lambda name, **k: read.append(name) or load_model(name, **k))
    out = tmp_path / "run"
    run_config = {"preset": preset, "config": "", "set": " ".join(settings), "out": str(out)}
    grid = InProcessGrid([{"partition-id": number} for number in range(CLIENTS)], run_config)
    strategy = TapStrategy(load_config(preset, "", settings), out)
    results = strategy.start(grid)

    assert strategy.progress.dropped == 0
    assert len(results["clients"]) == CLIENTS
    assert len([task for task in results["tasks"] if "image" in task]) == image_tasks
    for by_task in results["clients"].values():
        for by_model in by_task.values():
            assert set(by_model) == {"server", "server+finetune", "personal", "tap"}
            assert all(math.isfinite(metrics["loss"]) for metrics in by_model.values())
    # Every split was opened once, though ten to thirty clients read from it, four times each.
    assert len(opened) == 2 * len(known) - 1  # training and test data of VQA are one split
    assert read == [str(tmp_path / "checkpoint")]  # and the checkpoint once
