"""What Flower's run configuration says: the run's own configuration, and its folder."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from flwr.app import Context

from tap_flower.config import Config, load_config


def simulated_run(context: Context) -> tuple[Config, Path]:
    """Configuration and run folder from Flower's run configuration (`[tool.flwr.app.config]`).

    Without `out`, the folder is `tap-flower-runs/PRESET-RUN` in the user's home: the runtime's own folder is temporary.
    """
    values = context.run_config
    config = _load_config(*(str(values.get(key, "")) for key in ("preset", "config", "set")))
    out = str(values.get("out", ""))
    return config, Path(out) if out else Path.home() / "tap-flower-runs" / f"{config.preset}-{context.run_id}"


@cache
def _load_config(preset: str, config: str, settings: str) -> Config:
    return load_config(preset, config, settings.split())
