"""The client's handlers: one for each message of the protocol."""

from __future__ import annotations

import json
import logging
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Error, Message, RecordDict

from tap_flower.config import ConfigError, Encoding, HyperParameters, Metrics, hyper_parameters
from tap_flower.core.aggregation import BadUpdateError, check_form
from tap_flower.core.components import trainable_state
from tap_flower.core.tasks import TEXT_GENERATION
from tap_flower.core.training import DivergedError
from tap_flower.data.loading import ClientData
from tap_flower.data.spec import ClientSpec, SpecError
from tap_flower.data.texts import load_tokenizer
from tap_flower.federation import messages
from tap_flower.federation.description import describe
from tap_flower.federation.encodings import EncodingError
from tap_flower.federation.messages import (
    Instruction,
    LackingError,
    Manifest,
    MessageError,
    Report,
    TaskInfo,
    TensorInfo,
)
from tap_flower.federation.node import this_node
from tap_flower.federation.store import ClientStore, Kept, Received
from tap_flower.federation.updates import make_update, restore
from tap_flower.methods.interference import gradient_cosines
from tap_flower.methods.local import LocalClient
from tap_flower.methods.method import Memory, Method, State
from tap_flower.methods.registry import find_method
from tap_flower.methods.samples import Samples
from tap_flower.models.allocation import prepare_allocation
from tap_flower.models.backbones import BackboneError, load_backbone, locate
from tap_flower.reporting.client_records import record_decisions, record_evaluation
from tap_flower.storage import StorageError
from tap_flower.text_metrics import TextMetrics

REFUSED = 1001
"""Error code of a reply whose reason is meant for the person who runs the server or the node."""

EXPECTED = (
    BackboneError,
    BadUpdateError,
    ConfigError,
    DivergedError,
    EncodingError,
    MessageError,
    SpecError,
    StorageError,
)
"""Errors whose text says what is wrong and what to do."""
DEPLOYED = "client-spec"
"""A setting that a deployed node has, and a simulated one has not."""
log = logging.getLogger("tap_flower")


@dataclass(frozen=True)
class Participant:
    """A client that has received an instruction."""

    local: LocalClient
    store: ClientStore
    instruction: Instruction
    metrics: Metrics

    @property
    def method(self) -> Method:
        """Of the run.

        Raises:
            ConfigError: this version has no such method.
        """
        return find_method(self.local.settings.method)

    @property
    def encoding(self) -> Encoding:
        """Of the run."""
        return self.local.settings.wire.encoding

    def at_the_end(self) -> Kept | None:
        """The client's state after stage 1: the latest, or that of the best round where the run may stop early."""
        best = self.instruction.best
        return self.store.load() if best is None else self.store.load_best(best)

    @property
    def exchanged(self) -> dict[str, str]:
        """Tensor -> component, of what the client and the server send each other."""
        component_of = self.local.outline.component_map.component_of
        return {name: component for name, component in component_of.items() if self.method.exchanges(component)}

    def receive(self, message: Message) -> State:
        """The server's values of all of the client's tensors: those in the message, and those that it left out.

        Raises:
            LackingError: tensors were left out, and the client has no copy of them: its folder is lost, or it has other
                tasks than before.
            BadUpdateError: the server sent others than the client's tensors, or values that are not finite.
        """
        state, held = self.instruction.state, self.instruction.held
        exact = self.encoding is Encoding.float32
        sent = messages.decode_tensors(message.content, self.encoding)
        tensors = restore(sent, {} if exact or not sent else self.local.initial_values(), self.encoding)
        if held is not None:
            kept = self.store.received()
            if kept is None or not held <= kept.state <= state:
                has = "none" if kept is None else f"that of round {kept.state}"
                raise LackingError(f"the client was to hold the server's tensors of round {held}, and has {has}")
            own = {name: tensor for name, tensor in kept.tensors.items() if name in self.exchanged}
            if not tensors and kept.state == state and own.keys() == self.exchanged.keys():
                return own
            tensors = {**own, **tensors}
        if missing := sorted(self.exchanged.keys() - tensors.keys()):
            raise LackingError(f"the client was not sent {len(missing)} of its tensors, such as {missing[0]!r}")
        check_form("the server's message", tensors, self.exchanged, trainable_state(self.local.outline))
        if broken := [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]:
            raise BadUpdateError(f"the server's tensor {broken[0]!r} holds a value that is not finite")
        self.store.save_received(Received(state, tensors))
        return tensors


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
    """Runs a handler; what goes wrong in a way that somebody can mend is answered in plain words.

    What may quote a node's spec or data goes to its own log alone; a simulation is one machine, and tells it.
    """
    try:
        participant = _participant(message, context)
        with participant.store.locked():
            describe(
                participant.store.folder, participant.local, participant.instruction.run, participant.instruction.best
            )
            return Message(handler(participant, message), reply_to=message)
    except LackingError as error:
        return Message(Error(LackingError.CODE, str(error)), reply_to=message)
    except EXPECTED as error:
        reason = str(error)
        if isinstance(error, SpecError) and DEPLOYED in context.node_config:
            log.error("%s", error)
            reason = "the node's client spec is wrong, or does not fit its data: the log of the node says where"
        return Message(Error(REFUSED, reason), reply_to=message)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        traceback.print_exc()
        reason = "the log of its node says more" if DEPLOYED in context.node_config else str(error)
        return Message(Error(REFUSED, f"unexpected {type(error).__name__} at {where}: {reason}"), reply_to=message)


