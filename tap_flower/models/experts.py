"""Frozen transformer layers, and experts: LoRA weights on a layer's one frozen feed-forward network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tap_flower.models.lora import LoRA, LoraSettings, lora_linear, lora_linears

_M = TypeVar("_M", bound=nn.Module)
Run = Callable[..., Tensor]
"""Runs a function on its arguments: plainly, compiled, or so that the backward pass computes its inside again."""


class FrozenLayer(nn.Module):
    """The frozen weights of one pre-norm transformer layer of the backbone; every user of the layer shares them.

    Args:
        layer: a layer of transformers' FLAVA or ViLT; its modules are taken over, not copied.
        heads: number of attention heads.
    """

    def __init__(self, layer: nn.Module, heads: int) -> None:
        super().__init__()
        attention, output = layer.get_submodule("attention.attention"), layer.get_submodule("attention.output")
        self.norm_before = _of_type(layer, "layernorm_before", nn.LayerNorm)
        self.query = _of_type(attention, "query", nn.Linear)
        self.key = _of_type(attention, "key", nn.Linear)
        self.value = _of_type(attention, "value", nn.Linear)
        self.output = _of_type(output, "dense", nn.Linear)
        self.norm_after = _of_type(layer, "layernorm_after", nn.LayerNorm)
        self.up = _of_type(layer, "intermediate.dense", nn.Linear)
        self.down = _of_type(layer, "output.dense", nn.Linear)
        self.activation: Callable[[Tensor], Tensor] = layer.get_submodule("intermediate.intermediate_act_fn")
        self.heads = heads
        self.requires_grad_(False)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Multi-head attention after the projections.

        Args:
            query: projected queries, [S, B, T, D]; key and value likewise.
            key: projected keys.
            value: projected values.
            mask: [B, T] bool, False at padding, or None.

        Returns:
            [S, B, T, D], after the output projection.
        """
        stack, batch, tokens, size = query.shape
        split = (stack * batch, tokens, self.heads, size // self.heads)
        q, k, v = (x.reshape(split).transpose(1, 2) for x in (query, key, value))
        # One row for each entry of the stack; [S·B, 1, 1, T] broadcasts over heads and queries.
        attention_mask = None if mask is None else mask.repeat(stack, 1)[:, None, None, :]
        mixed = attention(q, k, v, attention_mask)
        joined: Tensor = self.output(mixed.transpose(1, 2).reshape(stack, batch, tokens, size))
        return joined

    def feed_forward(self, experts: Sequence[Expert], x: Tensor) -> Tensor:
        """The frozen network with one expert's LoRA for each entry of the stack: [S, B, T, D] -> [S, B, T, D]."""
        hidden = self.activation(lora_linear([e.up for e in experts], x))
        return lora_linear([e.down for e in experts], hidden)


_FEW_TOKENS = 128


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """`softmax(q kᵀ / √d) v`.

    A CPU is faster with the products themselves than with its fused kernel, whose backward pass is slow: in training, in
    bfloat16 by a factor of 3 to 8, in float32 by up to a quarter for short texts (`python -m benchmarks.attention`).

    Args:
        q: [N, H, T, d]; k and v likewise.
        k: keys.
        v: values.
        mask: bool, True where a key counts, broadcast to [N, H, T, T]; or None.
    """
    short = q.dtype is torch.bfloat16 or q.shape[2] <= _FEW_TOKENS
    if q.device.type != "cpu" or not short or not q.requires_grad:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = (q * q.shape[3] ** -0.5) @ k.transpose(2, 3)
    if mask is not None:  # added, since filling all scores costs several times as much, and once more backwards
        scores = scores + torch.zeros_like(mask, dtype=scores.dtype).masked_fill_(~mask, -torch.inf)
    mixed: Tensor = scores.softmax(-1) @ v
    return mixed


def _of_type(parent: nn.Module, name: str, kind: type[_M]) -> _M:
    module = parent.get_submodule(name)
    if not isinstance(module, kind):
        raise TypeError(f"{type(parent).__name__}.{name} is a {type(module).__name__}, not a {kind.__name__}")
    return module


class Expert(nn.Module):
    """LoRA on both linears of a layer's feed-forward network."""

    def __init__(self, layer: FrozenLayer, settings: LoraSettings) -> None:
        super().__init__()
        self.up = LoRA(layer.up, settings)
        self.down = LoRA(layer.down, settings)


class DomainExperts(nn.Module):
    """MoDE: the experts E_q and E_v of one domain in one layer of a block."""

    def __init__(self, layer: FrozenLayer, settings: LoraSettings) -> None:
        super().__init__()
        self.query = Expert(layer, settings)
        self.value = Expert(layer, settings)


def domain_residuals(layer: FrozenLayer, domains: Sequence[DomainExperts], x: Tensor) -> Tensor:
    """E_q(x) and E_v(x): [S, B, T, D] -> [2, S, B, T, D]. The frozen part of the first linear is computed once for both."""
    experts = [d.query for d in domains], [d.value for d in domains]
    hidden = layer.activation(lora_linears([[e.up for e in group] for group in experts], x[None]))
    return lora_linears([[e.down for e in group] for group in experts], hidden)
