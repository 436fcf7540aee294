"""The commands around one simulation: `presets`, `simulate`, `report`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from tap_flower.cli.common import ConfigFile, Preset, Settings, say
from tap_flower.cli.fetch import check_fetched
from tap_flower.errors import ConfigError
from tap_flower.plain import counted


def presets_command() -> None:
    """List the presets: clients, backbone, data sets, downloads."""
    from tap_flower.config import client_specs, load_config, presets
    from tap_flower.report.terminal_tables import download_table

    console = Console()
    for name in presets():
        config = load_config(name)
        specs = client_specs(config)
        tasks = ", ".join(sorted({task.name for spec in specs for task in spec.tasks}))
        rounds = f"{counted(config.rounds, 'round')} of {config.clients_per_round}"
        say(console, f"[bold]{name}[/]: {len(specs)} clients, {rounds}; tasks {tasks}")
        table, commands = download_table(specs)
        console.print(table)
        for command in commands:
            say(console, f"  {command}")
        console.print()


def simulate_command(
    preset: Preset = "demo",
    config: ConfigFile = "",
    set_: Settings = None,
    rounds: Annotated[int | None, typer.Option(help="Run this many rounds; short for --set rounds=N.")] = None,
    seed: Annotated[int | None, typer.Option(help="Set the seed; short for --set seed=S.")] = None,
    cpus_per_client: Annotated[
        int | None,
        typer.Option(
            min=1, help="Give each client this many cores.", show_default="share all among the clients of a round"
        ),
    ] = None,
    gpus_per_client: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Give each client this share of a GPU; 0 uses the processor.",
            show_default="share all among the clients of a round",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the run to this folder.", show_default="runs/PRESET-seedS")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --out after its last complete round.")
    ] = False,
) -> None:
    """Run a whole federation on this machine: both stages, evaluation and report."""
    from tap_flower.cli.progress import RunProgress
    from tap_flower.client.text_metrics import missing
    from tap_flower.config import check_contradictions, client_specs, load_config
    from tap_flower.methods.registry import find_method
    from tap_flower.report.html_report import REPORT, write_report
    from tap_flower.report.results import RESULTS, read_results
    from tap_flower.report.trackers import check_trackers
    from tap_flower.run.resources import CLUSTER, check_cluster, shared, shared_cluster, this_machine
    from tap_flower.run.simulation import Launch, simulate
    from tap_flower.server.checkpoint import check_free, has_begun, locked, resumable
    from tap_flower.server.likely_mistakes import (
        fewer_batches_than_tasks,
        likely_mistakes,
        one_list_of_classes,
        without_effect,
    )
    from tap_flower.server.privacy import budget_of

    console = Console()
    settings = tuple(set_ or ())
    settings += () if rounds is None else (f"rounds={rounds}",)
    settings += () if seed is None else (f"seed={seed}",)
    # What is wrong is said now, not after Flower's start.
    check_contradictions(settings)
    resolved = load_config(preset, config, settings)
    find_method(resolved.method)
    check_trackers(resolved.trackers)
    budget_of(resolved)
    specs = client_specs(resolved)
    if not specs:
        raise ConfigError(
            f"preset {preset!r} has no clients: add client specs under `clients` of a --config file, or run a Flower "
            f"project of your own with `flwr run`"
        )
    check_fetched(specs, resolved.data.root, f"tap-flower fetch {preset}")
    named = Path("runs") / f"{preset}-seed{resolved.seed}"
    if out is None and not resume and has_begun(named) and not (named / RESULTS).exists():
        say(console, f"[yellow]{escape(str(named))} holds a run that has not ended, which --resume would go on with")
    out = out or (named if resume else _free_folder(named))
    if has_begun(out):
        with locked(out, resume):
            pass
    if resume:
        begun = resumable(out, resolved).progress  # what is wrong with it is said now
        if (out / RESULTS).exists() and not read_results(out).get("missing"):
            say(console, escape(f"{out} has finished: tap-flower report {out} shows it"))
            return
        say(console, escape(f"resuming {out} after {counted(begun.round, 'complete round')}"))
    else:
        check_free(out)
    held = [(spec.name, task.name, task.kind) for spec in specs for task in spec.tasks]
    for sentence in (
        *without_effect(resolved),
        *likely_mistakes(resolved.clients_per_round, None, held),
        *fewer_batches_than_tasks(resolved, held),
        *one_list_of_classes(specs),
    ):
        say(console, f"[yellow]{escape(sentence)}")
    # The clients log it too, but their log goes with the run: it is said here, before hours of work.
    for problem in missing(meteor=resolved.metrics.meteor, bertscore=resolved.metrics.bertscore):
        say(console, f"[yellow]{escape(problem)}")
    if address := os.environ.get(CLUSTER):
        check_cluster(address)
        resources = shared_cluster(cpus_per_client, gpus_per_client)
    else:
        resources = shared(this_machine(), len(specs), resolved.clients_per_round, cpus_per_client, gpus_per_client)
    say(console, f"{len(specs)} clients: {resources}")
    launch = Launch(preset, config, settings, out, resume, len(specs), resources)
    try:
        with RunProgress(console, out) as progress:
            found = simulate(launch, progress.show, progress.watch)
    except KeyboardInterrupt:
        if has_begun(out):
            say(console, f"[yellow]interrupted; to go on, give the same command with --out {escape(str(out))} --resume")
        raise
    _show(console, found)
    write_report([out], out / REPORT)
    say(console, f"{found['seconds']['total']:.0f} s; results in {out}, to look at: {out / REPORT}")


def _free_folder(named: Path) -> Path:
    """Returns the folder, with a number appended where another run has it."""
    folder, number = named, 1
    while folder.exists():
        number += 1
        folder = named.with_name(f"{named.name}-{number}")
    return folder


def _show(console: Console, found: Mapping[str, Any]) -> None:
    """Prints the results of a run, and remarks on them such as missing clients."""
    from tap_flower.report.result_tables import headline_table
    from tap_flower.report.results import remarks
    from tap_flower.report.terminal_tables import terminal

    console.print(terminal(headline_table([found])), crop=False)
    for remark in remarks(found):
        say(console, f"[yellow]{escape(remark)}")


def report_command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of finished runs.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Write the page to this file.",
            show_default="report.html in the run folder, or here for several",
        ),
    ] = None,
) -> None:
    """Show the results of finished runs, in tables and on one HTML page."""
    from tap_flower.report.html_report import REPORT, write_report
    from tap_flower.report.result_tables import differences, groups, headline_table
    from tap_flower.report.run_record import read_runs
    from tap_flower.report.terminal_tables import terminal
    from tap_flower.report.verdict import method_table

    console, found = Console(), read_runs(runs)
    for one in found:
        _show(console, one.results)
    grouped = groups(found)
    for group in grouped:
        if len(group) > 1:
            console.print(terminal(headline_table([run.results for run in group])), crop=False)
    if len(grouped) > 1:
        console.print(terminal(method_table(grouped)), crop=False)
    if keys := differences(found):
        say(console, f"the runs differ, besides the seed, in {', '.join(keys)}")
    file = out or (runs[0] if len(runs) == 1 else Path()) / REPORT
    write_report(runs, file)
    say(console, f"to look at: {file}")
