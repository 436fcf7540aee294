"""Finds and prepares Flower's programs: paths, environment, ports."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from pathlib import Path

from tap_flower.errors import ConfigError

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Environment variables of Flower's processes: no telemetry, no progress bars in logs."""


def flower_program(name: str) -> str:
    """The path of one of Flower's commands, from this Python's environment even where that is not on PATH.

    Raises:
        ConfigError: the command is not installed.
    """
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise ConfigError(f"the command {name!r} is not installed: install tap-flower again")
    return found


def path_of_programs() -> dict[str, str]:
    """The variable PATH, with this Python's commands first: Flower's programs start others by their names alone."""
    return {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])}


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
