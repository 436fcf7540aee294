"""The trainable part of the encoders; the frozen part is the backbone's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tap_flower.core.initial import Initial
from tap_flower.models.experts import FrozenLayer, Run
from tap_flower.models.lora import LoRA, LoraSettings, lora_linears


class ImageAdaptor(nn.Module):
    """What stands in front of the image encoder: ×2 bilinear -> 3×3 conv -> GELU -> the backbone's size -> 1×1 conv.

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
        # Three channels: with the channels last, the convolutions take about half the time on a CPU.
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        x = F.interpolate(pixels, scale_factor=2, mode="bilinear", align_corners=True)
        x = F.gelu(self.conv(x))
        x = F.interpolate(x, size=(self.image_size, self.image_size), mode="bilinear", align_corners=True)
        mixed: Tensor = self.mix(x)
        return mixed


def patches_of(images: Tensor, side: int) -> Tensor:
    """Squares that are cut from images, row by row: [B, 3, H, W] -> [B, H / side · W / side, 3 · side · side].

    A convolution whose stride is its kernel is a linear map of each of them.
    """
    batch, channels, height, width = images.shape
    squares = images.reshape(batch, channels, height // side, side, width // side, side)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * side * side)


class PatchProjection(nn.Module):
    """A frozen convolution whose stride is its kernel, computed as a linear map: backwards, a CPU is faster at that.

    Args:
        convolution: its weight [D, 3, side, side] and bias [D] are taken over under their names, not copied.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = convolution.weight, convolution.bias

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, D, H / side, W / side]."""
        side = self.weight.shape[-1]
        tokens = F.linear(patches_of(images, side), self.weight.flatten(1), self.bias)
        return tokens.transpose(1, 2).reshape(len(images), -1, images.shape[2] // side, images.shape[3] // side)


class LayerLoRA(nn.Module):
    """LoRA on query and value of one encoder layer."""

    def __init__(self, layer: FrozenLayer, settings: LoraSettings) -> None:
        super().__init__()
        self.query = LoRA(layer.query, settings)
        self.value = LoRA(layer.value, settings)


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
        normed: Tensor = self.norm(self.proj(tokens))
        return normed


def encode(
    layers: Sequence[FrozenLayer],
    loras: Sequence[LayerLoRA],
    tokens: Tensor,
    mask: Tensor | None,
    run: Run,
) -> Tensor:
    """Frozen pre-norm transformer layers with LoRA on query and value.

    Args:
        layers: of the backbone.
        loras: one for each layer.
        tokens: [B, T, D].
        mask: [B, T] bool, False at padding, or None.
        run: how each layer is run, see `Backbone.run`.

    Returns:
        [B, T, D].
    """
    x = tokens[None]
    for layer, lora in zip(layers, loras, strict=True):
        x = run(_layer, layer, lora, x, mask)
    return x[0]


def _layer(layer: FrozenLayer, lora: LayerLoRA, x: Tensor, mask: Tensor | None) -> Tensor:
    n = layer.norm_before(x)
    query, value = lora_linears([[lora.query], [lora.value]], n[None])
    x = x + layer.attend(query, layer.key(n), value, mask)
    return x + cast(Tensor, layer.down(layer.activation(layer.up(layer.norm_after(x)))))
