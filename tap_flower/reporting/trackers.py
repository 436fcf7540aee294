"""Experiment trackers: TensorBoard, MLflow, Weights & Biases. Each is fed with the events of `metrics.jsonl`."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

from tap_flower.config import Config, ConfigError, plain

Scalars = Mapping[str, float]
"""Name, with slashes between its parts -> value."""


class Tracker(Protocol):
    """Where a run is shown while it goes on."""

    def log(self, step: int, scalars: Scalars) -> None:
        """Takes the values at a round."""
        ...

    def close(self) -> None:
        """Ends the record."""
        ...


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, run: Path, config: Config) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run / "tensorboard"))
        self._writer.add_text("config", "\n".join(f"    {key}: {value}" for key, value in _flat(plain(config))))

    def log(self, step: int, scalars: Scalars) -> None:
        """See `Tracker`."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """See `Tracker`."""
        self._writer.close()


class MLflow:
    """A run in the experiment `tap-flower`, at MLFLOW_TRACKING_URI or in RUN/mlflow.db."""

    def __init__(self, run: Path, config: Config) -> None:
        from mlflow.tracking import MlflowClient

        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(run / 'mlflow.db').resolve()}"
        self._client = MlflowClient(tracking_uri=uri)
        experiment = self._client.get_experiment_by_name("tap-flower")
        number = experiment.experiment_id if experiment else self._client.create_experiment("tap-flower")
        self._run = self._client.create_run(number, run_name=run.name).info.run_id
        for key, value in _flat(plain(config)):
            self._client.log_param(self._run, key, value)

    def log(self, step: int, scalars: Scalars) -> None:
        """See `Tracker`."""
        for name, value in scalars.items():
            self._client.log_metric(self._run, name.replace("+", "-"), value, step=step)

    def close(self) -> None:
        """See `Tracker`."""
        self._client.set_terminated(self._run)


class WeightsAndBiases:
    """A run in WANDB_PROJECT, or in the project `tap-flower`; its files are in RUN/wandb."""

    def __init__(self, run: Path, config: Config) -> None:
        import wandb

        project = os.environ.get("WANDB_PROJECT", "tap-flower")
        self._run = wandb.init(project=project, name=run.name, dir=str(run), config=dict(_flat(plain(config))))

    def log(self, step: int, scalars: Scalars) -> None:
        """See `Tracker`."""
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        """See `Tracker`."""
        self._run.finish()


TRACKERS: Mapping[str, Callable[[Path, Config], Tracker]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": WeightsAndBiases,
}
"""Name, which is also that of the extra that brings its package -> tracker."""


def tracker_names(names: str) -> list[str]:
    """The names in a text with commas between them.

    Raises:
        ConfigError: there is no tracker of a name.
    """
    found = [name.strip() for name in names.split(",") if name.strip()]
    for name in found:
        if name not in TRACKERS:
            raise ConfigError(f"trackers has {name!r}: use some of {', '.join(TRACKERS)}")
    return found


def open_trackers(names: str, run: Path, config: Config) -> list[Tracker]:
    """The trackers of a run.

    Args:
        names: some of `TRACKERS`, with commas between.
        run: the run folder.
        config: of the run.

    Raises:
        ConfigError: a name is unknown, a package is not installed, or a tracker cannot begin; those before it are closed.
    """
    found: list[Tracker] = []
    for name in tracker_names(names):
        try:
            found.append(TRACKERS[name](run, config))
        except Exception as error:  # whatever the packages of all trackers raise
            for opened in found:
                opened.close()
            raise ConfigError(_why_not(name, error)) from error
    return found


def _why_not(name: str, error: Exception) -> str:
    if isinstance(error, ImportError):
        return f"trackers has {name!r}, whose package is not installed ({error}): pip install 'tap-flower[{name}]'"
    remedy = "log in with `wandb login`, or set WANDB_MODE=offline" if name == "wandb" else "see to it"
    return f"trackers has {name!r}, which cannot begin ({type(error).__name__}: {error}): {remedy}, or leave it out"


def scalars(event: Mapping[str, Any]) -> dict[str, float]:
    """What of an event is a value over rounds: means over the clients of a round; after the end, test metrics."""
    values: dict[str, list[float]] = defaultdict(list)
    if event["event"] == "round":
        for report in event["clients"].values():
            for task, loss in report["losses"].items():
                values[f"train_loss/{task}"].append(loss)
            for task, replaced in report["replacements"].items():
                values[f"replaced/{task}"].append(replaced)
        values["seconds"].append(event["seconds"])
        if "epsilon" in event:
            values["epsilon"].append(event["epsilon"])
    if event["event"] == "end":
        for task, by_model in event["tasks"].items():
            for model, by_metric in by_model.items():
                for metric, value in by_metric.items():
                    values[f"test_{metric}/{task}/{model}"].append(value)
    return {name: fmean(each) for name, each in values.items()}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(key with dots, value) of what is no list: clients and their data are not parameters."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif not isinstance(value, list):
            yield f"{prefix}{key}", value
