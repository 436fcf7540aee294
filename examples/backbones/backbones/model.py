"""Encoders of your choice under the fusion of tap-flower: a small ViT and a small BERT from their configurations."""

from functools import cache

import torch
from torch import Tensor, nn
from transformers import AutoModel, BertConfig, FlavaConfig, PreTrainedModel, ViTConfig

from tap_flower.models.backbone import Backbone, Encoder, fusion_layers
from tap_flower.models.encoders import Output
from tap_flower.models.lora import LoraSettings

SIZE, LAYERS, IMAGE, VOCABULARY, LENGTH = 64, 1, 32, 60, 24
_SMALL = {"hidden_size": SIZE, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 2 * SIZE}


class AnyBackbone(Backbone):
    """A vision model and a text model of one width, with the multimodal layers of a FLAVA of that width for the fusion.

    Args:
        vision: a model that takes `pixel_values` and gives `last_hidden_state` [B, T, D].
        text: a model that takes `input_ids` and `attention_mask`, likewise.
        multimodal: a FLAVA.
    """

    attention_lora = LoraSettings(rank=8, alpha=16)
    expert_lora = LoraSettings(rank=4, alpha=8)

    def __init__(self, vision: PreTrainedModel, text: PreTrainedModel, multimodal: PreTrainedModel) -> None:
        super().__init__(multimodal.config)
        self.vision, self.text = vision, text
        self.size, self.vocabulary = vision.config.hidden_size, text.config.vocab_size
        self.text_length, self.image_size = text.config.max_position_embeddings, vision.config.image_size
        part = multimodal.multimodal_model
        self.fusion_layers = fusion_layers(part.encoder.layer, part.config.num_attention_heads, LAYERS)

    def image_encoder(self) -> Encoder:
        """What trains on top of the vision model."""
        return Images(self)

    def text_encoder(self) -> Encoder:
        """What trains on top of the text model."""
        return Texts(self)

    def classification_head(self, classes: int) -> nn.Module:
        """A linear map to the classes."""
        return nn.Linear(self.size, classes)


class Images(Encoder):
    """The frozen vision model's tokens, projected."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.output = Output(backbone.size)

    def forward(self, backbone: AnyBackbone, inputs: Tensor, mask: Tensor | None) -> Tensor:
        """Pixels [B, 3, H, W] -> [B, T, D]."""
        del mask
        return self.output(backbone.vision(pixel_values=inputs).last_hidden_state)


class Texts(Encoder):
    """The frozen text model's tokens, projected."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.output = Output(backbone.size)

    def forward(self, backbone: AnyBackbone, inputs: Tensor, mask: Tensor | None) -> Tensor:
        """Token ids [B, T] -> [B, T, D]."""
        return self.output(backbone.text(input_ids=inputs, attention_mask=mask).last_hidden_state)


@cache
def backbone() -> AnyBackbone:
    """The frozen models, once a process. With checkpoints: `AutoModel.from_pretrained(...)` three times, of one width."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = AnyBackbone(
            AutoModel.from_config(ViTConfig(**_SMALL, image_size=IMAGE, patch_size=8)),
            AutoModel.from_config(BertConfig(**_SMALL, vocab_size=VOCABULARY, max_position_embeddings=LENGTH)),
            AutoModel.from_config(
                FlavaConfig(image_config=_SMALL, text_config=_SMALL, multimodal_config=_SMALL, hidden_size=SIZE)
            ),
        )
    return made.requires_grad_(False).eval()
