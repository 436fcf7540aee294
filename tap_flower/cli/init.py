"""The command `init`: writes a first client spec for a folder or a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.markup import escape

from tap_flower.cli.common import say
from tap_flower.cli.guess import guessed_task
from tap_flower.errors import SpecError

_COMMENTS = {
    "name": "clients share a task, and its head, by this name: agree on it with the others",
    "kind": "image_classification, text_classification, image_generation or text_generation",
    "domain": "of the data; each has experts of its own",
    "columns": "role -> column; see docs/bring-your-own-data.md for templates",
    "classes": "in an order on which all clients of the task agree",
    "train": "rows whose hash over `by` lies in `part`: name the patient's column there, if there is one",
}


def init_command(
    data: Annotated[Path, typer.Argument(metavar="FOLDER|FILE", help="A folder, or a CSV, JSON or Parquet file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Write the client spec to this file.")] = Path("client.yaml"),
    name: Annotated[str, typer.Option(help="Name the client.")] = "client-1",
    backbone: Annotated[str, typer.Option(help="Use this backbone: demo, a local folder, or a hub id.")] = "demo",
) -> None:
    """Write a client spec for your own data, with comments; run `tap-flower check` next."""
    from tap_flower.data.spec import NAME
    from tap_flower.files import write_atomically

    if not NAME.fullmatch(name):
        raise SpecError(f"--name {name!r}: use letters, digits, '-' and '_', at most 64")
    if out.exists():
        raise SpecError(f"{out} is there already: give another file with --out, or remove it")
    console = Console()
    task = guessed_task(data.resolve(), lambda words: say(console, f"[yellow]{escape(words)}"))
    write_atomically(out, spec_text(name, backbone, task).encode())
    say(
        console,
        f"{out}: task {task['name']!r}, {task['kind']}; clients share a task by its name; read it, "
        f"change what is wrong, then: tap-flower check {out}",
    )


def spec_text(client: str, backbone: str, task: Mapping[str, Any]) -> str:
    """Writes a client spec as YAML, with comments."""
    lines = [
        "# A client spec, made by `tap-flower init`. Read it, change what is wrong, then run `tap-flower check`.",
        f"name: {_flow(client)}",
        f"backbone: {_flow(backbone)}  # demo, a local folder, or a hub id",
        "tasks:",
    ]
    for number, (key, value) in enumerate(task.items()):
        if key in _COMMENTS and (key != "train" or "part" in value):
            lines.append(f"    # {_COMMENTS[key]}")
        if key == "train" and "encoding" in value:
            lines.append("    # the encoding is a guess: look at the texts that `tap-flower check` shows")
        lines.append(("  - " if number == 0 else "    ") + f"{key}: {_flow(value)}")
    return "\n".join(lines) + "\n"


def _flow(value: Any) -> str:
    """Writes a value as YAML in one line."""
    written = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, sort_keys=False, width=float("inf"))
    return str(written).removesuffix("...\n").rstrip("\n")
