"""Small files of finished runs, from which a sweep's tables are made again on any machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from tap_flower.config import options, read_yaml
from tap_flower.errors import ConfigError
from tap_flower.files import write_atomically
from tap_flower.plain import leaves
from tap_flower.report.results import RESULTS, read_results

CONFIG = "config.yaml"
_DIGITS = 6
"""Significant digits of kept numbers."""
_CLIENTS = "clients", "patterns", "datasets"
"""Keys of a configuration that say who takes part: long, and with paths of a machine in them."""


def keep(runs: Sequence[Path], folder: Path) -> None:
    """Copies what tables need of finished runs: `LABEL/seed-N/results.json`, and one `LABEL/config.yaml` for all seeds.

    Numbers have six digits, the bytes of single components are left out, and clients are a hash of their specs. Nothing says
    where anything lay on this machine.

    Args:
        runs: run folders, LABEL/seed-N each.
        folder: where they are copied to.

    Raises:
        StorageError: the results of a run are damaged.
    """
    for run in runs:
        results = read_results(run)
        results["bytes"] = {key: value for key, value in results["bytes"].items() if key != "per_component"}
        text = json.dumps(_rounded(results), separators=(",", ":"), ensure_ascii=False)
        text = text.replace(f"{run.resolve()}/", "")  # why a client is missing may name its files
        label = folder / run.parent.name
        write_atomically(label / CONFIG, yaml.safe_dump(recorded(run), sort_keys=False, allow_unicode=True).encode())
        write_atomically(label / run.name / RESULTS, f"{text}\n".encode())


def recorded(run: Path) -> dict[str, Any]:
    """The configuration of a finished run but for its seed, with clients as a hash; that of its label where it was kept.

    Raises:
        ConfigError: there is none.
    """
    for folder in (run, run.parent):
        if (folder / CONFIG).exists():
            return portable(read_yaml(folder / CONFIG))
    raise ConfigError(
        f"{run} holds results without {CONFIG}, so nobody knows what of: remove it, or give another folder"
    )


def portable(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without its seed, where its data lie, and its clients, of which a hash stays."""
    found = {key: value for key, value in config.items() if key not in ("seed", "data", *_CLIENTS)}
    clients = config.get("clients")
    if not isinstance(clients, str):
        text = json.dumps(_without_folders([config.get(key) for key in _CLIENTS]), sort_keys=True, default=str)
        clients = f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
    return {**found, "backbone": _without_folders(config.get("backbone")), "clients": clients}


def different(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The options in which two portable configurations differ; what the old one has not, it has by default."""
    defaults = {key: value.name if isinstance(value, Enum) else value for key, value, _ in options()}
    known = {**defaults, **dict(leaves(old))}
    return sorted(key for key, value in leaves(new) if known.get(key) != value)


def _without_folders(value: Any) -> Any:
    """Absolute paths as the names of their files."""
    if isinstance(value, Mapping):
        return {key: _without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_folders(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value
