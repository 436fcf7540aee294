"""A client spec makes a `Client`: its tasks with their examples, and a model over one of the backbones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import cast

import msgspec
import torch
from flwr.app import Context

from tap_flower.client.client_model import client_model, outlined
from tap_flower.client.description import DESCRIPTION, Description, StatedSettings, TaskDescription
from tap_flower.client.evaluation import TestObserver
from tap_flower.client.node import GPU_WORKERS, Node, this_node
from tap_flower.client.samples import Samples
from tap_flower.client.task import Client, Task
from tap_flower.client.text_metrics import TextMetrics
from tap_flower.config import HyperParameters, Metrics
from tap_flower.core.tasks import IMAGE_GENERATION, TASK_KINDS, TEXT_GENERATION, image_generation
from tap_flower.data.examples import Examples
from tap_flower.data.images import with_image_forms
from tap_flower.data.loading import load_client_data
from tap_flower.data.spec import ClientSpec
from tap_flower.data.text import load_tokenizer, tokenizer_hash
from tap_flower.errors import ConfigError, SpecError, StorageError
from tap_flower.files import read_json, write_json
from tap_flower.hub import locate
from tap_flower.methods.method import Method
from tap_flower.methods.session import Session
from tap_flower.models.cpu import prepare_allocation
from tap_flower.models.load import load_backbone
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
    spec, model = with_image_forms(node.spec), settings.model
    backbone = load_backbone(
        spec.backbone,
        model.layers,
        model.image_size,
        spec.revision,
        getattr(torch, settings.compute.precision.value),
        settings.compute.recompute,
        node.compile,
    )
    tokenizer = load_tokenizer(locate(spec.backbone), spec.revision)
    loaded = load_client_data(
        spec, tokenizer, model.text_length, settings.seed, node.data_root, settings.needs_validation, _workers(node)
    )
    data = cast(Mapping[str, Mapping[str, Sequence[Examples]]], loaded.splits)
    tasks = [
        Task(
            name=task.name,
            # PSNR is of pixels, as they were before the task's own normalisation.
            kind=image_generation(task.image.std) if task.kind == IMAGE_GENERATION.name else TASK_KINDS[task.kind],
            modalities=task.modalities,
            train=list(data["train"][task.name]),
            test=list(data["test"][task.name]),
            validation=list(data["validation"][task.name]) or None,
            margin=task.margin,
            batch_size=task.batch_size,
            domains=task.domains,
            head_size=len(task.classes),
            classes=task.classes,
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
        fingerprint=f"{backbone.fingerprint}-{tokenizer_hash(tokenizer)}",
        outline=partial(outlined, build),
        observe=partial(_observer, spec, node.metrics),
        describe=partial(describe, spec),
    )


def _workers(node: Node) -> int:
    if node.loader_workers is not None:
        return node.loader_workers
    # Without a GPU, training itself takes all cores. Ray gives a client's cores to torch as its threads.
    return min(GPU_WORKERS, torch.get_num_threads()) if torch.cuda.is_available() else 0


def _observer(spec: ClientSpec, metrics: Metrics, session: Session, method: Method) -> TestObserver:
    """Collects the texts that the models write, and answers to a few test items."""
    tokenizer = load_tokenizer(locate(spec.backbone), spec.revision)

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    end = tokenizer.sep_token_id
    writes = [task.name for task in spec.tasks if task.kind == TEXT_GENERATION.name]
    texts = partial(TextMetrics, writes, decode, end, meteor=metrics.meteor, bertscore=metrics.bertscore)
    return TestObserver(Samples(session, spec.tasks, decode, end, {"server", "personal", method.result}), texts)


def describe(spec: ClientSpec, folder: Path, session: Session, instruction: Instruction) -> None:
    """Writes `model.json` into the state folder of a client, unless it is there already.

    Args:
        spec: the client spec.
        folder: state folder of the client.
        session: the client at work.
        instruction: the server's, which says the run and its epochs.

    Raises:
        StorageError: the folder cannot be written.
    """
    settings = session.settings
    found = Description(
        run=instruction.run,
        epochs=instruction.epochs,
        best=instruction.best,
        client=spec.name,
        backbone=spec.backbone,
        revision=spec.revision,
        fingerprint=session.fingerprint,
        stated=StatedSettings(
            settings.method, settings.seed, asdict(settings.model), {"precision": settings.compute.precision.value}
        ),
        tasks=tuple(TaskDescription(t.name, t.kind, t.modalities, t.domains, t.classes, t.image) for t in spec.tasks),
    )
    values = msgspec.to_builtins(found)
    with suppress(StorageError):
        if read_json(folder / DESCRIPTION) == values:
            return
    write_json(folder / DESCRIPTION, values)
