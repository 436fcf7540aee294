"""Flower's run configuration (`[tool.flwr.app.config]`, `flwr run --run-config`) as the configuration of a run."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, KeysView, Mapping, ValuesView
from functools import lru_cache
from pathlib import Path
from typing import Any

from tap_flower.config.options import Config
from tap_flower.config.resolve import client_specs, load_config
from tap_flower.data.spec import ClientSpec

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

    def __getitem__(self, key: str) -> Any:
        self._unread.discard(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, or `default`."""
        self._unread.discard(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self._unread.discard(str(key))
        return super().__contains__(key)

    def __iter__(self) -> Iterator[str]:
        self._unread.clear()
        return super().__iter__()

    def keys(self) -> KeysView[str]:  # type: ignore[override]
        """All keys."""
        self._unread.clear()
        return super().keys()

    def values(self) -> ValuesView[Any]:  # type: ignore[override]
        """All values."""
        self._unread.clear()
        return super().values()

    def items(self) -> ItemsView[str, Any]:  # type: ignore[override]
        """All keys and values."""
        self._unread.clear()
        return super().items()


def simulated_run(run_config: Mapping[str, object], run_id: int) -> tuple[Config, Path]:
    """Resolves Flower's run configuration.

    Args:
        run_config: has `preset`, `config` (path of a YAML file), `set` (`key=value`, separated by spaces) and `out`, the run
            folder; each may be missing or empty.
        run_id: Flower's number of the run.

    Returns:
        The configuration, which is not to be changed, and the run folder. Without `out` it is
        `tap-flower-runs/PRESET-RUN_ID` in the user's home: Flower's own folder is temporary.

    Raises:
        ConfigError: the preset, the file, a key or a value is wrong.
    """
    config = _config(*_texts(run_config))
    out = str(run_config.get("out", ""))
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
    return preset, config, settings


@lru_cache(maxsize=_KNOWN)
def _config(preset: str, config: str, settings: str) -> Config:
    return load_config(preset, config, settings.split())


@lru_cache(maxsize=_KNOWN)
def _specs(preset: str, config: str, settings: str) -> list[ClientSpec]:
    return client_specs(_config(preset, config, settings))
