"""Fusion (arXiv 2509.26524): four paths of a modality-to-task (MoTE) and a task-to-modality-expert stage (MoME) each.

The components are flat and named; `paths` is the one place that says which of them a pair's stream goes through. The
model holds what `components` lists, and the forward pass takes exactly these. Letters of shapes: S paths side by side,
B examples, T tokens, D the width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from tap_flower.models.backbone import Backbone
from tap_flower.models.encoders import Projection
from tap_flower.models.experts import AttentionLoRA, DomainExperts, Expert, FrozenLayer, Run, domain_residuals
from tap_flower.models.lora import LoraSettings, lora_linears

SHARED = "shared"
SHARED_PROJECTION = "fusion/shared_proj"
MODALITY_TASK = 2
"""Position of the modality-task path in `paths`."""


@dataclass(frozen=True)
class Stage:
    """The part of a path in one stage.

    Attributes:
        name: `mote` or `mome`.
        block: whose attention and domain experts: a modality (mote), a kind of task (mome) or `shared`.
        expert: (modality, kind) in mote, (kind, modality) in mome; either may be `shared`.
    """

    name: str
    block: str
    expert: tuple[str, str]

    @property
    def block_component(self) -> str:
        """Name of the component with the block's attention LoRA."""
        return f"{self.name}/block/{self.block}"

    @property
    def expert_component(self) -> str:
        """Name of the component with the expert's LoRA."""
        return f"{self.name}/expert/{self.expert[0]}/{self.expert[1]}"

    def domain_component(self, domain: str) -> str:
        """Name of the component with the block's experts of a domain."""
        return f"{self.name}/domain/{self.block}/{domain}"


@dataclass(frozen=True)
class Path:
    """One of the four paths of a stream.

    Attributes:
        own_input: whether it starts from the stream itself (x) or from its shared projection (h).
        mote: the first stage.
        mome: the second stage.
    """

    own_input: bool
    mote: Stage
    mome: Stage


def paths(modality: str, kind: str) -> tuple[Path, Path, Path, Path]:
    """Shared-shared, shared-task, modality-task and modality-shared path for a modality and a kind of task."""
    m, o, both = modality, kind, SHARED
    return (
        Path(False, Stage("mote", both, (both, both)), Stage("mome", both, (both, both))),
        Path(False, Stage("mote", m, (both, o)), Stage("mome", o, (o, both))),
        Path(True, Stage("mote", m, (m, o)), Stage("mome", o, (o, m))),
        Path(True, Stage("mote", m, (m, both)), Stage("mome", both, (both, m))),
    )


def components(
    backbone: Backbone, modality: str, kind: str, domains: Sequence[str]
) -> dict[str, Callable[[], nn.Module]]:
    """Lists every fusion component that a modality's stream of a kind of task goes through, as name -> constructor."""
    found: dict[str, Callable[[], nn.Module]] = {SHARED_PROJECTION: partial(Projection, backbone.size)}
    for path in paths(modality, kind):
        for stage, layers in zip((path.mote, path.mome), backbone.fusion_stages, strict=True):
            found[stage.block_component] = partial(_each, AttentionLoRA, layers, backbone.attention_lora)
            found[stage.expert_component] = partial(_each, Expert, layers, backbone.expert_lora)
            for domain in domains:
                found[stage.domain_component(domain)] = partial(_each, DomainExperts, layers, backbone.expert_lora)
    return found


def _each(
    part: type[AttentionLoRA | Expert | DomainExperts], layers: Sequence[FrozenLayer], settings: LoraSettings
) -> nn.ModuleList:
    return nn.ModuleList(part(layer, settings) for layer in layers)


