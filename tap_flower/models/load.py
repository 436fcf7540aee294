"""From a checkpoint's name to a backbone: with its weights, as an outline of shapes, or with random weights."""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import cast

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import has_file

from tap_flower import hub
from tap_flower.errors import BackboneError
from tap_flower.hub import locate
from tap_flower.models.backbone import Backbone
from tap_flower.models.flava import FlavaBackbone
from tap_flower.models.vilt import ViltBackbone

_FAMILIES: dict[str, type[FlavaBackbone | ViltBackbone]] = {"flava": FlavaBackbone, "vilt": ViltBackbone}
_WEIGHTS = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
"""Files of which a checkpoint has one; pytorch_model.bin is a pickle, and is never read."""
log = logging.getLogger("tap_flower")


@lru_cache(maxsize=4)
def load_backbone(
    name: str,
    layers: int,
    image_size: int | None = None,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    recompute: bool = False,
    compiled: bool = False,
) -> Backbone:
    """Loads a checkpoint; the process keeps the last four that it loaded, and shares them.

    Args:
        name: `demo`, a local folder, or a hub id. No code from the hub is ever run.
        layers: L, the number of fusion layers of each stage.
        image_size: side, in pixels, of the images that the patches are cut from; by default the checkpoint's own.
        revision: commit, tag or branch of a hub id.
        dtype: float32 or bfloat16, of the frozen weights and of the computation. On a processor without bfloat16 products
            float32 takes its place, with a warning.
        recompute: gradient checkpointing: less memory, more time.
        compiled: torch.compile. It starts a compiler on this machine, so this machine's owner decides.

    Raises:
        BackboneError: the checkpoint cannot be found, is of no supported family, or has too few multimodal layers.
    """
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


def outline(name: str, layers: int, image_size: int | None = None, revision: str | None = None) -> Backbone:
    """Makes a checkpoint's backbone on the meta device: shapes alone, no weights are read or fetched.

    Args:
        name: `demo`, a local folder, or a hub id. No code from the hub is ever run.
        layers: L, the number of fusion layers of each stage.
        image_size: side, in pixels, of the images that the patches are cut from; by default the checkpoint's own.
        revision: commit, tag or branch of a hub id.

    Raises:
        BackboneError: the checkpoint cannot be found, is of no supported family, or has too few multimodal layers.
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


def from_config(config: PreTrainedConfig, layers: int, image_size: int | None = None) -> Backbone:
    """Makes a backbone with random weights and L fusion layers; under `torch.device("meta")` it allocates nothing."""
    return from_model(AutoModel.from_config(config, dtype=torch.float32), layers, image_size)


def from_model(model: PreTrainedModel, layers: int, image_size: int | None = None) -> Backbone:
    """Makes a backbone with L fusion layers, which takes over the modules of a transformers model and freezes them."""
    backbone = _family(model.config)(model, layers, image_size)
    backbone.requires_grad_(False)
    return backbone.eval()


def bfloat16_products() -> bool:
    """Whether this machine multiplies bfloat16 matrices at speed: its GPU does, or oneDNN has kernels for its processor.

    Without either, PyTorch multiplies them element by element: 0.3 GFLOP/s where float32 reached 144 (two cores, AVX2).
    """
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _family(config: PreTrainedConfig) -> type[FlavaBackbone | ViltBackbone]:
    """The subclass of `Backbone` for a checkpoint."""
    if config.model_type not in _FAMILIES:
        raise BackboneError(
            f"backbone of model_type {config.model_type!r} is not supported: use one of {sorted(_FAMILIES)}"
        )
    return _FAMILIES[config.model_type]


def _checkpoint_config(name: str, revision: str | None) -> PreTrainedConfig:
    """The configuration of a checkpoint of a supported family."""
    hub.prepare(locate(name))
    try:
        config = AutoConfig.from_pretrained(locate(name), revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _missing(name, revision, error) from error
    _family(config)
    return cast(PreTrainedConfig, config)


def _missing(name: str, revision: str | None, reason: object) -> BackboneError:
    command = f"hf download {name}" + (f" --revision {revision}" if revision else "")
    return BackboneError(
        f"backbone {name!r} cannot be loaded: {str(reason).splitlines()[0]} "
        f"(a local folder must hold config.json and {SAFE_WEIGHTS_NAME}; a hub id is fetched with `{command}`; "
        f"pytorch_model.bin is a pickle and never read: AutoModel.from_pretrained(...).save_pretrained(FOLDER) converts it)"
    )
