from pathlib import Path

import hypothesis
import pytest
import torch

# A shared machine is slow at times; no test is judged by the clock.
hypothesis.settings.register_profile("tap", deadline=None, derandomize=True)
hypothesis.settings.load_profile("tap")


# As in an actor of the simulation: the last bits of a sum depend on the number of threads.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden-dir",
        type=Path,
        default=Path(__file__).parent / "golden" / "cases",
        help="folder with golden cases and their backbones/ (default: the committed ones)",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The deployments first: they are one file, run one after the other, and take as long as all the rest."""
    items.sort(key=lambda item: "deployment" not in item.path.parts)
