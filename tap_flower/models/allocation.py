"""How this process gets memory for tensors from the system."""

from __future__ import annotations

import ctypes
import os
from functools import cache

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""Numbers of two parameters of glibc's mallopt(3)."""


@cache
def prepare_allocation() -> None:
    """Large pages for large tensors, and freed memory stays with the process (Linux; elsewhere nothing happens).

    A training step frees and takes the same gigabytes again and again; given back to the system each time, they cost a fresh
    page for every 4 kB written: of a step of FLAVA at full size on two cores about a sixth, and with large pages alone still
    0.3 of 8.5 s of processor time. The process then holds what it needed at most. To be called before torch takes its first
    memory.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):
        return  # not glibc
    mallopt(_MMAP_MAX, 0)  # everything in one heap,
    mallopt(_TRIM_THRESHOLD, -1)  # which never shrinks