def _manifest(participant: Participant, _: Message) -> RecordDict:
    local = participant.local
    model, exchanges, component_of = local.outline, participant.method.exchanges, participant.exchanged
    component_map = model.component_map
    shapes = {name: tuple(tensor.shape) for name, tensor in trainable_state(model).items() if name in component_of}
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
                name: TensorInfo(component_of[name], shape, model.initials[name]) for name, shape in shapes.items()
            },
            reach={
                pair.task: frozenset(filter(exchanges, components)) for pair, components in component_map.reach.items()
            },
        )
    )


def _train(participant: Participant, message: Message) -> RecordDict:
    server_round, best = participant.instruction.server_round, participant.instruction.best
    kept = participant.store.load(before_round=server_round)
    if best is not None:
        participant.store.keep_best(best)
    received, before = participant.receive(message), participant.local.steps
    result = participant.method.participate(participant.local, server_round, received, _memory(kept))
    replaced = {decision.pair.task: int(decision.replaced) for decision in result.decisions}
    counts = Counter(replaced) + (Counter() if kept is None else kept.replacements)
    residual, encoding = {} if kept is None else kept.residual, participant.encoding
    component_of = participant.local.outline.component_map.component_of
    update = make_update(received, result.returned, residual, component_of, encoding)
    examples = participant.local.data.sizes("train")
    steps, unchanged = participant.local.steps - before, tuple(sorted(update.unchanged))
    scores = {} if best is None else _scores(participant, received, result.memory)
    report = Report(server_round, examples, result.losses, steps, replaced, unchanged, scores)
    content = messages.encode_report(report, update.tensors, encoding)
    record_decisions(participant.store.folder, participant.instruction.run, server_round, result.decisions)
    participant.store.save(Kept(server_round, result.memory, counts, update.residual))
    return content


def _distill(participant: Participant, message: Message) -> RecordDict:
    kept = participant.at_the_end()
    received, before = participant.receive(message), participant.local.steps
    result = participant.method.second_stage(participant.local, received, _memory(kept))
    participant.store.save_second_stage(result.models)
    examples, steps = participant.local.data.sizes("train"), participant.local.steps - before
    return messages.encode_report(Report(participant.instruction.server_round, examples, result.losses, steps, {}))


def _evaluate(participant: Participant, message: Message) -> RecordDict:
    local = participant.local
    method, memory = participant.method, _memory(participant.at_the_end())
    models = method.models(local, participant.receive(message), memory)
    models |= participant.store.second_stage(method.results)
    metrics: messages.Metrics = {task.name: {} for task in local.spec.tasks}
    tokenizer = load_tokenizer(locate(local.spec.backbone), local.spec.revision)

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    samples = Samples(local, decode, tokenizer.sep_token_id, {"server", "personal", method.result})
    cosines: list[dict[str, Any]] = []
    for name, state in models.items():
        model = local.model(state)
        samples.add(name, model)
        if name == "server":
            cosines = gradient_cosines(local, model)
        texts = TextMetrics(
            [task.name for task in local.spec.tasks if task.kind == TEXT_GENERATION.name],
            decode,
            tokenizer.sep_token_id,
            meteor=participant.metrics.meteor,
            bertscore=participant.metrics.bertscore,
        )
        found, of_texts = local.evaluate(model, "test", texts.observe), texts.metrics()
        for task, values in found.items():
            metrics[task][name] = values | of_texts.get(task, {})
    record_evaluation(participant.store.folder, participant.instruction.run, samples.tasks, cosines)
    return messages.encode({"metrics": metrics})


def _scores(participant: Participant, received: State, memory: Memory) -> dict[str, float]:
    """Validation scores of the client's own model: the last one of those that there are to evaluate."""
    models = participant.method.models(participant.local, received, memory)
    return participant.local.scores(participant.local.model(models[next(reversed(models))]), "validation")


def _memory(kept: Kept | None) -> Memory:
    return Memory() if kept is None else kept.memory


def _participant(message: Message, context: Context) -> Participant:
    instruction = messages.instruction(message)
    try:
        node = this_node(context, instruction.run)
    except ConfigError as error:
        raise SpecError(str(error)) from error
    settings = json.dumps(instruction.hyper_parameters, sort_keys=True)
    local = _local_client(node.spec, node.data_root, settings)
    return Participant(local, ClientStore(node.folder, instruction.run), instruction, node.metrics)


@cache
def _local_client(spec: ClientSpec, data_root: str, settings: str) -> LocalClient:
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
        parameters.compute.compile,
    )
    data = ClientData(
        spec,
        load_tokenizer(locate(spec.backbone), spec.revision),
        model.text_length,
        parameters.seed,
        data_root,
        hold_out=parameters.needs_validation,
    )
    return LocalClient(spec, data, backbone, parameters)
