"""The configuration that a run was made with, as runs are compared by it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from tap_flower.config import options, read_yaml
from tap_flower.errors import ConfigError
from tap_flower.plain import leaves

CONFIG = "config.yaml"
_CLIENTS = "clients", "patterns", "datasets"
"""Keys of a configuration that say who takes part: long, and with paths of a machine in them."""
_UNCOMPARED = "seed", "patterns", "datasets"
"""Keys by which configurations are not compared: `clients` holds what `patterns` and `datasets` have made."""


def config_file(run: Path) -> Path | None:
    """The configuration of a run; where a sweep's small files were kept, all seeds have the one in the folder above."""
    return next((folder / CONFIG for folder in (run, run.parent) if (folder / CONFIG).exists()), None)


def recorded(run: Path) -> Mapping[str, Any]:
    """The configuration of a finished run; of one that was kept, as `portable` gives it.

    Raises:
        ConfigError: there is none.
    """
    if (file := config_file(run)) is None:
        raise ConfigError(
            f"{run} holds results without {CONFIG}, so nobody knows what of: remove it, or give another folder"
        )
    return read_yaml(file)


def portable(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without its seed, where its data lie, and its clients, of which a hash stays."""
    if _is_portable(config):
        return dict(config)
    found = {key: value for key, value in config.items() if key not in ("seed", "data", *_CLIENTS)}
    text = json.dumps(_without_folders([config.get(key) for key in _CLIENTS]), sort_keys=True, default=str)
    clients = f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
    return {**found, "backbone": _without_folders(config.get("backbone")), "clients": clients}


def _is_portable(config: Mapping[str, Any]) -> bool:
    return isinstance(config.get("clients"), str)


def _completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Every option of a configuration, with dots in its key; what the configuration has not, it has by default."""
    defaults = {key: value.name if isinstance(value, Enum) else value for key, value, _ in options()}
    return {**defaults, **dict(leaves(config))}


def different(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The options in which two configurations differ, besides the seed.

    Paths count, unless one of the two is portable: then only the names of files do.
    """
    if _is_portable(old) or _is_portable(new):
        old, new = portable(old), portable(new)
    known = _completed(old)
    return sorted(k for k, value in _completed(new).items() if k not in _UNCOMPARED and known.get(k) != value)


def moved(old: Any, new: Any) -> tuple[str, str] | None:
    """The first absolute paths, in values that are else equal, that differ; None where something else differs, too."""
    if _without_folders(old) != _without_folders(new):
        return None
    pairs = zip(_texts(old), _texts(new), strict=True)
    return next(((one, other) for one, other in pairs if one != other), None)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield from _texts(value[key])
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)
    elif isinstance(value, str):
        yield value


def _without_folders(value: Any) -> Any:
    """Absolute paths as the names of their files."""
    if isinstance(value, Mapping):
        return {key: _without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_folders(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
