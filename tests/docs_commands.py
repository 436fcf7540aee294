"""Whether a command of the documentation is one that its program takes; nothing is run but `--help` of other programs."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import click
import typer
from flwr.common.config import parse_config_args

from tap_flower.cli import app
from tap_flower.config import Config, load_config, options
from tap_flower.methods.registry import find_method

from .docs_blocks import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PLACEHOLDER = re.compile(r"[A-Z]+")
"""Stands for what the reader chooses, as in `--set method=NAME`."""


class WrongError(AssertionError):
    """A command that would fail; the text says why."""


class _ParsedError(Exception):
    """The arguments have been read: the program's work is not wanted."""


def check_config(preset: str = "demo", settings: Sequence[str] = ()) -> Config:
    """Whether a preset and settings are right.

    Raises:
        ConfigError: they are not.
    """
    kept = []
    for setting in settings:
        key, _, value = setting.partition("=")
        if key not in {known for known, _, _ in options()} and key.split(".")[0] != "datasets":
            raise WrongError(f"there is no option {key!r}")
        if not PLACEHOLDER.fullmatch(value):
            kept.append(setting)
    config = load_config(preset, settings=kept)
    find_method(config.method)
    return config


def tap_flower(arguments: list[str]) -> None:
    """`tap-flower`: every option and argument, the preset, and every setting."""
    command: Any = typer.main.get_command(app)
    context = click.Context(command, info_name="tap-flower")
    while isinstance(command, click.Group):
        if not arguments:
            return
        name, *arguments = arguments
        if name == "--help":
            return
        command = command.get_command(context, name)
        if command is None:
            raise WrongError(f"tap-flower has no command {name!r}")
        context = click.Context(command, info_name=name, parent=context)
    if "--help" in arguments:
        return
    values = command.make_context(command.name, list(arguments)).params
    seed = values.get("seed")
    short = {"rounds": values.get("rounds"), "seed": seed if isinstance(seed, int) else None}
    check_config(
        values.get("preset") or "demo",  # `study pairs` needs none
        [*(values.get("set_") or ()), *(f"{key}={value}" for key, value in short.items() if value is not None)],
    )


def python(arguments: list[str]) -> None:
    """`python -m MODULE …`: the module is there, and one of ours takes the arguments."""
    if arguments[:1] != ["-m"]:
        raise WrongError("only `python -m MODULE` is known here")
    _, module, *rest = arguments
    if importlib.util.find_spec(module) is None:
        raise WrongError(f"there is no module {module}")
    if module.split(".")[0] not in {"benchmarks", "tap_flower", "tools"}:
        return
    read = argparse.ArgumentParser.parse_args

    def read_only(parser: argparse.ArgumentParser, *given: Any) -> None:
        read(parser, *given)
        raise _ParsedError

    with (
        mock.patch.object(argparse.ArgumentParser, "parse_args", read_only),
        mock.patch.object(sys, "argv", [module, *rest]),
    ):
        try:
            importlib.import_module(module).main()
        except _ParsedError:
            return
        except SystemExit as error:
            raise WrongError(f"{module} does not take {rest}") from error
    raise WrongError(f"{module} reads no arguments")


def pip(arguments: list[str]) -> None:
    """`pip install` of the project, with extras that it has."""
    command, *rest = arguments
    wanted = [word for word in rest if word != "-e"]
    known = PROJECT["project"]["optional-dependencies"]
    for word in wanted:
        found = re.fullmatch(r"(?:\.|tap-flower)(?:\[([a-z,-]+)\])?", word)
        if command != "install" or found is None:
            raise WrongError("only `pip install` of the project is known here")
        if unknown := set((found[1] or "").split(",")) - known.keys() - {""}:
            raise WrongError(f"pyproject.toml has no extra {sorted(unknown)}")


def pytest(arguments: list[str]) -> None:
    """`pytest`: files and folders that there are, and markers that are registered."""
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word == "-m":
            markers = {marker.partition(":")[0] for marker in PROJECT["tool"]["pytest"]["ini_options"]["markers"]}
            if unknown := set(rest.pop(0).split()) - markers - {"not", "and", "or"}:
                raise WrongError(f"there is no marker {sorted(unknown)}")
        elif not (ROOT / word).exists():
            raise WrongError(f"there is no {word}")


@functools.cache
def _help(*command: str) -> str:
    program = Path(sys.executable).with_name(command[0])
    if not program.exists():
        raise WrongError(f"{command[0]} is not installed: pip install -e '.[ci]'")
    done = subprocess.run(
        [str(program), *command[1:], "--help"],
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise WrongError(f"`{' '.join(command)} --help` fails: {done.stderr or done.stdout}")
    return done.stdout


def other(words: int, program: str, arguments: list[str]) -> None:
    """A command of another package: its help knows every option. `words` is the length of its subcommand."""
    known = _help(program, *arguments[:words])
    for word in arguments:
        option = word.partition("=")[0]
        if option.startswith("--") and not re.search(rf"(?<![\w-]){option}(?![\w-])", known):
            raise WrongError(f"`{program} --help` does not name {option}")


def flwr(arguments: list[str]) -> None:
    """`flwr`: known options; for a run, keys of our run configuration with settings that are right."""
    other(2 if arguments[0] == "supernode" else 1, "flwr", arguments)
    for option, value in itertools.pairwise(arguments):
        if option == "--run-config" and "=" in value:
            run_config(parse_config_args([value]))


def run_config(values: Mapping[str, Any]) -> None:
    """The run configuration that `flwr run` is given."""
    if unknown := values.keys() - PROJECT["tool"]["flwr"]["app"]["config"].keys():
        raise WrongError(f"[tool.flwr.app.config] has no {sorted(unknown)}")
    check_config(str(values.get("preset", "demo")), str(values.get("set", "")).split())


PROGRAMS: Mapping[str, Callable[[list[str]], None]] = {
    "tap-flower": tap_flower,
    "python": python,
    "python3": python,
    "pip": pip,
    "pytest": pytest,
    "flwr": flwr,
    **{name: functools.partial(other, 0, name) for name in ("flower-superlink", "flower-supernode")},
    **{name: functools.partial(other, 1, name) for name in ("hf", "mkdocs", "twine")},
    **dict.fromkeys((".", "cd"), lambda arguments: None),
}


def check_command(words: list[str]) -> None:
    """Whether a command is right.

    Raises:
        WrongError: with the command, what is wrong, and what to do.
    """
    program, *arguments = words
    shown = " ".join(words)
    name = program.rsplit("/", 1)[-1]
    if name not in PROGRAMS:
        raise WrongError(
            f"`{shown}`: no rule knows {name!r}. Write ```text for what is no command, add a checker of {name!r} to "
            f"PROGRAMS in tests/docs_commands.py, or name the test that runs the block in RUN_BY of tests/test_docs.py"
        )
    try:
        PROGRAMS[name](arguments)
    except (WrongError, click.ClickException, ValueError) as error:
        message = error.format_message() if isinstance(error, click.ClickException) else str(error)
        raise WrongError(f"`{shown}`: {message}") from error
