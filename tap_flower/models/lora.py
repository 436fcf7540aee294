"""Low-rank adaptation, stacked: several adapters on one frozen matrix, computed as one batch."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
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
    """One adapter: `ΔW = (α / r) · B A` with A [r, in] and B [out, r] (arXiv 2106.09685). B starts at zero.

    Args:
        frozen: what it adapts; a convolution is the linear map of each of its patches.
        settings: rank, α, dropout.
    """

    def __init__(self, frozen: nn.Linear | nn.Conv2d, settings: LoraSettings) -> None:
        super().__init__()
        self._frozen = (frozen,)  # in a tuple, else it would be a part of this module
        self.A = nn.Parameter(torch.empty(settings.rank, frozen.weight[0].numel()))
        self.B = nn.Parameter(torch.empty(len(frozen.weight), settings.rank))
        self.scale = settings.alpha / settings.rank
        self.dropout = settings.dropout

    @property
    def frozen(self) -> nn.Linear | nn.Conv2d:
        """What it adapts."""
        return self._frozen[0]

    def merged(self) -> dict[str, Tensor]:
        """`weight` [out, in] and `bias` [out] of the frozen map and the adapter as one linear map, without dropout."""
        weight = self.frozen.weight.detach().flatten(1) + self.scale * self.B.detach() @ self.A.detach()
        return {"weight": weight, "bias": cast(Tensor, self.frozen.bias).detach()}


Adapter = LoRA | nn.Linear
"""An adapter, or the linear map that it and the frozen one have been merged into."""


def lora_linear(linear: nn.Linear, loras: Sequence[Adapter], x: Tensor) -> Tensor:
    """A frozen linear map with one adapter for each entry of the stack.

    Args:
        linear: frozen.
        loras: S adapters of one rank, or S merged maps; the same one may occur more than once.
        x: [S, ..., in].

    Returns:
        `x[s] Wᵀ + bias + ΔW_s x[s]`, [S, ..., out].
    """
    return lora_linears(linear.weight, linear.bias, [loras], x)[0]


def lora_linears(weight: Tensor, bias: Tensor, groups: Sequence[Sequence[Adapter]], x: Tensor) -> tuple[Tensor, ...]:
    """As `lora_linear`, for several groups of adapters on one input: the frozen product is computed once for all.

    Args:
        weight: frozen, [out, in].
        bias: frozen, [out].
        groups: G times S adapters, all of one rank, or as many merged maps, which need neither `weight` nor `bias`.
        x: [S, ..., in].

    Returns:
        For each group [S, ..., out].
    """
    first, flat = groups[0][0], x.flatten(1, -2)
    if isinstance(first, nn.Linear):
        merged = [torch.stack([map_(part) for map_, part in zip(maps, flat, strict=True)]) for maps in groups]
        return tuple(output.view(*x.shape[:-1], -1) for output in merged)
    a = [torch.stack([cast(LoRA, lora).A for lora in loras]) for loras in groups]
    b = [torch.stack([cast(LoRA, lora).B for lora in loras]) for loras in groups]
    if first.training and x.device.type == "cpu" and not torch.compiler.is_compiling():
        outputs = _LoRALinear.apply(flat, weight, bias, first, *a, *b)  # type: ignore[no-untyped-call]
    else:
        a, b = [m.to(x.dtype) for m in a], [m.to(x.dtype) for m in b]
        base = F.linear(flat, weight, bias)
        low = [torch.bmm(F.dropout(flat, first.dropout, first.training), m.transpose(1, 2)) for m in a]
        outputs = [
            torch.baddbmm(base, part, m.transpose(1, 2), alpha=first.scale) for part, m in zip(low, b, strict=True)
        ]
    return tuple(output.view(*x.shape[:-1], -1) for output in outputs)


_LEVELS = 256
_BLOCK = 1 << 18
"""Elements that are worked on at a time: they stay in a core's cache through all the steps."""


