"""Flower's run configuration (`[tool.flwr.app.config]`, `flwr run --run-config`) as the configuration of a run."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from tap_flower.config.options import Config
from tap_flower.config.resolve import client_specs, load_config
from tap_flower.data.spec import ClientSpec
from tap_flower.errors import ConfigError
from tap_flower.hub import DEMO

_KNOWN = 8
"""Configurations that a process remembers: all messages of a run have the same one."""


class NotedConfig(dict[str, Any]):
    """Flower's run configuration, which notes what is read of it; reading all of it at once counts as such."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self._unread = set(values)

    @property
    def unread(self) -> tuple[str, ...]:
        """Keys that nobody has read, sorted."""
        return tuple(sorted(self._unread))


def _noting(name: str, whole: bool) -> Callable[..., Any]:
    """A method of `dict` for `NotedConfig`, which notes the key that it is called with, or all keys."""
    own = getattr(dict, name)

    def method(self: NotedConfig, *arguments: Any) -> Any:
        self._unread -= self._unread if whole else {str(arguments[0])}
        return own(self, *arguments)

    return method


for _name in ("__getitem__", "__contains__", "get", "pop", "setdefault"):
    setattr(NotedConfig, _name, _noting(_name, whole=False))
for _name in ("__iter__", "keys", "values", "items", "copy"):
    setattr(NotedConfig, _name, _noting(_name, whole=True))


def simulated_run(run_config: Mapping[str, object], run_id: int) -> tuple[Config, Path]:
    """Resolves Flower's run configuration.

    Args:
        run_config: has `preset` (by default demo), `config` (path of a YAML file), `set` (`key=value`, separated by spaces;
            quotes hold a value with spaces together, as in a shell) and `out`, the run folder; each may be missing or empty.
        run_id: Flower's number of the run.

    Returns:
        The configuration, which is not to be changed, and the run folder. Without `out` it is
        `tap-flower-runs/PRESET-RUN_ID` in the user's home: Flower's own folder is temporary.

    Raises:
        ConfigError: the preset, the file, a key or a value is wrong, or `out` is relative.
    """
    config = _config(*_texts(run_config))
    out = str(run_config.get("out", ""))
    if out and not Path(out).is_absolute():
        raise ConfigError(
            f"out = {out!r} is relative, and Flower's processes have folders of their own: give an absolute path"
        )
    return config, Path(out) if out else Path.home() / "tap-flower-runs" / f"{config.preset}-{run_id}"


def simulated_clients(run_config: Mapping[str, object]) -> list[ClientSpec]:
    """The client specs of a simulation, in the order of Flower's partition numbers.

    Args:
        run_config: Flower's run configuration, with the keys that `simulated_run` reads.

    Raises:
        ConfigError: the configuration or a client spec is wrong, or two clients share a name.
    """
    return _specs(*_texts(run_config))


def _texts(run_config: Mapping[str, object]) -> tuple[str, str, str]:
    preset, config, settings = (str(run_config.get(key, "")) for key in ("preset", "config", "set"))
    return preset or DEMO, config, settings


@lru_cache(maxsize=_KNOWN)
def _config(preset: str, config: str, settings: str) -> Config:
    try:
        parts = shlex.split(settings)
    except ValueError as error:
        raise ConfigError(f"set = {settings!r}: {error}; put a value with spaces in quotes, as in a shell") from error
    return load_config(preset, config, parts)


@lru_cache(maxsize=_KNOWN)
def _specs(preset: str, config: str, settings: str) -> list[ClientSpec]:
    return client_specs(_config(preset, config, settings))
