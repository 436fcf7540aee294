"""A client's model over a backbone, from its client spec or from the description in its state folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from tap_flower.client.description import Description, TaskDescription
from tap_flower.config import Model
from tap_flower.core.components import trainable_state
from tap_flower.core.tasks import TEXT_GENERATION
from tap_flower.data.spec import ClientSpec, TaskSpec
from tap_flower.errors import BackboneError
from tap_flower.models.backbone import Backbone
from tap_flower.models.heads import IMAGE_SIZE
from tap_flower.models.load import outline
from tap_flower.models.model import ModelTask, TapModel


def client_model(backbone: Backbone, client: ClientSpec | Description, text_length: int) -> TapModel:
    """A model of a client's components; its trainable tensors have no values yet.

    Args:
        backbone: backbone of the client.
        client: the client spec, or the description in the client's state folder.
        text_length: longest text and longest target, in tokens.

    Raises:
        BackboneError: the backbone has no positions for texts of this length.
    """
    tasks: Sequence[TaskSpec | TaskDescription] = client.tasks
    reads_text = any("text" in task.modalities for task in tasks)
    if reads_text and text_length > backbone.text_length:
        raise BackboneError(
            f"model.text_length = {text_length} is too long for backbone {client.backbone!r}, which has positions for "
            f"{backbone.text_length} tokens: choose at most {backbone.text_length}"
        )
    return TapModel(backbone, [model_task(task, text_length) for task in tasks])


def model_task(task: TaskSpec | TaskDescription, text_length: int) -> ModelTask:
    """A task as the model knows it; see `client_model`."""
    return ModelTask(
        pair=task.pair,
        kind=task.kind,
        domains=task.domains,
        classes=len(task.classes),
        target_length=text_length if task.kind == TEXT_GENERATION.name else 0,
        image_size=task.image.size or IMAGE_SIZE,
    )


def exchanged(spec: ClientSpec, model: Model) -> dict[str, Tensor]:
    """The tensors that a client and the server exchange, without values; no weights are read for it.

    Args:
        spec: the client spec.
        model: shape of the run's models.

    Raises:
        BackboneError: the client's backbone cannot be used.
    """
    backbone = outline(spec.backbone, model.layers, model.image_size, spec.revision)
    return trainable_state(outlined(partial(client_model, backbone, spec, model.text_length)))


def outlined(build: Callable[[], TapModel]) -> TapModel:
    """A model whose tensors are without memory."""
    with torch.device("meta"):
        return build()
