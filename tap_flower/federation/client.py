"""The client's handlers: one for each message of the protocol."""

from __future__ import annotations

import json
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from flwr.app import Context, Error, Message, RecordDict

from tap_flower.config import ConfigError, HyperParameters, Metrics, client_specs, hyper_parameters, read_yaml
from tap_flower.core.tasks import TEXT_GENERATION
from tap_flower.core.training import DivergedError
from tap_flower.data.loading import ClientData, load_tokenizer
from tap_flower.data.spec import ClientSpec, SpecError, client_spec
from tap_flower.federation import messages
from tap_flower.federation.messages import Instruction, Manifest, MessageError, Report, TaskInfo, TensorInfo
from tap_flower.federation.run_config import simulated_run
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
                TaskInfo(task.pair, task.kind, task.domain, len(task.classes), examples[task.name])
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
    tokenizer = load_tokenizer(locate(local.spec.backbone))

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
    spec, folder = _identity(context)
    settings = json.dumps(instruction.hyper_parameters, sort_keys=True)
    store = ClientStore(folder, instruction.run)
    return Participant(_local_client(_Key(spec), settings), store, instruction, _metrics(context))


def _identity(context: Context) -> tuple[ClientSpec, Path]:
    """The client that this node is, and the folder of its state: set on the node, or by the simulation's preset."""
    node = context.node_config
    if "client-spec" in node:
        if "state-dir" not in node:
            raise SpecError('the node has a client-spec but no state-dir: add state-dir="FOLDER" to its --node-config')
        spec = client_spec(read_yaml(Path(str(node["client-spec"])), "client spec"))
        return spec, Path(str(node["state-dir"])) / spec.name
    if "partition-id" not in node:
        raise SpecError(
            'the node has no client-spec: start it with --node-config \'client-spec="FILE" state-dir="FOLDER"\''
        )
    config, out = simulated_run(context)
    specs, partition = client_specs(config), int(node["partition-id"])
    if partition >= len(specs):
        raise ConfigError(
            f"there are more nodes than the {len(specs)} clients of preset {config.preset!r}: "
            f"use num-supernodes={len(specs)}"
        )
    return specs[partition], out / "clients" / specs[partition].name


def _metrics(context: Context) -> Metrics:
    """Which further metrics the client computes: like everything that reads files, set on the node, or in a simulation."""
    node = context.node_config
    if "client-spec" not in node:
        return simulated_run(context)[0].metrics
    meteor, bertscore = node.get("meteor", False), node.get("bertscore-model", "")
    if not isinstance(meteor, bool):
        raise SpecError(f"the node's meteor is {meteor!r}: write meteor=true or meteor=false in its --node-config")
    return Metrics(meteor, str(bertscore))


@dataclass(frozen=True)
class _Key:
    """A client spec that can be the key of a cache."""

    spec: ClientSpec

    def __hash__(self) -> int:
        return hash(repr(self.spec))


@cache
def _local_client(key: _Key, settings: str) -> LocalClient:
    """A client with its data and backbone, once a process: in a simulation an actor serves many messages."""
    parameters: HyperParameters = hyper_parameters(json.loads(settings))
    tokenizer = load_tokenizer(locate(key.spec.backbone))
    data = ClientData(key.spec, tokenizer, parameters.model.text_length, parameters.seed)
    return LocalClient(key.spec, data, load_backbone(key.spec.backbone, parameters.model.layers), parameters)
