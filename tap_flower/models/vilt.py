"""ViLT (`dandelin/vilt-b32-mlm` and any other ViLT checkpoint): arXiv 2102.03334."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, ViltModel

from tap_flower.core.initial import Initial
from tap_flower.models.backbone import Backbone, Encoder, fusion_layers
from tap_flower.models.encoders import ImageAdaptor, Output
from tap_flower.models.lora import LoRA, LoraSettings, lora_linear

PATCH_LORA = LoraSettings(rank=4, alpha=8)


class ViltBackbone(Backbone):
    """Embeddings of words and patches, and the transformer's layers for the fusion; ViLT has no encoders of its own.

    Args:
        model: a `ViltModel`; its modules are taken over, not copied.
        layers: L, the number of fusion layers of each stage.
        image_size: side, in pixels, of the images that the patches are cut from; by default the checkpoint's own.
    """

    parts: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "image": ("patches", "class_token", "positions"),
        "text": ("text_embeddings",),
    }
    copied = ("embeddings.cls_token", "embeddings.position_embeddings")
    attention_lora = LoraSettings(rank=8, alpha=16)
    expert_lora = LoraSettings(rank=8, alpha=16)

    def __init__(self, model: PreTrainedModel, layers: int, image_size: int | None = None) -> None:
        super().__init__(model.config)
        model = cast(ViltModel, model)
        config, embeddings = model.config, model.embeddings
        self.size = config.hidden_size
        self.vocabulary = config.vocab_size
        self.text_length = config.max_position_embeddings
        self.image_size, grid = self.image_grid(image_size, config)
        self.text_embeddings = embeddings.text_embeddings
        self.patches = embeddings.patch_embeddings.projection
        positions = _resized(embeddings.position_embeddings.detach(), grid)
        # What the image's tokens begin with: the class token, and its position and those of the patches.
        self.register_buffer("class_token", embeddings.cls_token.detach().clone())
        self.register_buffer("positions", positions)
        self.fusion_layers = fusion_layers(model.encoder.layer, config.num_attention_heads, layers)

    def image_encoder(self) -> Encoder:
        """A new trainable part of the image encoder: adaptor, LoRA on the patches, class token, positions, projection."""
        return ViltImageEncoder(self)

    def text_encoder(self) -> Encoder:
        """A new trainable part of the text encoder: the projection of the frozen embeddings."""
        return ViltTextEncoder(self)

    def classification_head(self, classes: int) -> nn.Module:
        """A new head, [B, D] -> [B, classes]: D -> 4D, LayerNorm, GELU, dropout .1, -> D, GELU, -> classes."""
        return nn.Sequential(
            nn.Linear(self.size, 4 * self.size),
            nn.LayerNorm(4 * self.size),
            nn.GELU(),
            nn.Dropout(0.1),
            nn.Linear(4 * self.size, self.size),
            nn.GELU(),
            nn.Linear(self.size, classes),
        )


def _resized(positions: Tensor, grid: int) -> Tensor:
    """Position embeddings [1, 1 + n·n, D] of the checkpoint for a grid of grid x grid patches, interpolated as ViLT does."""
    side = round((positions.shape[1] - 1) ** 0.5)  # n
    if side == grid:
        return positions.clone()
    spatial = positions[:, 1:].transpose(1, 2).reshape(1, -1, side, side)  # [1, D, n, n]
    spatial = F.interpolate(spatial, size=(grid, grid), mode="bilinear", align_corners=True)  # [1, D, grid, grid]
    return torch.cat([positions[:, :1], spatial.flatten(2).transpose(1, 2)], dim=1)  # [1, 1 + grid·grid, D]


class TokenOffsets(nn.Module):
    """The trainable part of class token and positions: what training adds to the checkpoint's values, zero at first.

    A tensor of ours starts from its name and the seed alone, so that a server without the checkpoint can start it.
    """

    INITIALS: ClassVar[dict[str, Initial]] = dict.fromkeys(("class_token", "positions"), Initial("constant", 0.0))

    def __init__(self, backbone: ViltBackbone) -> None:
        super().__init__()
        self.class_token = nn.Parameter(torch.empty(backbone.get_buffer("class_token").shape))
        self.positions = nn.Parameter(torch.empty(backbone.get_buffer("positions").shape))


class ViltImageEncoder(Encoder):
    """Trainable part of the image encoder."""

    def __init__(self, backbone: ViltBackbone) -> None:
        super().__init__()
        self.adaptor = ImageAdaptor(backbone.image_size)
        self.patches = LoRA(backbone.patches, PATCH_LORA)
        self.offsets = TokenOffsets(backbone)
        self.output = Output(backbone.size)

    def forward(self, backbone: Backbone, inputs: Tensor, mask: Tensor | None) -> Tensor:
        """Pixels [B, 3, H, W] -> class token and patches [B, 1 + patches, D]."""
        del mask  # all images are of one size
        frozen = cast(ViltBackbone, backbone)
        images, side = self.adaptor(inputs), frozen.patches.kernel_size[0]  # [B, 3, image_size, image_size]
        patches = F.unfold(images, side, stride=side).transpose(1, 2)  # [B, patches, 3 · side · side]
        tokens = lora_linear([self.patches], patches[None])[0]  # [B, patches, D]
        class_token = frozen.get_buffer("class_token") + self.offsets.class_token  # [1, 1, D]
        tokens = torch.cat([class_token.expand(len(tokens), -1, -1), tokens], dim=1)  # [B, 1 + patches, D]
        tokens = tokens + frozen.get_buffer("positions") + self.offsets.positions
        return cast(Tensor, self.output(tokens))


class ViltTextEncoder(Encoder):
    """Trainable part of the text encoder."""

    def __init__(self, backbone: ViltBackbone) -> None:
        super().__init__()
        self.output = Output(backbone.size)

    def forward(self, backbone: Backbone, inputs: Tensor, mask: Tensor | None) -> Tensor:
        """Token ids [B, T] -> [B, T, D]."""
        del mask  # there is no attention here
        frozen = cast(ViltBackbone, backbone)
        return cast(Tensor, self.output(frozen.text_embeddings(input_ids=inputs)))  # [B, T, D]
