"""The static checks: lint, format, types, and imports where types are not checked."""

from __future__ import annotations

import ast
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = "tap_flower", "benchmarks"
UNTYPED = sorted(
    path
    for folder in ("benchmarks", "examples")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".ipynb") and path.stem != "__init__"
)


@pytest.mark.parametrize(
    "command",
    [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]],
    ids=lambda command: "-".join(command[:2]),
)
def test_static(command: list[str]) -> None:
    program, *arguments = command
    done = subprocess.run(
        [str(Path(sys.executable).with_name(program)), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", UNTYPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_from_the_package_exist(path: Path) -> None:
    missing = []
    for node in ast.walk(ast.parse(code_of(path))):
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] in OURS:
            missing += [name for one in node.names if not exists(name := f"{node.module}.{one.name}")]
    assert missing == []


def exists(name: str) -> bool:
    """Whether there is a module of that name, or its module has it."""
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


def code_of(path: Path) -> str:
    """The Python of a module, or of a notebook's cells but for those that a shell runs."""
    if path.suffix != ".ipynb":
        return path.read_text()
    cells = ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    return "\n".join(cell for cell in cells if not cell.startswith("%%"))
