"""A client spec makes a `Client`: its tasks with their examples, and a model over one of the backbones."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from flwr.app import Context
from torch import Tensor

from tap_flower.client.description import Description, TaskDescription, describe
from tap_flower.client.evaluation import TestObserver
from tap_flower.client.node import Node, this_node
from tap_flower.client.samples import Samples
from tap_flower.client.task import Client, Task
from tap_flower.client.text_metrics import TextMetrics
from tap_flower.config import HyperParameters, Metrics, Model
from tap_flower.core.components import trainable_state
from tap_flower.core.tasks import TASK_KINDS, TEXT_GENERATION
from tap_flower.data.loading import load_client_data
from tap_flower.data.spec import ClientSpec, TaskSpec
from tap_flower.data.texts import load_tokenizer
from tap_flower.errors import BackboneError, ConfigError, SpecError
from tap_flower.methods.method import Method
from tap_flower.methods.session import Session
from tap_flower.models.allocation import prepare_allocation
from tap_flower.models.backbones import Backbone, load_backbone, locate, outline
from tap_flower.models.model import ModelTask, TapModel
from tap_flower.wire.messages import Instruction


def client_of_node(context: Context, settings: HyperParameters) -> Client:
    """The client of this node, from its `--node-config` or a simulation's run configuration.

    Args:
        context: Flower's context of the node.
        settings: the run's hyper-parameters.

    Raises:
        SpecError: a setting of the node, or the client spec, is wrong, or does not fit its data.
        BackboneError: its backbone cannot be used.
    """
    prepare_allocation()
    try:
        node = this_node(context)
    except ConfigError as error:  # it may quote the node's own files
        raise SpecError(str(error)) from error
    return client_from_spec(node, settings)


def client_from_spec(node: Node, settings: HyperParameters) -> Client:
    """The client of a node's client spec; its backbone is shared by all clients of the process."""
    spec, model = node.spec, settings.model
    backbone = load_backbone(
        spec.backbone,
        model.layers,
        model.image_size,
        spec.revision,
        getattr(torch, settings.compute.precision.value),
        settings.compute.recompute,
        settings.compute.compile,
    )
    tokenizer = load_tokenizer(locate(spec.backbone), spec.revision)
    data = load_client_data(
        spec, tokenizer, model.text_length, settings.seed, node.data_root, settings.needs_validation
    ).splits
    tasks = [
        Task(
            name=task.name,
            kind=TASK_KINDS[task.kind],
            modalities=task.modalities,
            train=list(data["train"][task.name]),
            test=list(data["test"][task.name]),
            validation=list(data["validation"][task.name]) or None,
            margin=task.margin,
            batch_size=task.batch_size,
            domains=task.domains,
            head_size=len(task.classes),
        )
        for task in spec.tasks
    ]
    build = partial(client_model, backbone, spec, model.text_length)
    return Client(
        name=spec.name,
        model=build,
        tasks=tasks,
        state_dir=node.state_dir,
        folder=node.folder,
        fingerprint=backbone.fingerprint,
        outline=partial(_outlined, build),
        observe=partial(_observer, spec, node.metrics),
        describe=partial(_describe, spec),
    )


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
    return trainable_state(_outlined(partial(client_model, backbone, spec, model.text_length)))


def _outlined(build: partial[TapModel]) -> TapModel:
    """A model without memory for any value."""
    with torch.device("meta"):
        return build()


def _observer(spec: ClientSpec, metrics: Metrics, session: Session, method: Method) -> TestObserver:
    """Collects the texts that the models write, and answers to a few test items."""
    tokenizer = load_tokenizer(locate(spec.backbone), spec.revision)

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    end = tokenizer.sep_token_id
    writes = [task.name for task in spec.tasks if task.kind == TEXT_GENERATION.name]
    texts = partial(TextMetrics, writes, decode, end, meteor=metrics.meteor, bertscore=metrics.bertscore)
    return TestObserver(Samples(session, spec.tasks, decode, end, {"server", "personal", method.result}), texts)


def _describe(spec: ClientSpec, folder: Path, session: Session, instruction: Instruction) -> None:
    """Writes `model.json` into the client's state folder."""
    describe(folder, spec, session.fingerprint, session.settings, instruction.run, instruction.epochs, instruction.best)
