"""The commands `study`: sweeps over one quantity, each with a page of figures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from tap_flower.cli.common import ConfigFile, CpusPerRun, GpusPerRun, Preset, RayAddress, Settings, say
from tap_flower.cli.sweep import Where, execute_missing, exit_if, refuse_execution, write_tables

if TYPE_CHECKING:
    from tap_flower.study.studies import Study

study_app = typer.Typer(help="Study how results change with one quantity.", no_args_is_help=True)
_SEEDS, _MARGINS, _ALPHAS = (41, 42, 43), (0.0, 0.01, 0.05, 0.2), (0.1, 1.0, 10.0)
_THEORY_SEEDS = range(41, 61)
_METHODS = ("tap", "fedavg+finetune")
Seeds = Annotated[
    list[int] | None, typer.Option(help="Run with this seed; may be repeated.", show_default="41, 42, 43")
]
StudyFolder = Annotated[Path, typer.Option(help="Write the study to this folder.")]
Methods = Annotated[
    list[str] | None,
    typer.Option(
        "--method", help="Run this method beside local; may be repeated.", show_default="tap, fedavg+finetune"
    ),
]


@study_app.command("pairs")
def pairs_command(
    context: typer.Context,
    preset: Annotated[
        str, typer.Option(help="Take the pairs of this preset.", show_default="none: pairs of linear maps")
    ] = "",
    config: ConfigFile = "",
    set_: Settings = None,
    seed: Annotated[
        list[int] | None,
        typer.Option(help="Run with this seed; may be repeated.", show_default="41 to 60; of a preset 41 to 43"),
    ] = None,
    disagreement: Annotated[
        float | None,
        typer.Option(min=0.0, help="Set how far the optima of the linear maps are apart.", show_default="1"),
    ] = None,
    out: StudyFolder = Path("runs/study-pairs"),
    cpus_per_run: CpusPerRun = None,
    gpus_per_run: GpusPerRun = None,
    ray: RayAddress = "local",
) -> None:
    """Measure the losses of the server's model and of personal ones as the number of pairs grows."""
    from tap_flower.errors import ConfigError
    from tap_flower.run.simulation import check_folder

    if preset:
        from tap_flower.study.studies import pairs_study

        if disagreement is not None:
            raise ConfigError("--disagreement is of the linear maps: leave it out, or leave out --preset")
        study = pairs_study(preset, config, set_ or [], seed or _SEEDS, out)
        _study(study, out, (ray, cpus_per_run, gpus_per_run))
        return
    from tap_flower.study.theorem import pairs_in_theory

    if config or set_:
        raise ConfigError("--config and --set are of a preset's clients: name it, --preset demo")
    refuse_execution(context, "linear maps are measured in this process, leave it out, or name a --preset")
    check_folder(out)
    console = Console()
    study = pairs_in_theory(seed or _THEORY_SEEDS, 1.0 if disagreement is None else disagreement, console.print)
    say(console, f"to look at: {study.write(out)}; numbers in {study.name}.csv")


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
    """Measure results and numbers of replacements by the margin of the replacement."""
    from tap_flower.study.studies import margin_study

    _study(
        margin_study(preset, config, set_ or [], seed or _SEEDS, margin or _MARGINS, out),
        out,
        (ray, cpus_per_run, gpus_per_run),
    )


@study_app.command("heterogeneity")
def heterogeneity_command(
    preset: Preset = "demo",
    config: ConfigFile = "",
    set_: Settings = None,
    seed: Seeds = None,
    method: Methods = None,
    alpha: Annotated[
        list[float] | None,
        typer.Option(help="Run with this concentration; may be repeated.", show_default="0.1, 1, 10"),
    ] = None,
    out: StudyFolder = Path("runs/study-heterogeneity"),
    cpus_per_run: CpusPerRun = None,
    gpus_per_run: GpusPerRun = None,
    ray: RayAddress = "local",
) -> None:
    """Measure methods by the label skew of clients: classes drawn from a Dirichlet distribution."""
    from tap_flower.study.heterogeneity import heterogeneity_study

    study = heterogeneity_study(preset, config, set_ or [], seed or _SEEDS, method or _METHODS, alpha or _ALPHAS, out)
    _study(study, out, (ray, cpus_per_run, gpus_per_run))


@study_app.command("newcomers")
def newcomers_command(
    preset: Preset = "demo",
    config: ConfigFile = "",
    set_: Settings = None,
    seed: Seeds = None,
    method: Methods = None,
    share: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Hold out at most this share of the clients, but at least one.")
    ] = 0.2,
    out: StudyFolder = Path("runs/study-newcomers"),
    cpus_per_run: CpusPerRun = None,
    gpus_per_run: GpusPerRun = None,
    ray: RayAddress = "local",
) -> None:
    """Hold clients out of federations, and compare their stage 2 alone with training from scratch."""
    from tap_flower.study.newcomers import newcomers_study
    from tap_flower.study.plan import checked

    console, where = Console(), (ray, cpus_per_run, gpus_per_run)
    federations, newcomers = newcomers_study(preset, config, set_ or [], seed or _SEEDS, method or _METHODS, share, out)
    for run in (*federations, *newcomers.runs):
        if run.done:
            checked([run])
    exit_if(execute_missing(console, federations, where))
    failed = execute_missing(console, newcomers.runs, where)
    lead = f"Preset {preset}. Clients that were held out run stage 2 alone, from the last values of the server."
    write_tables(console, newcomers, "What is a federation worth to newcomers?", lead, out)
    exit_if(failed)


def _study(study: Study, out: Path, where: Where) -> None:
    from tap_flower.study.plan import checked

    console = Console()
    for run in study.runs:
        if run.done:
            checked([run])
    exit_if(execute_missing(console, study.runs, where))
    say(console, f"to look at: {study.write(out)}; numbers in {study.name}.csv")
