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


Frozen = nn.Linear | nn.Conv2d
"""What is adapted; a convolution is the linear map of each of its patches."""


class LoRA(nn.Module):
    """One adapter: `ΔW = (α / r) · B A` with A [r, in] and B [out, r] (arXiv 2106.09685). B starts at zero.

    Args:
        frozen: what it adapts.
        settings: rank, α, dropout.
    """

    def __init__(self, frozen: Frozen, settings: LoraSettings) -> None:
        super().__init__()
        self._frozen = (frozen,)  # in a tuple, else it would be a part of this module
        self.A = nn.Parameter(torch.empty(settings.rank, frozen.weight[0].numel()))
        self.B = nn.Parameter(torch.empty(len(frozen.weight), settings.rank))
        self.scale = settings.alpha / settings.rank
        self.dropout = settings.dropout

    @property
    def frozen(self) -> Frozen:
        """What it adapts."""
        return self._frozen[0]

    def merged(self) -> dict[str, Tensor]:
        """`weight` [out, in] and `bias` [out] of the frozen map and the adapter as one linear map, without dropout."""
        weight = self.frozen.weight.detach().flatten(1) + self.scale * self.B.detach() @ self.A.detach()
        return {"weight": weight, "bias": cast(Tensor, self.frozen.bias).detach()}


Adapter = LoRA | nn.Linear
"""An adapter, or the linear map that it and the frozen one have been merged into."""


def lora_linear(loras: Sequence[Adapter], x: Tensor) -> Tensor:
    """A frozen linear map with one adapter for each entry of a stack.

    Args:
        loras: S adapters of one map and of one rank, or S merged maps; the same one may occur more than once.
        x: [S, ..., in].

    Returns:
        `x[s] Wᵀ + bias + ΔW_s x[s]`, [S, ..., out].
    """
    return lora_linears([loras], x[None])[0]


def lora_linears(groups: Sequence[Sequence[Adapter]], x: Tensor) -> Tensor:
    """As `lora_linear`, for several groups of adapters in one call.

    Args:
        groups: G times S adapters, all of one rank, or as many merged maps. A group adapts one map; those of all groups have
            one shape.
        x: an input for each group, [G, S, ..., in], or one for all, [1, S, ..., in]; groups that adapt the same map of
            the same input share its product.

    Returns:
        [G, S, ..., out].
    """
    flat, first = x.flatten(2, -2), groups[0][0]
    if isinstance(first, nn.Linear):
        inputs = flat.expand(len(groups), *flat.shape[1:])
        outputs = torch.stack(
            [_each(cast(Sequence[nn.Linear], m), part) for m, part in zip(groups, inputs, strict=True)]
        )
    else:
        loras = cast(Sequence[Sequence[LoRA]], groups)
        maps = [group[0].frozen for group in loras]
        same = all(frozen is maps[0] for frozen in maps)
        if same and len(x) == len(groups):  # as one larger group
            loras, maps, flat = [[lora for group in loras for lora in group]], maps[:1], flat.flatten(0, 1)[None]
        if x.device.type == "cpu" and first.training and not torch.compiler.is_compiling():
            each = [lora for group in loras for lora in group]
            outputs = _LoRALinear.apply(flat, maps, first, *(m.A for m in each), *(m.B for m in each))  # type: ignore[no-untyped-call]
        elif not torch.is_grad_enabled() and not (same and len(maps) > 1) and _pays(flat, maps[0].weight):
            outputs = _with_sums(loras, flat)
        else:
            outputs = _plain(loras, flat)
    return outputs.view(len(groups), *x.shape[1:-1], -1)


def _each(maps: Sequence[nn.Linear], x: Tensor) -> Tensor:
    """A map for each entry of the stack: [S, N, in] -> [S, N, out]."""
    return torch.stack([map_(part) for map_, part in zip(maps, x, strict=True)])


