"""From a checkpoint's name to a backbone: with its weights, as an outline of shapes, or with random weights."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from functools import lru_cache
from itertools import chain
from typing import cast

import torch
from safetensors import safe_open
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
Shapes = Mapping[str, tuple[int, ...]]
"""Name of a tensor -> its shape."""
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
        BackboneError: the checkpoint cannot be found, is of no supported family, has too few multimodal layers, or lacks
            weights that are used, or has them in other shapes than its configuration says.
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
    if dtype is torch.bfloat16 and not bfloat16_products():
        log.warning(
            "this processor has no bfloat16 products, and would be hundreds of times slower: computing in float32"
        )
        dtype = torch.float32
    return from_model(model, layers, image_size).computing(dtype, recompute, compiled)


def outline(name: str, layers: int, image_size: int | None = None, revision: str | None = None) -> Backbone:
    """Makes a checkpoint's backbone on the meta device: shapes alone, no weights are read or fetched.

    Where the checkpoint's files are on this machine, their tensors' names and shapes are compared.

    Args:
        name: `demo`, a local folder, or a hub id. No code from the hub is ever run.
        layers: L, the number of fusion layers of each stage.
        image_size: side, in pixels, of the images that the patches are cut from; by default the checkpoint's own.
        revision: commit, tag or branch of a hub id.

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
    try:
        with torch.device("meta"):
            model = AutoModel.from_config(config, dtype=torch.float32)
            expected = dict(model.named_parameters())
            backbone = from_model(model, layers, image_size)
    except BackboneError:
        raise
    except Exception as error:  # whatever transformers' modules raise on sizes that do not fit together
        reason = str(error).strip().partition("\n")[0]
        raise BackboneError(f"backbone {name!r} has a config.json of which no model can be made: {reason}") from error
    stored = _stored(name, revision)
    if stored is not None:
        kept = {id(tensor) for tensor in chain(backbone.parameters(), backbone.buffers())}
        used = {
            key: tuple(tensor.shape) for key, tensor in expected.items() if id(tensor) in kept or key in backbone.copied
        }
        check_weights(name, stored, used)
    return backbone


def check_weights(name: str, stored: Shapes, used: Shapes) -> None:
    """Compares the tensors of a checkpoint's files with those that a backbone uses.

    Args:
        name: of the checkpoint.
        stored: what the files hold.
        used: what the backbone is made of.

    Raises:
        BackboneError: some are missing, or have another shape.
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
    if wrong := [key for key, shape in used.items() if there[key] != shape]:
        raise BackboneError(
            f"backbone {name!r} has {len(wrong)} weights of other shapes than its config.json says, such as {wrong[0]!r} "
            f"{list(there[wrong[0]])} in place of {list(used[wrong[0]])}: give it the config.json that belongs to it"
        )


def _stored(name: str, revision: str | None) -> Shapes | None:
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
        found: dict[str, tuple[int, ...]] = {}
        for file in files:
            if file is None:
                return None
            with safe_open(file, framework="pt") as tensors:
                found |= {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
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
