"""Tables over runs: tasks and models, side by side, with mean and spread over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import yaml

from tap_flower.report.results import best, headline, models_in
from tap_flower.report.run_record import RunRecord
from tap_flower.report.svg import number


@dataclass(frozen=True)
class Table:
    """A table of a page.

    Attributes:
        caption: what it shows.
        header: names of the columns; the first column names the rows.
        rows: cells.
        best: (row, column) of the cells that stand out.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    best: frozenset[tuple[int, int]] = frozenset()


def metric_of(kind: str) -> str:
    """The headline metric of a kind of task, and what is better."""
    metric, higher = headline(kind)
    return f"{metric} ({'higher' if higher else 'lower'} is better)"


def groups(runs: Sequence[RunRecord]) -> list[list[RunRecord]]:
    """Runs that differ in nothing but their seed stand together, in the order in which the first of each was given."""
    found: dict[str, list[RunRecord]] = {}
    for run in runs:
        config = _config(run)
        key = repr(sorted(config.items())) if config else repr([run.results[k] for k in ("method", "preset", "rounds")])
        found.setdefault(f"{run.results['method']} {key}", []).append(run)
    return list(found.values())


def _config(run: RunRecord) -> dict[str, Any]:
    config = yaml.safe_load(run.config) if run.config else {}
    return {key: value for key, value in config.items() if key != "seed"} if isinstance(config, dict) else {}


def differences(runs: Sequence[RunRecord]) -> list[str]:
    """The keys, besides the seed, in which the configurations of runs differ."""
    configs = [_config(run) for run in runs]
    return sorted({key for config in configs for key in config if any(config[key] != c.get(key) for c in configs)})


def headline_table(runs: Sequence[RunRecord]) -> Table:
    """Task × model: means over clients of each task's headline metric, and over runs their mean and spread."""
    kinds: dict[str, str] = {task: kind for run in runs for task, kind in run.results["kinds"].items()}
    models = models_in({f"{n} {task}": m for n, run in enumerate(runs) for task, m in run.results["tasks"].items()})
    tasks = sorted({task for run in runs for task in run.results["tasks"]})
    rows, stand_out = [], set()
    for place, task in enumerate(tasks):
        found = {model: _values(runs, task, model, kinds[task]) for model in models}
        means = [fmean(values) if values else None for values in found.values()]
        winner = best(kinds[task], means)
        stand_out |= {(place, 2 + n) for n, mean in enumerate(means) if mean is not None and mean == winner}
        replaced = sum(_replaced(run.results, task) for run in runs) / len(runs)
        rows.append([task, metric_of(kinds[task]), *(spread(found[m]) for m in models), f"{replaced:g}"])
    about = "Means over clients, on test data"
    if len(runs) > 1:
        seeds = ", ".join(str(run.results["seed"]) for run in runs)
        about += f"; mean ± standard deviation over {len(runs)} runs with seeds {seeds}"
    return Table(about, ["task", "metric", *models, "replaced"], rows, frozenset(stand_out))


def side_by_side(grouped: Sequence[Sequence[RunRecord]]) -> Table:
    """Task and model × run, and behind the runs that differ in nothing but their seed their mean and spread."""
    runs = [run for group in grouped for run in group]
    kinds = {task: kind for run in runs for task, kind in run.results["kinds"].items()}
    header = ["task", "model", "metric"]
    for group in grouped:
        header += [run.title for run in group] + (["mean ± deviation"] if len(group) > 1 else [])
    rows = []
    for task in sorted(kinds):
        for model in models_in({str(n): run.results["tasks"].get(task, {}) for n, run in enumerate(runs)}):
            row = [task, model, metric_of(kinds[task])]
            for group in grouped:
                row += [spread(_values([run], task, model, kinds[task])) for run in group]
                row += [spread(_values(group, task, model, kinds[task]))] if len(group) > 1 else []
            rows.append(row)
    return Table("Every run, means over clients, on test data", header, rows)


def spread(values: Sequence[float]) -> str:
    """The mean of some values, and their standard deviation (n - 1) where there are several."""
    if not values:
        return "–"
    return number(fmean(values)) + (f" ± {number(stdev(values))}" if len(values) > 1 else "")


def _values(runs: Sequence[RunRecord], task: str, model: str, kind: str) -> list[float]:
    by_run = (run.results["tasks"].get(task, {}).get(model, {}).get(headline(kind)[0]) for run in runs)
    return [value for value in by_run if value is not None]


def _replaced(results: Mapping[str, Any], task: str) -> int:
    return sum(counts.get(task, 0) for counts in results["replacements"].values())
