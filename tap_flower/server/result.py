"""What a run has found: `TapResult`, and `results.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import MetricRecord
from flwr.serverapp.strategy import Result

from tap_flower.config import Config
from tap_flower.report.results import results
from tap_flower.server.checkpoint import Progress
from tap_flower.server.privacy import Privacy
from tap_flower.server.roster import Roster
from tap_flower.wire.messages import Metrics


@dataclass(repr=False)
class TapResult(Result):
    """Flower's `Result`, and what TAP adds to it.

    Attributes:
        personalise_metrics_clientapp: aggregated metrics of stage 2's fine-tuning, under the number of the last round.
        clients: client -> task -> model (`server`, `personal`, `tap`, …) -> metric -> value on the client's test data.
        tasks: task -> model -> metric -> mean over the clients that have the task.
        bytes: `down`, `up`, and `per_component`: bytes of tensors that were sent and received.
        missing: clients that the run knows and that were not evaluated.
        summary: the content of `results.json`.
    """

    personalise_metrics_clientapp: dict[int, MetricRecord] = field(default_factory=dict)
    clients: dict[str, Metrics] = field(default_factory=dict)
    tasks: Metrics = field(default_factory=dict)
    bytes: dict[str, Any] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)


def collect(
    result: TapResult,
    config: Config,
    progress: Progress,
    roster: Roster,
    privacy: Privacy | None,
    seconds: Mapping[str, float],
) -> None:
    """Fills a result from the metrics in `result.clients`.

    Args:
        result: changed in place.
        config: configuration of the run.
        progress: what the run has done.
        roster: its clients.
        privacy: budget of a private run.
        seconds: phase -> duration.
    """
    result.bytes = {
        "down": sum(progress.down.values()),
        "up": sum(progress.up.values()),
        "per_component": {
            component: {"down": progress.down[component], "up": progress.up.get(component, 0)}
            for component in sorted(progress.down)
        },
    }
    result.missing = sorted(roster.manifests.keys() - result.clients.keys())
    result.summary = results(
        preset=config.preset,
        method=config.method,
        seed=config.seed,
        rounds=progress.round,
        clients=result.clients,
        kinds={task.task: task.kind for manifest in roster.manifests.values() for task in manifest.tasks},
        replacements=progress.replacements,
        bytes=result.bytes,
        steps=progress.steps,
        seconds=seconds,
        privacy=None if privacy is None else privacy.spent(roster),
    )
    result.tasks = result.summary["tasks"]
