"""Frozen transformer layers, and what trains on them: LoRA on their attention, and experts on their feed-forward network.

Letters of shapes: S entries of a stack (paths that go through a layer side by side), B examples, T tokens, D the width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor, nn

from tap_flower.models import cpu
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
        """Multi-head attention (arXiv 1706.03762, section 3.2) after the projections of query, key and value.

        Args:
            query: projected queries, [S, B, T, D].
            key: projected keys, [S, B, T, D].
            value: projected values, [S, B, T, D].
            mask: [B, T] bool, False at padding, or None.

        Returns:
            [S, B, T, D], after the output projection.
        """
        stack, batch, tokens, size = query.shape
        split = (stack * batch, tokens, self.heads, size // self.heads)
        q, k, v = (x.reshape(split).transpose(1, 2) for x in (query, key, value))  # [S·B, heads, T, D / heads]
        if mask is not None:
            mask = mask.repeat(stack, 1)[:, None, None, :]  # [S·B, 1, 1, T], broadcast over heads and queries
        mixed = cpu.attention(q, k, v, mask)  # softmax(q kᵀ / √d) v
        joined: Tensor = self.output(mixed.transpose(1, 2).reshape(stack, batch, tokens, size))  # [S, B, T, D]
        return joined

    def feed_forward(self, experts: Sequence[Expert], x: Tensor) -> Tensor:
        """The frozen network with one expert's LoRA for each entry of the stack: [S, B, T, D] -> [S, B, T, D]."""
        hidden = self.activation(lora_linear([expert.up for expert in experts], x))  # [S, B, T, 4D]
        return lora_linear([expert.down for expert in experts], hidden)  # [S, B, T, D]


def _of_type(parent: nn.Module, name: str, kind: type[_M]) -> _M:
    module = parent.get_submodule(name)
    if not isinstance(module, kind):
        raise TypeError(f"{type(parent).__name__}.{name} is a {type(module).__name__}, not a {kind.__name__}")
    return module


class AttentionLoRA(nn.Module):
    """LoRA on query and value of one layer."""

    def __init__(self, layer: FrozenLayer, settings: LoraSettings) -> None:
        super().__init__()
        self.query = LoRA(layer.query, settings)
        self.value = LoRA(layer.value, settings)


class Expert(nn.Module):
    """LoRA on both linear maps of a layer's feed-forward network."""

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
    """E_q(x) and E_v(x) of MoDE; the frozen part of the first linear map is computed once for both.

    Args:
        layer: whose feed-forward network the experts adapt.
        domains: one for each entry of the stack.
        x: [S, B, T, D].

    Returns:
        [2, S, B, T, D].
    """
    experts = [d.query for d in domains], [d.value for d in domains]
    hidden = lora_linears([[expert.up for expert in group] for group in experts], x[None])  # [2, S, B, T, 4D]
    return lora_linears([[expert.down for expert in group] for group in experts], layer.activation(hidden))
