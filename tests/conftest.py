import os
from pathlib import Path

# Before anything of Hugging Face's is imported: a test that asks the hub by mistake fails at once, here as on a plane.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

import hypothesis
import pytest
import torch

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest begins first, so that no worker is left with it alone at the end."""
    items.sort(key=lambda item: item.path.parent.name != "deployment" and item.path.name != "test_static.py")
