"""Answers the server's messages, one function a message, whatever the client's models are made of."""

from __future__ import annotations

import json
import logging
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from statistics import fmean

import msgspec
from cachetools import LRUCache
from flwr.app import Context, Error, Message, MetricRecord, RecordDict

from tap_flower.client.description import hash_of_classes
from tap_flower.client.evaluation import evaluate_models
from tap_flower.client.known_parts import KnownParts
from tap_flower.client.module import unstable
from tap_flower.client.node import Limits, limits_of, state_folder, switch
from tap_flower.client.state import ClientState, StateFolder
from tap_flower.client.task import Client
from tap_flower.config import Encoding, HyperParameters, NotedConfig, hyper_parameters_of
from tap_flower.core.averaging import check_form
from tap_flower.core.components import State, trainable_state
from tap_flower.core.module_tensors import digest
from tap_flower.core.own_loop import recorded_steps
from tap_flower.errors import ClientError, MessageError, SpecError, StateLostError, TapFlowerError, task_of, users_line
from tap_flower.methods.method import Memory, Method
from tap_flower.methods.own_results import NUM_EXAMPLES, TRAIN_LOSS
from tap_flower.methods.registry import find_method
from tap_flower.methods.session import Session
from tap_flower.methods.trial import try_evidence, try_loops
from tap_flower.plain import printable, shown
from tap_flower.report.client_records import STEPS, record_decisions, record_evaluation
from tap_flower.wire import messages
from tap_flower.wire.fields import Component
from tap_flower.wire.messages import LOST, REFUSED, Evaluation, Instruction, Manifest, Report, TaskInfo, TensorInfo
from tap_flower.wire.tensors import encode_tensors, make_update, moved_to

OPEN_CLIENTS = 1024
"""Clients that a process keeps open; a process of a simulation serves many."""
log = logging.getLogger("tap_flower")


@dataclass(frozen=True)
class Participant:
    """A client with an instruction of the server's.

    Attributes:
        client: the client.
        session: its model, data and the run's hyper-parameters.
        folder: its state.
        instruction: what the server sent.
        keeps_best: whether the state with the best validation scores is kept; `keep-best` of the node's configuration.
    """

    client: Client
    session: Session
    folder: StateFolder
    instruction: Instruction
    keeps_best: bool

    @property
    def encoding(self) -> Encoding:
        """Encoding of the run."""
        return self.session.settings.wire.encoding

    @cached_property
    def method(self) -> Method:
        """Method of the run.

        Raises:
            ConfigError: this version has no such method.
        """
        return find_method(self.session.settings.method)

    @cached_property
    def exchanged(self) -> dict[str, str]:
        """Tensor -> component, for the tensors that client and server exchange."""
        outline = self.session.outline
        component_of = {n: c for n, c in outline.component_map.component_of.items() if n not in outline.local}
        return {name: component for name, component in component_of.items() if self.method.exchanges(component, name)}

    def state_after_stage_1(self) -> ClientState | None:
        """The client's latest state, or that of the best round where the run may stop early."""
        best = self.instruction.best
        return self.folder.load() if best is None else self.folder.load_best(best)

    def take_first_values(self, kept: State | None, message_type: str) -> None:
        """Gives the session the first values of the run that a module built here may not have.

        Args:
            kept: from the client's folder; at its first query, those are kept that another process would build otherwise.
            message_type: of the server's message.

        Raises:
            StateLostError: they are lost.
        """
        if kept is None and self.session.outline.is_built:
            if message_type != messages.MANIFEST:
                raise StateLostError("its folder has lost the run's first values: the server has to give them again")
            self.folder.save_first(kept := unstable(self.client.model, self.session.settings.seed))
        self.session.first = kept or {}

    def receive(self, message: Message, state: ClientState | None) -> State:
        """The server's tensors for this client, and those of the server's copy that stay here.

        Args:
            message: the server's.
            state: state of the client.

        Raises:
            MessageError: the server sent others than the client's tensors, or values that are not finite.
        """
        sent = messages.tensors_of(message.content, self.encoding)
        first = {} if self.encoding is Encoding.float32 or not sent else self.session.initial_values()
        tensors = moved_to(sent, first, self.encoding)
        check_form("the server's message", tensors, self.exchanged, trainable_state(self.session.outline))
        if broken := [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]:
            raise MessageError(f"the server's tensor {broken[0]!r} holds a value that is not finite")
        self.folder.save_server(tensors, self.instruction.round)
        outline, kept = self.session.outline, {} if state is None else state.local
        if outline.local:
            own = {**self.session.initial_values(), **kept}
            tensors |= {name: own[name] for name in outline.local}
        return tensors


