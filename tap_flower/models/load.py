"""From a checkpoint's name to a backbone: with its weights, as an outline of shapes, or with random weights."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from functools import lru_cache
from itertools import chain
from typing import NamedTuple, cast

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, has_file

from tap_flower import hub
from tap_flower.errors import BackboneError
from tap_flower.hub import locate
from tap_flower.models.backbone import Backbone
from tap_flower.models.flava import FlavaBackbone
from tap_flower.models.vilt import ViltBackbone

_FAMILIES: dict[str, type[FlavaBackbone | ViltBackbone]] = {"flava": FlavaBackbone, "vilt": ViltBackbone}
_WEIGHTS = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
"""Files of which a checkpoint has one; pytorch_model.bin is a pickle, and is never read."""
_PREFIXES = r"^(?:module\.|model\.|base_model\.model\.|flava\.|vilt\.)+"
"""What wrappers (DataParallel, PEFT, a model with heads) put before the names of a checkpoint's tensors: it is taken off."""
_DTYPES = {"F16", "BF16", "F32", "F64"}
"""Dtypes of weights in a file; others are those of a quantised checkpoint, whose values mean nothing without its scales."""
log = logging.getLogger("tap_flower")


class StoredTensor(NamedTuple):
    """A tensor of a safetensors file: its shape, and its dtype as the file names it."""

    shape: tuple[int, ...]
    dtype: str


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
        BackboneError: the checkpoint cannot be found, is of no supported family or quantised, has too few multimodal
            layers, or lacks weights that are used, or has them in other shapes than its configuration says, or with values
            that are not finite.
    """
    outline(name, layers, image_size, revision)
    try:
        model = AutoModel.from_pretrained(
            locate(name),
            config=_checkpoint_config(name, revision),
            revision=revision,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
            key_mapping={_PREFIXES: ""},
        )
    except Exception as error:  # whatever transformers, safetensors and the hub's library raise
        raise _missing(name, revision, error) from error
    weights = dict(model.named_parameters())
    backbone = from_model(model, layers, image_size)
    _check_values(name, _used(weights, backbone))
    if dtype is torch.bfloat16 and not bfloat16_products():
        log.warning(
            "this processor has no bfloat16 products, and would be hundreds of times slower: computing in float32"
        )
        dtype = torch.float32
    return backbone.computing(dtype, recompute, compiled)


def outline(name: str, layers: int, image_size: int | None = None, revision: str | None = None) -> Backbone:
    """Makes a checkpoint's backbone on the meta device: shapes alone, no weights are read or fetched.

    Where the checkpoint's files are on this machine, their tensors' names, shapes and dtypes are compared.

    Args:
        name: `demo`, a local folder, or a hub id. No code from the hub is ever run.
        layers: L, the number of fusion layers of each stage.
        image_size: side, in pixels, of the images that the patches are cut from; by default the checkpoint's own.
        revision: commit, tag or branch of a hub id.

    Raises:
        BackboneError: as `load_backbone` does, but for values.
    """
    config = _checkpoint_config(name, revision)
    try:
        held = any(has_file(locate(name), file, revision=revision) for file in _WEIGHTS)
    except OSError as error:
        raise _missing(name, revision, error) from error
    if not held:
        raise _missing(name, revision, f"it has no {SAFE_WEIGHTS_NAME}")
    try:
        with torch.device("meta"):
            model = AutoModel.from_config(config, dtype=torch.float32)
            expected = dict(model.named_parameters())
            backbone = from_model(model, layers, image_size)
    except BackboneError:
        raise
    except Exception as error:  # whatever transformers' modules raise on sizes that do not fit together
        reason = str(error).strip().partition("\n")[0]
        if isinstance(error, KeyError):  # an activation, say
            reason = f"transformers knows no {reason}"
        raise BackboneError(f"backbone {name!r} has a config.json of which no model can be made: {reason}") from error
    stored = _stored(name, revision)
    if stored is not None:
        _check_files(name, stored, _used(expected, backbone))
    return backbone


def _used(weights: Mapping[str, Tensor], backbone: Backbone) -> dict[str, Tensor]:
    """Those of a checkpoint's tensors that a backbone is made of."""
    kept = {id(tensor) for tensor in chain(backbone.parameters(), backbone.buffers())}
    return {key: tensor for key, tensor in weights.items() if id(tensor) in kept or key in backbone.copied}


