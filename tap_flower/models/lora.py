"""Low-rank adaptation, stacked: several adapters on one frozen matrix, computed as one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class LoraSettings:
    """Rank r, α and dropout of a family of adapters."""

    rank: int
    alpha: int
    dropout: float = 0.3


class LoRA(nn.Module):
    """One adapter: `ΔW = (α / r) · B A` with A [r, in] and B [out, r] (arXiv 2106.09685). B starts at zero."""

    def __init__(self, in_features: int, out_features: int, settings: LoraSettings) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(settings.rank, in_features))
        self.B = nn.Parameter(torch.empty(out_features, settings.rank))
        self.scale = settings.alpha / settings.rank
        self.dropout = settings.dropout

    @classmethod
    def on(cls, linear: nn.Linear, settings: LoraSettings) -> LoRA:
        """An adapter of the size of `linear`."""
        return cls(linear.in_features, linear.out_features, settings)


def dropout(x: Tensor, probability: float) -> Tensor:
    """As `torch.nn.functional.dropout` in training, with a probability rounded to a multiple of 1/256 on the CPU.

    PyTorch draws one Bernoulli number after the other there, which took 40 % of a training step. Eight of 64 random bits for
    each element take a fraction of that (`python -m benchmarks.dropout` compares the two).
    """
    if x.device.type != "cpu" or probability == 0.0:
        return F.dropout(x, probability)
    bits = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None).view(torch.uint8)
    dropped = round(probability * 256)
    keep = bits[: x.numel()].view(x.shape) >= dropped
    # Seen as bytes, a mask converts to floats several times faster.
    return x * keep.view(torch.uint8).to(x.dtype).mul_(256 / (256 - dropped))


def add_lora(base: Tensor, loras: Sequence[LoRA], x: Tensor) -> Tensor:
    """`base[s] + ΔW_s x[s]` for a stack of inputs and one adapter for each.

    Args:
        base: output of the frozen matrix, [S, ..., out].
        loras: S adapters of one rank; the same adapter may occur more than once.
        x: input of the frozen matrix, [S, ..., in].

    Returns:
        [S, ..., out].
    """
    first = loras[0]
    flat = dropout(x.flatten(1, -2), first.dropout) if first.training else x.flatten(1, -2)
    a = torch.stack([lora.A for lora in loras])
    b = torch.stack([lora.B for lora in loras])
    low = torch.bmm(flat, a.to(flat.dtype).transpose(1, 2))
    added = torch.baddbmm(base.flatten(1, -2), low, b.to(low.dtype).transpose(1, 2), alpha=first.scale)
    return added.view(base.shape)


def lora_linear(linear: nn.Linear, loras: Sequence[LoRA], x: Tensor) -> Tensor:
    """A frozen linear map with one adapter for each entry of the stack: x [S, ..., in] -> [S, ..., out]."""
    return add_lora(linear(x), loras, x)
