"""The command `fetch`: downloads what runs and nodes need from the hub, and converts old checkpoints."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from tap_flower.cli.common import say
from tap_flower.errors import BackboneError, ConfigError
from tap_flower.hub import CATALOGUE, answers, check_folder, fetch_data, fetch_model, is_here

if TYPE_CHECKING:
    from tap_flower.data.spec import ClientSpec

Needed = Mapping[tuple[str, str | None], str]
"""(name, revision) on the hub -> `model` or `dataset`."""


def fetch_command(
    name: Annotated[str, typer.Argument(help="A preset, a checkpoint's hub id, or a folder with pytorch_model.bin.")],
    to: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Put the checkpoint into this folder.", show_default="the hub's cache"),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Take this commit, tag or branch.")] = None,
) -> None:
    """Download what a preset needs, or one checkpoint; convert pytorch_model.bin to safetensors."""
    from tap_flower.config import client_specs, load_config, presets

    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "0"  # before the hub's library is imported
    console = Console()
    if name not in presets():
        try:
            folder = fetch_model(name, revision, to)
        except BackboneError as error:
            is_preset = "" if "/" in name or Path(name).exists() else f" (presets are {', '.join(presets())})"
            raise BackboneError(f"{error}{is_preset}") from error
        say(console, f"{name} is in {folder}")
        if str(folder) != name and (to is not None or Path(folder).parent == Path()):
            say(console, f"a client spec says: backbone: {folder.resolve()}")
        return
    if to is not None or revision is not None:
        raise ConfigError(f"{name!r} is a preset, which says itself what it needs: leave --to and --revision out")
    needed = hub_names(client_specs(load_config(name)))
    for number, ((wanted, commit), kind) in enumerate(needed.items(), 1):
        size = CATALOGUE[wanted].megabytes if wanted in CATALOGUE else None
        say(console, f"{number} of {len(needed)}: {wanted}" + (f", {size:,} MB" if size else ""))
        fetch_model(wanted, commit) if kind == "model" else fetch_data(wanted, commit)
    say(console, f"all that preset {name!r} needs is here")


def hub_names(specs: Iterable[ClientSpec]) -> Needed:
    """Lists the checkpoints and data sets that clients read from the hub."""
    needed: dict[tuple[str, str | None], str] = {}
    for spec in specs:
        if spec.backbone != "demo" and not Path(spec.backbone).exists():
            needed[spec.backbone, spec.revision] = "model"
        for source in (source for task in spec.tasks for sources in task.splits.values() for source in sources):
            if source.format == "hub":
                needed[source.name, source.revision] = "dataset"
    return needed


def check_fetched(specs: Iterable[ClientSpec], mirror: str, remedy: str) -> None:
    """Checks, before a run starts, that what its clients read from the hub is here or can be downloaded.

    Args:
        specs: of the clients.
        mirror: folder that data sets are read from in place of the hub; nothing without one.
        remedy: command that fetches it.

    Raises:
        ConfigError: the hub does not answer, and something is not here.
        BackboneError: a client's backbone is the path of a folder that is not there.
    """
    specs = list(specs)
    for spec in specs:
        check_folder(spec.backbone)
    needed = {key: kind for key, kind in hub_names(specs).items() if not (mirror and kind == "dataset")}
    lacking = [name for (name, revision), kind in needed.items() if not is_here(name, revision, kind)]
    if lacking and not answers():
        raise ConfigError(
            f"{', '.join(lacking)} must be fetched, and the hub does not answer: run `{remedy}` with a network"
        )
