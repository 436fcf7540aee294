"""Messages between server and clients: their fields, with bounds, and how they are checked.

A message holds a ConfigRecord `tap`, whose key `json` has the fields of one of the classes below; an ArrayRecord `arrays`
where tensors travel; Flower's `config` (server to client) and `metrics` (client to server). Nothing is pickled.

| message | server to client | client to server |
|---|---|---|
| `query.manifest` | `Instruction` | `Manifest` |
| `query.values` | `Instruction`, first values that the client lacks | `Kept`, first values that the server lacks |
| `train` | `Instruction`, the client's tensors | `Report`, Δ of each tensor |
| `train.personalise` | `Instruction`, the client's tensors | `Report` |
| `evaluate` | `Instruction`, the client's tensors | `Evaluation` |
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Annotated, Any, TypeVar

import msgspec
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from msgspec import Meta, Struct
from torch import Tensor

import tap_flower
from tap_flower.config import MOST_ROUNDS, Encoding
from tap_flower.core.averaging import LARGEST_WEIGHT
from tap_flower.core.components import ComponentMap, Pair
from tap_flower.core.headline import Headline
from tap_flower.core.initial import Initial
from tap_flower.errors import MessageError
from tap_flower.plain import shown, with_value
from tap_flower.wire.fields import Component, Count, Digest, Epoch, Examples, Name, Number, TensorName, Word
from tap_flower.wire.tensors import decode_tensors

PROTOCOL = 7
"""Counts up with every change of what travels, the keys of the hyper-parameters included; it alone decides who is refused.
Within a minor version of tap-flower it stays, so that a server and nodes of different patches work together."""
MANIFEST, VALUES = "query.manifest", "query.values"
TRAIN, PERSONALISE, EVALUATE = "train", "train.personalise", "evaluate"
FIELDS, ARRAYS, CONFIG, METRICS = "tap", "arrays", "config", "metrics"
"""Names of the records of a message."""
REFUSED, LOST = 1001, 1002
"""Error codes of replies: the reason is meant for the person who runs the server or the node; the client has lost the run's
first values, and must be asked who it is once more."""
LARGEST_CLIENT = 2**30
"""Values of all tensors of a client, 4 GiB in float32; more are refused before anything is allocated for them."""

_FEW = Meta(max_length=100)
"""Models of a task, metrics of a model: they stand in the log of events."""
_Fields = TypeVar("_Fields", bound=Struct)


class Instruction(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the server sends.

    Attributes:
        run: identity of the run.
        epochs: the run's start and its resumes, oldest first. A client's state counts only if it was written in one of them
            for a round that the next one did not repeat; values of another history are never mixed in.
        round: counted from 1; 0 in a manifest query.
        hyper_parameters: nested plain values of `config.HyperParameters`.
        wanted: in a query for values, the tensors whose first values the client is to send.
        best: where the run may stop early, its best round so far: the client keeps its state as of then, and goes on from it
            in stage 2. 0 before there is one, None where the run does not stop early.
        protocol: version of the protocol; another one is refused.
        version: version of tap-flower, for messages to people.
    """

    run: Name
    epochs: Annotated[tuple[Epoch, ...], Meta(min_length=1)]
    round: Annotated[int, Meta(ge=0, le=MOST_ROUNDS)]
    hyper_parameters: dict[str, Any]
    wanted: tuple[TensorName, ...] = ()
    best: Count | None = None
    protocol: int = PROTOCOL
    version: str = tap_flower.__version__


class TensorInfo(Struct, frozen=True, forbid_unknown_fields=True):
    """A tensor that a client exchanges.

    Attributes:
        component: its component.
        shape: its shape.
        initial: how its first value is made from its name and the run's seed; None where a client's module has it.
    """

    component: Component
    shape: Annotated[tuple[Annotated[int, Meta(ge=1, le=LARGEST_CLIENT)], ...], Meta(max_length=8)]
    initial: Initial | None

    def __post_init__(self) -> None:
        if self.initial is not None:
            self.initial.check(self.shape)


