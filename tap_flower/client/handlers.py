"""The client's handlers: one for each message of the protocol, whatever the client's models are made of."""

from __future__ import annotations

import logging
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from flwr.app import Context, Error, Message, RecordDict

from tap_flower.client.interference import gradient_cosines
from tap_flower.client.state import ClientStore, Kept, Received
from tap_flower.config import Encoding
from tap_flower.core.averaging import BadUpdateError, check_form
from tap_flower.core.components import ComponentModel, trainable_state
from tap_flower.core.training import DivergedError, Observer
from tap_flower.data.spec import SpecError
from tap_flower.errors import ClientError, ConfigError
from tap_flower.files import StorageError
from tap_flower.methods.method import Memory, Method, State
from tap_flower.methods.registry import find_method
from tap_flower.methods.session import LocalClient
from tap_flower.models.errors import BackboneError
from tap_flower.report.client_records import record_decisions, record_evaluation
from tap_flower.wire import messages
from tap_flower.wire.manifest import Manifest, TaskInfo, TensorInfo, encode_manifest
from tap_flower.wire.messages import Instruction, LackingError, MessageError
from tap_flower.wire.reports import Metrics, Report, encode_report
from tap_flower.wire.tensors import EncodingError
from tap_flower.wire.updates import make_update, restore

REFUSED = 1001
"""Error code of a reply whose reason is meant for the person who runs the server or the node."""

EXPECTED = (
    BackboneError,
    BadUpdateError,
    ClientError,
    ConfigError,
    DivergedError,
    EncodingError,
    MessageError,
    SpecError,
    StorageError,
)
"""Errors whose text says what is wrong and what to do."""
log = logging.getLogger("tap_flower")


class Witness(Protocol):
    """Sees what the models under evaluation make of the test data."""

    @property
    def samples(self) -> dict[str, Any]:
        """What they made of a few test items; see `methods.samples`."""
        ...

    def begin(self, name: str, model: ComponentModel) -> Observer:
        """What is to be shown the batches of the next model's evaluation."""
        ...

    def metrics(self) -> dict[str, dict[str, float]]:
        """Task name -> further metrics of the model whose evaluation has ended."""
        ...


@dataclass(frozen=True)
class Opened:
    """A client as its node knows it.

    Attributes:
        local: with its data, and the run's hyper-parameters.
        folder: of its state in this run.
        witness: makes what sees the evaluation of the run's method; None where the metrics of the kinds are all.
        describe: writes into the folder what its tensors are of.
    """

    local: LocalClient
    folder: Path
    witness: Callable[[Method], Witness] | None = None
    describe: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Participant:
    """A client that has received an instruction."""

    opened: Opened
    store: ClientStore
    instruction: Instruction

    @property
    def local(self) -> LocalClient:
        """With its data, and the run's hyper-parameters."""
        return self.opened.local

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


