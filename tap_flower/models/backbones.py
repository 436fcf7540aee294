"""Backbones: frozen weights of a pretrained model, and the settings that go with its family."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache, cached_property
from importlib.resources import files
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from tap_flower.models.experts import FrozenLayer
from tap_flower.models.lora import LoraSettings

DEMO = "demo"


class BackboneError(ValueError):
    """A backbone cannot be used; the message names it and the remedy."""


class Encoder(ABC, nn.Module):
    """The trainable part of a modality's encoder."""

    @abstractmethod
    def forward(self, backbone: Backbone, inputs: Tensor, mask: Tensor | None) -> Tensor:
        """Pixels [B, 3, H, W] or token ids [B, T], with a bool mask [B, T] or None -> tokens [B, T, D]."""


class Backbone(ABC, nn.Module):
    """The frozen part of the model, held once a process and shared by every model in it.

    A family (FLAVA, ViLT) is a subclass: it says what is frozen, and how its encoders and classification head look.

    Attributes:
        size: D.
        vocabulary: number of tokens.
        text_length: longest text that the checkpoint has positions for, in tokens.
        fusion_layers: layers for MoTE and MoME, in this order.
        attention_lora: LoRA of the fusion's query and value.
        expert_lora: LoRA of the experts.
    """

    size: int
    vocabulary: int
    text_length: int
    fusion_layers: nn.ModuleList
    attention_lora: LoraSettings
    expert_lora: LoraSettings

    def __init__(self, model: PreTrainedModel, layers: int) -> None:
        del model, layers
        super().__init__()

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

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over names, shapes and values of the frozen tensors, as 16 hexadecimal digits."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


def frozen_layers(layers: nn.ModuleList, heads: int) -> nn.ModuleList:
    """The backbone's layers as `FrozenLayer`s."""
    return nn.ModuleList(FrozenLayer(layer, heads) for layer in layers)


def fusion_layers(available: nn.ModuleList, heads: int, layers: int) -> nn.ModuleList:
    """The first 2L multimodal layers, the others are not held.

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


def demo_folder() -> Path:
    """Folder of the packaged demo backbone."""
    return Path(str(files("tap_flower.assets"))) / "flava-demo"


def locate(backbone: str) -> str:
    """What `from_pretrained` takes: the packaged folder for `demo`, otherwise the local folder or hub id itself."""
    return str(demo_folder()) if backbone == DEMO else backbone


def family(model_type: str) -> type[Backbone]:
    """The subclass for a checkpoint's `model_type`.

    Raises:
        BackboneError: the type is not supported.
    """
    from tap_flower.models.flava import FlavaBackbone

    families: dict[str, type[Backbone]] = {"flava": FlavaBackbone}
    if model_type not in families:
        raise BackboneError(f"backbone of model_type {model_type!r} is not supported: use one of {sorted(families)}")
    return families[model_type]


def from_model(model: PreTrainedModel, layers: int) -> Backbone:
    """A backbone with L fusion layers that takes over the modules of a transformers model and freezes them."""
    backbone = family(model.config.model_type)(model, layers)
    backbone.requires_grad_(False)
    return backbone.eval()


def from_config(config: PreTrainedConfig, layers: int) -> Backbone:
    """A backbone with random weights; under `torch.device("meta")` it allocates nothing."""
    from transformers import AutoModel

    return from_model(AutoModel.from_config(config), layers)  # type: ignore[no-untyped-call]


@cache
def load_backbone(name: str, layers: int) -> Backbone:
    """Loads a checkpoint, once a process.

    Args:
        name: `demo`, a local folder, or a hub id. No code from the hub is ever run.
        layers: L, the number of fusion layers of each stage.

    Raises:
        BackboneError: the checkpoint cannot be found, is of no supported family, or has too few multimodal layers.
    """
    from transformers import AutoModel

    place = locate(name)
    try:
        config = AutoConfig.from_pretrained(place, trust_remote_code=False)
        family(config.model_type)
        model = AutoModel.from_pretrained(place, trust_remote_code=False, dtype=torch.float32)
    except OSError as error:
        raise BackboneError(
            f"backbone {name!r} cannot be loaded: {str(error).splitlines()[0]} "
            f"(a local folder must hold config.json and model.safetensors; a hub id is fetched with `hf download {name}`)"
        ) from error
    return from_model(model, layers)
