"""The command `tap-flower`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from tap_flower.client.text_metrics import missing
from tap_flower.config import Model, client_specs, load_config, presets, read_yaml
from tap_flower.data.spec import SpecError
from tap_flower.errors import ConfigError, PersonalError, SimulationError
from tap_flower.files import StorageError, read_tensors, write_atomically
from tap_flower.methods.registry import find_method
from tap_flower.personal import commands as personal_commands
from tap_flower.report.console import mean_table, results_table
from tap_flower.report.html import REPORT, write_report
from tap_flower.report.needs import needs
from tap_flower.report.progress import RunProgress
from tap_flower.report.results import read_results
from tap_flower.report.trackers import tracker_names
from tap_flower.run.resources import CLUSTER, shared, shared_cluster, this_machine
from tap_flower.run.simulation import Launch, simulate
from tap_flower.run.supernode import NodeLaunch
from tap_flower.run.supernode import start as start_node
from tap_flower.server.accounting import budget_of
from tap_flower.study.comparison import compare
from tap_flower.study.execute import Outcome, execute
from tap_flower.study.plan import PlannedRun, read_sweep
from tap_flower.study.studies import Study, margin_study, pairs_study
from tap_flower.study.tables import latex, markdown, parts, terminal, to_csv

app = typer.Typer(
    help="TAP: two-stage adaptive personalization for multi-task, multi-modal federated learning.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
study_app = typer.Typer(help="What changes as one thing changes.", no_args_is_help=True)
app.add_typer(study_app, name="study")
for command in (personal_commands.predict, personal_commands.export, personal_commands.demo):
    app.command()(command)
_SEEDS, _MARGINS = (41, 42, 43), (0.0, 0.01, 0.05, 0.2)
EXPECTED = (ConfigError, PersonalError, SpecError, StorageError, SimulationError)
"""Errors that are told in one line, without a traceback."""


@app.command("simulate")
def simulate_command(
    preset: Annotated[str, typer.Option(help="One of `tap-flower presets`.")] = "demo",
    config: Annotated[str, typer.Option(help="A YAML file that overrides the preset.")] = "",
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value; may be repeated.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Short for --set rounds=N.")] = None,
    seed: Annotated[int | None, typer.Option(help="Short for --set seed=S.")] = None,
    cpus_per_client: Annotated[
        int | None, typer.Option(min=1, help="Cores of a client; without it, all cores for the clients of a round.")
    ] = None,
    gpus_per_client: Annotated[
        float | None, typer.Option(min=0.0, help="Share of a GPU; without it, all GPUs for the clients of a round.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The run folder; runs/PRESET-seedS without it.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
) -> None:
    """A whole run on this machine, through Flower's simulation runtime."""
    console = Console()
    settings = tuple(set_ or ())
    settings += () if rounds is None else (f"rounds={rounds}",)
    settings += () if seed is None else (f"seed={seed}",)
    resolved = load_config(preset, config, settings)
    find_method(resolved.method)  # now, not after Flower's start
    tracker_names(resolved.trackers)
    budget_of(resolved)
    specs = client_specs(resolved)
    if not specs:
        raise ConfigError(f"preset {preset!r} has no clients: add client specs under `clients`")
    out = out or _free_folder(Path("runs"), f"{preset}-seed{resolved.seed}", resume)
    if resume:
        read_tensors(out / "server" / "server.safetensors")  # what cannot be resumed is said before Flower starts
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is not empty: give another folder with `--out`, or go on with `--resume`")
    # The clients log it too, but their log goes with the run: it is said here, before hours of work.
    for problem in missing(meteor=resolved.metrics.meteor, bertscore=resolved.metrics.bertscore):
        console.print(f"[yellow]{escape(problem)}", highlight=False, soft_wrap=True)
    if os.environ.get(CLUSTER):
        resources = shared_cluster(cpus_per_client, gpus_per_client)
    else:
        resources = shared(this_machine(), len(specs), resolved.clients_per_round, cpus_per_client, gpus_per_client)
    console.print(f"{len(specs)} clients: {resources}", highlight=False)
    launch = Launch(preset, config, settings, out, resume, len(specs), resources)
    with RunProgress(console) as progress:
        found = simulate(launch, progress.show)
    console.print(results_table(found))
    write_report([out], out / REPORT)
    said = f"{found['seconds']['total']:.0f} s; results in {out}, to look at: {out / REPORT}"
    console.print(said, highlight=False, soft_wrap=True)


@app.command("report")
def report_command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of finished runs.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The file; report.html in the run folder, or here for several.")
    ] = None,
) -> None:
    """The results of finished runs as tables, and as one HTML file with plots that needs no network."""
    console, found = Console(), [read_results(run) for run in runs]
    for one in found:
        console.print(results_table(one))
    if len(found) > 1:
        console.print(mean_table(found))
    file = out or (runs[0] if len(runs) == 1 else Path()) / REPORT
    write_report(runs, file)
    console.print(f"to look at: {file}", highlight=False, soft_wrap=True)


