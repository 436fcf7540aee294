"""Compares the finished runs of a sweep: tasks by methods, ranks, differences to a reference, costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from tap_flower.report.results import headline, metric_with_arrow, read_results, scores
from tap_flower.study.plan import Sweep
from tap_flower.study.statistics import Estimate, estimate, mean_ranks, paired

OVERALL = "mean of scores"
"""Name of the row over all tasks."""


@dataclass(frozen=True)
class Row:
    """A row of the comparison.

    Attributes:
        name: name of the task, or of the cost.
        unit: the metric, with an arrow to the better side.
        values: label -> mean and interval over seeds.
        differences: label -> paired difference to the reference, positive where the label is better; empty for costs.
        best: the labels with the best mean.
    """

    name: str
    unit: str
    values: Mapping[str, Estimate]
    differences: Mapping[str, Estimate]
    best: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Comparison:
    """The comparison of a sweep's methods.

    Attributes:
        labels: labels of the methods, as the sweep lists them.
        seeds: seeds of the finished runs.
        reference: the label that the others' differences are to.
        quality: a row for each task, and the mean of their scores.
        ranks: label -> mean rank over tasks and seeds.
        costs: rows of megabytes, optimiser steps and seconds of a run.
    """

    labels: Sequence[str]
    seeds: Sequence[int]
    reference: str
    quality: Sequence[Row]
    ranks: Mapping[str, float]
    costs: Sequence[Row]


Values = dict[str, dict[int, float]]
"""Label -> seed -> value."""


def compare(sweep: Sweep) -> Comparison:
    """Compares the finished runs of a sweep.

    Methods are ranked for each task and seed by their score: the headline metric, or 1 minus it where lower is better.

    Raises:
        StorageError: the results of a run are damaged.
    """
    found = {(run.label, run.seed): read_results(run.folder) for run in sweep.runs if run.done}
    labels = list(dict.fromkeys(run.label for run in sweep.runs if (run.label, run.seed) in found))
    kinds = {task: kind for results in found.values() for task, kind in results["kinds"].items()}
    tasks: dict[str, Values] = {task: {} for task in sorted(kinds)}
    overall: Values = {}
    ranked: dict[tuple[str, int], dict[str, float]] = {}
    for (label, seed), results in found.items():
        of_run = scores(results, sweep.result[label])
        for task, score in of_run.items():
            metrics = results["tasks"][task][sweep.result[label]]
            tasks[task].setdefault(label, {})[seed] = metrics[headline(kinds[task])[0]]
            ranked.setdefault((task, seed), {})[label] = score
        overall.setdefault(label, {})[seed] = fmean(of_run.values())
    quality = [
        _row(task, metric_with_arrow(kinds[task]), headline(kinds[task])[1], values, sweep.reference)
        for task, values in tasks.items()
    ]
    quality += [_row(OVERALL, "score ↑", True, overall, sweep.reference)] if found else []
    costs: dict[str, Values] = {}
    for (label, seed), results in found.items():
        spent = {
            "MB to clients": results["bytes"]["down"] / 1e6,
            "MB back": results["bytes"]["up"] / 1e6,
            "optimiser steps": sum(results["steps"].values()),
            "seconds": results["seconds"]["total"],
        }
        for name, value in spent.items():
            costs.setdefault(name, {}).setdefault(label, {})[seed] = value
    return Comparison(
        labels,
        sorted({seed for _, seed in found}),
        sweep.reference,
        quality,
        mean_ranks(list(ranked.values())),
        [Row(name, "a run", _estimates(values), {}) for name, values in costs.items()],
    )


def _row(name: str, unit: str, higher: bool, values: Values, reference: str) -> Row:
    means, sign = _estimates(values), 1 if higher else -1
    top = (max if higher else min)(one.mean for one in means.values())
    oriented = {label: {seed: sign * v for seed, v in by_seed.items()} for label, by_seed in values.items()}
    differences = {
        label: difference
        for label, by_seed in oriented.items()
        if label != reference and (difference := paired(by_seed, oriented.get(reference, {}))) is not None
    }
    best = frozenset(label for label, one in means.items() if one.mean == top)
    # Where all are equal, none stands out.
    best = best if len(best) < len(means) else frozenset()
    return Row(name, unit, means, differences, best)


def _estimates(values: Values) -> dict[str, Estimate]:
    return {label: estimate([by_seed[seed] for seed in sorted(by_seed)]) for label, by_seed in values.items()}
