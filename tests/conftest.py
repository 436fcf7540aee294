import os
from pathlib import Path
from typing import Any

# Before anything of Hugging Face's is imported: a test that asks the hub by mistake fails at once, here as on a plane.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

import hypothesis
import pytest
import torch
from xdist.scheduler import LoadFileScheduling

# A shared machine is slow at times; no test is judged by the clock.
hypothesis.settings.register_profile("fast", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, max_examples=200)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "fast")

# As in an actor of the simulation: the last bits of a sum depend on the number of threads.
torch.set_num_threads(1)

pytest_plugins = ["tests.federations"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden-dir",
        type=Path,
        default=Path(__file__).parent / "golden" / "cases",
        help="folder with golden cases and their backbones/ (default: the committed ones)",
    )


LONGEST = "deployment", "test_static.py", "test_execute.py", "test_compute.py", "test_presets_run.py", "test_soak.py"
"""Folder and files that take longest."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest begins first, so that no worker is left with it alone at the end."""
    items.sort(key=lambda item: not {item.path.parent.name, item.path.name} & set(LONGEST))


class Scheduling(LoadFileScheduling):  # type: ignore[misc]
    """A worker takes a file whole; deployments, of a dozen processes each, come one after the other."""

    def _split_scope(self, nodeid: str) -> str:
        return "deployment" if nodeid.startswith("tests/deployment/") else str(super()._split_scope(nodeid))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduling:
    """Called by pytest-xdist."""
    return Scheduling(config, log)