@dataclass(frozen=True)
class Handlers:
    """The functions of a `TapClientApp`.

    Attributes:
        make_client: (context, hyper-parameters) -> the node's client.
        quotes: whether the server may be told what went wrong where the words may quote the node's data.
        known: (run, node, hyper-parameters) -> clients that are open.
    """

    make_client: Callable[[Context, HyperParameters], Client]
    quotes: Callable[[Context], bool]
    known: LRUCache[tuple[str, int, str], tuple[Client, Session]] = field(
        default_factory=lambda: LRUCache(OPEN_CLIENTS), init=False
    )

    def answer(self, message: Message, context: Context) -> Message:
        """Runs the handler of a message's type; an error is answered in plain words."""
        name, handler = "", _HANDLERS[message.metadata.message_type]
        try:
            limits = limits_of(context.node_config)
            with limits.time(message.metadata.ttl):
                instruction = messages.decode(message.content, Instruction, "the server")
                client, session = self._open(context, instruction, limits, anew=handler is _manifest)
                name = client.name if handler is _manifest else ""  # later, the server knows whom it has asked
                place = state_folder(client, context, instruction.run)
                folder = StateFolder(place, instruction.run, instruction.epochs)
                participant = Participant(
                    client, session, folder, instruction, switch(context.node_config, "keep-best")
                )
                session.config, session.metrics = dict(message.content.config_records.get(messages.CONFIG, {})), {}
                with folder.locked(), recorded_steps(client.folder and client.folder / STEPS):
                    participant.take_first_values(folder.load_first(), message.metadata.message_type)
                    content = handler(participant, message)
                    if client.describe is not None:  # not before: a message that is refused leaves nothing behind
                        client.describe(folder.folder, session, instruction)
            return Message(content, reply_to=message)
        except TapFlowerError as error:
            reason = printable(str(error))
            if isinstance(error, SpecError) and not self.quotes(context):
                log.error("%s", error)
                reason = "the node's client spec is wrong, or does not fit its data: the log of the node says where"
            code = LOST if isinstance(error, StateLostError) else REFUSED
            return Message(Error(code, _by_name(name, reason)), reply_to=message)
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = users_line(error) or f"{Path(last.filename).name}:{last.lineno}"
            traceback.print_exc()
            reason = printable(str(error)) if self.quotes(context) else "the log of its node says more"
            task = "" if (task := task_of(error)) is None else f"task {task!r}: "
            told = f"{task}unexpected {type(error).__name__} at {where}: {reason}"
            return Message(Error(REFUSED, _by_name(name, told)), reply_to=message)

    def _open(self, context: Context, instruction: Instruction, limits: Limits, anew: bool) -> tuple[Client, Session]:
        key = (instruction.run, context.node_id, sent := json.dumps(instruction.hyper_parameters, sort_keys=True))
        limits.check("rounds", "round", instruction.round)
        if key not in self.known:
            settings = hyper_parameters_of(sent)
            limits.check_settings(settings)
            noted = copy(context)
            noted.run_config = run_config = NotedConfig(context.run_config)
            client = self.make_client(noted, settings)
            if not isinstance(client, Client):
                raise ClientError(
                    f"the function that @app.client() decorates returned a {type(client).__name__}: return a "
                    f"tap_flower.Client"
                )
            place = state_folder(client, context, instruction.run)
            session = client.session(settings, KnownParts(place, instruction.run, anew))
            # A client spec may stand for the run configuration, and a loop of the project's own reads it later.
            if client.outline is None and not any(task.fit or task.score for task in client.tasks):
                session.unread = run_config.unread
            self.known[key] = client, session
        return self.known[key]


def _by_name(name: str, reason: str) -> str:
    """A reason with the client's name in front, where there is one and it is not in it yet."""
    return reason if not name or reason.startswith("client ") else f"client {name!r}: {reason}"


