"""What the documentation says is what the code does."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import yaml

from tap_flower.config import options
from tap_flower.data.spec import FORMATS, client_spec
from tap_flower.sweeps.plan import read_sweep
from tests.docs_tables import configuration_table

ROOT = Path(__file__).parent.parent


def test_the_configuration_page_is_generated_from_the_dataclasses() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert configuration_table() in page, "run `python -m tests.docs_tables` to write docs/configuration.md again"
    assert all(f"`{key}`" in page for key, _, _ in options())


def test_the_readmes_two_commands() -> None:
    lines = [
        line.strip() for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("pip install -e")
    ]
    assert lines == ['pip install -e ".[demo]" && tap-flower simulate', 'pip install -e ".[demo,test]" && pytest']
    assert "\npytest\n" in (ROOT / ".ci" / "run").read_text()


def test_every_page_is_in_the_navigation() -> None:
    listed = {page for entry in yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"] for page in entry.values()}
    assert listed == {path.name for path in (ROOT / "docs").glob("*.md")}


def test_the_tests_that_the_security_page_names_are_there() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "security.md").read_text()))
    defined = {
        name for path in ROOT.glob("tests/**/test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    assert len(named) > 20
    assert named - defined == set()


def test_the_plug_in_example_runs() -> None:
    page = (ROOT / "docs" / "plug-in.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["replaced"] == {"encoder.weight", "encoder.bias", "head.weight", "head.bias"}
    assert names["losses"][0]["triage"] < names["losses"][1]["triage"]
    for name, value in names["new_server_tensors"].items():
        assert (value - names["server_copy"].get_parameter(name)).abs().max() < 1e-6


def test_the_example_of_a_sweep_is_right(tmp_path: Path) -> None:
    block = (ROOT / "docs" / "sweeps.md").read_text().split("```yaml\n")[1].split("```")[0]
    (tmp_path / "sweep.yaml").write_text(block)
    (tmp_path / "clients.yaml").write_text("rounds: 4\n")
    sweep = read_sweep(tmp_path / "sweep.yaml", tmp_path / "out")
    assert len(sweep.runs) == 9
    assert {run.label for run in sweep.runs} == {"tap", "fedavg", "no-replacement"}


def test_the_examples_of_client_specs_are_right() -> None:
    page = (ROOT / "docs" / "bring-your-own-data.md").read_text()
    blocks = [textwrap.dedent(block) for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)]
    assert client_spec(yaml.safe_load(blocks[0])).tasks[0].classes == ("urgent", "routine")
    tasks = [yaml.safe_load(block) for block in blocks if block.startswith("- name")]
    for task in tasks:
        client_spec({"name": "x", "backbone": "demo", "tasks": task})
    assert {source["format"] for (task,) in tasks for source in [task["test"]]} == FORMATS.keys() - {"packaged"}
