"""Compares the finished runs of a sweep: tasks by methods, ranks, differences to a reference, costs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from tap_flower.report.results import headline, metric_with_arrow, read_results, scores
from tap_flower.study.plan import ROUNDS, STEPS, Sweep
from tap_flower.study.statistics import Estimate, estimate, mean_ranks, paired

OVERALL = "mean of scores"
"""Name of the row over all tasks."""
TITLES = {ROUNDS: "Equal rounds", STEPS: "Equal optimiser steps"}
"""Budget -> what the methods have in common."""


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
        budget: name of the budget that the methods have in common.
        labels: labels of the methods, as the sweep lists them.
        seeds: seeds of the finished runs.
        reference: the label that the others' differences are to.
        quality: a row for each task, and the mean of their scores.
        ranks: label -> mean rank over tasks and seeds.
        costs: rows of megabytes, rounds, optimiser steps and seconds of a run.
        note: what a reader of the tables must know.
    """

    budget: str
    labels: Sequence[str]
    seeds: Sequence[int]
    reference: str
    quality: Sequence[Row]
    ranks: Mapping[str, float]
    costs: Sequence[Row]
    note: str = ""


Values = dict[str, dict[int, float]]
"""Label -> seed -> value."""


def compare(sweep: Sweep, budget: str = ROUNDS) -> Comparison:
    """Compares the finished runs of a sweep that have one budget.

    Methods are ranked for each task and seed by their score: the headline metric, or 1 minus it where lower is better.

    Raises:
        StorageError: the results of a run are damaged.
    """
    found = {at: read_results(run.folder) for at, run in sweep.budgets[budget].items() if run.done}
    labels = list(dict.fromkeys(label for label, _ in found))
    seeds = sorted({seed for _, seed in found})
    kinds = {task: kind for results in found.values() for task, kind in results["kinds"].items()}
    measured, scored, costs = _by_name(), _by_name(), _by_name()
    for (label, seed), results in found.items():
        of_run = scores(results, sweep.result[label])
        for task, score in of_run.items():
            metrics = results["tasks"][task][sweep.result[label]]
            measured[task][label][seed], scored[task][label][seed] = metrics[headline(kinds[task])[0]], score
        measured[OVERALL][label][seed] = scored[OVERALL][label][seed] = fmean(of_run.values())
        costs["MB to clients"][label][seed] = results["bytes"]["down"] / 1e6
        costs["MB back"][label][seed] = results["bytes"]["up"] / 1e6
        costs["rounds"][label][seed] = results["rounds"]
        costs["optimiser steps"][label][seed] = sum(results["steps"].values())
        costs["seconds"][label][seed] = results["seconds"]["total"]
    units = {
        **{task: metric_with_arrow(kinds[task]) for task in sorted(kinds)},
        **({OVERALL: "score ↑"} if found else {}),
    }
    ranked = [
        {label: by_seed[seed] for label, by_seed in scored[task].items() if seed in by_seed}
        for task in kinds
        for seed in seeds
    ]
    one_stage = [label for label in labels if budget == STEPS and sweep.result[label] == "server"]
    return Comparison(
        budget,
        labels,
        seeds,
        sweep.reference,
        [_row(name, unit, measured[name], scored[name], sweep.reference) for name, unit in units.items()],
        mean_ranks(ranked),
        [Row(name, "a run", _estimates(values), {}) for name, values in costs.items()],
        f"Without a stage 2, with equal steps in stage 1 alone: {', '.join(one_stage)}." if one_stage else "",
    )


def _by_name() -> dict[str, Values]:
    return defaultdict(lambda: defaultdict(dict))


def _row(name: str, unit: str, values: Values, scored: Values, reference: str) -> Row:
    means = {label: fmean(by_seed.values()) for label, by_seed in scored.items()}
    best = frozenset(label for label, mean in means.items() if mean == max(means.values()))
    differences = {
        label: difference
        for label, by_seed in scored.items()
        if label != reference and (difference := paired(by_seed, scored.get(reference, {}))) is not None
    }
    # Where all are equal, none stands out.
    return Row(name, unit, _estimates(values), differences, best if len(best) < len(means) else frozenset())


def _estimates(values: Values) -> dict[str, Estimate]:
    return {label: estimate(list(by_seed.values())) for label, by_seed in values.items()}