def _manifest(participant: Participant, _: Message) -> RecordDict:
    """`query.manifest`: who the client is, what it has, which tensors it exchanges."""
    session, exchanged = participant.session, participant.exchanged
    model = session.outline
    participant.method.suits(model)
    try_loops(session, participant.method)
    try_evidence(session, participant.method)
    examples, held_out = session.data.sizes("train"), session.data.sizes("validation")
    for task in participant.client.tasks:
        if isinstance(task.validation, float) and held_out.get(task.name):
            count = examples[task.name] + held_out[task.name]
            log.info(
                "task %r: %d of %d training examples are set aside (`validation`)",
                task.name,
                held_out[task.name],
                count,
            )
    if participant.keeps_best and not any(held_out.values()):
        log.warning("keep-best does nothing: no held-out examples say which state is best")
    built = session.built_values() if model.is_built else {}
    _check_names(exchanged, built)
    tensors = {name: tensor for name, tensor in trainable_state(model).items() if name in exchanged}
    if empty := [name for name, tensor in tensors.items() if not tensor.numel()]:
        raise ClientError(
            f"tensor {empty[0]!r} of the model has the shape {list(tensors[empty[0]].shape)}, and so no value to train: "
            f"leave its layer out, or freeze it"
        )
    kept = set(exchanged.values())
    classes = {task.name: task.classes for task in participant.client.tasks}
    return messages.encode(
        Manifest(
            client=session.name,
            fingerprint=session.fingerprint,
            tasks=tuple(
                TaskInfo(
                    task.pair.task,
                    task.pair.modalities,
                    task.kind.name,
                    task.domains,
                    task.head_size,
                    examples[task.pair.task],
                    hash_of_classes(participant.instruction.run, task.pair.task, classes[task.pair.task]),
                    *task.kind.judged_by,
                )
                for task in session.tasks
            ),
            tensors={
                name: TensorInfo(exchanged[name], tuple(tensor.shape), model.initials.get(name))
                for name, tensor in tensors.items()
            },
            reach={pair.task: components & kept for pair, components in model.component_map.reach.items()},
            state=participant.folder.round,
            unread=session.unread,
            built={name: digest(value) for name, value in built.items()},
        )
    )


def _check_names(component_of: Mapping[str, str], built: Iterable[str]) -> None:
    """Refuses names of tensors and components that no message can carry.

    Raises:
        ClientError: there is one.
    """
    named = {**dict.fromkeys(chain(component_of, built), "tensor"), **dict.fromkeys(component_of.values(), "component")}
    for name, what in named.items():
        try:
            msgspec.convert(name, Component)
        except msgspec.ValidationError as error:
            raise ClientError(
                f"the model has the {what} {shown(name)}: name it with at most 256 letters, digits, '_', '-', '.' and, "
                f"between two parts, '/'"
            ) from error


def _values(participant: Participant, message: Message) -> RecordDict:
    """`query.values`: takes over first values of the run, and sends those that the server asks for."""
    session, kept = participant.session, State()
    if messages.ARRAYS in message.content:
        own = session.built_values()
        kept = messages.tensors_of(message.content, Encoding.float32)
        check_form("the server's message", kept, kept.keys() & own.keys(), own)
        if broken := [name for name, tensor in kept.items() if not bool(tensor.isfinite().all())]:
            raise MessageError(f"the run's first value of {broken[0]!r} is not finite")
        participant.folder.save_first(kept)
        session.first = {**session.first, **kept}
    values = session.built_values() if participant.instruction.wanted else {}
    if unknown := sorted(set(participant.instruction.wanted) - values.keys()):
        raise MessageError(f"the server asks for tensor {unknown[0]!r}, which client {session.name!r} does not have")
    wanted = {name: values[name] for name in participant.instruction.wanted}
    return messages.encode(messages.Kept(len(kept)), encode_tensors(wanted, Encoding.float32))


