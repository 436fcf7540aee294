"""What `tap-flower --help` says: commands in the order of use and in groups, and something about every option."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import click
import typer

from tap_flower.cli import app

GROUPS = {
    "Simulate": ["presets", "fetch", "simulate", "report"],
    "Use the models": ["predict", "export", "demo"],
    "Compare": ["sweep", "study"],
    "Deploy": ["init", "check", "node", "restore"],
}


def leaves(command: Any) -> Iterator[Any]:
    """The commands below a group."""
    if isinstance(command, click.Group):
        for below in command.commands.values():
            yield from leaves(below)
    else:
        yield command


def test_the_commands_are_in_the_order_of_use_and_in_groups() -> None:
    commands: Any = typer.main.get_command(app)
    found: dict[str, list[str]] = {}
    for name, command in commands.commands.items():
        found.setdefault(command.rich_help_panel, []).append(name)
    assert found == GROUPS
    assert list(found)[:2] == ["Simulate", "Use the models"]


def test_every_command_and_option_has_a_sentence_that_begins_with_a_verb() -> None:
    nouns = {"the", "a", "an", "of", "what", "which", "folder", "number", "file", "port", "address"}
    for command in leaves(typer.main.get_command(app)):
        options = [param for param in command.params if isinstance(param, click.Option) and param.name != "help"]
        for text in [command.help, *(option.help for option in options)]:
            assert text, command.name
            assert text.endswith((".", "…")), text
            assert text.split()[0].lower() not in nouns, text


def test_help_is_told_without_torch() -> None:
    code = "import sys, tap_flower.cli; sys.exit('torch' in sys.modules or 'flwr' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