@app.command("sweep")
def sweep_command(
    file: Annotated[Path, typer.Argument(help="YAML: methods, seeds, settings.")],
    out: Annotated[Path | None, typer.Option(help="The sweep's folder; runs/NAME-OF-FILE without it.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Runs at once; one a GPU or core without it.")] = None,
) -> None:
    """Methods by seeds: runs what is missing, then compares them in table.md, .csv and .tex."""
    console, out = Console(), out or Path("runs") / file.stem
    sweep = read_sweep(file, out)
    failed = _execute(console, sweep.runs, jobs)
    found = compare(sweep)
    shown = parts(found)
    for part in shown:
        console.print(terminal(part))
    for name, text in (("md", markdown(shown)), ("csv", to_csv(found)), ("tex", latex(shown))):
        write_atomically(out / f"table.{name}", text.encode())
    console.print(f"tables in {out / 'table.md'}, .csv and .tex", highlight=False, soft_wrap=True)
    _exit_if(failed)


@study_app.command("pairs")
def pairs_command(
    preset: Annotated[str, typer.Option(help="One of `tap-flower presets`.")] = "demo",
    config: Annotated[str, typer.Option(help="A YAML file that overrides the preset.")] = "",
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value; may be repeated.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="May be repeated; 41, 42 and 43 without it.")] = None,
    out: Annotated[Path, typer.Option(help="The study's folder.")] = Path("runs/study-pairs"),
    jobs: Annotated[int | None, typer.Option(min=1, help="Runs at once; one a GPU or core without it.")] = None,
) -> None:
    """Losses of the server's model and of personal ones as the number of pairs grows."""
    _study(pairs_study(preset, config, set_ or [], seed or _SEEDS, out), out, jobs)


@study_app.command("margin")
def margin_command(
    preset: Annotated[str, typer.Option(help="One of `tap-flower presets`.")] = "demo",
    config: Annotated[str, typer.Option(help="A YAML file that overrides the preset.")] = "",
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value; may be repeated.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="May be repeated; 41, 42 and 43 without it.")] = None,
    margin: Annotated[
        list[float] | None, typer.Option(help="May be repeated; 0, 0.01, 0.05 and 0.2 without it.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The study's folder.")] = Path("runs/study-margin"),
    jobs: Annotated[int | None, typer.Option(min=1, help="Runs at once; one a GPU or core without it.")] = None,
) -> None:
    """Results and numbers of replacements by the margin of the replacement."""
    _study(margin_study(preset, config, set_ or [], seed or _SEEDS, margin or _MARGINS, out), out, jobs)


def _study(study: Study, out: Path, jobs: int | None) -> None:
    console = Console()
    _exit_if(_execute(console, study.runs, jobs))
    console.print(f"to look at: {study.write(out)}; numbers in {study.name}.csv", highlight=False, soft_wrap=True)


def _execute(console: Console, runs: Sequence[PlannedRun], jobs: int | None) -> list[Outcome]:
    """Runs what is missing and says so; returns what failed."""
    machine, missing_runs = this_machine(), [run for run in runs if not run.done]
    jobs = max(1, min(jobs or machine.gpus or machine.cores, len(missing_runs)))
    console.print(
        f"{len(runs)} runs, {len(runs) - len(missing_runs)} of them finished; {jobs} at once", highlight=False
    )
    failed: list[Outcome] = []
    ended = count(1)

    def finished(outcome: Outcome) -> None:
        failed.extend([outcome] if outcome.problem else [])
        how = f"[bold red]failed[/]: {escape(outcome.problem)}" if outcome.problem else f"{outcome.seconds:.0f} s"
        said = f"{next(ended)}/{len(missing_runs)} {outcome.run.label}, seed {outcome.run.seed}: {how}"
        console.print(said, highlight=False, soft_wrap=True)

    execute(missing_runs, jobs, machine, finished)
    return failed


def _exit_if(failed: Sequence[Outcome]) -> None:
    if failed:
        raise SimulationError(f"{len(failed)} runs failed, see above: the same command runs them again, and no others")