def _train(participant: Participant, message: Message) -> RecordDict:
    """`train`: one round of stage 1."""
    session, folder, instruction = participant.session, participant.folder, participant.instruction
    # Step 1: the state before this round, also where the server repeats it.
    state = folder.load(before_round=instruction.round)
    if instruction.best is not None:
        folder.keep_best(instruction.best)
    # Step 2: the method's round.
    received, steps = participant.receive(message, state), session.steps
    result = participant.method.participate(session, instruction.round, received, _memory(state))
    # Step 3: what the server gets, Δ = trained − received, and what stays here.
    returned = {name: value for name, value in result.returned.items() if name in participant.exchanged}
    residual = {} if state is None else state.residual
    difference, residual = make_update(received, returned, residual, participant.encoding)
    local = {name: result.returned.get(name, received[name]) for name in session.outline.local}
    replaced = {decision.pair.task: int(decision.replaced) for decision in result.decisions}
    wanted = instruction.best is not None or participant.keeps_best
    scores = _own_scores(participant, received, result.memory) if wanted else {}
    report = Report(
        round=instruction.round,
        examples=session.data.sizes("train"),
        losses=result.losses,
        steps=session.steps - steps,
        state=0 if state is None else state.round,
        replacements=replaced,
        validation={} if instruction.best is None else scores,
    )
    tensors = encode_tensors(difference, participant.encoding)
    content = messages.encode(report, tensors, metrics=_metrics(report, session))
    # Step 4: the new state is on the disk before the answer leaves.
    counts = Counter(replaced) + (Counter() if state is None else state.replacements)
    record_decisions(folder.folder, instruction.run, instruction.round, result.decisions)
    score = fmean(scores.values()) if participant.keeps_best and scores else None
    folder.save(ClientState(instruction.round, result.memory, counts, residual, local, score))
    return content


def _personalise(participant: Participant, message: Message) -> RecordDict:
    """`train.personalise`: stage 2."""
    session, folder, instruction = participant.session, participant.folder, participant.instruction
    state, steps = participant.state_after_stage_1(), session.steps
    result = participant.method.second_stage(session, participant.receive(message, state), _memory(state))
    participant.method.check_made(result)
    for after, decisions in enumerate(result.decisions, 1):
        record_decisions(folder.folder, instruction.run, instruction.round + after, decisions)
    folder.save_models(result.models, instruction.round)
    report = Report(
        round=instruction.round,
        examples=session.data.sizes("train"),
        losses=result.losses,
        steps=session.steps - steps,
        state=folder.round,
        models=tuple(result.models),
    )
    return messages.encode(report, metrics=_metrics(report, session))


def _evaluate(participant: Participant, message: Message) -> RecordDict:
    """`evaluate`: the metrics of every model that the client has, on its test data."""
    session, method, folder = participant.session, participant.method, participant.folder
    state = participant.state_after_stage_1()
    received, memory = participant.receive(message, state), _memory(state)
    models = method.models(received, memory, session.initial_values) | folder.load_models(method.results)
    observer = None if participant.client.observe is None else participant.client.observe(session, method)
    found = evaluate_models(session, models, observer)
    record_evaluation(folder.folder, participant.instruction.run, found.samples, found.cosines, found.skipped)
    judged = [
        session.kinds[task].judged_by.score(models[found.last]) for task, models in found.metrics.items() if models
    ]
    metrics: dict[str, int | float] = {NUM_EXAMPLES: sum(session.data.sizes("test").values())}
    metrics |= {"score": fmean(judged)} if judged else {}  # a client may have nothing to test on
    return messages.encode(Evaluation(found.metrics, folder.round), metrics=MetricRecord(dict(metrics)))


def _metrics(report: Report, session: Session) -> MetricRecord:
    """Flower's record of a round: examples, the mean loss over the client's tasks, what its own loops returned."""
    found: dict[str, int | float] = {**session.metrics, NUM_EXAMPLES: sum(report.examples.values())}
    if report.losses:
        found[TRAIN_LOSS] = fmean(report.losses.values())
    return MetricRecord(dict(found))


def _own_scores(participant: Participant, received: State, memory: Memory) -> dict[str, float]:
    """Task name -> validation score of the client's own model, the last one that an evaluation would judge."""
    session = participant.session
    models = participant.method.models(received, memory, session.initial_values)
    return session.scores(session.model(models[next(reversed(models))]), "validation")


def _memory(state: ClientState | None) -> Memory:
    return Memory() if state is None else state.memory


_HANDLERS: Mapping[str, Callable[[Participant, Message], RecordDict]] = {
    messages.MANIFEST: _manifest,
    messages.VALUES: _values,
    messages.TRAIN: _train,
    messages.PERSONALISE: _personalise,
    messages.EVALUATE: _evaluate,
}
