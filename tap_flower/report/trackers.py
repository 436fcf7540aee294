"""Experiment trackers: TensorBoard, MLflow, Weights & Biases. Each is fed with the events of `metrics.jsonl`."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path
from statistics import fmean
from typing import Any

from tap_flower.config import Config, options
from tap_flower.errors import ConfigError
from tap_flower.plain import install

Scalars = Mapping[str, float]
"""Name, with slashes between its parts -> value."""


@dataclass(frozen=True)
class Tracked:
    """The run that a tracker shows.

    Attributes:
        folder: the run folder.
        config: the run's configuration.
        identity: letters and digits that name the run; a resumed run goes on with the record of this identity.
        after_round: the last complete round of a run that is resumed; None for a new run.
    """

    folder: Path
    config: Config
    identity: str
    after_round: int | None = None

    @property
    def parameters(self) -> dict[str, Any]:
        """Key with dots -> value of every option that is no list or mapping: clients and their data are not parameters."""
        values = {key: attrgetter(key)(self.config) for key, *_ in options()}
        plain = {key: value.name if isinstance(value, Enum) else value for key, value in values.items()}
        return {key: value for key, value in plain.items() if not isinstance(value, list | dict)}


class TensorBoard:
    """A tracker that writes TensorBoard's event files in RUN/tensorboard."""

    def __init__(self, run: Tracked) -> None:
        from torch.utils.tensorboard import SummaryWriter

        void = None if run.after_round is None else run.after_round + 1
        self._writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=void)
        if run.after_round is None:
            config = "\n".join(f"    {key}: {value}" for key, value in run.parameters.items())
            self._writer.add_text("config", config)

    def log(self, step: int, scalars: Scalars) -> None:
        """Writes values at a round to the event file."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, complete: bool) -> None:
        """Closes the event file."""
        del complete  # event files have no word for it
        self._writer.close()


class MLflow:
    """A tracker that writes to MLflow's experiment `tap-flower`, at MLFLOW_TRACKING_URI or in RUN/mlflow.db."""

    _IDENTITY = "tap_flower.run"

    def __init__(self, run: Tracked) -> None:
        from mlflow.tracking import MlflowClient

        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(run.folder / 'mlflow.db').resolve()}"
        self._client = MlflowClient(tracking_uri=uri)
        experiment = self._client.get_experiment_by_name("tap-flower")
        number = experiment.experiment_id if experiment else self._client.create_experiment("tap-flower")
        before = self._client.search_runs([number], f"tags.`{self._IDENTITY}` = '{run.identity}'")
        if before:
            self._run = before[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
            return
        tags = {self._IDENTITY: run.identity}
        self._run = self._client.create_run(number, run_name=run.folder.name, tags=tags).info.run_id
        for key, value in run.parameters.items():
            self._client.log_param(self._run, key, value)

    def log(self, step: int, scalars: Scalars) -> None:
        """Sends values at a round to MLflow."""
        for name, value in scalars.items():
            self._client.log_metric(self._run, name.replace("+", "-"), value, step=step)

    def close(self, complete: bool) -> None:
        """Tells MLflow that the run has finished, or failed."""
        self._client.set_terminated(self._run, status="FINISHED" if complete else "FAILED")


class WeightsAndBiases:
    """A tracker that writes to the project WANDB_PROJECT or `tap-flower` of Weights & Biases; its files are in RUN/wandb."""

    def __init__(self, run: Tracked) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "tap-flower"),
            name=run.folder.name,
            id=run.identity,
            resume="allow",
            dir=str(run.folder),
            config=run.parameters,
        )

    def log(self, step: int, scalars: Scalars) -> None:
        """Sends values at a round to Weights & Biases."""
        self._run.log(dict(scalars), step=step)

    def close(self, complete: bool) -> None:
        """Tells Weights & Biases that the run has finished, or failed."""
        self._run.finish(exit_code=0 if complete else 1)


Tracker = TensorBoard | MLflow | WeightsAndBiases
"""An experiment tracker: shows a run while it goes on."""
TRACKERS: Mapping[str, Callable[[Tracked], Tracker]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": WeightsAndBiases,
}
"""Name of a tracker, and of the extra that brings its package -> its class."""


def tracker_names(names: str) -> list[str]:
    """Splits names of trackers that are separated by commas.

    Raises:
        ConfigError: there is no tracker of a name.
    """
    found = [name.strip() for name in names.split(",") if name.strip()]
    for name in found:
        if name not in TRACKERS:
            raise ConfigError(f"trackers has {name!r}: use some of {', '.join(TRACKERS)}")
    return found


def check_trackers(names: str) -> None:
    """Checks that the packages of trackers are installed, before anything is started.

    Raises:
        ConfigError: one is not, or a name is unknown.
    """
    for name in tracker_names(names):
        if find_spec(name) is None:  # each is the name of its package
            raise ConfigError(_why_not(name, ImportError(f"No module named {name!r}")))


def open_trackers(names: str, run: Tracked) -> list[Tracker]:
    """Opens the trackers of a run.

    Args:
        names: some of `TRACKERS`, separated by commas.
        run: the run that they show.

    Raises:
        ConfigError: a name is unknown, a package is not installed, or a tracker could not start; those before it are closed.
    """
    found: list[Tracker] = []
    for name in tracker_names(names):
        try:
            found.append(TRACKERS[name](run))
        except Exception as error:  # whatever the packages of all trackers raise
            for opened in found:
                opened.close(complete=False)
            raise ConfigError(_why_not(name, error)) from error
    return found


def _why_not(name: str, error: Exception) -> str:
    if isinstance(error, ImportError):
        return f"trackers has {name!r}, whose package is not installed ({error}): {install(name)}"
    remedy = "log in with `wandb login`, or set WANDB_MODE=offline" if name == "wandb" else "fix that"
    reason = f"{type(error).__name__}: {error}"
    return f"trackers has {name!r}, which could not start ({reason}): {remedy}, or remove it from `trackers`"


def scalars(event: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an event for trackers: of a round, means over its clients; at the end, the test metrics."""
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
