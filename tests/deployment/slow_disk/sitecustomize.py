"""A slow disk for a node: on its PYTHONPATH, a process waits before it has a personal model written to disk."""

import os
import time
from pathlib import Path

_write = os.fsync


def fsync(descriptor: int) -> None:
    """Waits for as long as the file `slow` exists, if it is a personal model that is written."""
    name = Path(f"/proc/self/fd/{descriptor}").readlink().name
    while name.startswith(".personal.safetensors") and Path(os.environ["SLOW_DISK"]).exists():
        time.sleep(0.1)
    _write(descriptor)


os.fsync = fsync
