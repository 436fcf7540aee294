"""Random numbers from seeds: one seed for each purpose, derived from the run's."""

from __future__ import annotations

import functools
import hashlib
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
    """Has torch draw from this seed, and afterwards as if nothing had been drawn."""
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_initialized() else []):  # type: ignore[no-untyped-call]
        seed_torch(seed)
        yield
