"""The release: what is in it, and that the wheel works where there is no source tree."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from flwr.cli.build import build_fab_from_disk

import tap_flower
from tests.federations import CLIENTS
from tests.hub_checks import check_for_the_hub

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
APP = (
    "pyproject.toml",
    "LICENSE",
    *(f"{side}/{file}.py" for side in ("client_app", "server_app") for file in ("__init__", "app")),
)
"""What is in the Flower app."""
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def run(*command: str | Path, folder: Path, environment: dict[str, str] | None = None) -> str:
    """What a command prints; it must not fail."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with source distribution and wheel, the wheel being built from the source distribution."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, folder=ROOT)
    return folder


@pytest.fixture(scope="module")
def wheel(release: Path) -> Path:
    (found,) = release.glob("*.whl")
    return found


def test_the_version_is_one(release: Path) -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {tap_flower.__version__, citation["version"]} == {VERSION}
    versions = re.findall(r"^## \[(.*?)\](?: - \d{4}-\d\d-\d\d)?$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[:2] == ["Unreleased", VERSION]
    assert {path.name for path in release.iterdir()} == {
        f"tap_flower-{VERSION}.tar.gz",
        f"tap_flower-{VERSION}-py3-none-any.whl",
    }


def test_the_package_index_can_show_it(release: Path) -> None:
    said = run(sys.executable, "-m", "twine", "check", "--strict", *release.iterdir(), folder=release)
    assert said.count("PASSED") == 2


def test_flowers_hub_takes_it(release: Path) -> None:
    with tarfile.open(release / f"tap_flower-{VERSION}.tar.gz") as archive:
        archive.extractall(release.parent, filter="data")
    folder = (release.parent / f"tap_flower-{VERSION}").rename(release.parent / "tap-flower")
    check_for_the_hub(folder)
    with zipfile.ZipFile(io.BytesIO(build_fab_from_disk(folder))) as bundle:
        assert set(bundle.namelist()) == {*APP, ".info/CONTENT"}


def test_the_wheel_holds_the_package_and_the_app_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    package = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tap_flower").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    app = {f"tap_flower/flower_app/{name}" for name in APP}
    information = {name for name in names if name.startswith(f"tap_flower-{VERSION}.dist-info/")}
    assert names - information == package | app
    assert f"tap_flower-{VERSION}.dist-info/licenses/LICENSE" in information
    for name in (
        "py.typed",
        "assets/flava-demo/model.safetensors",
        "assets/flava-demo/tokenizer.json",
        "presets/demo.yaml",
    ):
        assert f"tap_flower/{name}" in names


def test_the_source_distribution_holds_tests_and_documentation(release: Path) -> None:
    with tarfile.open(release / f"tap_flower-{VERSION}.tar.gz") as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "tests/test_release.py",
        "docs/index.md",
        "CHANGELOG.md",
        "CITATION.cff",
        "CONTRIBUTING.md",
        "LICENSE",
    } <= names


@dataclass(frozen=True)
class Installed:
    """The wheel in an environment of its own, with this one's dependencies but not its tap_flower.

    Attributes:
        bin: of the environment.
        folder: an empty folder to work in.
    """

    bin: Path
    folder: Path

    def __call__(self, program: str, *arguments: str) -> str:
        """What a program of the environment prints."""
        hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
        environment = {name: value for name, value in os.environ.items() if name not in hidden}
        return run(self.bin / program, *arguments, folder=self.folder, environment={**environment, "COLUMNS": "160"})


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    home = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", home, folder=home)
    python = home / "bin" / "python"
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        wheel,
        folder=home,
    )
    own = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=home).strip())
    # A folder that a .pth file names is searched, but its own .pth files, an editable install's among them, are not read.
    folders = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (own / "dependencies.pth").write_text("\n".join(folders) + "\n")
    return Installed(home / "bin", tmp_path_factory.mktemp("empty"))


def test_every_module_can_be_imported_without_the_source_tree(installed: Installed) -> None:
    code = (
        "import importlib, pkgutil, sys, tap_flower\n"
        "names = [m.name for m in pkgutil.walk_packages(tap_flower.__path__, 'tap_flower.') if 'flower_app' not in m.name]\n"
        "files = [importlib.import_module(name).__file__ for name in names]\n"
        "sys.path.insert(0, str(tap_flower.run.simulation.app_folder()))\n"
        "import client_app.app, server_app.app\n"
        "print(*files, client_app.app.__file__, server_app.app.__file__, sep='\\n')\n"
        "print('searched:', *sys.path, sep='\\n')"
    )
    found, _, searched = installed("python", "-c", code).partition("searched:\n")
    assert len(found.splitlines()) > 80
    assert [file for file in found.splitlines() if not Path(file).is_relative_to(installed.bin.parent)] == []
    assert [path for path in searched.splitlines() if path and Path(path).resolve() == ROOT] == []


def test_the_command_works(installed: Installed) -> None:
    assert "demo: 12 clients" in installed("tap-flower", "presets")
    (installed.folder / "bob.yaml").write_text(yaml.safe_dump(CLIENTS[1]))
    said = installed("tap-flower", "check", "bob.yaml")
    assert "no problems found" in said
    assert "languages" in said
