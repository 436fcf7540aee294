"""Clipping: an update that is longer than it may be is scaled down, and keeps its direction."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def clip(change: Mapping[str, Tensor], longest: float) -> tuple[dict[str, Tensor], float]:
    """Scales a client's change Δ to min(1, longest / ‖Δ‖₂) · Δ, the norm being that of all its tensors together.

    Args:
        change: tensor name -> returned value minus the value that was sent (float32, any shapes).
        longest: the largest L2 norm, above 0.

    Returns:
        The change (float32), and its norm before. A change whose norm is not finite comes back as it is: it cannot be
        scaled, and is to be refused.
    """
    squares = [float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2 for tensor in change.values()]
    norm = math.sqrt(math.fsum(squares)) if all(map(math.isfinite, squares)) else math.inf
    if not longest < norm < math.inf:
        return dict(change), norm
    # In float64: a factor may be too small for float32.
    return {name: (tensor.double() * (longest / norm)).to(tensor.dtype) for name, tensor in change.items()}, norm
