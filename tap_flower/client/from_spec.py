"""What a client spec says, as what a method works with: the tasks, and a model over a backbone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tap_flower.config import Model
from tap_flower.core.components import Pair, trainable_state
from tap_flower.core.tasks import TASK_KINDS
from tap_flower.data.spec import ClientSpec
from tap_flower.errors import BackboneError
from tap_flower.methods.session import LocalTask
from tap_flower.models.backbone import Backbone
from tap_flower.models.load import outline
from tap_flower.models.model import ModelTask, TapModel


@dataclass(frozen=True)
class SpecHoldings:
    """Tasks and model of a client spec.

    Attributes:
        spec: of the client.
        backbone: shared by all clients of the process.
        text_length: longest text and longest target, in tokens.
    """

    spec: ClientSpec
    backbone: Backbone
    text_length: int

    @property
    def name(self) -> str:
        """Of the client."""
        return self.spec.name

    @property
    def fingerprint(self) -> str:
        """Of the backbone."""
        return self.backbone.fingerprint

    @property
    def tasks(self) -> Sequence[LocalTask]:
        """The tasks of the spec."""
        return [
            LocalTask(task.pair, TASK_KINDS[task.kind], task.domains, len(task.classes), task.margin)
            for task in self.spec.tasks
        ]

    def new_model(self) -> TapModel:
        """A model of the client's components; its trainable tensors have no values yet."""
        return client_model(self.backbone, self.spec, self.text_length)

    def outline(self) -> TapModel:
        """The same, without memory for any value."""
        with torch.device("meta"):
            return self.new_model()


class TaskOutline(Protocol):
    """What of a task its model depends on; see `TaskSpec`."""

    @property
    def pair(self) -> Pair: ...  # noqa: D102
    @property
    def kind(self) -> str: ...  # noqa: D102
    @property
    def domains(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def classes(self) -> tuple[str, ...]: ...  # noqa: D102


class ClientOutline(Protocol):
    """What of a client its model depends on; see `ClientSpec`."""

    @property
    def backbone(self) -> str: ...  # noqa: D102
    @property
    def tasks(self) -> Sequence[TaskOutline]: ...  # noqa: D102


def client_model(backbone: Backbone, spec: ClientOutline, text_length: int) -> TapModel:
    """A model of a client's components; its trainable tensors have no values yet.

    Args:
        backbone: of the client.
        spec: of the client, or what its folder says of it.
        text_length: longest text and longest target, in tokens.

    Raises:
        BackboneError: the backbone has no positions for texts of this length.
    """
    reads_text = any("text" in task.pair.modalities for task in spec.tasks)
    if reads_text and text_length > backbone.text_length:
        raise BackboneError(
            f"model.text_length = {text_length} is too long for backbone {spec.backbone!r}, which has positions for "
            f"{backbone.text_length} tokens: choose at most {backbone.text_length}"
        )
    return TapModel(backbone, model_tasks(spec, text_length))


def model_tasks(spec: ClientOutline, text_length: int) -> list[ModelTask]:
    """A client's tasks, as its model knows them; see `client_model`."""
    return [
        ModelTask(
            pair=task.pair,
            kind=task.kind,
            domains=task.domains,
            classes=len(task.classes),
            target_length=text_length if task.kind == "text_generation" else 0,
        )
        for task in spec.tasks
    ]


def exchanged(spec: ClientSpec, model: Model) -> dict[str, Tensor]:
    """The tensors that a client and the server send each other, without values; no weights are read for it.

    Args:
        spec: of the client.
        model: the run's.

    Raises:
        BackboneError: the client's backbone cannot be used.
    """
    backbone = outline(spec.backbone, model.layers, model.image_size, spec.revision)
    with torch.device("meta"):
        return trainable_state(client_model(backbone, spec, model.text_length))
