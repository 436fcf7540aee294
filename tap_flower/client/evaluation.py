"""Clients that a client spec describes, over one of the backbones: the handlers of tap-flower's own ClientApp."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from flwr.app import Context

from tap_flower.client.description import describe
from tap_flower.client.from_spec import SpecHoldings
from tap_flower.client.handlers import Handlers, Opened
from tap_flower.client.node import this_node
from tap_flower.client.samples import Samples
from tap_flower.client.text_metrics import TextMetrics
from tap_flower.config import HyperParameters, Metrics, hyper_parameters
from tap_flower.core.components import ComponentModel
from tap_flower.core.tasks import TEXT_GENERATION
from tap_flower.core.training import Observer
from tap_flower.data.loading import load_client_data
from tap_flower.data.spec import ClientSpec, SpecError
from tap_flower.data.texts import load_tokenizer
from tap_flower.errors import ConfigError
from tap_flower.methods.method import Method
from tap_flower.methods.session import LocalClient
from tap_flower.models.allocation import prepare_allocation
from tap_flower.models.backbones import load_backbone, locate
from tap_flower.wire.messages import Instruction

DEPLOYED = "client-spec"
"""A setting that a deployed node has, and a simulated one has not."""


def open_client(context: Context, instruction: Instruction) -> Opened:
    """The client of this node.

    Raises:
        SpecError: a setting of the node, or the client spec, is wrong.
        BackboneError: its backbone cannot be used.
        ConfigError: a hyper-parameter that the server sent is out of bounds.
    """
    try:
        node = this_node(context, instruction.run)
    except ConfigError as error:
        raise SpecError(str(error)) from error
    local = _local_client(
        node.spec, node.data_root, json.dumps(instruction.hyper_parameters, sort_keys=True), node.compile
    )
    return Opened(
        local,
        node.folder,
        partial(SpecWitness.of, local, node.spec, node.metrics),
        partial(
            describe,
            node.folder,
            node.spec,
            local.holdings.fingerprint,
            local.settings,
            instruction.run,
            instruction.best,
        ),
    )


HANDLERS = Handlers(open_client, lambda context: DEPLOYED not in context.node_config)


@dataclass
class SpecWitness:
    """Gathers what the models make of a few test items, and the metrics of the texts that they write.

    Attributes:
        gathered: the items.
        new_texts: makes what takes in the texts of one model.
        texts: of the model under evaluation.
    """

    gathered: Samples
    new_texts: Callable[[], TextMetrics]
    texts: TextMetrics = field(init=False)

    @classmethod
    def of(cls, local: LocalClient, spec: ClientSpec, metrics: Metrics, method: Method) -> SpecWitness:
        """The witness of a client's evaluation."""
        tokenizer = load_tokenizer(locate(spec.backbone), spec.revision)

        def decode(ids: list[int]) -> str:
            return str(tokenizer.decode(ids, skip_special_tokens=True))

        end = tokenizer.sep_token_id
        writes = [task.name for task in spec.tasks if task.kind == TEXT_GENERATION.name]
        texts = partial(TextMetrics, writes, decode, end, meteor=metrics.meteor, bertscore=metrics.bertscore)
        return cls(Samples(local, spec.tasks, decode, end, {"server", "personal", method.result}), texts)

    @property
    def samples(self) -> dict[str, Any]:
        """What the models made of a few test items."""
        return self.gathered.tasks

    def begin(self, name: str, model: ComponentModel) -> Observer:
        """Takes in the few items; what is to be shown the batches of the model's evaluation."""
        self.gathered.add(name, model)
        self.texts = self.new_texts()
        return self.texts.observe

    def metrics(self) -> dict[str, dict[str, float]]:
        """Task name -> metrics of the texts that the model wrote."""
        return self.texts.metrics()


@cache
def _local_client(spec: ClientSpec, data_root: str, settings: str, compiled: bool) -> LocalClient:
    """A client with its data and backbone, once a process: in a simulation an actor serves many messages."""
    prepare_allocation()
    parameters: HyperParameters = hyper_parameters(json.loads(settings))
    model = parameters.model
    backbone = load_backbone(
        spec.backbone,
        model.layers,
        model.image_size,
        spec.revision,
        getattr(torch, parameters.compute.precision.value),
        parameters.compute.recompute,
        compiled,
    )
    data = load_client_data(
        spec,
        load_tokenizer(locate(spec.backbone), spec.revision),
        model.text_length,
        parameters.seed,
        data_root,
        parameters.needs_validation,
    )
    return LocalClient(SpecHoldings(spec, backbone, model.text_length), data, parameters)