class TaskInfo(Struct, frozen=True, forbid_unknown_fields=True):
    """A pair that a client has.

    Attributes:
        task: name of the task.
        modalities: modalities of its input, sorted.
        kind: name of the kind of task.
        domains: domains of its data.
        head_size: number of classes; 0 where the head has none.
        examples: number of training examples.
        class_hash: keyed hash of the names of its classes, in order, which the client makes; empty where they have no names.
        headline: name of the metric that its kind is judged by.
        higher_is_better: direction of that metric.
    """

    task: Name
    modalities: Annotated[tuple[Name, ...], Meta(min_length=1, max_length=100)]
    kind: Name
    domains: Annotated[tuple[Name, ...], Meta(max_length=1000)]
    head_size: Count
    examples: Examples
    class_hash: Annotated[str, Meta(pattern=r"\A([0-9a-f]{16})?\Z")] = ""
    headline: Word = "loss"
    higher_is_better: bool = False

    def __post_init__(self) -> None:
        if len(set(self.modalities)) < len(self.modalities):
            raise ValueError(f"task {self.task!r} names a modality twice: {shown(self.modalities)}")

    @property
    def pair(self) -> Pair:
        """The modality-task pair."""
        return Pair(self.task, self.modalities)

    @property
    def judged_by(self) -> Headline:
        """The headline metric and its direction."""
        return Headline(self.headline, self.higher_is_better)


class Manifest(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, dict=True):
    """What a client has, before the first round. Names of classes and columns are not in it.

    Attributes:
        client: stable name of the client.
        fingerprint: fingerprint of its frozen backbone.
        tasks: its pairs.
        tensors: tensor name -> component, shape and first value of each tensor that it exchanges.
        reach: task name -> components that the pair's forward pass reaches, of those that it exchanges.
        state: round of the client's state of this run; 0 where it has none.
        unread: keys of Flower's run configuration that the project has not read while it made the client.
        built: tensor name -> digest of the value that the client's module was built with, frozen tensors and buffers
            included; nothing where values come from the run's seed.
        protocol: version of the protocol; another one is refused.
        version: version of tap-flower, for messages to people.
    """

    client: Name
    fingerprint: Name
    tasks: Annotated[tuple[TaskInfo, ...], Meta(min_length=1, max_length=1000)]
    tensors: dict[TensorName, TensorInfo]
    reach: dict[Name, frozenset[Component]]
    state: Count = 0
    unread: Annotated[tuple[Annotated[str, Meta(max_length=256)], ...], Meta(max_length=256)] = ()
    built: dict[TensorName, Digest] = {}
    protocol: int = PROTOCOL
    version: str = tap_flower.__version__

    def __post_init__(self) -> None:
        names = [task.task for task in self.tasks]
        if sorted(names) != sorted(self.reach):
            raise ValueError(f"tasks are {shown(names)}, reach is about {shown(sorted(self.reach))}")
        if unknown := sorted(n for n, info in self.tensors.items() if info.initial is None and n not in self.built):
            raise ValueError(f"nothing says how tensor {shown(unknown[0])} starts")
        if (total := sum(math.prod(info.shape) for info in self.tensors.values())) > LARGEST_CLIENT:
            raise ValueError(f"the tensors have {total} values, more than {LARGEST_CLIENT}")
        if (total := sum(self.examples.values())) > LARGEST_WEIGHT:
            raise ValueError(f"the tasks have {total} examples, more than {LARGEST_WEIGHT}")
        _ = self.component_map  # its own checks

    @cached_property
    def component_of(self) -> dict[str, str]:
        """Tensor name -> component."""
        return {name: info.component for name, info in self.tensors.items()}

    @cached_property
    def component_map(self) -> ComponentMap:
        """Tensor -> component, pair -> components."""
        return ComponentMap(self.component_of, {task.pair: self.reach[task.task] for task in self.tasks})

    @cached_property
    def examples(self) -> dict[str, int]:
        """Task name -> number of training examples."""
        return {task.task: task.examples for task in self.tasks}

    @cached_property
    def weights(self) -> dict[str, int]:
        """Component -> n_c, the examples of the client's pairs that reach it: the client's weight in the average."""
        return self.component_map.examples_per_component({task.pair: task.examples for task in self.tasks})


class Kept(Struct, frozen=True, forbid_unknown_fields=True):
    """What a client says to a query for values, beside tensors.

    Attributes:
        kept: number of first values that it has taken over.
    """

    kept: Count


