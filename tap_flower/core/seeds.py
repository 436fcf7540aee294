"""Random numbers from seeds: one seed for each purpose, derived from the run's."""

from __future__ import annotations

import functools
import hashlib
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def named_seed(seed: int, *names: object) -> int:
    """A seed for the random numbers that belong to `names`, below 2^63; unrelated for different names or seeds."""
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def seed_torch(seed: int) -> None:
    """Has torch draw from this seed, on every device.

    `torch.manual_seed` notes a stack trace for each kind of device that is not there, which takes longer than an optimiser
    step of a small model.
    """
    if _accelerated():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


@functools.cache
def _accelerated() -> bool:
    return any(kind.is_available() for kind in (torch.cuda, torch.xpu, torch.mps) if hasattr(kind, "is_available"))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Has torch, `random` and `numpy.random` draw from this seed, and afterwards as if nothing had been drawn."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices), others_seeded(seed):
        seed_torch(seed)
        yield


@contextmanager
def others_seeded(seed: int) -> Iterator[None]:
    """Has `random` and `numpy.random` draw from this seed, and afterwards as if nothing had been drawn."""
    numpy = sys.modules.get("numpy")  # who draws from it has imported it
    states = random.getstate(), numpy and numpy.random.get_state()
    try:
        random.seed(seed)
        if numpy is not None:
            numpy.random.seed(seed % 2**32)
        yield
    finally:
        random.setstate(states[0])
        if numpy is not None:
            numpy.random.set_state(states[1])