def _check_files(name: str, stored: Mapping[str, StoredTensor], used: Mapping[str, Tensor]) -> None:
    """Compares the tensors of a checkpoint's files with those that a backbone uses.

    Raises:
        BackboneError: some are missing, have another shape, or are quantised.
    """
    legacy = {".gamma": ".weight", ".beta": ".bias"}
    there = {re.sub(r"\.(gamma|beta)$", lambda m: legacy[m[0]], re.sub(_PREFIXES, "", k)): s for k, s in stored.items()}
    if lacking := [key for key in used if key not in there]:
        others = [key for key in stored if re.sub(_PREFIXES, "", key) not in used]
        instead = f", and has {len(others)} that are not used, such as {others[0]!r}" if others else ""
        raise BackboneError(
            f"backbone {name!r} lacks {len(lacking)} of the {len(used)} weights that are used, such as {lacking[0]!r}"
            f"{instead}: save the whole model under the names of its own class (`save_pretrained`)"
        )
    if wrong := [key for key, tensor in used.items() if there[key].shape != tuple(tensor.shape)]:
        raise BackboneError(
            f"backbone {name!r} has {len(wrong)} weights of other shapes than its config.json says, such as {wrong[0]!r} "
            f"{list(there[wrong[0]].shape)} in place of {list(used[wrong[0]].shape)}: give it the config.json that belongs "
            f"to it"
        )
    if packed := [key for key in used if there[key].dtype not in _DTYPES]:
        raise _quantised(name, f"{packed[0]!r} is stored as {there[packed[0]].dtype}")


def _check_values(name: str, used: Mapping[str, Tensor]) -> None:
    """Refuses weights that are NaN or infinite, with which every loss would be."""
    if broken := [key for key, tensor in used.items() if not bool(tensor.isfinite().all())]:
        raise BackboneError(
            f"backbone {name!r} has {len(broken)} weights that are NaN or infinite in float32, such as {broken[0]!r}: get "
            f"the checkpoint again, or one of an earlier step of its training"
        )


def _quantised(name: str, reason: str) -> BackboneError:
    return BackboneError(f"backbone {name!r} is quantised ({reason}): give the checkpoint that it was made from")


def _stored(name: str, revision: str | None) -> dict[str, StoredTensor] | None:
    """The tensors in a checkpoint's files, without reading their values; None where they are not on this machine yet."""

    def path(file: str) -> str | None:
        found: str | None = cached_file(
            locate(name),
            file,
            revision=revision,
            local_files_only=True,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return found

    try:
        files = [path(SAFE_WEIGHTS_NAME)]
        if files == [None] and (index := path(SAFE_WEIGHTS_INDEX_NAME)):
            with open(index, encoding="utf-8") as listing:  # noqa: PTH123
                files = [path(file) for file in sorted(set(json.load(listing)["weight_map"].values()))]
        found: dict[str, StoredTensor] = {}
        for file in files:
            if file is None:
                return None
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118
                    tensor = tensors.get_slice(key)
                    found[key] = StoredTensor(tuple(tensor.get_shape()), tensor.get_dtype())
    except Exception as error:  # a damaged file: whatever safetensors and json raise
        raise _missing(name, revision, error) from error
    return found


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
    hub.check_folder(locate(name))
    hub.prepare(locate(name))
    try:
        config = AutoConfig.from_pretrained(locate(name), revision=revision, trust_remote_code=False)
    except Exception as error:  # whatever transformers and the hub's library raise on what is no configuration
        raise _missing(name, revision, error) from error
    _family(config)
    if getattr(config, "quantization_config", None):
        raise _quantised(name, "its config.json has a quantization_config")
    for part in (config, getattr(config, "image_config", config)):
        for key in ("image_size", "patch_size"):
            sides = getattr(part, key, None)
            if isinstance(sides, list | tuple):
                if len(set(sides)) != 1 or not isinstance(sides[0], int):
                    raise BackboneError(
                        f"backbone {name!r} has {key} = {list(sides)} in config.json: use one that is square"
                    )
                setattr(part, key, sides[0])
    return cast(PreTrainedConfig, config)


def _missing(name: str, revision: str | None, reason: object) -> BackboneError:
    command = f"tap-flower fetch {name}" + (f" --revision {revision}" if revision else "")
    return BackboneError(
        f"backbone {name!r} cannot be loaded: {(str(reason) or type(reason).__name__).splitlines()[0]} "
        f"(a local folder must hold config.json and {SAFE_WEIGHTS_NAME}; a hub id is fetched with `{command}`; "
        f"pytorch_model.bin is a pickle and never read: the same command converts it once)"
    )
