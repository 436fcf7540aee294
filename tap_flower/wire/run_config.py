"""What Flower's run configuration says: the run's own configuration, and its folder."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from flwr.app import Context

from tap_flower.config import Config, client_specs, load_config
from tap_flower.data.spec import ClientSpec


def simulated_run(context: Context) -> tuple[Config, Path]:
    """Configuration and run folder from Flower's run configuration (`[tool.flwr.app.config]`).

    Without `out`, the folder is `tap-flower-runs/PRESET-RUN` in the user's home: the runtime's own folder is temporary.
    """
    config = _config(*_keys(context))
    out = str(context.run_config.get("out", ""))
    return config, Path(out) if out else Path.home() / "tap-flower-runs" / f"{config.preset}-{context.run_id}"


def simulated_clients(context: Context) -> list[ClientSpec]:
    """The client specs of a simulation, checked once a process."""
    return _specs(*_keys(context))


def _keys(context: Context) -> tuple[str, str, str]:
    preset, config, settings = (str(context.run_config.get(key, "")) for key in ("preset", "config", "set"))
    return preset, config, settings


@cache
def _config(preset: str, config: str, settings: str) -> Config:
    return load_config(preset, config, settings.split())


@cache
def _specs(preset: str, config: str, settings: str) -> list[ClientSpec]:
    return client_specs(_config(preset, config, settings))
