"""The bridge to the golden vectors: the published code's names, and its two habits that stay out of the product."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tap_flower.core.components import Pair
from tap_flower.models.backbone import Backbone
from tap_flower.models.experts import AttentionLoRA
from tap_flower.models.fusion import Fusion
from tap_flower.models.lora import LoRA
from tap_flower.models.model import ModelTask, TapModel

FIRST_OR_SECOND = {"up": "0", "down": "2"}


def model_tasks(expected: Mapping[str, Any]) -> list[ModelTask]:
    """The tasks of a case, from its `expected.json`."""
    tasks = []
    for name, modalities, domain in expected["task_domain_pair"]:
        config = expected["task_configs"][name]
        what = config["modality"] if config["type"] == "generation" else modalities[0]
        tasks.append(
            ModelTask(
                pair=Pair(name, tuple(modalities)),
                kind=f"{what}_{config['type']}",
                domains=(domain,),
                classes=config.get("num_classes", 0),
                target_length=config.get("max_length", 0),
            )
        )
    return tasks


def published_name(name: str) -> str:
    """The published name of one of our trainable tensors."""
    component, _, rest = name.removeprefix("components.").partition(".")
    kind, *parts = component.split("/")
    if kind == "encoder":
        prefix = f"encoders.{parts[0]}"
        if match := re.fullmatch(r"layers\.(\d+)\.(query|value)\.([AB])", rest):
            layer, which, matrix = match.groups()
            inner = f"backbone.base_model.model.encoder.layer.{layer}.attention.attention.{which}"
            return f"{prefix}.{inner}.lora_{matrix}.default.weight"
        for ours, theirs in (
            ("adaptor.conv", "input_adaptor.1"),
            ("adaptor.mix", "input_adaptor.4"),
            ("output.proj", "proj"),
            ("output.norm", "layer_norm"),
            ("patches.A", "backbone.base_model.model.projection.lora_A.default.weight"),
            ("patches.B", "backbone.base_model.model.projection.lora_B.default.weight"),
            ("offsets.class_token", "cls_token"),
            ("offsets.positions", "position_embeddings"),
        ):
            if rest.startswith(ours):
                return f"{prefix}.{theirs}{rest.removeprefix(ours)}"
    if kind == "fusion":
        return f"fusion.{parts[0]}.{rest}"
    if kind in ("mote", "mome"):
        layer, _, tail = rest.partition(".")
        if parts[0] == "block":
            which, matrix = tail.split(".")
            return (
                f"fusion.{kind}_transformers.{parts[1]}.layers.{layer}.attention.lora_{which[0]}.lora_{matrix}.weight"
            )
        if parts[0] == "domain":
            which, linear, matrix = tail.split(".")
            inner = f"mode_{which[0]}.experts.{parts[2]}.{FIRST_OR_SECOND[linear]}.lora_{matrix}.default.weight"
            return f"fusion.{kind}_transformers.{parts[1]}.layers.{layer}.{inner}"
        linear, matrix = tail.split(".")
        inner = f"{parts[1]}.{parts[2]}.{FIRST_OR_SECOND[linear]}.lora_{matrix}.default.weight"
        return f"fusion.{kind}_experts.layer_{layer}.{inner}"
    if kind == "head":
        for ours, theirs in (
            ("positions.", "position_embeddings."),
            ("value.", "cond_attention.in_proj_"),
            ("output.", "cond_attention.out_proj."),
            ("vocabulary.", "lm_head."),
            ("proj.", "proj.0."),
        ):
            if rest.startswith(ours):
                rest = theirs + rest.removeprefix(ours)
                break
        return f"head.task_heads.{parts[0]}.{rest}"
    raise KeyError(name)


def published_value(name: str, state: Mapping[str, Tensor], backbone: Backbone) -> Tensor:
    """The value of one of our tensors in a published state.

    Of the one-key attention only the value's third is ours; of class token and positions we hold what training added to the
    checkpoint's; our LoRA of a patch convolution is a matrix.
    """
    theirs = published_name(name)
    value = state[theirs]
    if ".cond_attention.in_proj_" in theirs:
        return value.chunk(3)[2]
    if ".offsets." in name:
        return value - backbone.get_buffer(name.rpartition(".")[2])
    return value.flatten(1) if ".patches." in name else value


class PublishedFusion(Fusion):
    """Habit 1: `q' = W_copy q + LoRA(q)` without bias, then the frozen `W_q, b_q` on q'; value likewise."""

    def __init__(self, model: TapModel, state: Mapping[str, Tensor]) -> None:
        super().__init__(model.fusion.mote_layers, model.fusion.mome_layers, model.fusion.run)
        self.copies: dict[LoRA, nn.Parameter] = {}
        self.copy_names: dict[str, nn.Parameter] = {}
        for component, module in model.components.items():
            stage, *parts = component.split("/")
            if parts[0] != "block":
                continue
            for depth, block in enumerate(module):
                assert isinstance(block, AttentionLoRA)
                for which, lora in (("q", block.query), ("v", block.value)):
                    inner = f"layers.{depth}.attention.lora_{which}.base_linear.weight"
                    name = f"fusion.{stage}_transformers.{parts[1]}.{inner}"
                    self.copies[lora] = self.copy_names[name] = nn.Parameter(state[name].clone())

    def project(self, blocks: Sequence[AttentionLoRA], x: Tensor) -> Tensor:
        groups = [block.query for block in blocks], [block.value for block in blocks]
        return torch.stack(
            [
                torch.stack([self._published(lora, one) for lora, one in zip(loras, part, strict=True)])
                for loras, part in zip(groups, x, strict=True)
            ]
        )

    def _published(self, lora: LoRA, x: Tensor) -> Tensor:
        return lora.frozen(x @ self.copies[lora].T + lora.scale * x @ lora.A.T @ lora.B.T)


def published_model(backbone: Backbone, expected: Mapping[str, Any], state: Mapping[str, Tensor]) -> TapModel:
    """Our model with the published weights and the two habits."""
    model = TapModel(backbone, model_tasks(expected))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(published_value(name, state, backbone))
    model.fusion = PublishedFusion(model, state)
    for layer in backbone.fusion_layers:  # habit 2
        layer.norm_before.eps = layer.norm_after.eps = 1e-5
    return model.eval()
