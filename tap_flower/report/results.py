"""`results.json`: the outcome of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from tap_flower.core.tasks import TASK_KINDS
from tap_flower.errors import StorageError
from tap_flower.files import read_json

SCHEMA = 1
RESULTS = "results.json"
MODELS = ("server", "server+finetune", "personal", "tap")
"""Names of models in the order in which they are shown; others follow."""
_REQUIRED = {"preset", "method", "seed", "rounds", "clients", "tasks", "kinds", "replacements", "bytes"}
Metrics = Mapping[str, Mapping[str, Mapping[str, float]]]


def results(clients: Mapping[str, Metrics], **known: Any) -> dict[str, Any]:
    """Puts the content of `results.json` together: each metric's mean over clients beside what else is known of a run.

    Args:
        clients: client -> task -> model -> metric -> value on the client's test data.
        **known: `preset`, `method`, `seed` and `rounds` of stage 1; `kinds`: task -> kind; `replacements`: client -> task ->
            number of rounds in which its components were replaced; `bytes`: `down`, `up` and `per_component`; `steps`:
            client -> optimiser steps of both stages; `seconds`: phase -> duration, `total` that of the whole run; `privacy`:
            what a private run has spent. A value of None is left out.
    """
    collected: dict[str, dict[str, dict[str, list[float]]]] = {}
    for _, by_task in sorted(clients.items()):
        for task, by_model in by_task.items():
            for model, by_metric in by_model.items():
                for metric, value in by_metric.items():
                    of_model = collected.setdefault(task, {}).setdefault(model, {})
                    of_model.setdefault(metric, []).append(value)
    tasks = {
        task: {model: {metric: fmean(v) for metric, v in m.items()} for model, m in by_model.items()}
        for task, by_model in collected.items()
    }
    values = {**known, "clients": clients, "tasks": tasks}
    ordered = {k: dict(sorted(v.items())) if isinstance(v, Mapping) else v for k, v in values.items() if v is not None}
    return {"schema": SCHEMA, **ordered}


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


def headline(kind: str) -> tuple[str, bool]:
    """The metric that a kind of task is judged by, and whether higher is better; a user's own kind is judged by its loss."""
    found = TASK_KINDS.get(kind)
    return ("loss", False) if found is None else (found.headline, found.higher_is_better)


def metric_in_words(kind: str) -> str:
    """The headline metric of a kind of task for an axis, such as `accuracy (higher is better)`."""
    metric, higher = headline(kind)
    return f"{metric} ({'higher' if higher else 'lower'} is better)"


def metric_with_arrow(kind: str) -> str:
    """The headline metric of a kind of task for a table, with an arrow to the better side, such as `accuracy ↑`."""
    metric, higher = headline(kind)
    return f"{metric} {'↑' if higher else '↓'}"


def models_in(tasks: Metrics) -> list[str]:
    """The models in `task -> model -> metric -> value`, in the order in which they are shown."""
    present = {model for by_model in tasks.values() for model in by_model}
    return [model for model in MODELS if model in present] + sorted(present - set(MODELS))


def best(kind: str, values: Sequence[float | None]) -> float | None:
    """The best of some values of the headline metric; None where there are none, or no two that differ."""
    known = {value for value in values if value is not None}
    return (max if headline(kind)[1] else min)(known) if len(known) > 1 else None


def scores(found: Mapping[str, Any], model: str) -> dict[str, float]:
    """Task name -> score of a model in the results of a run: the headline metric, or 1 minus it where lower is better."""
    kinds = found["kinds"]
    return {task: TASK_KINDS[kinds[task]].score(by_model[model]) for task, by_model in found["tasks"].items()}
