"""Compares the finished runs of a sweep: tasks by methods, ranks, differences to a reference, clients, costs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np

from tap_flower.errors import ConfigError
from tap_flower.report.results import SPREAD, disputed, dropped_answers, headlines, read_results, scores, unmeasured
from tap_flower.study.plan import ROUNDS, STEPS, Sweep
from tap_flower.study.statistics import Estimate, estimate, holm, mean_ranks, paired

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
        differences: label -> paired difference to the reference, positive where the label is better; in rows of quality.
        best: the labels with the best mean.
        p_values: label -> p-value of its difference, corrected for the number of labels that the row compares.
    """

    name: str
    unit: str
    values: Mapping[str, Estimate]
    differences: Mapping[str, Estimate]
    best: frozenset[str] = frozenset()
    p_values: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """The comparison of a sweep's methods.

    Attributes:
        budget: name of the budget that the methods have in common.
        labels: labels of the methods, as the sweep lists them.
        seeds: seeds of the finished runs; some labels may have fewer, which `unfinished` tells.
        reference: the label that the others' differences are to.
        quality: a row for each task, and the mean of their scores.
        ranks: label -> mean rank over tasks and `ranked_seeds`.
        ranked_seeds: seeds with which all labels have results.
        clients: rows on the spread over clients, and on how many of them a method serves better than training alone.
        costs: rows of megabytes, rounds, optimiser steps and seconds of a run.
        unfinished: a sentence for each label that has not finished with a seed that others have.
        note: what else a reader of the tables must know.
    """

    budget: str
    labels: Sequence[str]
    seeds: Sequence[int]
    reference: str
    quality: Sequence[Row]
    ranks: Mapping[str, float]
    ranked_seeds: Sequence[int]
    clients: Sequence[Row]
    costs: Sequence[Row]
    unfinished: str = ""
    note: str = ""


Values = dict[str, dict[int, float]]
"""Label -> seed -> value."""
Found = Mapping[tuple[str, int], Mapping[str, Any]]
"""(label, seed) -> results of the run."""
ALONE = "local"
"""Name of the model, and of the method, of clients that train alone."""
NOT_WORSE = f"not worse than {ALONE}"
"""Name of the row on how many clients lose nothing."""


def compare(sweep: Sweep, budget: str = ROUNDS) -> Comparison:
    """Compares the finished runs of a sweep that have one budget.

    Methods are ranked for each task and seed by their score: the headline metric, or 1 minus it where lower is better.

    Raises:
        ConfigError: the runs mean several tasks by one name.
        StorageError: the results of a run are damaged.
    """
    found = {at: read_results(run.folder) for at, run in sweep.budgets[budget].items() if run.done}
    labels = list(dict.fromkeys(label for label, _ in found))
    seeds = sorted({seed for _, seed in found})
    if several := disputed(*found.values()):
        raise ConfigError(f"{several[0]}: run those again that an earlier version made")
    judged_by = headlines(*found.values())
    measured, scored, costs = _by_name(), _by_name(), _by_name()
    for (label, seed), results in found.items():
        of_run = scores(results, sweep.result[label])
        for task, score in of_run.items():
            metrics = results["tasks"][task][sweep.result[label]]
            measured[task][label][seed], scored[task][label][seed] = metrics[judged_by[task].metric], score
        if len(of_run) == len(results["tasks"]):  # else it would be a mean over other tasks
            measured[OVERALL][label][seed] = scored[OVERALL][label][seed] = fmean(of_run.values())
        costs["MB to clients"][label][seed] = results["bytes"]["down"] / 1e6
        costs["MB back"][label][seed] = results["bytes"]["up"] / 1e6
        costs["rounds"][label][seed] = results["rounds"]
        costs["optimiser steps"][label][seed] = sum(results["steps"].values())
        costs["seconds"][label][seed] = results["seconds"]["total"]
    units = {
        **{task: str(judged_by[task]) for task in sorted(judged_by)},
        **({OVERALL: "score ↑"} if found else {}),
    }
    ranked = [
        (seed, of_labels)
        for task in judged_by
        for seed in seeds
        if len(of_labels := {label: one[seed] for label, one in scored[task].items() if seed in one}) == len(labels)
    ]
    one_stage = [label for label in labels if budget == STEPS and sweep.result[label] == "server"]
    notes = [f"Without a stage 2, with equal steps in stage 1 alone: {', '.join(one_stage)}."] if one_stage else []
    notes += [
        f"{label}, seed {seed}: without {', '.join(missing)}, so that its means are over other clients."
        for (label, seed), results in found.items()
        if (missing := results.get("missing"))
    ]
    notes += [
        f"{label}, seed {seed}: {sentence}."
        for (label, seed), results in found.items()
        for sentence in (*dropped_answers(results), *unmeasured(results["tasks"], [sweep.result[label]]))
    ]
    ranked_seeds = sorted({seed for seed, _ in ranked})
    if ranked and ranked_seeds != seeds:
        notes.append(f"The mean rank is over {_named(ranked_seeds)} alone.")
    return Comparison(
        budget,
        labels,
        seeds,
        sweep.reference,
        [_row(name, unit, measured[name], scored[name], sweep.reference) for name, unit in units.items()],
        mean_ranks([of_labels for _, of_labels in ranked]),
        ranked_seeds,
        [*_spread(found, sweep.result, units), *_served(found, sweep.result)],
        [Row(name, "a run", _estimates(values), {}) for name, values in costs.items()],
        " ".join(_unfinished(sweep.budgets[budget], found, seeds)),
        " ".join(notes),
    )


