"""Reads everything that a run folder holds for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tap_flower.errors import ConfigError, StorageError
from tap_flower.plain import parse_yaml
from tap_flower.report.client_records import DecisionRecord, read_decisions, read_examples, read_gradients
from tap_flower.report.configuration import config_file
from tap_flower.report.events import read_events
from tap_flower.report.results import read_results


@dataclass(frozen=True)
class ClientRecord:
    """A client's own records of a run.

    Attributes:
        decisions: decisions on replacement, in the order of rounds.
        examples: task name -> `kind` and `items`, examples with the models' answers.
        gradients: cosines between the gradients of each two pairs.
        here: whether the folder is at hand; on a node of a real deployment it is not.
    """

    decisions: Sequence[DecisionRecord] = ()
    examples: Mapping[str, Mapping[str, Any]] | None = None
    gradients: Sequence[Mapping[str, Any]] = ()
    here: bool = False


@dataclass(frozen=True)
class RunRecord:
    """A finished run.

    Attributes:
        name: name of its folder, with folders above it where other runs have the name, too; see `read_runs`.
        results: content of `results.json`.
        rounds: events of complete rounds, in order.
        config: content of `config.yaml`, or nothing.
        clients: client name -> its own records.
        settings: the values of `config.yaml`, or nothing.
    """

    name: str
    results: Mapping[str, Any]
    rounds: Sequence[Mapping[str, Any]]
    config: str
    clients: Mapping[str, ClientRecord]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The run's name for people: folder and seed."""
        return f"{self.name} (seed {self.results['seed']})"


def read_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """Reads some run folders; names have as many folders above the run's as tell the runs apart.

    Raises:
        ConfigError: a folder is given twice.
        StorageError: see `read_run`.
    """
    parts = [folder.resolve().parts for folder in folders]
    if double := next((folder for folder, part in zip(folders, parts, strict=True) if parts.count(part) > 1), None):
        raise ConfigError(f"the run folder {double} is given twice: one run is no repetition of itself, give it once")
    depth = next((n for n in range(1, max(map(len, parts))) if len({p[-n:] for p in parts}) == len(parts)), 1)
    return [
        replace(read_run(folder), name="/".join(part[-depth:])) for folder, part in zip(folders, parts, strict=True)
    ]


def read_run(run: Path) -> RunRecord:
    """Reads a run folder. Only results are required; what else is missing is left out.

    Raises:
        StorageError: the run has not finished, or a file is damaged.
    """
    results = read_results(run)
    try:
        events = [event for event in read_events(run) if event["event"] == "round"]
        file = config_file(run)
        config = file.read_text(encoding="utf-8") if file else ""
        settings = dict(parse_yaml(config)) if file else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(
            f"{run}: metrics.jsonl or config.yaml is damaged: {error}; restore it, or remove it"
        ) from error
    clients = {name: _client(run / "clients", name) for name in results["clients"]}
    return RunRecord(run.resolve().name, results, events, config, clients, settings)


def _client(parent: Path, name: str) -> ClientRecord:
    folder = parent / name
    # A name comes from a client, over the wire: it must not lead out of the run folder.
    if Path(name).name != name or not folder.is_dir():
        return ClientRecord()
    return ClientRecord(read_decisions(folder), read_examples(folder), read_gradients(folder), here=True)
