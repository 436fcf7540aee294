"""Options shared by several commands, and how commands print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tap_flower.run.resources import CLUSTER


def _without_contradictions(settings: list[str] | None) -> list[str] | None:
    """Refuses settings that give one option two values."""
    if settings and len(settings) > 1:
        from tap_flower.config import check_contradictions  # it takes long to import

        check_contradictions(settings)
    return settings


Preset = Annotated[str, typer.Option(help="Start from this preset; `tap-flower presets` lists them.")]
ConfigFile = Annotated[str, typer.Option(metavar="FILE", help="Override the preset by this YAML file.")]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        callback=_without_contradictions,
        help="Override one option; may be repeated.",
    ),
]
DataRoot = Annotated[Path | None, typer.Option(metavar="FOLDER", help="Read hub data sets from this mirror.")]
CpusPerRun = Annotated[
    int | None, typer.Option(min=1, help="Give each run this many cores.", show_default="all cores, shared by the runs")
]
GpusPerRun = Annotated[
    float | None,
    typer.Option(min=0.0, help="Give each run this many GPUs, such as 0.5.", show_default="1 where there are any"),
]
RayAddress = Annotated[
    str,
    typer.Option(
        "--ray",
        envvar=CLUSTER,
        metavar="ADDRESS",
        help="Join a Ray cluster: HOST:PORT, auto, or local for this machine.",
    ),
]


def say(console: Console, text: str) -> None:
    """Prints a line without highlighting and without breaking it."""
    console.print(text, highlight=False, soft_wrap=True)
