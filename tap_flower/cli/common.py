"""Options that several commands have, and how they print."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tap_flower import hub
from tap_flower.data.presets import fetch_command
from tap_flower.data.spec import ClientSpec
from tap_flower.errors import ConfigError

DEMO = "demo"
"""The backbone that the package holds."""

Preset = Annotated[str, typer.Option(help="Name of a preset; `tap-flower presets` lists them.")]
ConfigFile = Annotated[str, typer.Option(metavar="FILE", help="YAML file that overrides the preset.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override an option; may be repeated.")
]
DataRoot = Annotated[Path | None, typer.Option(metavar="FOLDER", help="Read hub data sets from this mirror.")]
Jobs = Annotated[int | None, typer.Option(min=1, help="Runs at once.", show_default="one per GPU or core")]


def check_downloads(specs: Sequence[ClientSpec], data_root: str) -> None:
    """Says before a run starts what it lacks where the hub cannot be reached, with the commands that fetch it.

    Args:
        specs: of its clients.
        data_root: folder with a mirror of the hub's data sets, or nothing.

    Raises:
        ConfigError: something is not here, and cannot be had.
    """
    wanted = {(spec.backbone, spec.revision, "model"): None for spec in specs if spec.backbone != DEMO}
    if not data_root:
        sources = (
            source for spec in specs for task in spec.tasks for split in task.splits.values() for source in split
        )
        wanted |= {(source.name, source.revision, "dataset"): None for source in sources if source.format == "hub"}
    if absent := hub.absent(wanted):
        names = " ".join(dict.fromkeys(name for name, _, _ in absent))
        commands = [fetch_command(name, revision, is_model=kind == "model") for name, revision, kind in absent]
        raise ConfigError(
            f"{len(absent)} of the {len(wanted)} checkpoints and data sets of this run are not on this machine, and the hub "
            f"cannot be reached: fetch them where there is a network with `tap-flower fetch {names}`, or with\n  "
            + "\n  ".join(commands)
        )


def say(console: Console, text: str) -> None:
    """Prints a line that is neither coloured nor broken where it is long."""
    console.print(text, highlight=False, soft_wrap=True)
