"""Backbones: frozen weights of a pretrained model, and the settings that go with its family."""

from __future__ import annotations

import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cache, cached_property
from importlib.resources import files
from pathlib import Path
from typing import ClassVar, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import has_file

from tap_flower import hub
from tap_flower.models.errors import BackboneError
from tap_flower.models.experts import FrozenLayer
from tap_flower.models.lora import LoraSettings

DEMO = "demo"
log = logging.getLogger("tap_flower")


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
        image_size: side, in pixels, of the images that the checkpoint's patches are cut from.
        fusion_layers: layers for MoTE and MoME, in this order.
        recompute: gradient checkpointing: whether the backward pass computes the inside of each layer again, dropout
            included, in place of keeping it (arXiv 1604.06174).
        compiled: whether the layers are compiled (torch.compile), each kind once a process.
        parts: modality -> names of the frozen modules and buffers that it alone uses.
        attention_lora: LoRA of the fusion's query and value.
        expert_lora: LoRA of the experts.
    """

    size: int
    vocabulary: int
    text_length: int
    image_size: int
    fusion_layers: nn.ModuleList
    parts: ClassVar[Mapping[str, tuple[str, ...]]]
    attention_lora: LoraSettings
    expert_lora: LoraSettings
    recompute: bool = False
    compiled: bool = False

    def __init__(self, model: PreTrainedModel, layers: int, image_size: int | None = None) -> None:
        del layers, image_size
        super().__init__()
        self._configuration = _configuration(model.config)

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
        """Of the frozen weights; models compute in it, their trainable tensors stay float32."""
        return next(self.parameters()).dtype

    def run(self, part: Callable[..., Tensor], *arguments: object) -> Tensor:
        """Runs a part of a layer on its arguments, as the attributes say."""
        if self.compiled:
            part = _compiled(part)
        found = checkpoint(part, *arguments, use_reentrant=False) if self.recompute else part(*arguments)
        return cast(Tensor, found)

    def computing(self, dtype: torch.dtype, recompute: bool = False, compiled: bool = False) -> Backbone:
        """Sets how models over this backbone compute, and returns it; the fingerprint stays that of the checkpoint.

        Args:
            dtype: float32 or bfloat16.
            recompute: see the attribute.
            compiled: likewise.
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


@cache
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
    from tap_flower.models.vilt import ViltBackbone

    families: dict[str, type[Backbone]] = {"flava": FlavaBackbone, "vilt": ViltBackbone}
    if model_type not in families:
        raise BackboneError(f"backbone of model_type {model_type!r} is not supported: use one of {sorted(families)}")
    return families[model_type]


def from_model(model: PreTrainedModel, layers: int, image_size: int | None = None) -> Backbone:
    """A backbone with L fusion layers that takes over the modules of a transformers model and freezes them."""
    backbone = family(model.config.model_type)(model, layers, image_size)
    backbone.requires_grad_(False)
    return backbone.eval()


def from_config(config: PreTrainedConfig, layers: int, image_size: int | None = None) -> Backbone:
    """A backbone with random weights; under `torch.device("meta")` it allocates nothing."""
    from transformers import AutoModel

    model = AutoModel.from_config(config, dtype=torch.float32)
    return from_model(model, layers, image_size)


def outline(name: str, layers: int, image_size: int | None = None, revision: str | None = None) -> Backbone:
    """A checkpoint's backbone on the meta device: shapes alone, from its configuration; no weights are read or fetched.

    Takes what `load_backbone` takes.

    Raises:
        BackboneError: as `load_backbone` does.
    """
    config = _checkpoint_config(name, revision)
    try:
        held = any(has_file(locate(name), file, revision=revision) for file in _WEIGHTS)
    except OSError as error:
        raise _missing(name, revision, error) from error
    if not held:
        raise _missing(name, revision, f"it has no {SAFE_WEIGHTS_NAME}")
    with torch.device("meta"):
        return from_config(config, layers, image_size)


@cache
def load_backbone(
    name: str,
    layers: int,
    image_size: int | None = None,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    recompute: bool = False,
    compiled: bool = False,
) -> Backbone:
    """Loads a checkpoint, once a process.

    Args:
        name: `demo`, a local folder, or a hub id. No code from the hub is ever run.
        layers: L, the number of fusion layers of each stage.
        image_size: side, in pixels, of the images that the patches are cut from; by default the checkpoint's own.
        revision: commit, tag or branch of a hub id.
        dtype: see `Backbone.computing`; on a processor without bfloat16 products float32 in its place, with a warning.
        recompute: likewise.
        compiled: likewise.

    Raises:
        BackboneError: the checkpoint cannot be found, is of no supported family, or has too few multimodal layers.
    """
    from transformers import AutoModel

    _checkpoint_config(name, revision)
    try:
        model = AutoModel.from_pretrained(
            locate(name), revision=revision, trust_remote_code=False, use_safetensors=True, dtype=torch.float32
        )
    except (OSError, SafetensorError) as error:
        raise _missing(name, revision, error) from error
    if dtype is torch.bfloat16 and not bfloat16_products():
        log.warning(
            "this processor has no bfloat16 products, and would be hundreds of times slower: computing in float32"
        )
        dtype = torch.float32
    return from_model(model, layers, image_size).computing(dtype, recompute, compiled)


def bfloat16_products() -> bool:
    """Whether this machine multiplies bfloat16 matrices at speed: its GPU does, or oneDNN has kernels for its processor.

    Without either, PyTorch multiplies them element by element: 0.3 GFLOP/s where float32 reached 144 (two cores, AVX2).
    """
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported())


_WEIGHTS = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
"""Files of which a checkpoint has one; pytorch_model.bin is a pickle, and is never read."""


def _checkpoint_config(name: str, revision: str | None) -> PreTrainedConfig:
    """The configuration of a checkpoint of a supported family."""
    hub.prepare(locate(name))
    try:
        config = AutoConfig.from_pretrained(locate(name), revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _missing(name, revision, error) from error
    family(config.model_type)
    return cast(PreTrainedConfig, config)


def _missing(name: str, revision: str | None, reason: object) -> BackboneError:
    command = f"hf download {name}" + (f" --revision {revision}" if revision else "")
    return BackboneError(
        f"backbone {name!r} cannot be loaded: {str(reason).splitlines()[0]} "
        f"(a local folder must hold config.json and {SAFE_WEIGHTS_NAME}; a hub id is fetched with `{command}`; "
        f"pytorch_model.bin is a pickle and never read: AutoModel.from_pretrained(...).save_pretrained(FOLDER) converts it)"
    )
