"""The configuration that a run was made with, as runs are compared by it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from tap_flower.config import options, read_yaml
from tap_flower.errors import ConfigError
from tap_flower.plain import leaves

CONFIG = "config.yaml"
_CLIENTS = "clients", "patterns", "datasets"
"""Keys of a configuration that say who takes part: long, and with paths of a machine in them."""


def config_file(run: Path) -> Path | None:
    """The configuration of a run; where a sweep's small files were kept, all seeds have the one in the folder above."""
    return next((folder / CONFIG for folder in (run, run.parent) if (folder / CONFIG).exists()), None)


def recorded(run: Path) -> dict[str, Any]:
    """The configuration of a finished run, as `portable` gives it.

    Raises:
        ConfigError: there is none.
    """
    if (file := config_file(run)) is None:
        raise ConfigError(
            f"{run} holds results without {CONFIG}, so nobody knows what of: remove it, or give another folder"
        )
    return portable(read_yaml(file))


def portable(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without its seed, where its data lie, and its clients, of which a hash stays."""
    found = {key: value for key, value in config.items() if key not in ("seed", "data", *_CLIENTS)}
    clients = config.get("clients")
    if not isinstance(clients, str):
        text = json.dumps(_without_folders([config.get(key) for key in _CLIENTS]), sort_keys=True, default=str)
        clients = f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
    return {**found, "backbone": _without_folders(config.get("backbone")), "clients": clients}


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Every option of a portable configuration, with dots in its key; what the configuration has not, it has by default."""
    defaults = {key: value.name if isinstance(value, Enum) else value for key, value, _ in options()}
    return {**defaults, **dict(leaves(config))}


def different(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The options in which two portable configurations differ."""
    known = completed(old)
    return sorted(key for key, value in completed(new).items() if known.get(key) != value)


def _without_folders(value: Any) -> Any:
    """Absolute paths as the names of their files."""
    if isinstance(value, Mapping):
        return {key: _without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_folders(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
