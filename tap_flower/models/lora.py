"""Low-rank adaptation (arXiv 2106.09685), stacked: several adapters on one frozen map, computed as one batch.

Letters of shapes: G groups of adapters, S entries of a stack, N tokens, r the rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tap_flower.models import cpu

Frozen = nn.Linear | nn.Conv2d
"""What is adapted; a convolution is the linear map of each of its patches."""


@dataclass(frozen=True)
class LoraSettings:
    """Rank r, α and dropout of a family of adapters."""

    rank: int
    alpha: int
    dropout: float = 0.3


class LoRA(nn.Module):
    """One adapter: `ΔW = (α / r) · B A` with A [r, in] and B [out, r] (arXiv 2106.09685, eq. 3). B starts at zero.

    Args:
        frozen: the map that it adapts; its weights do not become parameters of this module.
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
        """The map that this adapts."""
        return self._frozen[0]

    def merged(self) -> dict[str, Tensor]:
        """`weight` [out, in] and `bias` [out] of the frozen map and the adapter as one linear map, without dropout."""
        weight = self.frozen.weight.detach().flatten(1) + self.scale * self.B.detach() @ self.A.detach()
        return {"weight": weight, "bias": cpu.bias_of(self.frozen).detach()}


Adapter = LoRA | nn.Linear
"""An adapter, or the linear map that it and the frozen one have been merged into."""


def lora_linear(loras: Sequence[Adapter], x: Tensor) -> Tensor:
    """Applies a frozen linear map with one adapter for each entry of a stack.

    Args:
        loras: S adapters of one map and of one rank, or S merged maps; the same one may occur more than once.
        x: [S, ..., in].

    Returns:
        `W x[s] + bias + ΔW_s dropout(x[s])`, [S, ..., out].
    """
    return lora_linears([loras], x[None])[0]


def lora_linears(groups: Sequence[Sequence[Adapter]], x: Tensor) -> Tensor:
    """Applies frozen linear maps with one adapter for each entry of a stack, for several groups of adapters in one call.

    Args:
        groups: G times S adapters, all of one rank, or as many merged maps. A group adapts one map; those of all groups have
            one shape.
        x: an input for each group, [G, S, ..., in], or one for all, [1, S, ..., in]; groups that adapt the same map of
            the same input share its product.

    Returns:
        `W_g x[g, s] + bias_g + ΔW_gs dropout(x[g, s])`, [G, S, ..., out].
    """
    shape, x = x.shape, x.flatten(2, -2)  # [1 or G, S, N, in]

    # The dispatch of LoRA. Step 1: a merged model has a dense map in place of each adapter, and needs no kernel.
    if isinstance(groups[0][0], nn.Linear):
        linears = cast(Sequence[Sequence[nn.Linear]], groups)
        products = [linear(x[g % len(x), s]) for g, group in enumerate(linears) for s, linear in enumerate(group)]
        return torch.stack(products).view(len(groups), *shape[1:-1], -1)  # [G, S, ..., out]

    # Step 2: groups that adapt one map, each with its own input, are one larger group.
    loras = cast(Sequence[Sequence[LoRA]], groups)
    if len(x) == len(loras) and all(group[0].frozen is loras[0][0].frozen for group in loras):
        loras, x = [[lora for group in loras for lora in group]], x.flatten(0, 1)[None]  # [1, G · S, N, in]

    # Step 3: a kernel where there is a faster one for this device and mode, else the definition.
    each, first = [lora for group in loras for lora in group], loras[0][0]
    maps, a, b = [group[0].frozen for group in loras], [lora.A for lora in each], [lora.B for lora in each]
    outputs = cpu.lora_linears(x, maps, a, b, first.scale, first.dropout, first.training)
    if outputs is None:
        outputs = _definition(loras, x)
    return outputs.view(len(groups), *shape[1:-1], -1)  # [G, S, ..., out]


def _definition(groups: Sequence[Sequence[LoRA]], x: Tensor) -> Tensor:
    """`W x + bias + (α / r) B A dropout(x)` in plain PyTorch: [1 or G, S, N, in] -> [G, S, N, out]."""
    outputs: list[Tensor] = []
    for g, loras in enumerate(groups):
        first, part = loras[0], x[g % len(x)]  # [S, N, in]
        a = torch.stack([lora.A for lora in loras]).to(x.dtype)  # [S, r, in]
        b = torch.stack([lora.B for lora in loras]).to(x.dtype)  # [S, out, r]
        if g == 0 or len(x) > 1 or first.frozen is not groups[g - 1][0].frozen:  # else it is that of the group before
            base = F.linear(part, first.frozen.weight.flatten(1), first.frozen.bias)  # [S, N, out]
        low = F.dropout(part, first.dropout, first.training) @ a.transpose(1, 2)  # [S, N, r]
        outputs.append(torch.baddbmm(base, low, b.transpose(1, 2), alpha=first.scale))  # [S, N, out]
    return torch.stack(outputs) if len(outputs) > 1 else outputs[0][None]