class Report(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a client returns of a round, or of stage 2, beside tensors.

    Attributes:
        round: round of the instruction.
        examples: task name -> training examples.
        losses: task name -> mean training loss of the server's copy.
        steps: optimiser steps that the client made for it, of all models.
        replacements: task name -> 1 where the personal model's components were replaced, else 0.
        state: round of the state that the client began with; 0 where it had none of this run.
        validation: task name -> validation score of the client's own model, where the run may stop early.
        models: names of the models that stage 2 has made.
    """

    round: Count
    examples: dict[Name, Examples]
    losses: dict[Name, Number]
    steps: Count
    state: Count = 0
    replacements: dict[Name, Count] = {}
    validation: dict[Name, Number] = {}
    models: tuple[Word, ...] = ()

    def check(self, manifest: Manifest, server_round: int) -> None:
        """Refuses a report on another round, other tasks or other counts of examples.

        Raises:
            MessageError: with the value.
        """
        if self.round != server_round:
            raise MessageError(f"the reply is for round {self.round}, not {server_round}")
        if self.examples != manifest.examples:
            raise MessageError(f"the reply counts {self.examples} examples, the manifest {manifest.examples}")
        for field in ("losses", "replacements", "validation"):
            if unknown := sorted(getattr(self, field).keys() - manifest.examples.keys()):
                raise MessageError(f"{field} names the task {unknown[0]!r}, not one of {sorted(manifest.examples)}")


Metrics = dict[str, dict[str, dict[str, float]]]
"""Task name -> model (`server`, `tap`, …) -> metric -> value."""


class Evaluation(Struct, frozen=True, forbid_unknown_fields=True):
    """The metrics of every model that a client has, on its test data.

    Attributes:
        metrics: task name -> model -> metric -> value.
        state: round of the client's state of this run; 0 where it has none.
    """

    metrics: dict[Name, Annotated[dict[Word, Annotated[dict[Word, Number], _FEW]], _FEW]]
    state: Count = 0

    def check(self, manifest: Manifest) -> None:
        """Refuses metrics of other tasks than the client's.

        Raises:
            MessageError: with both lists.
        """
        if self.metrics.keys() != manifest.examples.keys():
            raise MessageError(
                f"the metrics are about {sorted(self.metrics)}, not about the tasks {sorted(manifest.examples)}"
            )


def encode(fields: Struct, arrays: ArrayRecord | None = None, **records: ConfigRecord | MetricRecord) -> RecordDict:
    """The content of a message.

    Args:
        fields: one of the classes of this module.
        arrays: encoded tensors, where the message carries any.
        records: Flower's `config` or `metrics`.
    """
    content = RecordDict({FIELDS: ConfigRecord({"json": msgspec.json.encode(fields).decode()}), **records})
    if arrays is not None:
        content[ARRAYS] = arrays
    return content


def decode(content: RecordDict, kind: type[_Fields], sender: str) -> _Fields:
    """The fields of a message, checked.

    Args:
        content: content of the message.
        kind: class of the fields.
        sender: who sent it, for error messages.

    Raises:
        MessageError: the sender speaks another protocol or version, a record is unknown, or a field is missing, unknown,
            of another type or out of bounds; the message names the field and shows its value.
    """
    record = content.config_records.get(FIELDS)
    text = None if record is None else record.get("json")
    if not isinstance(text, str):
        raise MessageError(f"{sender}: the message has no record {FIELDS!r} with a text 'json': it is not tap-flower's")
    if unknown := sorted(content.keys() - {FIELDS, ARRAYS, CONFIG, METRICS}):
        raise MessageError(
            f"{sender}: the message has the record {shown(unknown[0])}, which the protocol does not know"
        )
    try:
        if kind in (Instruction, Manifest):
            _check_protocol(text, sender)
        return msgspec.json.decode(text, type=kind)
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
        raise MessageError(f"{sender}: the message cannot be read: {with_value(str(error), text)}") from error


def tensors_of(content: RecordDict, encoding: Encoding) -> dict[str, Tensor]:
    """The tensors of a message (float32, CPU), as they came: names, shapes and values are the receiver's to check.

    Raises:
        MessageError: there are none, or one is not in `encoding`.
    """
    if ARRAYS not in content.array_records:
        raise MessageError(f"the message has no record {ARRAYS!r}")
    return decode_tensors(content.array_records[ARRAYS], encoding)


def refuse_tensors(content: RecordDict) -> None:
    """Refuses tensors in a message that has none.

    Raises:
        MessageError: it has some.
    """
    if ARRAYS in content:
        raise MessageError(f"the message has the record {ARRAYS!r}, which does not belong in it")


def payload_bytes(content: RecordDict) -> dict[str, int]:
    """Tensor name -> bytes on the wire."""
    record = content.array_records.get(ARRAYS)
    return {} if record is None else {name: len(array.data) for name, array in record.items()}


class _Version(Struct):
    protocol: Any = None
    version: Any = None


def _check_protocol(text: str, sender: str) -> None:
    """Refuses another protocol before any other field is looked at."""
    theirs = msgspec.json.decode(text, type=_Version)
    if theirs.protocol != PROTOCOL:
        raise MessageError(
            f"{sender} speaks protocol {shown(theirs.protocol)} of tap-flower {shown(theirs.version)}, here is protocol "
            f"{PROTOCOL} of tap-flower {tap_flower.__version__}: install one minor version on the server and on every node"
        )
