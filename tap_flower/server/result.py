"""What a run has found: `TapResult`, and `results.json`."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np
from flwr.app import MetricRecord, RecordDict
from flwr.serverapp.strategy import Result

from tap_flower.config import Config
from tap_flower.errors import MessageError, RunError
from tap_flower.plain import shown
from tap_flower.report.results import results
from tap_flower.server.checkpoint import Progress
from tap_flower.server.privacy import Privacy
from tap_flower.server.roster import Roster
from tap_flower.wire.messages import Metrics, Report

_TOLD = 10
"""Clients that a line of the log names."""


@dataclass(repr=False)
class TapResult(Result):
    """Flower's `Result`, and what TAP adds to it.

    The result of a resumed run has the metrics of the rounds after the resume; `metrics.jsonl` has the losses of all.

    Attributes:
        personalise_metrics_clientapp: aggregated metrics of stage 2's fine-tuning, under the number of the last round.
        clients: client -> task -> model (`server`, `personal`, `tap`, …) -> metric -> value on the client's test data.
        tasks: task -> model -> metric -> mean over the clients that have the task.
        bytes: `down` and `up`, bytes of all tensors that were sent and received; `first_values`, those of them that gave
            clients the run's first values, before their first round; `per_component`, the others by component.
        missing: client, or "node NUMBER" of one that was refused -> why it was not evaluated, of all that the run has known.
        marks: client -> what a reader of its metrics must know, such as that its state was lost.
        summary: the content of `results.json`.
    """

    personalise_metrics_clientapp: dict[int, MetricRecord] = field(default_factory=dict)
    clients: dict[str, Metrics] = field(default_factory=dict)
    tasks: Metrics = field(default_factory=dict)
    bytes: dict[str, Any] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    marks: dict[str, list[str]] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)


def as_record(where: str, metrics: MetricRecord | None) -> MetricRecord | None:
    """What a project's own function returned as metrics; a dict of numbers is taken for a record.

    Raises:
        RunError: it is something else, such as the pair (loss, metrics) of Flower's earlier strategies.
    """
    if metrics is None or isinstance(metrics, MetricRecord):
        return metrics
    try:
        return MetricRecord(dict(metrics))
    except (TypeError, ValueError) as error:
        raise RunError(
            f"{where} returned a {type(metrics).__name__}: return a MetricRecord of numbers by name, or None"
        ) from error


def mean_metrics(contents: list[RecordDict], weighted_by_key: str) -> MetricRecord:
    """The weighted mean of each metric over the clients that have it.

    Flower's own function divides by the weight of all clients, also where some have not the metric: clients may have other
    tasks, or nothing to test on.

    Args:
        contents: of the replies; the metrics are numbers, or lists of equal length.
        weighted_by_key: key of the weight.

    Raises:
        MessageError: a weight cannot be used, or lists of one name differ in length.
    """
    sums: dict[str, Any] = {}
    weights: dict[str, float] = {}
    for record in (record for content in contents for record in content.metric_records.values()):
        weight = weight_of(record, weighted_by_key)
        for name, value in record.items():
            if name != weighted_by_key and weight:
                values = weight * np.asarray(value, np.float64)
                if np.shape(sums.get(name, values)) != values.shape:
                    raise MessageError(f"metric {shown(name)} has another length on some clients than on others")
                sums[name] = sums.get(name, 0.0) + values
                weights[name] = weights.get(name, 0.0) + weight
    return MetricRecord({name: (total / weights[name]).tolist() for name, total in sums.items()})


def weight_of(record: MetricRecord, weighted_by_key: str) -> float:
    """The weight of a client's metrics in their mean.

    Raises:
        MessageError: it is missing, or no finite number from 0 on.
    """
    weight = record.get(weighted_by_key)
    if isinstance(weight, int | float) and 0 <= weight < math.inf:
        return float(weight)
    found = "is missing" if weight is None else f"is {shown(weight)}"
    raise MessageError(
        f"the metric {weighted_by_key!r}, by which weighted_by_key weights the others, {found}: return a number from 0 on, "
        f"or set weighted_by_key to a metric that all clients return"
    )


def told(names: Collection[str]) -> str:
    """Names for a line of a log, the first ten of them."""
    first = ", ".join(sorted(names)[:_TOLD])
    return first if len(names) <= _TOLD else f"{first} and {len(names) - _TOLD} more"


def round_in_words(reports: Mapping[str, Report]) -> list[str]:
    """What a log says of a round or of stage 2: of each task the mean training loss, and how many clients replaced.

    Args:
        reports: client -> its report.
    """
    lines = []
    for task in sorted({task for report in reports.values() for task in report.examples}):
        losses = [report.losses[task] for report in reports.values() if task in report.losses]
        decided = [report.replacements[task] for report in reports.values() if task in report.replacements]
        found = [f"training loss {fmean(losses):.4f} (mean of {len(losses)} clients)"] if losses else []
        found += [f"replaced on {sum(decided)} of {len(decided)} clients"] if decided else []
        lines += [f"{task}: {', '.join(found)}"] if found else []
    return lines


def collect(
    result: TapResult,
    config: Config,
    progress: Progress,
    roster: Roster,
    first_values: Mapping[str, int],
    privacy: Privacy | None,
    seconds: Mapping[str, float],
) -> None:
    """Fills a result from its `clients` and `missing`.

    Args:
        result: changed in place.
        config: configuration of the run.
        progress: what the run has done.
        roster: its clients.
        first_values: `down` and `up` -> bytes of first values, which travel before a client's first round.
        privacy: budget of a private run.
        seconds: phase -> duration.
    """
    result.bytes = {
        "down": sum(progress.down.values()) + first_values["down"],
        "up": sum(progress.up.values()) + first_values["up"],
        "first_values": dict(first_values),
        "per_component": {
            component: {"down": progress.down[component], "up": progress.up.get(component, 0)}
            for component in sorted(progress.down)
        },
    }
    result.marks = progress.marks
    tasks = [task for manifest in roster.manifests.values() for task in manifest.tasks]
    result.summary = results(
        preset=config.preset,
        method=config.method,
        seed=config.seed,
        rounds=progress.round,
        clients=result.clients,
        kinds={task.task: task.kind for task in tasks},
        headlines={task.task: task.judged_by for task in tasks},
        replacements=progress.replacements,
        bytes_=result.bytes,
        steps=progress.steps,
        missing=result.missing,
        marks=result.marks,
        dropped=progress.dropped,
        seconds=seconds,
        privacy=None if privacy is None else privacy.spent(roster),
    )
    result.tasks = result.summary["tasks"]