class Fusion:
    """The forward pass of a stream through the four paths, as one batch with stacked LoRA.

    It holds no weights of its own: the frozen layers are the backbone's, the rest are the model's components.

    Args:
        mote_layers: the backbone's multimodal layers 0 .. L-1.
        mome_layers: the backbone's multimodal layers L .. 2L-1.
        run: how each part of a layer is run: `Backbone.run`.

    Attributes:
        observe: where it is set, it is called between the two stages with (modality, kind) and the token mean [B, D] of the
            stream's modality-task path.
    """

    def __init__(self, mote_layers: Sequence[FrozenLayer], mome_layers: Sequence[FrozenLayer], run: Run) -> None:
        self.mote_layers = mote_layers
        self.mome_layers = mome_layers
        self.run = run
        self.observe: Callable[[tuple[str, str], Tensor], None] | None = None

    def __call__(
        self, held: nn.ModuleDict, x: Tensor, mask: Tensor | None, modality: str, kind: str, domain: str
    ) -> Tensor:
        """Runs one stream.

        Args:
            held: component name -> module.
            x: tokens of one modality, [B, T, D].
            mask: [B, T] bool, False at padding; None where nothing is padded.
            modality: of the stream.
            kind: kind of the task.
            domain: of the batch.

        Returns:
            Pooled features of the four paths, [4, B, D]: the mean over the tokens that are not padding.
        """
        route = paths(modality, kind)
        h = held[SHARED_PROJECTION](x)  # [B, T, D]

        # MoTE. The last two paths enter it through the same block with the same input, so one entry is enough for both.
        stages = [path.mote for path in route]
        streams = torch.stack([x if path.own_input else h for path in route[:-1]])  # [3, B, T, D]
        for depth, layer in enumerate(self.mote_layers):
            streams = self._layer(layer, depth, held, streams, mask, stages, domain)  # [4, B, T, D]
        if self.observe is not None:
            self.observe(stages[MODALITY_TASK].expert, masked_mean(streams[MODALITY_TASK][None], mask)[0])

        # MoME.
        stages = [path.mome for path in route]
        for depth, layer in enumerate(self.mome_layers):
            streams = self._layer(layer, depth, held, streams, mask, stages, domain)  # [4, B, T, D]
        return masked_mean(streams, mask)  # [4, B, D]

    def project(self, blocks: Sequence[AttentionLoRA], x: Tensor) -> Tensor:
        """Projects a stack's queries and values; the golden tests override it: [2, S, B, T, D] -> [2, S, B, T, D]."""
        return lora_linears([[b.query for b in blocks], [b.value for b in blocks]], x)

    def _layer(
        self,
        layer: FrozenLayer,
        depth: int,
        held: nn.ModuleDict,
        x: Tensor,
        mask: Tensor | None,
        stages: Sequence[Stage],
        domain: str,
    ) -> Tensor:
        """One layer: attention for each entry of the stack, then an expert for each stage: [S, B, T, D] -> [4, B, T, D]."""
        domains = [_at(held[stage.domain_component(domain)], depth) for stage in stages[: len(x)]]
        blocks = [_at(held[stage.block_component], depth) for stage in stages[: len(x)]]
        x = self.run(attention_part, self.project, layer, domains, blocks, x, mask)  # [S, B, T, D]
        if len(x) < len(stages):
            x = torch.cat([x, x[-1:]])  # from here on, the last two paths differ
        experts = [_at(held[stage.expert_component], depth) for stage in stages]
        return self.run(expert_part, layer, experts, x)


def _at(module: nn.Module, depth: int) -> nn.Module:
    return cast(nn.ModuleList, module)[depth]


def attention_part(
    project: Callable[[Sequence[AttentionLoRA], Tensor], Tensor],
    layer: FrozenLayer,
    domains: Sequence[DomainExperts],
    blocks: Sequence[AttentionLoRA],
    x: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """`n = LN1(x); q = n + E_q(n), v = n + E_v(n), k = n; x + attention(q, k, v)`: [S, B, T, D] -> [S, B, T, D].

    Args:
        project: the projections of queries and values: `Fusion.project`.
        layer: the frozen layer.
        domains: MoDE, one for each entry of the stack.
        blocks: LoRA of the attention, one for each entry of the stack.
        x: tokens, [S, B, T, D].
        mask: [B, T] bool, False at padding, or None.
    """
    n = layer.norm_before(x)  # [S, B, T, D]
    query, value = project(blocks, n + domain_residuals(layer, domains, n))  # [S, B, T, D] each
    return x + layer.attend(query, layer.key(n), value, mask)


def expert_part(layer: FrozenLayer, experts: Sequence[Expert], x: Tensor) -> Tensor:
    """`x + E(LN2(x))`, an expert for each entry of the stack: [S, B, T, D] -> [S, B, T, D]."""
    return x + layer.feed_forward(experts, layer.norm_after(x))


def masked_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over tokens: x [S, B, T, D], mask [B, T] bool -> [S, B, D], over the tokens where the mask is True."""
    if mask is None:
        return x.mean(2)
    return torch.einsum("sbtd,bt->sbd", x, mask.to(x.dtype)) / mask.sum(1, keepdim=True)