def kept(shape: Sequence[int], dropped: int) -> Tensor:
    """A random mask: uint8, 1 where an element is kept; `dropped` of 256 are not. It follows torch's random numbers."""
    count, seed = math.prod(shape), int(torch.randint(2**63 - 1, ()))
    bits = np.random.SFC64(seed).random_raw((count + 7) // 8).view(np.uint8)
    # NumPy compares bytes several times as fast as torch.
    return torch.from_numpy((bits[:count] >= dropped).view(np.uint8)).view(*shape)


class _LoRALinear(torch.autograd.Function):
    """`x Wᵀ + bias + scale · dropout(x) A_gᵀ B_gᵀ` for G groups on a CPU, in training, block by block.

    Passes over memory and random numbers are what costs there, not arithmetic: plain operations spent a third of a step on
    them. Eight bits are drawn for an element, so that the probability is a multiple of 1/256; one byte of mask is kept for
    the backward pass in place of two float tensors; what is dropped out is written to a scratch block alone; and what is
    added is added in place (`python -m benchmarks.lora` compares). The large products are in the dtype of the frozen weight.
    With bfloat16, blocks are still worked on in the adapters' float32: a CPU is several times as fast at its thin products.
    """

    @staticmethod
    @torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, settings: LoRA, *adapters: Tensor
    ) -> tuple[Tensor, ...]:
        """X [S, N, in], adapters G times A [S, r, in], then G times B [S, out, r] -> G times [S, N, out]."""
        x, groups = x.to(weight.dtype), len(adapters) // 2
        dropped = round(settings.dropout * _LEVELS)
        # What is kept is scaled up; the adapter's own factor takes that over, so that x is multiplied with the mask alone.
        ctx.factor = settings.scale * _LEVELS / (_LEVELS - dropped)
        base = F.linear(x, weight)
        outputs, keeps, lows = [], [], []
        for group, (a, b) in enumerate(zip(adapters[:groups], adapters[groups:], strict=True)):
            # The bias is one more column of B, whose input is 1: adding it costs no pass of its own.
            columns = torch.cat([b * ctx.factor, bias.expand(len(b), -1)[..., None]], -1).transpose(1, 2).to(x.dtype)
            keep, low = kept(x.shape, dropped), a.new_ones(len(x), a.shape[1] + 1, x.shape[1])
            output = base if group == groups - 1 else base.clone()
            for rows, block in _blocks(x, a.dtype):
                block.copy_(keep[:, rows]).mul_(x[:, rows].to(a.dtype))
                low[:, :-1, rows] = torch.bmm(a, block.transpose(1, 2))
                output[:, rows].baddbmm_(low[:, :, rows].transpose(1, 2).to(x.dtype), columns)
            outputs.append(output)
            keeps.append(keep)
            lows.append(low)
        ctx.save_for_backward(x, weight, *keeps, *lows, *adapters)
        return tuple(outputs)

    @staticmethod
    @torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x and of the adapters."""
        x, weight, *saved = ctx.saved_tensors
        groups = len(gradients)
        keeps, lows, a, b = (saved[i * groups : (i + 1) * groups] for i in range(4))
        total = functools.reduce(torch.add, gradients)
        x_gradient = total @ weight
        columns = [(m * ctx.factor).transpose(1, 2).contiguous() for m in b]
        a_gradients, b_gradients = [torch.zeros_like(m) for m in a], [torch.zeros_like(m) for m in columns]
        for group, gradient in enumerate(gradients):
            for rows, block in _blocks(x, a[group].dtype):
                part = gradient[:, rows].to(block.dtype)
                low_gradient = torch.bmm(columns[group], part.transpose(1, 2))
                b_gradients[group].baddbmm_(lows[group][:, :-1, rows], part, alpha=ctx.factor)
                block.copy_(keeps[group][:, rows])
                added = torch.bmm(low_gradient.transpose(1, 2), a[group])
                if added.dtype is x.dtype:
                    x_gradient[:, rows].addcmul_(added, block)
                else:
                    x_gradient[:, rows].add_(added.mul_(block).to(x.dtype))
                a_gradients[group].baddbmm_(low_gradient, block.mul_(x[:, rows].to(block.dtype)))
        # Contiguous, so that the parameters keep their parts as gradients; else each is copied.
        return x_gradient, None, None, None, *a_gradients, *(m.transpose(1, 2).contiguous() for m in b_gradients)


def _blocks(x: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Rows of x [S, N, in], and a scratch block [S, rows, in] of a dtype for them, again and again the same memory."""
    stack, total, size = x.shape
    step = max(1, _BLOCK // (stack * size))
    scratch = x.new_empty(stack * min(step, total) * size, dtype=dtype)
    for start in range(0, total, step):
        rows = min(step, total - start)
        yield slice(start, start + rows), scratch[: stack * rows * size].view(stack, rows, size)
