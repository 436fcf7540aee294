"""The commands that compare runs: `sweep`, `study pairs`, `study margin`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from tap_flower.cli.common import ConfigFile, CpusPerRun, GpusPerRun, Preset, RayAddress, Settings, say
from tap_flower.cli.fetch import check_fetched
from tap_flower.errors import SimulationError

if TYPE_CHECKING:
    from tap_flower.study.execute import Outcome
    from tap_flower.study.plan import PlannedRun
    from tap_flower.study.studies import Study

study_app = typer.Typer(help="Study how results change with one quantity.", no_args_is_help=True)
_SEEDS, _MARGINS = (41, 42, 43), (0.0, 0.01, 0.05, 0.2)
Seeds = Annotated[
    list[int] | None, typer.Option(help="Run with this seed; may be repeated.", show_default="41, 42, 43")
]
Where = tuple[str, int | None, float | None]
"""(address of a Ray cluster, cores of a run, GPUs of a run)."""
StudyFolder = Annotated[Path, typer.Option(help="Write the study to this folder.")]


def sweep_command(
    file: Annotated[Path, typer.Argument(help="A YAML file with methods, seeds and settings.")],
    out: Annotated[
        Path | None, typer.Option(help="Write the sweep to this folder.", show_default="runs/NAME-OF-FILE")
    ] = None,
    cpus_per_run: CpusPerRun = None,
    gpus_per_run: GpusPerRun = None,
    ray: RayAddress = "local",
) -> None:
    """Run methods by seeds, those that are missing, and compare them in tables (.md, .csv, .tex)."""
    from tap_flower.files import write_atomically
    from tap_flower.report.terminal_tables import terminal
    from tap_flower.study.comparison import compare
    from tap_flower.study.plan import read_sweep
    from tap_flower.study.sweep_tables import comparison_tables, latex, markdown, to_csv

    console, out = Console(), out or Path("runs") / file.stem
    sweep = read_sweep(file, out)
    failed = _execute(console, sweep.runs, (ray, cpus_per_run, gpus_per_run))
    found = compare(sweep)
    tables = comparison_tables(found)
    for table in tables:
        console.print(terminal(table))
    for name, text in (("md", markdown(tables)), ("csv", to_csv(found)), ("tex", latex(tables))):
        write_atomically(out / f"table.{name}", text.encode())
    say(console, f"tables in {out / 'table.md'}, .csv and .tex")
    _exit_if(failed)


@study_app.command("pairs")
def pairs_command(
    preset: Preset = "demo",
    config: ConfigFile = "",
    set_: Settings = None,
    seed: Seeds = None,
    out: StudyFolder = Path("runs/study-pairs"),
    cpus_per_run: CpusPerRun = None,
    gpus_per_run: GpusPerRun = None,
    ray: RayAddress = "local",
) -> None:
    """Measure how the server's loss, and personal ones, change as the number of pairs grows."""
    from tap_flower.study.studies import pairs_study

    _study(pairs_study(preset, config, set_ or [], seed or _SEEDS, out), out, (ray, cpus_per_run, gpus_per_run))


@study_app.command("margin")
def margin_command(
    preset: Preset = "demo",
    config: ConfigFile = "",
    set_: Settings = None,
    seed: Seeds = None,
    margin: Annotated[
        list[float] | None,
        typer.Option(help="Run with this margin; may be repeated.", show_default="0, 0.01, 0.05, 0.2"),
    ] = None,
    out: StudyFolder = Path("runs/study-margin"),
    cpus_per_run: CpusPerRun = None,
    gpus_per_run: GpusPerRun = None,
    ray: RayAddress = "local",
) -> None:
    """Measure how results and replacements change with the margin."""
    from tap_flower.study.studies import margin_study

    _study(
        margin_study(preset, config, set_ or [], seed or _SEEDS, margin or _MARGINS, out),
        out,
        (ray, cpus_per_run, gpus_per_run),
    )


def _study(study: Study, out: Path, where: Where) -> None:
    console = Console()
    _exit_if(_execute(console, study.runs, where))
    say(console, f"to look at: {study.write(out)}; numbers in {study.name}.csv")


def _execute(console: Console, runs: Sequence[PlannedRun], where: Where) -> list[Outcome]:
    """Executes the missing runs, prints a line for each, and returns those that failed."""
    from tap_flower.config import client_specs
    from tap_flower.study.execute import cluster, execute, share_of

    missing = [run for run in runs if not run.done]
    already = f"{len(runs)} runs, {len(runs) - len(missing)} of them finished"
    if not missing:
        say(console, already)
        return []
    first = missing[0].resolved
    check_fetched(client_specs(first), first.data.root, f"tap-flower fetch {first.preset}")
    failed: list[Outcome] = []
    ended = count(1)

    def finished(outcome: Outcome) -> None:
        failed.extend([outcome] if outcome.problem else [])
        how = f"[bold red]failed[/]: {escape(outcome.problem)}" if outcome.problem else f"{outcome.seconds:.0f} s"
        say(console, f"{next(ended)}/{len(missing)} {outcome.run.label}, seed {outcome.run.seed}: {how}")

    address, cpus, gpus = where
    with cluster(address) as machines:
        share = share_of(machines, len(missing), cpus, gpus)
        say(console, f"{already}; {share}")
        execute(missing, share, finished)
    return failed


def _exit_if(failed: Sequence[Outcome]) -> None:
    if failed:
        raise SimulationError(f"{len(failed)} runs failed, see above: the same command runs them again, and no others")
