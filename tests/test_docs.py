"""What the documentation says is what the code does."""

from __future__ import annotations

import re
import shlex
import textwrap
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from tap_flower.cli import app
from tap_flower.config import load_config, options
from tap_flower.data.spec import FORMATS, client_spec
from tap_flower.study.plan import read_sweep

from .docs_blocks import ROOT, Block, blocks, commands, inline, pages
from .docs_commands import PROGRAMS, WrongError, check_command, check_config, run_config, tap_flower
from .docs_tables import configuration_table

RUN_BY = {
    ("docs/deploy.md", "openssl req -x509"): "test_a_deployment",
    ("docs/deploy.md", "ssh-keygen"): "test_a_deployment",
    ("docs/deploy.md", "[superlink.dep]"): "test_a_deployment",
    ("docs/plug-in.md", "--- a/pyproject.toml"): "test_a_stock_project_becomes_tap_by_a_diff_of_less_than_30_lines",
    ("docs/plug-in.md", "cd examples/quickstart"): "test_a_stock_project_becomes_tap_by_a_diff_of_less_than_30_lines",
    ("docs/plug-in.md", "from tap_flower import load_personal"): "test_what_stage_2_has_made_is_loaded_by_name",
    ("docs/add-a-method.md", "[build-system]"): "test_the_pages_package_brings_two_methods",
    ("docs/add-a-method.md", '"""FedAdam (Reddi'): "test_the_pages_package_brings_two_methods",
    ("docs/use-personal-models.md", "from tap_flower import PersonalModel"): "test_the_pages_python",
    ("docs/use-personal-models.md", "from tap_flower.personal.export import load_export"): "test_the_pages_python",
}
"""(page, how the block begins) -> the test that runs it, where that is not done here."""
SHOWS_COMMANDS = re.compile(rf"(?:\$ )?(?:{'|'.join(re.escape(name) for name in PROGRAMS if name[0].isalpha())}) ")


def check_script(block: Block, _: Path) -> None:
    """Commands: each of them is one that its program takes."""
    for words in commands(block.text):
        check_command(words)


def check_session(block: Block, _: Path) -> None:
    """Commands after a `$`, and what they print."""
    for line in block.text.splitlines():
        if line.startswith("$ "):
            check_command(shlex.split(line)[1:])


_IMAGES = {"kind": "image_generation", "modalities": ["image"], "columns": {"image": "image"}}


def check_yaml(block: Block, folder: Path) -> None:
    """A sweep, a client spec, tasks of one, services, or a configuration."""
    values = yaml.safe_load(block.text)
    task = {"name": "t", "kind": "text_generation", "modalities": ["text"], "domain": "d"}
    task |= {split: {"format": "csv", "path": "rows.csv"} for split in ("train", "test")}
    file = folder / "file.yaml"
    file.write_text(block.text)
    if isinstance(values, list):
        client_spec({"name": "x", "backbone": "demo", "tasks": values})
    elif "methods" in values:
        if "config" in values:
            (folder / values["config"]).write_text("rounds: 4\n")
        read_sweep(file, folder / "out")
    elif "tasks" in values:
        client_spec(values)
    elif "templates" in values:
        client_spec({"name": "x", "backbone": "demo", "tasks": [task | values]})
    elif values.keys() == {"image"}:
        client_spec({"name": "x", "backbone": "demo", "tasks": [task | values | _IMAGES]})
    elif "services" in values:
        for service in values["services"].values():
            check_command(shlex.split(service["command"]))
    else:
        load_config("demo", str(file))


def check_toml(block: Block, _: Path) -> None:
    """A run configuration of `flwr run`."""
    run_config(tomllib.loads(block.text))


def check_unit(block: Block, _: Path) -> None:
    """A unit of systemd: what it executes."""
    for command in re.findall(r"^ExecStart=(.*)$", block.text, re.MULTILINE):
        check_command(shlex.split(command))


def check_text(block: Block, _: Path) -> None:
    """Neither code nor commands."""
    for line in block.text.splitlines():
        if SHOWS_COMMANDS.match(line):
            raise WrongError(
                f"{line!r} looks like a command: put it into a block without a language, or after a `$` in ```console"
            )


RULES: Mapping[str, Callable[[Block, Path], None]] = {
    "": check_script,
    "console": check_session,
    "yaml": check_yaml,
    "toml": check_toml,
    "ini": check_unit,
    "text": check_text,
}
"""Language -> whether a block of it is right; ```python is run."""


def page_case(page: Path) -> Any:
    """A page; that of the site and the release is slow, since its commands come with the extra `ci`."""
    marks = [pytest.mark.slow] if page.name == "contributing.md" else []
    return pytest.param(page, marks=marks, id=str(page.relative_to(ROOT)))


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_holds_no_unresolved_conflict(page: Path) -> None:
    assert not re.search(r"^(<{7}|>{7}) ", page.read_text(), re.MULTILINE)