def _stacked(loras: Sequence[LoRA], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A [S, r, in] and B [S, out, r]."""
    return torch.stack([lora.A for lora in loras]).to(dtype), torch.stack([lora.B for lora in loras]).to(dtype)


def _plain(groups: Sequence[Sequence[LoRA]], x: Tensor) -> Tensor:
    """With plain operations: [1 or G, S, N, in] -> [G, S, N, out]."""
    bases: list[Tensor] = []
    outputs: list[Tensor] = []
    for number, loras in enumerate(groups):
        first, part, (a, b) = loras[0], x[number % len(x)], _stacked(loras, x.dtype)
        shared = number >= len(x) and first.frozen is groups[0][0].frozen
        bases.append(bases[0] if shared else F.linear(part, first.frozen.weight.flatten(1), first.frozen.bias))
        low = torch.bmm(F.dropout(part, first.dropout, first.training), a.transpose(1, 2))
        outputs.append(torch.baddbmm(bases[-1], low, b.transpose(1, 2), alpha=first.scale))
    return torch.stack(outputs) if len(outputs) > 1 else outputs[0][None]


def _with_sums(groups: Sequence[Sequence[LoRA]], x: Tensor) -> Tensor:
    """With the sums `W + ΔW`, without gradients or dropout: [1 or G, S, N, in] -> [G, S, N, out]."""
    outputs = x.new_empty(len(groups), *x.shape[1:3], len(groups[0][0].B))
    for number, (loras, output) in enumerate(zip(groups, outputs, strict=True)):
        first, (a, b) = loras[0], _stacked(loras, x.dtype)
        sums = torch.baddbmm(first.frozen.weight.flatten(1)[None], b, a, alpha=first.scale)
        torch.baddbmm(cast(Tensor, first.frozen.bias), x[number % len(x)], sums.transpose(1, 2), out=output)
    return outputs


def _pays(x: Tensor, weight: Tensor) -> bool:
    """Whether to add adapters to a weight before the product with x [1 or G, S, N, in]: with many tokens that saves passes.

    Not in bfloat16, where a small ΔW would be lost against W.
    """
    features, size = len(weight), weight[0].numel()
    return weight.dtype == torch.float32 and x.shape[2] * (features + size) > features * size


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
    """`x_g W_gᵀ + bias_g + scale · dropout(x_g) A_gsᵀ B_gsᵀ` for G groups of S adapters, in training on a CPU, by blocks.

    Passes over memory and random numbers are what costs there, not arithmetic: plain operations spent a third of a step on
    them. Eight bits are drawn for an element, so that the probability is a multiple of 1/256; one byte of mask is kept for
    the backward pass in place of two float tensors; what is dropped out is written to a scratch block alone; and what is
    added is added in place (`python -m benchmarks.lora` compares). The large products are in the dtype of the frozen weight.
    With bfloat16, blocks are still worked on in the adapters' float32: a CPU is several times as fast at its thin products.
    """

    @staticmethod
    @torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
    def forward(ctx: Any, x: Tensor, maps: Sequence[Frozen], settings: LoRA, *adapters: Tensor) -> Tensor:
        """X [1 or G, S, N, in], G maps, G times S adapters A [r, in], then as many B [out, r] -> [G, S, N, out]."""
        weights = [frozen.weight.flatten(1) for frozen in maps]
        x, groups, stack = x.to(weights[0].dtype), len(maps), len(adapters) // 2
        a, b = torch.stack(adapters[:stack]), torch.stack(adapters[stack:])
        dropped = round(settings.dropout * _LEVELS)
        # What is kept is scaled up; the adapter's own factor takes that over, so that x is multiplied with the mask alone.
        ctx.factor = settings.scale * _LEVELS / (_LEVELS - dropped)
        output = x.new_empty(groups, *x.shape[1:3], b.shape[1])
        for number, (weight, target) in enumerate(zip(weights, output, strict=True)):
            if number >= len(x) and maps[number] is maps[0]:
                target.copy_(output[0])
            else:
                torch.matmul(x[number % len(x)].flatten(0, 1), weight.T, out=target.flatten(0, 1))
        # The bias is one more column of B, whose input is 1: adding it costs no pass of its own.
        bias = torch.cat([cast(Tensor, frozen.bias).expand(stack // groups, -1) for frozen in maps])
        columns = torch.cat([b * ctx.factor, bias[..., None]], -1).transpose(1, 2).to(x.dtype)
        keep = kept((groups, *x.shape[1:]), dropped)
        low = a.new_ones(stack, a.shape[1] + 1, x.shape[2])
        for rows, block in _blocks(keep, a.dtype):
            dropped_out = block.copy_(keep[:, :, rows]).mul_(x[:, :, rows].to(a.dtype)).flatten(0, 1)
            low[:, :-1, rows] = torch.bmm(a, dropped_out.transpose(1, 2))
            output.flatten(0, 1)[:, rows].baddbmm_(low[:, :, rows].transpose(1, 2).to(x.dtype), columns)
        ctx.maps = maps
        ctx.save_for_backward(x, keep, low, a, b)
        return output

    @staticmethod
    @torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x and of the adapters."""
        x, keep, low, a, b = ctx.saved_tensors
        x_gradient = _frozen_backward(ctx.maps, gradient, len(x))
        columns = (b * ctx.factor).transpose(1, 2).contiguous()
        a_gradient, b_gradient = torch.zeros_like(a), torch.zeros_like(columns)
        gradient = gradient.flatten(0, 1)
        for rows, block in _blocks(keep, a.dtype):
            part = gradient[:, rows].to(block.dtype)
            low_gradient = torch.bmm(columns, part.transpose(1, 2))
            b_gradient.baddbmm_(low[:, :-1, rows], part, alpha=ctx.factor)
            block.copy_(keep[:, :, rows])
            added = torch.bmm(low_gradient.transpose(1, 2), a).view(block.shape)
            target = x_gradient[:, :, rows]
            for number in range(0, len(block), len(target)):
                some = slice(number, number + len(target))
                if added.dtype is x.dtype:
                    target.addcmul_(added[some], block[some])
                else:
                    target.add_(added[some].mul_(block[some]).to(x.dtype))
            a_gradient.baddbmm_(low_gradient, block.mul_(x[:, :, rows].to(block.dtype)).flatten(0, 1))
        # Contiguous, so that the parameters keep their parts as gradients; else each is copied.
        return x_gradient, None, None, *a_gradient, *b_gradient.transpose(1, 2).contiguous()


def _frozen_backward(maps: Sequence[Frozen], gradient: Tensor, inputs: int) -> Tensor:
    """The gradient of the inputs through the frozen maps: [G, S, N, out] -> [inputs, S, N, in], inputs being 1 or G."""
    if inputs == 1 and all(frozen is maps[0] for frozen in maps):
        maps, gradient = maps[:1], functools.reduce(torch.add, gradient)[None]
    x_gradient = gradient.new_empty(inputs, *gradient.shape[1:3], maps[0].weight[0].numel())
    for number, (frozen, part) in enumerate(zip(maps, gradient, strict=True)):
        target, product = x_gradient[number % inputs].flatten(0, 1), (part.flatten(0, 1), frozen.weight.flatten(1))
        torch.mm(*product, out=target) if number < inputs else torch.addmm(target, *product, out=target)
    return x_gradient


def _blocks(x: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Rows of x [G, S, N, in], and a scratch block [G, S, rows, in] of a dtype for them, again and again the same memory."""
    groups, stack, total, size = x.shape
    each = groups * stack * size
    step = max(1, _BLOCK // each)
    scratch = x.new_empty(min(step, total) * each, dtype=dtype)
    for start in range(0, total, step):
        rows = min(step, total - start)
        yield slice(start, start + rows), scratch[: rows * each].view(groups, stack, rows, size)
