"""The base class of backbones: frozen weights of a pretrained model, and the settings that go with its family."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property, lru_cache
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig

from tap_flower.errors import BackboneError
from tap_flower.models.experts import FrozenLayer
from tap_flower.models.lora import LoraSettings


class Encoder(ABC, nn.Module):
    """The trainable part of a modality's encoder."""

    @abstractmethod
    def forward(self, backbone: Backbone, inputs: Tensor, mask: Tensor | None) -> Tensor:
        """Encodes one modality.

        Args:
            backbone: with the frozen part of this encoder.
            inputs: normalised pixels [B, 3, H, W], or token ids [B, T].
            mask: [B, T] bool, False at padding; None where nothing is padded.

        Returns:
            Tokens, [B, T, D].
        """


class Backbone(ABC, nn.Module):
    """The frozen part of the model, held once a process and shared by every model in it.

    A family (FLAVA, ViLT) is a subclass: it says what is frozen, and how its encoders and classification head look.

    Args:
        config: of the checkpoint; what of it decides the result becomes part of the fingerprint.

    Attributes:
        size: D.
        vocabulary: number of tokens.
        text_length: longest text that the checkpoint has positions for, in tokens.
        image_size: side, in pixels, of the images that the checkpoint's patches are cut from.
        fusion_layers: layers for MoTE and MoME, in this order.
        recompute: gradient checkpointing: whether the backward pass computes the inside of each layer again, dropout
            included, in place of keeping it (arXiv 1604.06174).
        compiled: whether the layers are compiled (torch.compile), each kind once a process.
        parts: modality -> names of the frozen modules and buffers that it alone uses.
        copied: names of the checkpoint's tensors that are held as copies.
        attention_lora: LoRA of the fusion's query and value.
        expert_lora: LoRA of the experts.
    """

    size: int
    vocabulary: int
    text_length: int
    image_size: int
    fusion_layers: nn.ModuleList
    parts: ClassVar[Mapping[str, tuple[str, ...]]]
    copied: ClassVar[tuple[str, ...]] = ()
    attention_lora: LoraSettings
    expert_lora: LoraSettings
    recompute: bool = False
    compiled: bool = False

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self._configuration = _configuration(config)

    @abstractmethod
    def image_encoder(self) -> Encoder:
        """A new trainable part of the image encoder."""

    @abstractmethod
    def text_encoder(self) -> Encoder:
        """A new trainable part of the text encoder."""

    @abstractmethod
    def classification_head(self, classes: int) -> nn.Module:
        """A new classification head, [B, D] -> [B, classes]."""

    @property
    def encoders(self) -> dict[str, Callable[[], Encoder]]:
        """Modality -> constructor of the trainable part of its encoder."""
        return {"image": self.image_encoder, "text": self.text_encoder}

    @property
    def fusion_stages(self) -> tuple[list[FrozenLayer], list[FrozenLayer]]:
        """The layers of MoTE (0 .. L-1) and of MoME (L .. 2L-1)."""
        layers = cast(list[FrozenLayer], list(self.fusion_layers))
        return layers[: len(layers) // 2], layers[len(layers) // 2 :]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the frozen weights; models compute in it, while their trainable tensors stay float32."""
        return next(self.parameters()).dtype

    def run(self, part: Callable[..., Tensor], *arguments: object) -> Tensor:
        """Runs a part of a layer on its arguments: compiled or not, its inside kept for the backward pass or not."""
        if self.compiled:
            part = _compiled(part)
        found = checkpoint(part, *arguments, use_reentrant=False) if self.recompute else part(*arguments)
        return cast(Tensor, found)

    def computing(self, dtype: torch.dtype, recompute: bool = False, compiled: bool = False) -> Backbone:
        """Sets how models over this backbone compute, and returns it; the fingerprint stays that of the checkpoint.

        Args:
            dtype: float32 or bfloat16, of the frozen weights and of the computation.
            recompute: whether to use gradient checkpointing.
            compiled: whether to use torch.compile.
        """
        if not next(self.parameters()).is_meta:
            _ = self.fingerprint  # of the values as they were read
        self.recompute, self.compiled = recompute, compiled
        return self.to(dtype)

    @staticmethod
    def image_grid(wanted: int | None, config: PreTrainedConfig) -> tuple[int, int]:
        """The image size in use, in pixels and in patches: the checkpoint's own, unless the run wants another one.

        Args:
            wanted: by the run, in pixels.
            config: with the checkpoint's `image_size` and `patch_size`.

        Raises:
            BackboneError: it is not a multiple of the patch size.
        """
        patch = int(config.patch_size)
        size = int(config.image_size) if wanted is None else wanted
        if size % patch:
            raise BackboneError(
                f"model.image_size = {size} is no multiple of the backbone's patches of {patch} pixels: "
                f"choose {size // patch * patch or patch} or {(size // patch + 1) * patch}"
            )
        return size, size // patch

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over what of the configuration decides the result, and names, shapes and values of the frozen tensors.

        As 16 hexadecimal digits.
        """
        digest = hashlib.sha256(self._configuration.encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


@lru_cache(maxsize=8)
def _compiled(part: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(part, dynamic=True)


_PARTS = ("image_config", "text_config", "multimodal_config")
_DECIDES_THE_RESULT = ("model_type", "num_attention_heads", "hidden_act", "layer_norm_eps", "image_size", "patch_size")


def _configuration(config: PreTrainedConfig) -> str:
    """What of a configuration, its parts included, decides the result beside the tensors, as JSON."""

    def chosen(values: Mapping[str, object]) -> dict[str, object]:
        return {
            key: chosen(value) if isinstance(value, Mapping) else value
            for key, value in values.items()
            if key in _DECIDES_THE_RESULT or key in _PARTS
        }

    return json.dumps(chosen(config.to_dict()), sort_keys=True)


def frozen_layers(layers: nn.ModuleList, heads: int) -> nn.ModuleList:
    """A checkpoint's layers, with this number of attention heads, as `FrozenLayer`s."""
    return nn.ModuleList(FrozenLayer(layer, heads) for layer in layers)


def fusion_layers(available: nn.ModuleList, heads: int, layers: int) -> nn.ModuleList:
    """The first 2L multimodal layers as `FrozenLayer`s; the others are not held.

    Args:
        available: the checkpoint's multimodal layers.
        heads: number of attention heads.
        layers: L, the number of fusion layers of each stage.

    Raises:
        BackboneError: the checkpoint has fewer than 2L multimodal layers.
    """
    if not 1 <= layers <= len(available) // 2:
        raise BackboneError(
            f"model.layers = {layers} needs {2 * layers} multimodal layers, the backbone has {len(available)}: "
            f"choose between 1 and {len(available) // 2}"
        )
    return frozen_layers(available[: 2 * layers], heads)
