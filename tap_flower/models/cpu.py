"""Everything that is here only for speed: kernels of LoRA and attention for CPUs, and where their memory comes from.

Nothing in this file changes what a model computes beyond rounding, and nobody needs it to understand the model. The other
files of this folder call `lora_linears`, `attention` and `PatchProjection`, each beside its definition in plain PyTorch.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

# --- Memory ---------------------------------------------------------------------------------------

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""Numbers of two parameters of glibc's mallopt(3)."""


@functools.cache
def prepare_allocation() -> None:
    """Has this process use large pages for large tensors, and keep freed memory (on Linux; elsewhere nothing happens).

    A training step frees and takes the same gigabytes again and again; given back to the system each time, they cost a fresh
    page for every 4 kB written: of a step of FLAVA at full size on two cores about a sixth, and with large pages alone still
    0.3 of 8.5 s of processor time. The process then holds what it needed at most. Call it before the first tensor is made.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):
        return  # not glibc
    mallopt(_MMAP_MAX, 0)  # everything in one heap,
    mallopt(_TRIM_THRESHOLD, -1)  # which never shrinks


# --- Attention and patches ------------------------------------------------------------------------

_FEW_TOKENS = 128


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Computes `F.scaled_dot_product_attention(q, k, v, mask)`: `softmax(q kᵀ / √d) v`.

    A CPU is faster with the products themselves than with its fused kernel, whose backward pass is slow: in training, in
    bfloat16 by a factor of 3 to 8, in float32 by up to a quarter for short texts (`python -m benchmarks.attention`).

    Args:
        q: queries, [N, H, T, d].
        k: keys, [N, H, T, d].
        v: values, [N, H, T, d].
        mask: bool, True where a key counts, broadcast to [N, H, T, T]; or None.

    Returns:
        [N, H, T, d].
    """
    short = q.dtype is torch.bfloat16 or q.shape[2] <= _FEW_TOKENS
    if q.device.type != "cpu" or not short or not q.requires_grad:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = (q * q.shape[3] ** -0.5) @ k.transpose(2, 3)
    if mask is not None:  # added, since filling all scores costs several times as much, and once more backwards
        scores = scores + torch.zeros_like(mask, dtype=scores.dtype).masked_fill_(~mask, -torch.inf)
    mixed: Tensor = scores.softmax(-1) @ v
    return mixed


class PatchProjection(nn.Module):
    """A convolution whose stride is its kernel, as a linear map of each patch: the backward pass is faster on a CPU.

    Args:
        convolution: its weight [D, 3, side, side] and bias [D] are taken over under their names, not copied.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = convolution.weight, convolution.bias

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, D, H / side, W / side]."""
        side = self.weight.shape[-1]
        batch, channels, rows, columns = len(images), images.shape[1], images.shape[2] // side, images.shape[3] // side
        squares = images.reshape(batch, channels, rows, side, columns, side)
        patches = squares.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, -1)
        tokens = F.linear(patches, self.weight.flatten(1), self.bias)
        return tokens.transpose(1, 2).reshape(batch, -1, rows, columns)


# --- LoRA -----------------------------------------------------------------------------------------

_Frozen = nn.Linear | nn.Conv2d


def bias_of(frozen: _Frozen) -> Tensor:
    """The bias of a frozen map, [out]; zeros where it has none."""
    return frozen.weight.new_zeros(len(frozen.weight)) if frozen.bias is None else frozen.bias


