"""Tables of results, for the report and the terminal: tasks and models, over one run or several."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from tap_flower.plain import counted
from tap_flower.report.configuration import different
from tap_flower.report.results import SPREAD, disputed, headlines, models_in
from tap_flower.report.run_record import RunRecord
from tap_flower.report.svg import number


@dataclass(frozen=True)
class Table:
    """A table as plain text.

    Attributes:
        caption: what it shows.
        header: names of the columns; the first column names the rows.
        rows: cells.
        best: (row, column) of the cells that stand out.
        note: what else a reader should know.
        shades: (row, column) of a shaded cell -> its share of the strongest shade; -1 to 1, negative ones have a colour of
            their own.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    best: frozenset[tuple[int, int]] = frozenset()
    note: str = ""
    shades: Mapping[tuple[int, int], float] = field(default_factory=dict)


def groups(runs: Sequence[RunRecord]) -> list[list[RunRecord]]:
    """Groups runs that differ in nothing but their seed, in the order in which the first of each was given."""
    found: list[list[RunRecord]] = []
    for run in runs:
        alike = [group for group in found if all(_repeats(run, other) for other in group)]
        if len(alike) == 1:
            alike[0].append(run)
        else:  # a kept run, which does not say where its data lay, may be like several groups
            found.append([run])
    return found


def _repeats(run: RunRecord, other: RunRecord) -> bool:
    """Whether two runs differ in nothing but their seed, as far as is known."""
    known = ("method",) if run.settings and other.settings else ("method", "preset", "rounds")
    return (
        bool(run.settings) == bool(other.settings)
        and all(run.results[key] == other.results[key] for key in known)
        and not disputed(run.results, other.results)
        and not different(run.settings, other.settings)
    )


def repeated_seeds(runs: Sequence[Mapping[str, Any]]) -> str:
    """A sentence where several results are of one seed, or nothing."""
    counts = Counter(run["seed"] for run in runs)
    several = [f"{counted(count, 'run')} of seed {seed}" for seed, count in counts.items() if count > 1]
    return f"there are {', '.join(several)}, which are no independent repetitions" if several else ""


def differences(runs: Sequence[RunRecord]) -> list[str]:
    """The options, besides the seed, in which the configurations of runs differ."""
    first, *others = [run.settings for run in runs if run.settings] or [{}]
    return sorted({key for other in others for key in different(first, other)})


def headline_table(runs: Sequence[Mapping[str, Any]]) -> Table:
    """Task × model: each task's headline metric, and how often personal components were replaced.

    Args:
        runs: the results of one run, or of several, whose mean and standard deviation the cells then hold.
    """
    judged_by = headlines(*runs)
    models = models_in({f"{n} {task}": m for n, run in enumerate(runs) for task, m in run["tasks"].items()})
    rows, stand_out = [], set()
    for place, task in enumerate(sorted({task for run in runs for task in run["tasks"]})):
        found = [_values(runs, task, model, judged_by[task].metric) for model in models]
        means = [fmean(values) if values else None for values in found]
        winner = judged_by[task].best(means)
        stand_out |= {(place, 2 + n) for n, mean in enumerate(means) if mean is not None and mean == winner}
        replaced = fmean(sum(counts.get(task, 0) for counts in run["replacements"].values()) for run in runs)
        rows.append([task, str(judged_by[task]), *map(spread, found), f"{replaced:.1f}".removesuffix(".0")])
    first, seeds = runs[0], ", ".join(str(run["seed"]) for run in runs)
    if len(runs) > 1:
        caption, note = f"mean of {len(runs)} runs, seeds {seeds}", "mean ± standard deviation over runs"
        note += f"; {repeated}" if (repeated := repeated_seeds(runs)) else ""
    else:
        caption = f"{first['method']} on {first['preset']}, {counted(first['rounds'], 'round')}, seed {seeds}"
        down, up = (first["bytes"][way] / 1e6 for way in ("down", "up"))
        note = f"{down:.1f} MB sent to clients, {up:.1f} MB back"
    header = ["task", "metric", *models, "replaced"]
    return Table(caption, header, rows, frozenset(stand_out), f"means over clients, on test data; {note}")


def clients_table(runs: Sequence[Mapping[str, Any]]) -> Table | None:
    """Task × model: how the headline metric differs between clients; None where no task has several.

    Args:
        runs: the results of one run, or of several, whose mean and standard deviation the cells then hold.
    """
    held = Counter((n, task) for n, run in enumerate(runs) for by_task in run["clients"].values() for task in by_task)
    several = {task for (n, task), count in held.items() if count > 1 and task in runs[n]["tasks"]}
    if not several:
        return None
    models = models_in({f"{n} {task}": run["tasks"].get(task, {}) for n, run in enumerate(runs) for task in several})
    rows, judged_by = [], headlines(*runs)
    for task in sorted(several):
        for key, what in SPREAD.items():
            found = [_values(runs, task, model, key) for model in models]
            rows.append([task, f"{what}, {judged_by[task] if key != 'std' else '↓'}", *map(spread, found)])
    return Table(
        "Over clients", ["task", "over clients", *models], rows, note="tenth percentile: counted from the worst"
    )


def side_by_side(grouped: Sequence[Sequence[RunRecord]]) -> Table:
    """Task and model × run, and behind the runs that differ in nothing but their seed their mean and spread."""
    runs = [run.results for group in grouped for run in group]
    header = ["task", "model", "metric"]
    for group in grouped:
        header += [run.title for run in group] + (["mean ± deviation"] if len(group) > 1 else [])
    rows = []
    for task, judged_by in sorted(headlines(*runs).items()):
        for model in models_in({str(n): run["tasks"].get(task, {}) for n, run in enumerate(runs)}):
            row = [task, model, str(judged_by)]
            for group in grouped:
                found = [_values([run.results], task, model, judged_by.metric) for run in group]
                row += map(spread, found)
                row += [spread([value for values in found for value in values])] if len(group) > 1 else []
            rows.append(row)
    return Table("Every run, means over clients, on test data", header, rows)


def spread(values: Sequence[float]) -> str:
    """The mean of some values as text, with their standard deviation (n - 1) where there are several."""
    if not values:
        return "–"
    return number(fmean(values)) + (f" ± {number(stdev(values))}" if len(values) > 1 else "")


def _values(runs: Sequence[Mapping[str, Any]], task: str, model: str, key: str) -> list[float]:
    """A metric, or a key of `SPREAD`, of a task and a model in each run that has it."""
    by_run = (run["tasks"].get(task, {}).get(model, {}).get(key) for run in runs)
    return [value for value in by_run if value is not None]
