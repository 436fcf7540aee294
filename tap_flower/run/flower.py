"""Finds and prepares Flower's programs: paths, environment, ports."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import sys
import tempfile
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
_COLOURS = ("FORCE_COLOR", "TTY_COMPATIBLE")
"""Environment variables, set in notebooks and in CI, that put colours into what Flower prints, its JSON included."""
_LONGEST_FOLDER, _SHORT = 30, "/tmp"
"""Longest temporary folder in which the paths of Ray's sockets are short enough, and a shorter one."""
log = logging.getLogger("tap_flower")


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


def environment() -> dict[str, str]:
    """The environment of Flower's processes: this one's, but none of them asks a proxy for this machine.

    Colours are not forced upon their output, which is read here. Proxies that the HTTP client cannot use at all, such as
    SOCKS without its package, are left out, with a warning. Ray's sockets get a short folder, since their paths have 107
    bytes at most.
    """
    import httpx

    kept = {name: value for name, value in os.environ.items() if name not in _COLOURS}
    found = {**kept, **QUIET, **path_of_programs()}
    told = [found.get("no_proxy") or found.get("NO_PROXY", ""), "127.0.0.1", "localhost", "::1"]
    found["no_proxy"] = found["NO_PROXY"] = ",".join(filter(None, told))
    for name in [name for name in found if name.lower() in ("http_proxy", "https_proxy", "all_proxy")]:
        try:
            httpx.Client(proxy=found[name] or None, trust_env=False).close()
        except (ImportError, ValueError) as error:
            del found[name]
            log.warning("%s is not passed on to Flower's processes, as it cannot be used: %s", name, error)
    if len(tempfile.gettempdir()) > _LONGEST_FOLDER and os.access(_SHORT, os.W_OK):
        found.setdefault("RAY_TMPDIR", _SHORT)
    return found


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
