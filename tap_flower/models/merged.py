"""A model of one task without adapters: every adapter is merged with the frozen map that it adapts.

The forward pass is that of `TapModel`. An adapter's place is taken by a dense linear map of its own, and what of the
backbone nothing reads any more is dropped, so that the model's `state_dict` is the whole network.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tap_flower.models.backbone import Backbone
from tap_flower.models.lora import LoRA
from tap_flower.models.model import ModelTask, TapModel


def merged_outline(backbone: Backbone, task: ModelTask) -> TapModel:
    """A merged model without values.

    Args:
        backbone: not shared with other models: it loses what a merged model does without. On the meta device it is enough
            to see the names.
        task: the model's only one.

    Returns:
        A model in evaluation mode; `load_state_dict` takes what `merged_state` gives.
    """
    model = TapModel(backbone, [task])
    for parent, name, adapter in list(_adapters(model)):
        _hollow(adapter.frozen)
        setattr(parent, name, nn.Linear(adapter.A.shape[1], len(adapter.B)))
    for modality, parts in backbone.parts.items():
        if modality not in task.pair.modalities:
            for part in parts:
                delattr(backbone, part)
    return model.requires_grad_(False).eval()


def merged_state(model: TapModel, outline: TapModel) -> dict[str, Tensor]:
    """The tensors of a merged model.

    Args:
        model: with adapters; it may have further tasks.
        outline: the merged model without values, which `merged_outline` makes.

    Returns:
        Name -> value on the CPU, float32; no two share memory.
    """
    held = dict(model.state_dict())
    names = {id(module): name for name, module in model.named_modules()}
    for _, _, adapter in _adapters(model):
        held |= {f"{names[id(adapter)]}.{part}": value for part, value in adapter.merged().items()}
    return {name: held[name].detach().cpu().float().clone().contiguous() for name in outline.state_dict()}


def _adapters(model: TapModel) -> Iterator[tuple[nn.Module, str, LoRA]]:
    """(parent, name in it, adapter)."""
    for parent in model.components.modules():
        for name, child in parent.named_children():
            if isinstance(child, LoRA):
                yield parent, name, child


def _hollow(frozen: nn.Module) -> None:
    """Takes the values of a frozen map away: only its adapters' merged maps are used."""
    for name in [name for name, _ in frozen.named_parameters()]:
        delattr(frozen, name)
        frozen.register_buffer(name, torch.empty(0, 0), persistent=False)
