"""A client of a preset's pattern with random weights and made-up data: nothing is downloaded or read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import cast

import torch
from torch import Tensor
from transformers import FlavaConfig, PreTrainedConfig, ViltConfig

from tap_flower.config import HyperParameters, client_specs, load_config
from tap_flower.core.tasks import TASK_KINDS, TEXT_GENERATION
from tap_flower.core.training import Batch
from tap_flower.data.batching import ClientData
from tap_flower.data.spec import ClientSpec, TaskSpec
from tap_flower.methods.session import Session
from tap_flower.methods.session_task import SessionTask
from tap_flower.models.backbone import Backbone
from tap_flower.models.heads import IMAGE_SIZE
from tap_flower.models.load import from_config
from tap_flower.models.model import ModelTask, TapModel

_TINY = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 256, "num_hidden_layers": 8}


def configuration(model: str, size: str) -> PreTrainedConfig:
    """The configuration of a checkpoint: `base` is that of the paper's, `tiny` has 64 dimensions."""
    if model == "vilt":
        return ViltConfig(**_TINY) if size == "tiny" else ViltConfig()
    if size == "base":
        return FlavaConfig()
    part = _TINY | {"num_hidden_layers": 3}
    return FlavaConfig(image_config=part, text_config=part, multimodal_config=part, hidden_size=64)


def client(
    model: str,
    size: str,
    pattern: int,
    batch_size: int,
    length: int,
    dtype: torch.dtype = torch.float32,
    recompute: bool = False,
    device: torch.device = torch.device("cpu"),  # noqa: B008
) -> Session:
    """The client of a pattern, of the first group, with the preset's hyper-parameters.

    Args:
        model: `flava` or `vilt`, the name of a preset.
        size: see `configuration`.
        pattern: 0 to 9.
        batch_size: examples in a batch.
        length: of all texts, in tokens; the longest that the backbone has positions for, where that is less.
        dtype: of the computation.
        recompute: see `Backbone`.
        device: where the client's models compute.
    """
    config = load_config(model, settings=[f"train.batch_size={batch_size}"])
    spec = client_specs(config)[pattern]
    backbone = from_config(configuration(model, size), config.model.layers, config.model.image_size)
    backbone.computing(dtype, recompute)
    data = cast(ClientData, MadeUpData(spec, backbone, min(length, backbone.text_length)))
    return session_of(spec, backbone, data, config, device)


def session_of(
    spec: ClientSpec, backbone: Backbone, data: ClientData, settings: HyperParameters, device: torch.device
) -> Session:
    """The client of a client spec over any backbone. It needs no Flower, as `client.from_spec` does.

    Args:
        spec: names the client and its tasks.
        backbone: of its models.
        data: its examples.
        settings: the run's hyper-parameters.
        device: where its models compute.
    """
    tasks = [SessionTask(task.pair, TASK_KINDS[task.kind], task.domains, len(task.classes)) for task in spec.tasks]
    lengths = {TEXT_GENERATION.name: settings.model.text_length}
    model_tasks = [
        ModelTask(task.pair, task.kind, task.domains, len(task.classes), lengths.get(task.kind, 0))
        for task in spec.tasks
    ]
    build = partial(TapModel, backbone, model_tasks)
    with torch.device("meta"):
        outline = build()
    return Session(spec.name, tasks, build, outline, data, settings, "random-weights", device)


def backbone_of(local: Session) -> Backbone:
    """The backbone that all models of a client share."""
    return cast(TapModel, local.outline).backbone


def specs_of(local: Session) -> tuple[TaskSpec, ...]:
    """The tasks of a client that `client` made."""
    return cast(MadeUpData, local.data).spec.tasks


class MadeUpData:
    """Random examples of a client's tasks, in turns.

    Args:
        spec: of the client.
        backbone: whose tokens the texts are made of.
        length: of all texts, in tokens.
    """

    def __init__(self, spec: ClientSpec, backbone: Backbone, length: int) -> None:
        self.spec, self.vocabulary, self.length = spec, backbone.vocabulary, length

    def batch(self, task: TaskSpec, batch_size: int, random: torch.Generator, device: torch.device) -> Batch:
        """One batch of a task."""
        inputs: dict[str, str | int | Tensor] = {"domain": task.domain or task.domains[0]}
        if "image" in task.roles:
            inputs["image"] = torch.randn(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, generator=random).to(device)
        if "text" in task.roles:
            inputs["input_ids"] = self._tokens(batch_size, random, device)
        if "label" in task.roles:
            target = torch.randint(len(task.classes), (batch_size,), generator=random).to(device)
        elif "target" in task.roles:
            target = self._tokens(batch_size, random, device)
            inputs["target_length"] = self.length
        else:
            target = cast(Tensor, inputs["image"])
        return Batch(task.name, inputs, target)

    def training_batches(
        self, batch_size: int, seed: int, device: torch.device, group_by_length: bool = False, count: int = 0
    ) -> Iterator[Batch]:
        """Endless batches, as `ClientData.training_batches` gives them."""
        del group_by_length, count  # all are of one length, and there is no end of them
        random = torch.Generator().manual_seed(seed)
        while True:
            for task in self.spec.tasks:
                yield self.batch(task, batch_size, random, device)

    def sizes(self, split: str) -> Mapping[str, int]:
        """As `ClientData.sizes`; made-up data have no end."""
        del split
        return {task.name: 1 for task in self.spec.tasks}

    def _tokens(self, batch_size: int, random: torch.Generator, device: torch.device) -> Tensor:
        return torch.randint(self.vocabulary, (batch_size, self.length), generator=random).to(device)
