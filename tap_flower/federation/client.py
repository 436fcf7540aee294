"""The client's handlers: one for each message of the protocol."""

from __future__ import annotations

import json
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from flwr.app import Context, Error, Message, RecordDict

from tap_flower.config import ConfigError, HyperParameters, Metrics, ReplacementEvidence, hyper_parameters
from tap_flower.core.tasks import TEXT_GENERATION
from tap_flower.core.training import DivergedError
from tap_flower.data.loading import ClientData
from tap_flower.data.spec import ClientSpec, SpecError
from tap_flower.data.texts import load_tokenizer
from tap_flower.federation import messages
from tap_flower.federation.messages import Instruction, Manifest, MessageError, Report, TaskInfo, TensorInfo
from tap_flower.federation.node import this_node
from tap_flower.federation.store import ClientStore, Kept
from tap_flower.methods import tap
from tap_flower.methods.local import LocalClient, State
from tap_flower.models.backbones import BackboneError, load_backbone, locate
from tap_flower.storage import StorageError
from tap_flower.text_metrics import TextMetrics

REFUSED = 1001
"""Error code of a reply whose reason is meant for the person who runs the server or the node."""


@dataclass(frozen=True)
class Participant:
    """A client that has received an instruction."""

    local: LocalClient
    store: ClientStore
    instruction: Instruction
    metrics: Metrics


def manifest(message: Message, context: Context) -> Message:
    """`query.manifest`: who the client is, what it has, which tensors it holds."""
    return _answer(message, context, _manifest)


def train(message: Message, context: Context) -> Message:
    """`train`: one participation in stage 1."""
    return _answer(message, context, _train)


def distill(message: Message, context: Context) -> Message:
    """`train.distill`: stage 2."""
    return _answer(message, context, _distill)


def evaluate(message: Message, context: Context) -> Message:
    """`evaluate`: the metrics of every model that the client has, on its test data."""
    return _answer(message, context, _evaluate)


def _answer(message: Message, context: Context, handler: Callable[[Participant, Message], RecordDict]) -> Message:
    """Runs a handler; what goes wrong in a way that somebody can mend is answered in plain words."""
    try:
        return Message(handler(_participant(message, context), message), reply_to=message)
    except (BackboneError, ConfigError, DivergedError, MessageError, SpecError, StorageError) as error:
        return Message(Error(REFUSED, str(error)), reply_to=message)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        traceback.print_exc()
        return Message(Error(REFUSED, f"unexpected {type(error).__name__} at {where}: {error}"), reply_to=message)


def _manifest(participant: Participant, _: Message) -> RecordDict:
    local = participant.local
    model = local.new_model()
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    component_map = model.component_map
    examples = local.data.sizes("train")
    return messages.encode_manifest(
        Manifest(
            client=local.spec.name,
            fingerprint=local.backbone.fingerprint,
            tasks=tuple(
                TaskInfo(task.pair, task.kind, task.domains, len(task.classes), examples[task.name])
                for task in local.spec.tasks
            ),
            tensors={
                name: TensorInfo(component_map.component_of[name], shape, model.initials[name])
                for name, shape in shapes.items()
            },
            reach={pair.task: components for pair, components in component_map.reach.items()},
        )
    )


def _train(participant: Participant, message: Message) -> RecordDict:
    server_round = participant.instruction.server_round
    kept = participant.store.load(before_round=server_round)
    received = messages.decode_tensors(message.content)
    result = tap.participate(participant.local, server_round, received, None if kept is None else kept.personal)
    replaced = {decision.pair.task: int(decision.replaced) for decision in result.decisions}
    counts = Counter(replaced) + (Counter() if kept is None else kept.replacements)
    participant.store.save(Kept(server_round, result.personal, counts))
    report = Report(server_round, participant.local.data.sizes("train"), result.losses, replaced)
    return messages.encode_report(report, result.server_copy)


def _distill(participant: Participant, message: Message) -> RecordDict:
    kept = participant.store.load()
    received = messages.decode_tensors(message.content)
    result = tap.second_stage(participant.local, received, None if kept is None else kept.personal)
    participant.store.save_second_stage(result)
    examples = participant.local.data.sizes("train")
    return messages.encode_report(Report(participant.instruction.server_round, examples, result.losses, {}))


def _evaluate(participant: Participant, message: Message) -> RecordDict:
    local = participant.local
    # A client that was never sampled has no personal model yet: it is evaluated with the initial values.
    models: dict[str, State | None] = {"server": messages.decode_tensors(message.content), "personal": None}
    models |= participant.store.models()
    metrics: messages.Metrics = {task.name: {} for task in local.spec.tasks}
    tokenizer = load_tokenizer(locate(local.spec.backbone), local.spec.revision)

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    for name, state in models.items():
        texts = TextMetrics(
            [task.name for task in local.spec.tasks if task.kind == TEXT_GENERATION.name],
            decode,
            tokenizer.sep_token_id,
            meteor=participant.metrics.meteor,
            bertscore=participant.metrics.bertscore,
        )
        found, of_texts = local.evaluate(local.model(state), "test", texts.observe), texts.metrics()
        for task, values in found.items():
            metrics[task][name] = values | of_texts.get(task, {})
    return messages.encode({"metrics": metrics})


def _participant(message: Message, context: Context) -> Participant:
    instruction = messages.instruction(message)
    node = this_node(context)
    settings = json.dumps(instruction.hyper_parameters, sort_keys=True)
    local = _local_client(node.spec, node.data_root, settings)
    return Participant(local, ClientStore(node.folder, instruction.run), instruction, node.metrics)


@cache
def _local_client(spec: ClientSpec, data_root: str, settings: str) -> LocalClient:
    """A client with its data and backbone, once a process: in a simulation an actor serves many messages."""
    parameters: HyperParameters = hyper_parameters(json.loads(settings))
    model = parameters.model
    backbone = load_backbone(
        spec.backbone,
        model.layers,
        model.image_size,
        spec.revision,
        getattr(torch, parameters.compute.precision.value),
        parameters.compute.recompute,
        parameters.compute.compile,
    )
    data = ClientData(
        spec,
        load_tokenizer(locate(spec.backbone), spec.revision),
        model.text_length,
        parameters.seed,
        data_root,
        hold_out=parameters.replacement.evidence is ReplacementEvidence.validation,
    )
    return LocalClient(spec, data, backbone, parameters)