@app.command("check")
def check_command(
    spec: Annotated[Path, typer.Argument(help="A client spec, as a node is given it.")],
    preset: Annotated[str, typer.Option(help="The run's; one of `tap-flower presets`.")] = "demo",
    config: Annotated[str, typer.Option(help="The run's YAML file that overrides the preset.")] = "",
    set_: Annotated[list[str] | None, typer.Option("--set", help="The run's key=value; may be repeated.")] = None,
    data_root: Annotated[Path | None, typer.Option(help="The node's mirror of hub data sets.")] = None,
) -> None:
    """Whether a client spec can be trained on: reads all its data and lists every problem."""
    # Imported here: they bring transformers and datasets, which the other commands do without.
    from tap_flower.client.from_spec import exchanged
    from tap_flower.data.checking import Problem, check_data, check_spec
    from tap_flower.models.backbones import locate
    from tap_flower.models.errors import BackboneError
    from tap_flower.report.check_tables import data_table, example_table, exchange_line

    console, run = Console(), load_config(preset, config, tuple(set_ or ()))
    root = run.data.root if data_root is None else str(data_root.resolve())
    client, problems = check_spec(read_yaml(spec, "client spec"))
    if client is not None:
        hold_out = run.needs_validation
        with console.status("reading the data"):
            summaries, found = check_data(
                client, locate(client.backbone), run.model.text_length, run.seed, root, hold_out
            )
        problems += found
        console.print(data_table(summaries, run.model.text_length))
        console.print(example_table(summaries))
        try:
            console.print(exchange_line(exchanged(client, run.model)), highlight=False, soft_wrap=True)
        except BackboneError as error:
            problems.append(Problem(str(error)))
    _tell(console, problems)
    console.print("no problems found")


@app.command("node")
def node_command(
    spec: Annotated[Path, typer.Argument(help="The client spec.")],
    superlink: Annotated[str, typer.Option(metavar="HOST:PORT", help="Of the server's SuperLink.")],
    state_dir: Annotated[Path, typer.Option(help="Where the client's models lie; they never leave it.")],
    root_certificates: Annotated[
        Path | None,
        typer.Option(help="Who signed the SuperLink's certificate, PEM; the system's authorities without it."),
    ] = None,
    key: Annotated[
        Path | None, typer.Option(help="This node's private key, where the SuperLink knows its nodes.")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="No TLS: for trying out on one machine.")] = False,
    port: Annotated[int | None, typer.Option(help="For the node's own processes; a free one without it.")] = None,
    data_root: Annotated[Path | None, typer.Option(help="The node's mirror of hub data sets.")] = None,
    meteor: Annotated[bool, typer.Option("--meteor", help="METEOR of generated texts.")] = False,
    bertscore: Annotated[str, typer.Option(metavar="MODEL", help="BERTScore of generated texts.")] = "",
) -> None:
    """Checks a client spec with all its data, then becomes a Flower SuperNode for it."""
    from tap_flower.data.checking import check_data, check_spec
    from tap_flower.models.backbones import locate

    console, launch = (
        Console(),
        NodeLaunch(spec, superlink, state_dir, root_certificates, key, insecure, port, data_root, meteor, bertscore),
    )
    launch.command()  # what is wrong with it is said before all data are read
    client, problems = check_spec(read_yaml(spec, "client spec"))
    if client is not None:
        with console.status("reading the data"):
            root = "" if data_root is None else str(data_root.resolve())
            problems += check_data(client, locate(client.backbone), Model().text_length, seed=0, root=root)[1]
    for problem in missing(meteor=meteor, bertscore=bertscore):
        console.print(f"[yellow]{escape(problem)}", highlight=False, soft_wrap=True)
    _tell(console, problems)
    start_node(launch)


def _tell(console: Console, problems: Sequence[object]) -> None:
    """Prints the problems of a client spec; ends the command where there are any."""
    for problem in problems:
        console.print(f"[bold red]problem:[/] {escape(str(problem))}", highlight=False, soft_wrap=True)
    if problems:
        console.print(f"{len(problems)} problem{'s' * (len(problems) > 1)} found", highlight=False)
        raise typer.Exit(1)


@app.command("presets")
def presets_command() -> None:
    """The presets that there are: clients, backbone, data sets, and what must be downloaded."""
    console = Console()
    for name in presets():
        config = load_config(name)
        specs = client_specs(config)
        tasks = sorted({task.name for spec in specs for task in spec.tasks})
        console.print(
            f"[bold]{name}[/]: {len(specs)} clients, {config.rounds} rounds of {config.clients_per_round}; "
            f"tasks {', '.join(tasks)}",
            highlight=False,
            soft_wrap=True,
        )
        table, commands = needs(specs)
        console.print(table)
        for command in commands:
            console.print(f"  {command}", highlight=False, soft_wrap=True)
        console.print()


def _free_folder(parent: Path, name: str, resume: bool) -> Path:
    """`parent/name`, or with a number behind it where that is taken by another run."""
    folder, number = parent / name, 1
    while not resume and folder.exists():
        number += 1
        folder = parent / f"{name}-{number}"
    return folder


def main() -> None:
    """Entry point: an expected error is told in a line, and the exit code is 1."""
    for library in ("HUB", "DATASETS"):
        os.environ.setdefault(f"HF_{library}_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except EXPECTED as error:
        Console(stderr=True).print(f"[bold red]error:[/] {error}", highlight=False, soft_wrap=True)
        raise SystemExit(1) from error
