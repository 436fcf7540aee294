"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from tap_flower.report.results import best, headline, mean_of_runs, models_in


def results_table(found: Mapping[str, Any]) -> Table:
    """Task × model for one run: the mean over the clients of each task's headline metric, the best one in bold."""
    title = f"{found['method']} on {found['preset']}, {found['rounds']} rounds, seed {found['seed']}"
    replaced = {
        task: str(sum(counts.get(task, 0) for counts in found["replacements"].values())) for task in found["tasks"]
    }
    table = _task_table(title, found["tasks"], found["kinds"], {"replaced": replaced})
    down, up = (found["bytes"][way] / 1e6 for way in ("down", "up"))
    table.caption = f"means over clients, on test data; {down:.1f} MB sent to clients, {up:.1f} MB back"
    return table


def mean_table(runs: Sequence[Mapping[str, Any]]) -> Table:
    """Task × model over several runs: means over clients and runs."""
    seeds = ", ".join(str(run["seed"]) for run in runs)
    table = _task_table(f"mean of {len(runs)} runs, seeds {seeds}", mean_of_runs(runs), runs[0]["kinds"])
    table.caption = "means over clients and runs, on test data"
    return table


def _task_table(
    title: str,
    tasks: Mapping[str, Mapping[str, Mapping[str, float]]],
    kinds: Mapping[str, str],
    more: Mapping[str, Mapping[str, str]] | None = None,
) -> Table:
    """A row for each task, a column for each model, and columns with more (name -> task -> text)."""
    table, more = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)), more or {}
    models = models_in(tasks)
    for name in ("task", "metric"):
        table.add_column(name, no_wrap=True)
    for name in (*models, *more):
        table.add_column(name.replace("+", "\n+"), justify="right")
    for task, by_model in tasks.items():
        metric, higher = headline(kinds[task])
        values = [by_model.get(model, {}).get(metric) for model in models]
        winner = best(kinds[task], values)
        cells = ["" if v is None else f"[bold]{v:.3f}[/bold]" if v == winner else f"{v:.3f}" for v in values]
        table.add_row(task, metric + (" ↑" if higher else " ↓"), *cells, *(column[task] for column in more.values()))
    return table