def lora_linears(
    x: Tensor,
    maps: Sequence[_Frozen],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scale: float,
    dropout: float,
    training: bool,
) -> Tensor | None:
    """Computes `W x + bias + scale · B A dropout(x)` for G groups of S adapters, where there is a faster way to do so.

    Args:
        x: one input for all groups, [1, S, N, in], or one for each, [G, S, N, in].
        maps: the frozen map of each group.
        a: A [r, in] of each of the G · S adapters.
        b: B [out, r] of each of them.
        scale: α / r.
        dropout: the probability.
        training: whether to drop out.

    Returns:
        [G, S, N, out], or None where plain operations are as fast.
    """
    if x.device.type == "cpu" and training and not torch.compiler.is_compiling():
        output: Tensor = _LoRALinear.apply(x, maps, scale, dropout, *a, *b)  # type: ignore[no-untyped-call]
        return output
    share_the_product = len(maps) > 1 and all(frozen is maps[0] for frozen in maps)
    if not torch.is_grad_enabled() and not share_the_product and _pays(x, maps[0].weight):
        return _with_sums(x, maps, a, b, scale)
    return None


def _pays(x: Tensor, weight: Tensor) -> bool:
    """Whether to add adapters to a weight before the product with x [1 or G, S, N, in]: with many tokens that saves passes.

    Not in bfloat16, where a small ΔW would be lost against W.
    """
    features, size = len(weight), weight[0].numel()
    return weight.dtype == torch.float32 and x.shape[2] * (features + size) > features * size


def _with_sums(x: Tensor, maps: Sequence[_Frozen], a: Sequence[Tensor], b: Sequence[Tensor], scale: float) -> Tensor:
    """With the sums `W + ΔW`, without gradients or dropout: [1 or G, S, N, in] -> [G, S, N, out]."""
    stack = len(a) // len(maps)
    outputs = x.new_empty(len(maps), *x.shape[1:3], len(b[0]))
    for number, (frozen, output) in enumerate(zip(maps, outputs, strict=True)):
        own = slice(number * stack, (number + 1) * stack)
        delta = torch.stack(list(b[own])).to(x.dtype), torch.stack(list(a[own])).to(x.dtype)
        sums = torch.baddbmm(frozen.weight.flatten(1)[None], *delta, alpha=scale)
        torch.baddbmm(bias_of(frozen), x[number % len(x)], sums.transpose(1, 2), out=output)
    return outputs


_LEVELS = 256
_BLOCK = 1 << 18
"""Elements that are worked on at a time: they stay in a core's cache through all the steps."""


def kept(shape: Sequence[int], dropped: int) -> Tensor:
    """A random mask of dropout, which follows torch's random numbers.

    Args:
        shape: of the mask.
        dropped: of 256 elements, how many are dropped.

    Returns:
        uint8, 1 where an element is kept.
    """
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
    def forward(
        ctx: Any, x: Tensor, maps: Sequence[_Frozen], scale: float, dropout: float, *adapters: Tensor
    ) -> Tensor:
        """X [1 or G, S, N, in], G maps, G times S adapters A [r, in], then as many B [out, r] -> [G, S, N, out]."""
        weights = [frozen.weight.flatten(1) for frozen in maps]
        x, groups, stack = x.to(weights[0].dtype), len(maps), len(adapters) // 2
        a, b = torch.stack(adapters[:stack]), torch.stack(adapters[stack:])
        dropped = round(dropout * _LEVELS)
        # What is kept is scaled up; the adapter's own factor takes that over, so that x is multiplied with the mask alone.
        ctx.factor = scale * _LEVELS / (_LEVELS - dropped)
        output = x.new_empty(groups, *x.shape[1:3], b.shape[1])
        for number, (weight, target) in enumerate(zip(weights, output, strict=True)):
            if number >= len(x) and maps[number] is maps[0]:
                target.copy_(output[0])
            else:
                torch.matmul(x[number % len(x)].flatten(0, 1), weight.T, out=target.flatten(0, 1))
        # The bias is one more column of B, whose input is 1: adding it costs no pass of its own.
        bias = torch.cat([bias_of(frozen).expand(stack // groups, -1) for frozen in maps])
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
        return x_gradient, None, None, None, *a_gradient, *b_gradient.transpose(1, 2).contiguous()


def _frozen_backward(maps: Sequence[_Frozen], gradient: Tensor, inputs: int) -> Tensor:
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
