"""The trainable parts that encoders are made of; the frozen parts are the backbone's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tap_flower.core.initial import Initial
from tap_flower.models.experts import AttentionLoRA, FrozenLayer, Run
from tap_flower.models.lora import lora_linears


class ImageAdaptor(nn.Module):
    """Stands in front of the image encoder: ×2 bilinear -> 3×3 conv -> GELU -> the backbone's size -> 1×1 conv.

    It starts close to the identity, so that a pretrained encoder sees the images that it knows: the first convolution
    scales down to where GELU is nearly linear (GELU(x) ≈ x / 2), the second scales up again.
    """

    SCALE = 0.1
    INITIALS: ClassVar[dict[str, Initial]] = {
        "conv.weight": Initial("identity", SCALE),
        "mix.weight": Initial("identity", 2 / SCALE),
        "mix.bias": Initial("constant", 0.0),
    }

    def __init__(self, image_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, kernel_size=3, padding=1, bias=False)
        self.mix = nn.Conv2d(3, 3, kernel_size=1)
        self.image_size = image_size

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, 3, image_size, image_size]."""
        x = pixels.contiguous(memory_format=torch.channels_last)  # in which convolutions of 3 channels are fastest
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)  # [B, 3, 2H, 2W]
        x = F.gelu(self.conv(x))  # [B, 3, 2H, 2W]
        x = F.interpolate(x, size=(self.image_size, self.image_size), mode="bilinear", align_corners=True)
        return cast(Tensor, self.mix(x))  # [B, 3, image_size, image_size]


class Projection(nn.Linear):
    """Linear D -> D. It starts as the identity, so that what follows begins with the pretrained features."""

    INITIALS: ClassVar[dict[str, Initial]] = {"weight": Initial("identity", 1.0), "bias": Initial("constant", 0.0)}

    def __init__(self, size: int) -> None:
        super().__init__(size, size)


class Output(nn.Module):
    """Linear D -> D and LayerNorm: the end of every encoder."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.proj = Projection(size)
        self.norm = nn.LayerNorm(size)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        return cast(Tensor, self.norm(self.proj(tokens)))


def encode(
    layers: Iterable[nn.Module], loras: Iterable[nn.Module], tokens: Tensor, mask: Tensor | None, run: Run
) -> Tensor:
    """Runs tokens through frozen pre-norm transformer layers with LoRA on query and value.

    Args:
        layers: the backbone's `FrozenLayer`s.
        loras: an `AttentionLoRA` for each layer.
        tokens: [B, T, D].
        mask: [B, T] bool, False at padding, or None.
        run: how each layer is run: `Backbone.run`.

    Returns:
        [B, T, D].
    """
    x = tokens[None]  # [1, B, T, D]: a stack of one
    for layer, lora in zip(layers, loras, strict=True):
        x = run(_layer, layer, lora, x, mask)  # [1, B, T, D]
    return x[0]


def _layer(layer: FrozenLayer, lora: AttentionLoRA, x: Tensor, mask: Tensor | None) -> Tensor:
    n = layer.norm_before(x)  # [1, B, T, D]
    query, value = lora_linears([[lora.query], [lora.value]], n[None])  # [1, B, T, D] each
    x = x + layer.attend(query, layer.key(n), value, mask)
    return x + cast(Tensor, layer.down(layer.activation(layer.up(layer.norm_after(x)))))