@dataclass(frozen=True)
class Handlers:
    """Answers the server's messages, as a ClientApp's functions.

    Attributes:
        open: (context, instruction) -> the client. It raises one of `EXPECTED` with what is wrong.
        quotes: whether the server may be told what went wrong where the words may quote the node's own: a simulation is one
            machine. Elsewhere they go to the node's log alone.
    """

    open: Callable[[Context, Instruction], Opened]
    quotes: Callable[[Context], bool]

    def manifest(self, message: Message, context: Context) -> Message:
        """`query.manifest`: who the client is, what it has, which tensors it holds."""
        return self._answer(message, context, _manifest)

    def train(self, message: Message, context: Context) -> Message:
        """`train`: one participation in stage 1."""
        return self._answer(message, context, _train)

    def distill(self, message: Message, context: Context) -> Message:
        """`train.distill`: stage 2."""
        return self._answer(message, context, _distill)

    def evaluate(self, message: Message, context: Context) -> Message:
        """`evaluate`: the metrics of every model that the client has, on its test data."""
        return self._answer(message, context, _evaluate)

    def _answer(
        self, message: Message, context: Context, handler: Callable[[Participant, Message], RecordDict]
    ) -> Message:
        """Runs a handler; what goes wrong in a way that somebody can mend is answered in plain words."""
        try:
            instruction = messages.instruction(message)
            opened = self.open(context, instruction)
            participant = Participant(opened, ClientStore(opened.folder, instruction.run), instruction)
            with participant.store.locked():
                content = handler(participant, message)
                opened.describe()  # not before: a message that is refused leaves nothing behind
            return Message(content, reply_to=message)
        except LackingError as error:
            return Message(Error(LackingError.CODE, str(error)), reply_to=message)
        except EXPECTED as error:
            reason = str(error)
            if isinstance(error, SpecError) and not self.quotes(context):
                log.error("%s", error)
                reason = "the node's client spec is wrong, or does not fit its data: the log of the node says where"
            return Message(Error(REFUSED, reason), reply_to=message)
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(last.filename).name}:{last.lineno}"
            traceback.print_exc()
            reason = str(error) if self.quotes(context) else "the log of its node says more"
            return Message(Error(REFUSED, f"unexpected {type(error).__name__} at {where}: {reason}"), reply_to=message)


def _manifest(participant: Participant, _: Message) -> RecordDict:
    local = participant.local
    model, exchanges, component_of = local.outline, participant.method.exchanges, participant.exchanged
    participant.method.suits(model)
    component_map = model.component_map
    shapes = {name: tuple(tensor.shape) for name, tensor in trainable_state(model).items() if name in component_of}
    examples = local.data.sizes("train")
    return encode_manifest(
        Manifest(
            client=local.holdings.name,
            fingerprint=local.holdings.fingerprint,
            tasks=tuple(
                TaskInfo(task.pair, task.kind.name, task.domains, task.head_size, examples[task.pair.task])
                for task in local.holdings.tasks
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
    content = encode_report(report, messages.encode_tensors(update.tensors, encoding))
    record_decisions(participant.store.folder, participant.instruction.run, server_round, result.decisions)
    participant.store.save(Kept(server_round, result.memory, counts, update.residual))
    return content


def _distill(participant: Participant, message: Message) -> RecordDict:
    kept = participant.at_the_end()
    received, before = participant.receive(message), participant.local.steps
    result = participant.method.second_stage(participant.local, received, _memory(kept))
    participant.store.save_second_stage(result.models)
    examples, steps = participant.local.data.sizes("train"), participant.local.steps - before
    return encode_report(Report(participant.instruction.server_round, examples, result.losses, steps, {}))


def _evaluate(participant: Participant, message: Message) -> RecordDict:
    local = participant.local
    method, memory = participant.method, _memory(participant.at_the_end())
    models = method.models(local, participant.receive(message), memory)
    models |= participant.store.second_stage(method.results)
    metrics: Metrics = {task: {} for task in local.kinds}
    witness = None if participant.opened.witness is None else participant.opened.witness(method)
    cosines: list[dict[str, Any]] = []
    for name, state in models.items():
        model = local.model(state)
        if name == "server":
            cosines = gradient_cosines(local, model)
        found = local.evaluate(model, "test", None if witness is None else witness.begin(name, model))
        further = {} if witness is None else witness.metrics()
        for task, values in found.items():
            metrics[task][name] = values | further.get(task, {})
    samples = {} if witness is None else witness.samples
    record_evaluation(participant.store.folder, participant.instruction.run, samples, cosines)
    return messages.encode({"metrics": metrics})


def _scores(participant: Participant, received: State, memory: Memory) -> dict[str, float]:
    """Validation scores of the client's own model: the last one of those that there are to evaluate."""
    models = participant.method.models(participant.local, received, memory)
    return participant.local.scores(participant.local.model(models[next(reversed(models))]), "validation")


def _memory(kept: Kept | None) -> Memory:
    return Memory() if kept is None else kept.memory
