"""Differential privacy of what a round releases: Gaussian noise on each component's mean change.

A client's change is clipped to the norm C over all of its components together, and counts with weight 1 in each. Taking it
out (a change of zero in its place) moves the sums of all components, seen as one vector, by C at the most. Noise of
standard deviation z · C on every value of the sums makes the round one Gaussian mechanism with the noise multiplier z. The
mean of a component that m_c clients hold is its sum over m_c, and has noise of z · C / m_c.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

RandomBytes = Callable[[int], bytes]
"""Number of bytes -> as many random bytes."""
_BLOCK = 1 << 16
"""Values that are drawn at a time."""


def holders_needed(noise_multiplier: float, max_noise: float) -> int:
    """The smallest m with z / m ≤ max_noise: with fewer holders in a round, a component's mean is too noisy to be of use."""
    return max(1, math.ceil(noise_multiplier / max_noise))


def sensitivity(clip_norm: float, holders: int, values: int) -> float:
    """By how much one client moves the sums of a round, in L2: C, and a little for what is rounded on the way.

    Clipped changes and means are float32, which is 2^-24 off, relatively; a mean stands for the sum of all holders. In sums
    every value is off by less than holders · 2^-39 (see `aggregation`).

    Args:
        clip_norm: C.
        holders: the most that any component has in the round.
        values: of all tensors together.
    """
    return clip_norm * (1.0 + holders * 2.0**-22) + math.sqrt(values) * holders * 2.0**-39


def gaussian(count: int, random_bytes: RandomBytes = os.urandom) -> Tensor:
    """Independent standard normal values (float64 [count]).

    Each value is the normal quantile of 52 bits of the operating system's secure random numbers. A generator of torch is
    out of the question: on the CPU it has 2^32 different states to start from, which can all be tried.

    Args:
        count: of the values.
        random_bytes: where the randomness comes from; another source is for tests.
    """
    bits = torch.frombuffer(bytearray(random_bytes(8 * count)), dtype=torch.int64) if count else torch.empty(0)
    # The middles of 2^52 equal parts of (0, 1): none is 0 or 1, and all are exact.
    uniform = (bits.long() & (2**52 - 1)).double().add_(0.5).mul_(2.0**-52)
    normal: Tensor = torch.special.ndtri(uniform)
    return normal


def release(
    previous: Mapping[str, Tensor],
    means: Mapping[str, Tensor],
    component_of: Mapping[str, str],
    holders: Mapping[str, int],
    noise: float,
    random_bytes: RandomBytes = os.urandom,
) -> dict[str, Tensor]:
    """The server's tensors after a private round: θ_c + Δ̄_c + N(0, (noise / m_c)²) for each component that is released.

    Args:
        previous: tensor name -> current value on the server (float32).
        means: tensor name -> mean of the clipped changes over the m_c holders; not looked at where nothing is released.
        component_of: tensor name -> component.
        holders: component -> m_c, for the components that are released; the tensors of all others are kept, bit for bit.
        noise: standard deviation of the noise on a sum, z · C.
        random_bytes: see `gaussian`.
    """
    released = dict(previous)
    for name, value in previous.items():
        if (count := holders.get(component_of[name])) is not None:
            flat = (value.double() + means[name]).flatten()
            for part in torch.split(flat, _BLOCK):  # views: they are changed in place
                part.add_(gaussian(len(part), random_bytes), alpha=noise / count)
            released[name] = flat.view(value.shape).to(value.dtype)
    return released
