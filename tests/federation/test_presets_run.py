"""The paper's clients, end to end, on small data of the real form: all thirty, and a group of ten."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
import pytest
from datasets import Dataset
from transformers import AutoModel

from tap_flower.config import load_config
from tap_flower.data import sources
from tap_flower.report.events import read_events
from tap_flower.server.strategy import TapStrategy
from tests.checkpoints import tiny_flava, tiny_vilt
from tests.grid import InProcessGrid
from tests.mirror import KEYS, ROWS, write_mirror

SETTINGS = [
    "train.steps=1", "train.batch_size=2", "train.accumulation=1", "distill.iterations=1", "model.text_length=24",
    "start_timeout=1", "round_timeout=600",
]  # fmt: skip


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mirror")
    write_mirror(root)
    return root


@dataclass(frozen=True)
class Preset:
    """A preset over a tiny checkpoint and the mirror; `opened` and `read` are the data sets and checkpoints so far."""

    strategy: TapStrategy
    grid: InProcessGrid
    image_tasks: int
    opened: list[Dataset]
    read: list[str]
    checkpoint: Path

    def check_reading(self) -> None:
        """Every split was opened once, though up to thirty clients read from it four times each; the checkpoint likewise."""
        assert len(self.opened) == 2 * len(self.strategy.config.datasets) - 1  # VQA's data are of one split
        assert self.read == [str(self.checkpoint)]


Prepare = Callable[..., Preset]


@pytest.fixture
def prepare(mirror: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prepare:
    """(preset, settings) -> the preset."""

    def prepared(preset: str, *more: str) -> Preset:
        make, image_tasks = {"flava": (tiny_flava, 3), "vilt": (tiny_vilt, 1)}[preset]
        make(checkpoint := tmp_path / "checkpoint")
        known = load_config(preset).datasets
        rows = [f"datasets.{key}.rows={ROWS}" for key in KEYS if key in known]
        settings = [*SETTINGS, *rows, f"data.root={mirror}", f"backbone={checkpoint}", *more]
        sources._opened.cache_clear()
        opened, read = list[Dataset](), list[str]()
        load, load_model = datasets.load_dataset, AutoModel.from_pretrained
        monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: opened.append(load(*a, **k)) or opened[-1])
        monkeypatch.setattr(AutoModel, "from_pretrained", lambda name, **k: read.append(name) or load_model(name, **k))
        config, out = load_config(preset, "", settings), tmp_path / "run"
        run_config = {"preset": preset, "config": "", "set": " ".join(settings), "out": str(out)}
        grid = InProcessGrid([{"partition-id": number} for number in range(len(config.clients))], run_config)
        return Preset(TapStrategy(config=config, run_folder=out), grid, image_tasks, opened, read, checkpoint)

    return prepared


class Crash(Exception):
    """Ends a run after stage 1."""


def crash(*_: object) -> None:
    raise Crash


@pytest.mark.parametrize("preset", ["flava", "vilt"])
def test_a_group_of_clients_comes_together_and_one_trains(prepare: Prepare, preset: str) -> None:
    one = prepare(preset, "groups=1", "rounds=1", "clients_per_round=1")
    one.strategy.configure_personalise = crash  # type: ignore[method-assign]
    with pytest.raises(Crash):
        one.strategy.start(one.grid)
    assert len(one.strategy.roster.names) == 10
    names = one.strategy.roster.sample(1, 1)
    (event,) = [e for e in read_events(one.strategy.run_folder) if e["event"] == "round"]
    assert sorted(event["clients"]) == names
    assert one.strategy.progress.dropped == {}
    for name, report in event["clients"].items():
        assert report["losses"].keys() <= one.strategy.roster.manifests[name].reach.keys()
        assert report["losses"]
        assert all(math.isfinite(loss) for loss in report["losses"].values())
    one.check_reading()


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["flava", "vilt"])
def test_all_thirty_clients(prepare: Prepare, preset: str) -> None:
    whole = prepare(preset, "rounds=2", "clients_per_round=8")
    results = whole.strategy.start(whole.grid).summary
    assert whole.strategy.progress.dropped == {}
    assert len(results["clients"]) == 30
    assert len([task for task in results["tasks"] if "image" in task]) == whole.image_tasks
    for by_task in results["clients"].values():
        for by_model in by_task.values():
            assert set(by_model) == {"server", "server+finetune", "personal", "tap"}
            assert all(math.isfinite(metrics["loss"]) for metrics in by_model.values())
    whole.check_reading()
