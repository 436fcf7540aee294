"""`results.json`: the outcome of a run."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from tap_flower.core.headline import Headline
from tap_flower.core.tasks import TASK_KINDS
from tap_flower.errors import StorageError
from tap_flower.files import read_json
from tap_flower.plain import counted

SCHEMA = 2
RESULTS = "results.json"
MODELS = ("server", "server+finetune", "personal", "tap")
"""Names of models in the order in which they are shown; others follow."""
SPREAD = {"worst": "worst client", "p10": "tenth percentile", "std": "standard deviation"}
"""Key in the results of a task and a model -> what it says of the headline metric over clients; see `spread`."""
_REQUIRED = {"preset", "method", "seed", "rounds", "clients", "tasks", "kinds", "replacements", "bytes"}
Metrics = Mapping[str, Mapping[str, Mapping[str, float]]]


def results(
    *,
    preset: str,
    method: str,
    seed: int,
    rounds: int,
    clients: Mapping[str, Metrics],
    kinds: Mapping[str, str],
    headlines: Mapping[str, Headline],
    replacements: Mapping[str, Mapping[str, int]],
    bytes_: Mapping[str, Any],
    steps: Mapping[str, int],
    missing: Mapping[str, str],
    marks: Mapping[str, Sequence[str]],
    dropped: Mapping[str, int],
    seconds: Mapping[str, float],
    privacy: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Puts the content of `results.json` together, with each metric's mean over clients, and `spread`.

    Args:
        preset: name of the preset.
        method: name of the method.
        seed: seed of the run.
        rounds: rounds of stage 1.
        clients: client -> task -> model -> metric -> value on the client's test data.
        kinds: task name -> name of its kind.
        headlines: task name -> the metric that it is judged by.
        replacements: client -> task -> number of rounds in which its components were replaced.
        bytes_: `down`, `up`, `first_values` and `per_component`; see `TapResult.bytes`.
        steps: client -> optimiser steps that it made, both stages.
        missing: client -> why it was not evaluated.
        marks: client -> what a reader of its metrics must know.
        dropped: who -> how many of its replies could not be used.
        seconds: phase -> its seconds; `total` is the whole run.
        privacy: what a private run has spent; None leaves the key out.
    """
    collected: dict[str, dict[str, dict[str, list[float]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for _, by_task in sorted(clients.items()):
        for task, by_model in by_task.items():
            for model, by_metric in by_model.items():
                for metric, value in by_metric.items():
                    collected[task][model][metric].append(value)
    return {
        "schema": SCHEMA,
        "preset": preset,
        "method": method,
        "seed": seed,
        "rounds": rounds,
        "clients": {name: clients[name] for name in sorted(clients)},
        "tasks": {
            task: {
                model: {metric: fmean(v) for metric, v in m.items()} | spread(headlines[task], m)
                for model, m in by_model.items()
            }
            for task, by_model in sorted(collected.items())
        },
        "kinds": dict(sorted(kinds.items())),
        "headlines": {task: headline._asdict() for task, headline in sorted(headlines.items())},
        "replacements": {name: dict(replacements[name]) for name in sorted(replacements)},
        "bytes": dict(bytes_),
        "steps": {name: steps[name] for name in sorted(steps)},
        "missing": dict(missing),
        "marks": {name: list(marks[name]) for name in sorted(marks)},
        "dropped": {who: dropped[who] for who in sorted(dropped)},
        "seconds": dict(seconds),
        **({} if privacy is None else {"privacy": dict(privacy)}),
    }


def spread(headline: Headline, values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """How a model's headline metric differs between clients.

    `worst` is that of the worst client, `p10` the tenth percentile counted from the worst, `std` the sample standard
    deviation (0 for one client). Empty where the clients do not have the metric.

    Args:
        headline: the metric that the task is judged by.
        values: metric -> its values, one for each client.
    """
    name, higher = headline
    if name not in values:
        return {}
    found = values[name]
    return {
        "worst": min(found) if higher else max(found),
        "p10": float(np.quantile(found, 0.1 if higher else 0.9)),
        "std": stdev(found) if len(found) > 1 else 0.0,
    }


def read_results(run: Path) -> dict[str, Any]:
    """Reads the `results.json` of a run folder.

    Raises:
        StorageError: there is no such folder, the run has not finished, or the file is damaged.
    """
    if not run.is_dir():
        raise StorageError(f"{run} is no run folder: give the folder that `tap-flower simulate --out` wrote")
    if not (run / RESULTS).exists():
        raise StorageError(f"{run} holds no {RESULTS}: the run has not finished; go on with `--out {run} --resume`")
    found = read_json(run / RESULTS)
    if found.get("schema") != SCHEMA:
        raise StorageError(
            f"{run / RESULTS} has schema {found.get('schema')}, not {SCHEMA}: use the version that wrote it"
        )
    if missing := _REQUIRED - found.keys():
        raise StorageError(f"{run / RESULTS} is damaged: it lacks {', '.join(sorted(missing))}")
    return found


def dropped_answers(found: Mapping[str, Any]) -> list[str]:
    """A sentence for each client of a run that was evaluated, and some of whose answers could not be used."""
    return [
        f"{who}: {counted(count, 'answer')} could not be used"
        for who, count in found.get("dropped", {}).items()
        if not any(who in (name, f"client {name!r}") for name in found.get("missing", {}))
    ]


def remarks(found: Mapping[str, Any]) -> list[str]:
    """What a reader of the results of a run must know, a sentence each: who is missing and why, and what was lost.

    Means over different clients are told, too: those of a task for which a client has no test rows, or not every model. So
    are tasks that stage 2 made worse.
    """
    missing = [
        # Names of clients have no blanks: a node was refused before its client had a name.
        f"{name if ' ' in name else f'client {name!r}'} was not evaluated: {reason}"
        for name, reason in found.get("missing", {}).items()
    ]
    marks = [f"client {name!r}: {mark}" for name, marks in found.get("marks", {}).items() for mark in marks]
    untested = [
        f"client {name!r} has no test rows of task {task!r}: the means of the task are without it"
        for name, by_task in found["clients"].items()
        for task, by_model in by_task.items()
        if not by_model
    ]
    of_tasks = [sentence for task in found["tasks"] for sentence in (*_uneven(found, task), *_worse(found, task))]
    dropped = [f"{sentence}; the events `dropped` of metrics.jsonl say why" for sentence in dropped_answers(found)]
    return missing + dropped + marks + untested + of_tasks


def _worse(found: Mapping[str, Any], task: str) -> list[str]:
    by_model, headline = found["tasks"][task], headlines(found)[task]
    if not {"server", "personal", "tap"} <= by_model.keys():
        return []
    after, *before = (by_model[model][headline.metric] for model in ("tap", "personal", "server"))
    if any(headline.ahead(after, value) >= 0 for value in before):
        return []
    return [
        f"task {task!r}: stage 2 made the test result worse: {headline.metric} is {after:.3g} after it, and was "
        f"{before[0]:.3g} (personal) and {before[1]:.3g} (server)"
    ]


def _uneven(found: Mapping[str, Any], task: str) -> list[str]:
    counts = Counter(model for by_task in found["clients"].values() for model in by_task.get(task, {}))
    if len(set(counts.values())) < 2:
        return []
    parts = [f"{model} over {counts[model]}" for model in models_in({task: found["tasks"][task]})]
    return [
        f"task {task!r}: its means are over different numbers of clients, so they cannot be compared: {', '.join(parts)}"
    ]


def headlines(*found: Mapping[str, Any]) -> dict[str, Headline]:
    """Task name -> the metric that it is judged by, in the results of some runs; without tasks that `disputed` tells.

    Results that were written before they said it count a user's own kind by its loss.
    """
    return {task: judged_by[0][1] for task, judged_by in _judged(found).items() if len(judged_by) == 1}


def disputed(*found: Mapping[str, Any]) -> list[str]:
    """A sentence for each task that is of several kinds, or judged by several metrics, in the results of some runs."""
    return [
        f"task {task!r} is not compared: by this name runs have "
        + " and ".join(f"{kind} judged by {headline.metric}" for kind, headline in judged_by)
        for task, judged_by in _judged(found).items()
        if len(judged_by) > 1
    ]


def _judged(found: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[str, Headline]]]:
    """Task name -> each (kind, metric that it is judged by) that it has in the results of some runs."""
    judged: dict[str, dict[tuple[str, Headline], None]] = defaultdict(dict)
    for results in found:
        for task, kind in sorted(results["kinds"].items()):
            judged[task][kind, _headline(results, task, kind)] = None
    return {task: list(ways) for task, ways in judged.items()}


def _headline(found: Mapping[str, Any], task: str, kind: str) -> Headline:
    if "headlines" in found:
        return Headline(**found["headlines"][task])
    return TASK_KINDS[kind].judged_by if kind in TASK_KINDS else Headline("loss", False)


def models_in(tasks: Metrics) -> list[str]:
    """The models in `task -> model -> metric -> value`, in the order in which they are shown."""
    present = {model for by_model in tasks.values() for model in by_model}
    return [model for model in MODELS if model in present] + sorted(present - set(MODELS))


def scores(found: Mapping[str, Any], model: str) -> dict[str, float]:
    """Task name -> score of a model in the results of a run: the headline metric, or 1 minus it where lower is better.

    Tasks without results of the model are left out: stage 2 may have failed on all clients that have them.
    """
    judged_by = headlines(found)
    return {
        task: judged_by[task].score(by_model[model]) for task, by_model in found["tasks"].items() if model in by_model
    }


def unmeasured(tasks: Metrics, models: Iterable[str]) -> list[str]:
    """A sentence for each task of a run, in its results, that has none of some models."""
    return [
        f"task {task!r} has no results of {', '.join(missing)}, and is left out"
        for task, by_model in tasks.items()
        if (missing := [model for model in models if model not in by_model])
    ]