def _unfinished(planned: Iterable[tuple[str, int]], found: Found, seeds: Sequence[int]) -> list[str]:
    """A sentence for each planned label that has not finished with some of the seeds."""
    gone = {label: [seed for seed in seeds if (label, seed) not in found] for label, _ in planned}
    return [f"{label} has not finished with {_named(missing)}." for label, missing in gone.items() if missing]


def _named(seeds: Sequence[int]) -> str:
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


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
    p_values = holm({label: one.p for label, one in differences.items() if one.p is not None})
    # Where all are equal, none stands out.
    best = best if len(best) < len(means) else frozenset()
    return Row(name, unit, _estimates(values), differences, best, p_values)


def _spread(found: Found, result: Mapping[str, str], units: Mapping[str, str]) -> list[Row]:
    """Of each task, and of the clients' scores: the worst client, the tenth percentile, the standard deviation."""
    rows = {(task, key): Values() for task in units for key in SPREAD}
    for (label, seed), results in found.items():
        for task, by_model in results["tasks"].items():
            metrics = by_model.get(result[label], {})
            for key in SPREAD.keys() & metrics.keys():
                rows[task, key].setdefault(label, {})[seed] = metrics[key]
        if of_clients := list(_client_scores(results, result[label]).values()):
            over = (
                min(of_clients),
                float(np.quantile(of_clients, 0.1)),
                float(np.std(of_clients, ddof=len(of_clients) > 1)),
            )
            for key, value in zip(SPREAD, over, strict=True):
                rows[OVERALL, key].setdefault(label, {})[seed] = value
    return [
        Row(f"{task}: {SPREAD[key]}", units[task] if key != "std" else "↓", _estimates(values), {})
        for (task, key), values in rows.items()
        if values
    ]


def _served(found: Found, result: Mapping[str, str]) -> list[Row]:
    """The shares of clients that a method serves better than training alone does, and no worse beyond noise.

    A client's score is the mean over its tasks. It is worse beyond noise where the difference of its score to that of
    `local`, paired by seed, has an interval over seeds that is wholly below 0.
    """
    better, no_worse = dict[str, Estimate](), dict[str, Estimate]()
    by_client: dict[str, dict[str, dict[int, float]]] = {}
    for (label, seed), results in found.items():
        for client, score in _client_scores(results, result[label]).items():
            by_client.setdefault(label, {}).setdefault(client, {})[seed] = score
    alone = next((by_client[label] for label in by_client if result[label] == ALONE), {})
    for label, scores_of in by_client.items():
        pairs = [paired(scores_of[client], alone[client]) for client in scores_of.keys() & alone.keys()]
        differences = [one for one in pairs if one is not None]
        if result[label] == ALONE or not differences:
            continue
        seeds = min(one.count for one in differences)
        better[label] = Estimate(fmean(one.mean > 0 for one in differences), None, seeds)
        if seeds > 1:
            worse = fmean(one.significant and one.mean < 0 for one in differences)
            no_worse[label] = Estimate(1.0 - worse, None, seeds)
    rows = [Row(f"better than {ALONE}", "share ↑", better, {}), Row(NOT_WORSE, "share ↑", no_worse, {})]
    return [row for row in rows if row.values]


def _client_scores(results: Mapping[str, Any], model: str) -> dict[str, float]:
    """Client -> mean over its tasks of its score: the headline metric, or 1 minus it where lower is better."""
    judged_by = headlines(results)
    of_tasks = {
        client: [judged_by[task].score(by_model[model]) for task, by_model in by_task.items() if model in by_model]
        for client, by_task in results["clients"].items()
    }
    return {client: fmean(found) for client, found in of_tasks.items() if found}


def _estimates(values: Values) -> dict[str, Estimate]:
    return {label: estimate(list(by_seed.values())) for label, by_seed in values.items()}
