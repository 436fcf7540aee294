"""The house's rules: who may import whom, and what an import pulls in."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_import_contracts() -> None:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


NODES_AND_SERVERS = {
    "client_app.app": {"torch", "transformers", "datasets", "ray"},
    "tap_flower.server.strategy": {"transformers", "datasets", "ray"},
    "server_app.app": {"transformers", "datasets", "ray"},
}
MODELS = {
    "tap_flower": {"torch", "flwr", "transformers", "datasets"},
    "tap_flower.cli": {"torch", "flwr", "httpx", "transformers", "datasets", "ray", "gradio"},
    "tap_flower.core.replacement": {"flwr", "transformers", "datasets", "omegaconf", "ray"},
    "tap_flower.core.averaging": {"flwr", "transformers", "datasets", "omegaconf", "ray"},
    "tap_flower.core.objectives": {"flwr", "transformers", "datasets", "omegaconf", "ray"},
    "tap_flower.models.model": {"flwr", "datasets", "omegaconf", "ray"},
    "tap_flower.personal.personal_model": {"flwr", "ray", "gradio"},
}


@pytest.mark.parametrize("modules", [NODES_AND_SERVERS, MODELS], ids=["nodes and servers", "models"])
def test_an_import_pulls_in_only_what_its_layer_may_use(modules: dict[str, set[str]]) -> None:
    """One after the other in a process, since each may use what those before it may."""
    code = (
        "import importlib, sys\n"
        f"for module, forbidden in {modules!r}.items():\n"
        "    importlib.import_module(module)\n"
        "    for name in forbidden & sys.modules.keys(): print(module, name)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == ""


def test_nothing_is_pickled() -> None:
    for path in [
        *(ROOT / "tap_flower").rglob("*.py"),
        *(ROOT / "client_app").glob("*.py"),
        *(ROOT / "server_app").glob("*.py"),
    ]:
        text = path.read_text()
        for word in (
            "import pickle",
            "torch.save(",
            "allow_pickle",
            "import cloudpickle",
            "trust_remote_code=True",
        ):
            assert word not in text, f"{path}: {word}"
