"""The commands for a client's own machine: `check`, `node`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from tap_flower.cli.common import ConfigFile, DataRoot, Preset, Settings, say
from tap_flower.errors import BackboneError, ConfigError
from tap_flower.plain import counted
from tap_flower.run.supernode import NodeLaunch
from tap_flower.run.supernode import start as start_node

if TYPE_CHECKING:
    from tap_flower.config import Config  # it takes long to import


def check_command(
    spec: Annotated[
        Path,
        typer.Argument(help="The client spec that a node will be given, or a run's configuration with its clients."),
    ],
    preset: Preset = "demo",
    config: ConfigFile = "",
    set_: Settings = None,
    data_root: DataRoot = None,
    json_: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write what was found to this file.")
    ] = None,
) -> None:
    """Check client specs: read all their data, list every problem, and show what the model gets."""
    from tap_flower.config import client_specs, load_config, read_yaml, spec_values
    from tap_flower.files import write_json
    from tap_flower.server.likely_mistakes import one_list_of_classes

    console = Console()
    run, found = load_config(preset, config, tuple(set_ or ())), list[dict[str, Any]]()
    try:
        values = read_yaml(spec, "client spec")
        is_run = "clients" in values
        if is_run and config:
            raise ConfigError(f"{spec} is the configuration of a run, and so is --config {config}: give one of them")
        if is_run:  # its own settings count, as they do in `simulate`
            run = load_config(preset, str(spec), tuple(set_ or ()))
            if not run.clients:
                raise ConfigError(f"{spec} has no clients: list their specs under `clients`")
    except ConfigError as error:
        if json_ is None:
            raise
        write_json(json_, _nothing(None) | {"problems": [str(error)]})
        _tell(console, [str(error)], [])
    if data_root is not None:
        run.data.root = str(data_root.resolve())
    for client in spec_values(run) if is_run else [values]:
        if is_run and isinstance(client, Mapping):
            say(console, f"[bold]client {escape(str(client.get('name')))}")
        found.append(_checked(console, client, run))
    names = Counter(one["client"] for one in found)
    for one in found:
        if one["client"] is not None and names[one["client"]] > 1:
            one["problems"].append(f"two clients are named {one['client']!r}: give every client its own name")
    if is_run and not any(one["problems"] for one in found):
        try:
            found[0]["notes"] += one_list_of_classes(client_specs(run))
        except ConfigError as error:  # what each may have, and not beside the other
            found[0]["problems"].append(str(error))
    if json_ is not None:
        write_json(json_, {"clients": found} if is_run else found[0])
    _tell(console, *(list(dict.fromkeys(chain(*(one[kind] for one in found)))) for kind in ("problems", "notes")))
    console.print("no problems found")


def _nothing(name: Any) -> dict[str, Any]:
    """What is known of a client before its spec is read, in the form of `--json`."""
    return {"client": name, "problems": [], "notes": [], "tasks": {}}


def _checked(console: Console, values: Any, run: Config) -> dict[str, Any]:
    """Checks a client spec and its data, and prints what the model gets; returns what was found."""
    from tap_flower.client.client_model import exchanged
    from tap_flower.data.check import Problem, check_data
    from tap_flower.data.images import with_image_forms
    from tap_flower.data.spec import SPLITS, read_spec
    from tap_flower.report.terminal_tables import data_table, example_table, exchange_line

    found = _nothing(values.get("name") if isinstance(values, Mapping) else None)
    client, errors = read_spec(values)
    problems = [Problem(str(error)) for error in errors]
    if client is not None:
        with console.status("reading the data"):
            summaries, wrong = check_data(client, run.model.text_length, run.seed, run.data.root, run.needs_validation)
        problems += wrong
        for task in client.tasks:
            splits = {one.split: one.plain() for one in summaries if one.task == task.name}
            found["tasks"][task.name] = {split: splits.get(split, {}) for split in SPLITS}
        console.print(data_table(summaries, run.model.text_length))
        console.print(example_table(summaries))
        try:
            say(console, exchange_line(exchanged(with_image_forms(client), run.model)))
        except BackboneError as error:
            problems.append(Problem(str(error)))
    for kind, is_note in (("problems", False), ("notes", True)):
        found[kind] = list(dict.fromkeys(str(one) for one in problems if one.is_note is is_note))
    return found


def node_command(
    spec: Annotated[Path, typer.Argument(help="The client spec.")],
    superlink: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Connect to the server's SuperLink at this address.")
    ],
    state_dir: Annotated[Path, typer.Option(help="Keep the client's models in this folder, which they never leave.")],
    root_certificates: Annotated[
        Path | None,
        typer.Option(help="Trust this certificate authority (PEM file).", show_default="the system's authorities"),
    ] = None,
    key: Annotated[
        Path | None, typer.Option(help="Identify this node by its private key, where the SuperLink asks for one.")
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Connect without TLS, for a trial on one machine.")
    ] = False,
    port: Annotated[
        int | None, typer.Option(help="Use this port for the node's own processes.", show_default="a free one")
    ] = None,
    data_root: DataRoot = None,
    meteor: Annotated[bool, typer.Option("--meteor", help="Compute METEOR of generated texts.")] = False,
    bertscore: Annotated[str, typer.Option(metavar="MODEL", help="Compute BERTScore of generated texts.")] = "",
    compile_: Annotated[
        bool, typer.Option("--compile", help="Run models through torch.compile; needs a C++ compiler.")
    ] = False,
    loader_workers: Annotated[
        int | None,
        typer.Option(
            min=0, help="Read data ahead of training with this many threads.", show_default="4 with a GPU, else 0"
        ),
    ] = None,
    keep_best: Annotated[
        bool,
        typer.Option(
            "--keep-best", help="Keep also the state with the best validation scores; `restore --best` goes back to it."
        ),
    ] = False,
    limit: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=N",
            help="Refuse more than N steps, batch_size, text_length, rounds or seconds; may be repeated.",
        ),
    ] = None,
) -> None:
    """Run a client on this machine: check its spec and data, then join the server as a Flower SuperNode."""
    from tap_flower.client.text_metrics import missing
    from tap_flower.config import Model, read_yaml
    from tap_flower.data.check import Problem, check_data
    from tap_flower.data.spec import read_spec

    console = Console()
    launch = NodeLaunch(
        spec, superlink, state_dir, root_certificates, key, insecure, port, data_root, meteor, bertscore, compile_,
        loader_workers, keep_best, limit or (),
    )  # fmt: skip
    launch.command()  # what is wrong with it is said before all data are read
    client, errors = read_spec(read_yaml(spec, "client spec"))
    problems = [Problem(str(error)) for error in errors]
    if client is not None:
        with console.status("reading the data"):
            root = "" if data_root is None else str(data_root.resolve())
            problems += check_data(client, Model().text_length, seed=0, root=root)[1]
    for problem in missing(meteor=meteor, bertscore=bertscore):
        say(console, f"[yellow]{escape(problem)}")
    _tell(console, *([str(one) for one in problems if one.is_note is is_note] for is_note in (False, True)))
    start_node(launch)


def _tell(console: Console, problems: Sequence[str], notes: Sequence[str]) -> None:
    """Prints the notes and problems of a client spec; ends the command where there are problems."""
    for note in notes:
        say(console, f"[yellow]note:[/] {escape(note)}")
    for problem in problems:
        say(console, f"[bold red]problem:[/] {escape(problem)}")
    if problems:
        say(console, f"{counted(len(problems), 'problem')} found")
        raise typer.Exit(1)
