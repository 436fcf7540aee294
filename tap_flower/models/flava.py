"""FLAVA (`facebook/flava-full` and any other FLAVA checkpoint): arXiv 2112.04482."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, cast

from torch import Tensor, nn
from transformers import FlavaModel, PreTrainedModel

from tap_flower.models.backbone import Backbone, Encoder, frozen_layers, fusion_layers
from tap_flower.models.cpu import PatchProjection
from tap_flower.models.encoders import ImageAdaptor, Output, encode
from tap_flower.models.experts import AttentionLoRA, FrozenLayer
from tap_flower.models.lora import LoraSettings

ENCODER_LORA = LoraSettings(rank=8, alpha=16)


class FlavaBackbone(Backbone):
    """Image transformer, text transformer and the multimodal transformer's layers; poolers and projections are dropped.

    Args:
        model: a `FlavaModel`; its modules are taken over, not copied.
        layers: L, the number of fusion layers of each stage.
        image_size: side, in pixels, of the images that the patches are cut from; by default the checkpoint's own.
    """

    parts: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "image": ("image_embeddings", "image_layers", "image_norm"),
        "text": ("text_embeddings", "text_layers", "text_norm"),
    }
    attention_lora = LoraSettings(rank=16, alpha=32)
    expert_lora = LoraSettings(rank=4, alpha=8)

    def __init__(self, model: PreTrainedModel, layers: int, image_size: int | None = None) -> None:
        super().__init__(model.config)
        model = cast(FlavaModel, model)
        image, text, multimodal = model.image_model, model.text_model, model.multimodal_model
        self.size = multimodal.config.hidden_size
        self.vocabulary = text.config.vocab_size
        self.text_length = text.config.max_position_embeddings
        self.image_size, _ = self.image_grid(image_size, image.config)
        self.image_embeddings = image.embeddings
        patches = self.image_embeddings.patch_embeddings
        patches.register_module("projection", PatchProjection(patches.projection))  # the same map, faster
        self.image_layers = frozen_layers(image.encoder.layer, image.config.num_attention_heads)
        self.image_norm = image.layernorm
        self.text_embeddings = text.embeddings
        self.text_layers = frozen_layers(text.encoder.layer, text.config.num_attention_heads)
        self.text_norm = text.layernorm
        self.fusion_layers = fusion_layers(multimodal.encoder.layer, multimodal.config.num_attention_heads, layers)

    def image_encoder(self) -> Encoder:
        """A new trainable part of the image encoder: adaptor, LoRA on every image layer, projection."""
        return FlavaImageEncoder(self)

    def text_encoder(self) -> Encoder:
        """A new trainable part of the text encoder: LoRA on every text layer, projection."""
        return FlavaTextEncoder(self)

    def classification_head(self, classes: int) -> nn.Module:
        """A new head, [B, D] -> [B, classes]: D -> D/2, ReLU, dropout .3, -> classes."""
        return nn.Sequential(
            nn.Linear(self.size, self.size // 2), nn.ReLU(), nn.Dropout(0.3), nn.Linear(self.size // 2, classes)
        )


class FlavaImageEncoder(Encoder):
    """Trainable part of the image encoder."""

    def __init__(self, backbone: FlavaBackbone) -> None:
        super().__init__()
        self.adaptor = ImageAdaptor(backbone.image_size)
        self.layers = _loras(backbone.image_layers)
        self.output = Output(backbone.size)

    def forward(self, backbone: Backbone, inputs: Tensor, mask: Tensor | None) -> Tensor:
        """Pixels [B, 3, H, W] -> class token and patches [B, 1 + patches, D]."""
        frozen = cast(FlavaBackbone, backbone)
        images = self.adaptor(inputs)  # [B, 3, image_size, image_size]
        tokens = frozen.image_embeddings(images, interpolate_pos_encoding=True)  # [B, 1 + patches, D]
        tokens = encode(frozen.image_layers, self.layers, tokens, mask, frozen.run)
        return cast(Tensor, self.output(frozen.image_norm(tokens)))


class FlavaTextEncoder(Encoder):
    """Trainable part of the text encoder."""

    def __init__(self, backbone: FlavaBackbone) -> None:
        super().__init__()
        self.layers = _loras(backbone.text_layers)
        self.output = Output(backbone.size)

    def forward(self, backbone: Backbone, inputs: Tensor, mask: Tensor | None) -> Tensor:
        """Token ids [B, T] -> [B, T, D]."""
        frozen = cast(FlavaBackbone, backbone)
        tokens = frozen.text_embeddings(input_ids=inputs)  # [B, T, D]
        tokens = encode(frozen.text_layers, self.layers, tokens, mask, frozen.run)
        return cast(Tensor, self.output(frozen.text_norm(tokens)))


def _loras(layers: nn.ModuleList) -> nn.ModuleList:
    return nn.ModuleList(AttentionLoRA(cast(FrozenLayer, layer), ENCODER_LORA) for layer in layers)
