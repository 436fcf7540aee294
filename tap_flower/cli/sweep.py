"""The commands that compare runs: `sweep`, `study pairs`, `study margin`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from tap_flower.cli.common import ConfigFile, Jobs, Preset, Settings, say
from tap_flower.cli.fetch import check_fetched
from tap_flower.config import client_specs
from tap_flower.errors import SimulationError
from tap_flower.files import write_atomically
from tap_flower.report.terminal_tables import terminal
from tap_flower.run.resources import this_machine
from tap_flower.study.comparison import compare
from tap_flower.study.execute import Outcome, execute
from tap_flower.study.plan import PlannedRun, read_sweep
from tap_flower.study.studies import Study, margin_study, pairs_study
from tap_flower.study.sweep_tables import comparison_tables, latex, markdown, to_csv

study_app = typer.Typer(help="Study how results change with one quantity.", no_args_is_help=True)
_SEEDS, _MARGINS = (41, 42, 43), (0.0, 0.01, 0.05, 0.2)
Seeds = Annotated[list[int] | None, typer.Option(help="Seed of runs; may be repeated.", show_default="41, 42, 43")]
StudyFolder = Annotated[Path, typer.Option(help="The study's folder.")]


def sweep_command(
    file: Annotated[Path, typer.Argument(help="YAML file of methods, seeds and settings.")],
    out: Annotated[Path | None, typer.Option(help="The sweep's folder.", show_default="runs/NAME-OF-FILE")] = None,
    jobs: Jobs = None,
) -> None:
    """Run methods by seeds, whatever is missing, and compare them in table.md, .csv and .tex."""
    console, out = Console(), out or Path("runs") / file.stem
    sweep = read_sweep(file, out)
    failed = _execute(console, sweep.runs, jobs)
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
    jobs: Jobs = None,
) -> None:
    """Measure the losses of the server's model and of personal ones as the number of pairs grows."""
    _study(pairs_study(preset, config, set_ or [], seed or _SEEDS, out), out, jobs)


@study_app.command("margin")
def margin_command(
    preset: Preset = "demo",
    config: ConfigFile = "",
    set_: Settings = None,
    seed: Seeds = None,
    margin: Annotated[
        list[float] | None, typer.Option(help="Margin; may be repeated.", show_default="0, 0.01, 0.05, 0.2")
    ] = None,
    out: StudyFolder = Path("runs/study-margin"),
    jobs: Jobs = None,
) -> None:
    """Measure results and numbers of replacements by the margin of the replacement."""
    _study(margin_study(preset, config, set_ or [], seed or _SEEDS, margin or _MARGINS, out), out, jobs)


def _study(study: Study, out: Path, jobs: int | None) -> None:
    console = Console()
    _exit_if(_execute(console, study.runs, jobs))
    say(console, f"to look at: {study.write(out)}; numbers in {study.name}.csv")


def _execute(console: Console, runs: Sequence[PlannedRun], jobs: int | None) -> list[Outcome]:
    """Executes the missing runs, with a line for each, and returns those that failed."""
    machine, missing = this_machine(), [run for run in runs if not run.done]
    jobs = max(1, min(jobs or machine.gpus or machine.cores, len(missing)))
    for run in missing[:1]:
        check_fetched(client_specs(run.resolved), run.resolved.data.root, f"tap-flower fetch {run.resolved.preset}")
    say(console, f"{len(runs)} runs, {len(runs) - len(missing)} of them finished; {jobs} at once")
    failed: list[Outcome] = []
    ended = count(1)

    def finished(outcome: Outcome) -> None:
        failed.extend([outcome] if outcome.problem else [])
        how = f"[bold red]failed[/]: {escape(outcome.problem)}" if outcome.problem else f"{outcome.seconds:.0f} s"
        say(console, f"{next(ended)}/{len(missing)} {outcome.run.label}, seed {outcome.run.seed}: {how}")

    execute(missing, jobs, machine, finished)
    return failed


def _exit_if(failed: Sequence[Outcome]) -> None:
    if failed:
        raise SimulationError(f"{len(failed)} runs failed, see above: the same command runs them again, and no others")