@pytest.mark.parametrize("page", [page_case(page) for page in pages()])
def test_every_block_is_run_or_checked(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    wrong, names = [], dict[str, Any]()
    for block in blocks(page):
        if run_by(block):
            continue
        try:
            if block.language == "python":
                exec(compile(block.text, str(block), "exec"), names)
            elif block.language in RULES:
                RULES[block.language](block, tmp_path)
            else:
                raise WrongError(
                    f"no rule knows ```{block.language}: use one of {', '.join(RULES)}, python, or add a rule"
                )
        except Exception as error:
            wrong.append(f"{block}: {type(error).__name__}: {error}")
    for code in inline(page, "tap-flower"):
        try:
            words = shlex.split(code)[1:]
            tap_flower([*words, "--help"] if all(map(str.isalpha, words)) else words)  # a command's name alone
        except Exception as error:
            wrong.append(f"{page.relative_to(ROOT)}: `{code}`: {error}")
    for setting in re.findall(r"`--set ([a-z_.]+=[^`\s]+)`", page.read_text()):
        try:
            check_config("demo", [setting] if setting != "key=value" else [])
        except Exception as error:
            wrong.append(f"{page.relative_to(ROOT)}: `--set {setting}`: {error}")
    assert not wrong, "\n".join(wrong)


def run_by(block: Block) -> str | None:
    """The test that runs a block, where RUN_BY names one."""
    found = [test for (page, begins), test in RUN_BY.items() if page == block.page and block.begins.startswith(begins)]
    return found[0] if found else None


def test_the_tests_that_run_blocks_are_there() -> None:
    there = {test for page in pages() for block in blocks(page) if (test := run_by(block))}
    assert there == set(RUN_BY.values()), "a row of RUN_BY has lost its block: remove the row"
    for page, begins in RUN_BY:
        assert any(b.begins.startswith(begins) for b in blocks(ROOT / page)), (
            f"{page} has no block {begins!r}: remove it"
        )
    assert set(RUN_BY.values()) <= defined_tests()


def defined_tests() -> set[str]:
    """The names of all test functions."""
    return {
        name for path in ROOT.glob("tests/**/test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    }


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("tap-flower simulate --round 3", "No such option"),
        ("tap-flower simulate --rounds three", "'three' is not a valid integer"),
        ("tap-flower simulate --set train.stepz=3", "there is no option 'train.stepz'"),
        ("tap-flower simulate --set train.steps=0", "train.steps = 0 is out of bounds"),
        ("tap-flower simulate --set method=tapp", "unknown method 'tapp'"),
        ("tap-flower simulate --preset demmo", "unknown preset 'demmo'"),
        ("tap-flower simulat", "has no command 'simulat'"),
        ("tap-flower report", "Missing argument 'RUN...'"),
        ("A=1 tap-flower study pair", "has no command 'pair'"),
        ("for s in 1 2; do tap-flower report x --out $s; tap-flower sweep; done", "Missing argument 'FILE'"),
        ("python -m benchmarks.cost --preset demo", "does not take"),
        ("python -m benchmarks.none", "there is no module"),
        ('pip install "tap-flower[demos]"', "has no extra"),
        ("pip install torch", "only `pip install` of the project"),
        ("pytest tests/none", "there is no tests/none"),
        ("pytest -m quick", "there is no marker"),
        pytest.param("mkdocs build --stricter", "does not name --stricter", marks=pytest.mark.slow),
        ("flwr run . --run-config 'sets=\"rounds=2\"'", r"has no \['sets'\]"),
        ("flwr run . --run-config 'set=\"rounds=0\"'", "rounds = 0 is out of bounds"),
        ("pytest && curl x", "no rule knows 'curl'. Write ```text"),
    ],
)
def test_a_wrong_command_is_found(script: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(WrongError, match=problem):
        check_script(Block("page.md", 1, "", script), tmp_path)


def test_a_command_within_text_is_found(tmp_path: Path) -> None:
    with pytest.raises(WrongError, match="looks like a command"):
        check_text(Block("page.md", 1, "text", "first\ntap-flower presets"), tmp_path)


def test_the_client_spec_of_a_node_passes_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (spec,) = [
        b for b in blocks(ROOT / "docs" / "deploy.md") if b.language == "yaml" and b.begins == "name: hospital-a"
    ]
    (tmp_path / "hospital-a.yaml").write_text(spec.text)
    done = CliRunner().invoke(app, ["check", "hospital-a.yaml"])
    assert done.exit_code == 0, done.output
    assert "no problems found" in done.output


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
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    listed = [page for section in nav for pages in section.values() for entry in pages for page in entry.values()]
    assert sorted(listed) == sorted(str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md"))


def test_the_tests_that_the_security_page_names_are_there() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "security.md").read_text()))
    assert len(named) > 20
    assert named - defined_tests() == set()


def test_the_plug_in_example_runs() -> None:
    page = (ROOT / "docs" / "plug-in.md").read_text()
    (code,) = [block.split("```")[0] for block in page.split("```python\n") if "new_server_tensors" in block]
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
    assert len(sweep.runs) == 15
    assert {run.label for run in sweep.runs} == {"tap", "tap+steps", "fedavg", "no-replacement", "fedavg+steps"}


def test_the_examples_of_client_specs_are_right() -> None:
    page = (ROOT / "docs" / "bring-your-own-data.md").read_text()
    blocks = [textwrap.dedent(block) for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)]
    assert client_spec(yaml.safe_load(blocks[0])).tasks[0].classes == ("urgent", "routine")
    tasks = [yaml.safe_load(block) for block in blocks if block.startswith("- name")]
    for task in tasks:
        client_spec({"name": "x", "backbone": "demo", "tasks": task})
    assert {source["format"] for (task,) in tasks for source in [task["test"]]} == FORMATS.keys() - {"packaged"}
