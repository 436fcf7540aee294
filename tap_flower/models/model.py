"""The model of a client: one frozen backbone and the trainable components that the client's pairs reach."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tap_flower.core.components import ComponentMap, ComponentModel, Pair
from tap_flower.core.initial import Initial, initial_values
from tap_flower.models import fusion
from tap_flower.models.backbone import Backbone
from tap_flower.models.heads import IMAGE_SIZE, ImageHead, TextHead
from tap_flower.models.lora import LoRA


@dataclass(frozen=True)
class ModelTask:
    """What the model must know of a task.

    Attributes:
        pair: name and modalities.
        kind: name of its kind.
        domains: of its data; a batch has one of them.
        classes: number of classes (classification).
        target_length: longest target in tokens (text generation).
        image_size: side of the images in pixels (image generation).
    """

    pair: Pair
    kind: str
    domains: tuple[str, ...]
    classes: int = 0
    target_length: int = 0
    image_size: int = IMAGE_SIZE


class TapModel(ComponentModel):
    """Encoders, fusion with four paths, heads. A flat set of named components makes up everything trainable.

    The inputs of a batch are `image` [B, 3, H, W] (normalised), `input_ids` [B, T] (int64), `attention_mask` [B, T]
    (0 at padding; left out where nothing is padded), `domain` (a string) and, for text generation, `target_length` (an
    int, positions to generate).

    Args:
        backbone: shared by all models of the process.
        tasks: the client's tasks.

    Attributes:
        component_map: which tensor belongs to which component, and what each pair reaches.
        initials: tensor name -> how it starts.
    """

    def __init__(self, backbone: Backbone, tasks: Sequence[ModelTask]) -> None:
        super().__init__()
        self.backbone = backbone
        self.tasks = {task.pair.task: task for task in tasks}
        self.fusion = fusion.Fusion(*backbone.fusion_stages, backbone.run)
        reach: dict[Pair, frozenset[str]] = {}
        constructors: dict[str, Callable[[], nn.Module]] = {}
        for task in tasks:
            needed = _constructors(backbone, task)
            reach[task.pair] = frozenset(needed)
            constructors |= needed
        self.components = nn.ModuleDict({name: constructors[name]() for name in sorted(constructors)})
        component_of = {
            f"components.{component}.{name}": component
            for component, module in self.components.items()
            for name, _ in module.named_parameters()
        }
        self.component_map = ComponentMap(component_of, reach)
        self.initials = {
            f"components.{component}.{name}": initial
            for component, module in self.components.items()
            for name, initial in initial_values(module, _initial).items()
        }

    def features(self, task: str, inputs: Mapping[str, Any]) -> Tensor:
        """Pooled features [B, D]: the mean over tokens that are not padding, over the paths and over the streams."""
        wanted = self.tasks[task]
        pooled = []
        for modality in wanted.pair.modalities:
            tokens, mask = self.encode(modality, inputs)  # [B, T, D], [B, T]
            stream = self.fusion(self.components, tokens, mask, modality, wanted.kind, inputs["domain"])  # [4, B, D]
            pooled.append(stream)
        return torch.cat(pooled).mean(0)  # [B, D]

    def encode(self, modality: str, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Tokens of one modality [B, T, D], and their mask [B, T] bool or None where nothing is padded."""
        encoder = self.components[f"encoder/{modality}"]
        if modality == "image":
            return encoder(self.backbone, inputs["image"], None), None
        mask = inputs["attention_mask"].bool() if "attention_mask" in inputs else None
        return encoder(self.backbone, inputs["input_ids"], mask), mask

    def forward(self, task: str, inputs: Mapping[str, Any]) -> Tensor:
        """Output of a task, float32: logits [B, C], image [B, 3, H, W] or token logits [B, target_length, V].

        Computed in the dtype of the backbone; the trainable tensors are float32 and are rounded where they are used.
        """
        head, dtype = self.components[f"head/{task}"], self.backbone.dtype
        device = next(head.parameters()).device.type
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            features = self.features(task, inputs)  # [B, D]
            output = head(features, inputs["target_length"]) if isinstance(head, TextHead) else head(features)
        return cast(Tensor, output).float()


def _constructors(backbone: Backbone, task: ModelTask) -> dict[str, Callable[[], nn.Module]]:
    """Name -> constructor of every component that a task reaches."""
    found: dict[str, Callable[[], nn.Module]] = {f"head/{task.pair.task}": lambda: _head(backbone, task)}
    for modality in task.pair.modalities:
        if modality not in backbone.encoders:
            raise ValueError(
                f"task {task.pair.task!r} has the modality {modality!r}: use one of {sorted(backbone.encoders)}"
            )
        found[f"encoder/{modality}"] = backbone.encoders[modality]
        found |= fusion.components(backbone, modality, task.kind, task.domains)
    return found


def _head(backbone: Backbone, task: ModelTask) -> nn.Module:
    if task.kind == "image_generation":
        return ImageHead(backbone.size, task.image_size)
    if task.kind == "text_generation":
        return TextHead(backbone.size, backbone.vocabulary, task.target_length)
    return backbone.classification_head(task.classes)


def _initial(part: nn.Module, name: str) -> Initial | None:
    """How a parameter starts where it differs from PyTorch's own.

    LoRA: A uniform ± 1/√in, B zero. Embedding and GPT-2's Conv1D: normal, deviation .02, and 0.
    """
    if isinstance(part, LoRA):
        return Initial("constant", 0.0) if name == "B" else Initial("uniform", 1 / math.sqrt(part.A.shape[1]))
    if isinstance(part, nn.Embedding | Conv1D):
        return Initial("constant", 0.0) if name == "bias" else Initial("normal", 0.02)
    return None
