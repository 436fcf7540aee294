"""The command `sweep`, and how runs are executed and compared."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from click.core import ParameterSource
from rich.console import Console
from rich.markup import escape

from tap_flower.cli.common import CpusPerRun, GpusPerRun, RayAddress, say
from tap_flower.cli.fetch import check_fetched
from tap_flower.errors import ConfigError, SimulationError

if TYPE_CHECKING:
    from tap_flower.study.execute import Outcome
    from tap_flower.study.plan import PlannedRun, Sweep

Where = tuple[str, int | None, float | None]
"""(address of a Ray cluster, cores of a run, GPUs of a run)."""


def sweep_command(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="A YAML file with methods, seeds and settings.")],
    out: Annotated[
        Path | None, typer.Option(help="Write the sweep to this folder.", show_default="runs/NAME-OF-FILE")
    ] = None,
    keep: Annotated[
        Path | None,
        typer.Option(help="Copy the small files of each finished run here; a run that is here is not run again."),
    ] = None,
    cpus_per_run: CpusPerRun = None,
    gpus_per_run: GpusPerRun = None,
    ray: RayAddress = "local",
    tables: Annotated[
        bool, typer.Option("--tables", help="Run nothing: make the tables of the runs there are.")
    ] = False,
) -> None:
    """Run methods by seeds, those that are missing, and compare them in table.md, .csv, .tex and .html."""
    from tap_flower.study import kept
    from tap_flower.study.plan import read_sweep

    console, out = Console(), out or Path("runs") / file.stem
    if tables:
        refuse_execution(context, "--tables runs nothing, leave one of them out")
    if keep is not None:
        _check_apart(out, keep)
    sweep = read_sweep(file, out, keep)
    if keep is not None:
        kept.keep([run.folder for run in sweep.runs if run.done], keep)
    done = sum(run.done for run in sweep.runs)
    if tables and not done:
        raise ConfigError(f"{out} holds no finished run of {file}: leave --tables out to run them")
    if tables:
        say(console, f"{len(sweep.runs)} runs, {done} of them finished")
    failed = [] if tables else execute_missing(console, sweep.runs, (ray, cpus_per_run, gpus_per_run), keep)
    write_tables(console, sweep, f"Sweep {file.stem}", f"Preset {sweep.runs[0].preset}; the file is {file.name}.", out)
    if keep is not None:
        say(console, f"{sum(run.done for run in sweep.runs)} runs kept in {keep}")
    exit_if(failed)


def _check_apart(out: Path, keep: Path) -> None:
    one, other = out.resolve(), keep.resolve()
    if one.is_relative_to(other) or other.is_relative_to(one):
        raise ConfigError(
            f"--keep {keep} and --out {out} are one folder, or one holds the other, so that kept files would replace those "
            f"of runs: give --keep a folder beside it"
        )


def refuse_execution(context: typer.Context, why: str) -> None:
    """Refuses the options on how runs are executed, where they are on the command line and would do nothing."""
    names = ("ray", "cpus_per_run", "gpus_per_run")
    given = [name for name in names if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    if given:
        said = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ConfigError(f"{said} would have no effect: {why}")


def write_tables(console: Console, sweep: Sweep, title: str, lead: str, out: Path) -> None:
    """Compares the finished runs of a sweep, prints the tables and writes them into a folder."""
    from tap_flower.files import write_atomically
    from tap_flower.report.figures import Figure
    from tap_flower.report.html_report import write_study
    from tap_flower.report.terminal_tables import terminal
    from tap_flower.study.comparison import compare
    from tap_flower.study.sweep_tables import comparison_tables, latex, markdown, to_csv

    found = [compare(sweep, budget) for budget in sweep.budgets]
    tables = [table for one in found for table in comparison_tables(one)]
    for table in tables:
        console.print(terminal(table), crop=False)
    for name, text in (("md", markdown(tables)), ("csv", to_csv(found)), ("tex", latex(tables))):
        write_atomically(out / f"table.{name}", text.encode())
    write_study(title, lead, [Figure(table.caption, table, None) for table in tables], out / "table.html")
    say(console, f"tables in {out / 'table.md'}, .csv, .tex and .html")


def execute_missing(
    console: Console, runs: Sequence[PlannedRun], where: Where, keep: Path | None = None
) -> list[Outcome]:
    """Executes the missing runs, prints a line for each, keeps the small files of each, and returns those that failed."""
    from tap_flower.config import client_specs
    from tap_flower.report.results import dropped_answers, read_results
    from tap_flower.run.simulation import check_folder
    from tap_flower.study import kept
    from tap_flower.study.execute import cluster, execute, share_of

    missing = [run for run in runs if not run.done]
    already = f"{len(runs)} runs, {len(runs) - len(missing)} of them finished"
    if not missing:
        say(console, already)
        return []
    for folder in (missing[0].folder, *([] if keep is None else [keep])):
        check_folder(folder)
    first = missing[0].resolved
    check_fetched(client_specs(first), first.data.root, f"tap-flower fetch {first.preset}")
    failed: list[Outcome] = []
    ended = count(1)

    def finished(outcome: Outcome) -> None:
        failed.extend([outcome] if outcome.problem else [])
        if keep is not None and not outcome.problem:
            kept.keep([outcome.run.folder], keep)
        if outcome.problem:
            how = f"[bold red]failed[/]: {escape(outcome.problem)}"
        else:
            found = read_results(outcome.run.folder)
            gone, dropped = found.get("missing"), dropped_answers(found)
            how = f"{outcome.seconds:.0f} s" + (f", [yellow]without {escape(', '.join(gone))}[/]" if gone else "")
            how += f", [yellow]{escape('; '.join(dropped))}[/]" if dropped else ""
        say(console, f"{next(ended)}/{len(missing)} {escape(outcome.run.label)}, seed {outcome.run.seed}: {how}")

    address, cpus, gpus = where
    with cluster(address) as machines:
        share = share_of(machines, len(missing), cpus, gpus)
        say(console, f"{already}; {share}")
        execute(missing, share, finished)
    return failed


def exit_if(failed: Sequence[Outcome]) -> None:
    """Ends the command where runs have failed."""
    if failed:
        raise SimulationError(f"{len(failed)} runs failed, see above: the same command runs them again, and no others")
