"""`report.html`: one file that shows one run or several, without a request to any network."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from tap_flower.files import write_atomically
from tap_flower.report import figures, result_tables, verdict
from tap_flower.report.results import remarks
from tap_flower.report.run_record import RunRecord, read_runs
from tap_flower.report.svg import SERIES, number

REPORT = "report.html"
ITEMS, FEWER_ITEMS, MANY_CLIENTS = 4, 2, 12
"""Test items of a task that are shown, and fewer of them for more clients: pictures are a good part of the file."""


def write_report(folders: Sequence[Path], file: Path) -> None:
    """Writes the HTML report of one run or several, which needs no network.

    Args:
        folders: run folders of finished runs, at least one.
        file: the HTML file.

    Raises:
        StorageError: a run has not finished, a file is damaged, or `file` cannot be written.
    """
    write_atomically(file, page(read_runs(folders)).encode())


def page(runs: Sequence[RunRecord]) -> str:
    """The HTML report of one run or several."""
    grouped = result_tables.groups(runs)
    results = [[run.results for run in group] for group in grouped]
    return _template("report.html").render(
        runs=[_run_page(run) for run in runs],
        verdict=verdict.verdict(grouped),
        methods=verdict.method_table(grouped) if len(grouped) > 1 else None,
        headlines=[
            (group, result_tables.headline_table(of_group), result_tables.clients_table(of_group))
            for group, of_group in zip(grouped, results, strict=True)
        ],
        side_by_side=result_tables.side_by_side(grouped) if len(runs) > 1 else None,
        differences=result_tables.differences(runs),
        items=ITEMS if max(len(run.clients) for run in runs) <= MANY_CLIENTS else FEWER_ITEMS,
        series=SERIES,
    )


def write_study(title: str, lead: str, shown: Sequence[figures.Figure], file: Path) -> None:
    """Writes the HTML page of a study.

    Args:
        title: the question that the study asks.
        lead: how it was measured.
        shown: its figures.
        file: the HTML file.
    """
    page = _template("study.html").render(title=title, lead=lead, figures=shown, series=SERIES)
    write_atomically(file, page.encode())


def _run_page(run: RunRecord) -> dict[str, Any]:
    """A run with the figures of its part of the page."""
    gradients = [figures.gradient_figure(run, client) for client in run.clients]
    return {
        "run": run,
        "attendance": verdict.attendance(run.results),
        "privacy": verdict.privacy(run.results),
        "remarks": remarks(run.results),
        "clients": list(figures.client_figures(run)),
        "losses": list(figures.loss_figures(run)),
        "replacements": figures.replacement_map(run),
        "decisions": {client: list(figures.decision_figures(run, client)) for client in run.clients},
        "bytes": figures.byte_figure(run),
        "gradients": [figure for figure in gradients if figure is not None],
        "on_nodes": [name for name, client in run.clients.items() if not client.here],
    }


@cache
def _template(name: str) -> Template:
    environment = Environment(
        loader=PackageLoader("tap_flower.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    return environment.get_template(name)
