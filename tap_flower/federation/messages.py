"""The wire: what is in a message, and how it is checked.

Every message has a ConfigRecord `tap` with the one key `json`, and, where tensors travel, an ArrayRecord `tensors`. Tensors
are trainable and by name, in the encoding of the run. Nothing else is ever sent; nothing is pickled.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar, cast

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from torch import Tensor

import tap_flower
from tap_flower.config import Encoding
from tap_flower.core.components import ComponentMap, Pair
from tap_flower.core.initial import Initial
from tap_flower.data.spec import NAME
from tap_flower.federation.encodings import EncodingError, from_array, to_array
from tap_flower.plain import PlainError, check_fields, check_type, parse_json, shown

PROTOCOL = 4
LARGEST_MANIFEST = 2**29
"""Values of all tensors of a client, 2 GiB in float32; more are refused before anything is allocated for them."""
LARGEST_NUMBER = 1e305
"""Magnitude from which on a loss, score or metric is refused: a thousand smaller ones have a finite sum."""
_DIMENSIONS = 8
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_+.-]{0,63}")
"""Names of models and metrics."""
_PATH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")
"""Names of components; a tensor's is one after `components.`: a file may hold other names beside them."""
_COMPONENTS, _LONGEST_PATH = "components.", 256
MANIFEST, TRAIN, DISTILL, EVALUATE = "query.manifest", "train", "train.distill", "evaluate"
_PLAIN, _TENSORS = "tap", "tensors"
_From = TypeVar("_From")
_To = TypeVar("_To")


class MessageError(ValueError):
    """A message is not what the protocol says; the text names the field and the value."""


class LackingError(RuntimeError):
    """The server left out tensors that the client was to hold, and it does not: they are to be sent again."""

    CODE = 1002


@dataclass(frozen=True)
class Instruction:
    """What the server sends.

    Attributes:
        run: identity of the run.
        server_round: counted from 1; 0 in a manifest query.
        hyper_parameters: nested plain values of `config.HyperParameters`.
        state: number of complete rounds that the server's tensors come from.
        held: the `state` as of which the client is known to hold all of its tensors; those that have not changed since
            are left out. None where the message has them all.
        best: where the run may stop early, its best round so far: the client keeps its state as of then, and goes on from it
            in stage 2. 0 before there is one, None where the run does not stop early.
    """

    run: str
    server_round: int
    hyper_parameters: dict[str, Any]
    state: int = 0
    held: int | None = None
    best: int | None = None


@dataclass(frozen=True)
class TensorInfo:
    """A tensor that a client holds: its component, its shape, and how it starts."""

    component: str
    shape: tuple[int, ...]
    initial: Initial

    def __post_init__(self) -> None:
        if not 0 < math.prod(self.shape) <= LARGEST_MANIFEST or min(self.shape, default=1) < 1:
            raise MessageError(
                f"the shape {shown(self.shape)} is impossible, or has more than {LARGEST_MANIFEST} values"
            )
        if len(self.shape) > _DIMENSIONS:
            raise MessageError(f"the shape {shown(self.shape)} has more than {_DIMENSIONS} dimensions")
        self.initial.check(self.shape)


@dataclass(frozen=True)
class TaskInfo:
    """A pair that a client has, and the number of its training examples."""

    pair: Pair
    kind: str
    domains: tuple[str, ...]
    head_size: int
    examples: int


@dataclass(frozen=True)
class Manifest:
    """What a client has, before the first round. Names of classes and columns are not in it."""

    client: str
    fingerprint: str
    tasks: tuple[TaskInfo, ...]
    tensors: Mapping[str, TensorInfo]
    reach: Mapping[str, frozenset[str]]

    @property
    def component_of(self) -> dict[str, str]:
        """Tensor name -> component."""
        return {name: info.component for name, info in self.tensors.items()}

    def initial_values(self, names: Iterable[str], seed: int) -> dict[str, Tensor]:
        """The run's initial values of some tensors."""
        return {n: self.tensors[n].initial.value(n, self.tensors[n].shape, seed) for n in names}

    def tensors_without(self, components: Iterable[str]) -> set[str]:
        """The names of the tensors of all other components.

        Raises:
            MessageError: the client has no such component.
        """
        left_out, known = set(components), set(self.component_of.values())
        if unknown := sorted(left_out - known):
            raise MessageError(f"the client has no component {unknown[0]!r}, which it calls unchanged")
        return {name for name, component in self.component_of.items() if component not in left_out}

    @property
    def component_map(self) -> ComponentMap:
        """Tensor -> component, pair -> components."""
        return ComponentMap(
            self.component_of,
            {task.pair: self.reach[task.pair.task] for task in self.tasks},
        )

    @property
    def examples_per_component(self) -> dict[str, int]:
        """The client's aggregation weights."""
        return self.component_map.examples_per_component({task.pair: task.examples for task in self.tasks})


@dataclass(frozen=True)
class Report:
    """What a client returns beside tensors.

    Attributes:
        server_round: of the instruction that it answers.
        examples: task name -> training examples.
        losses: task name -> mean training loss of the server's copy.
        steps: optimiser steps that the client made for it, of all models.
        replacements: task name -> 1 where the personal model's components were replaced, else 0.
        unchanged: components that training left as they were; their tensors are not in the message.
        validation: task name -> validation score of the client's own model, where the run may stop early; see `stopping`.
    """

    server_round: int
    examples: dict[str, int]
    losses: dict[str, float]
    steps: int
    replacements: dict[str, int]
    unchanged: tuple[str, ...] = ()
    validation: dict[str, float] = field(default_factory=dict)


Metrics = dict[str, dict[str, dict[str, float]]]
"""Task name -> model (`server`, `tap`, …) -> metric -> value."""


def encode(
    values: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None, encoding: Encoding = Encoding.float32
) -> RecordDict:
    """The content of a message.

    Args:
        values: plain values, nested.
        tensors: float32 tensors by name, or None where the message carries none.
        encoding: of the tensors.

    Raises:
        MessageError: a tensor is not finite.
    """
    content = RecordDict({_PLAIN: ConfigRecord({"json": json.dumps(values)})})
    if tensors is not None:
        content[_TENSORS] = ArrayRecord({n: _named(n, to_array, tensor, encoding) for n, tensor in tensors.items()})
    return content


def decode(content: RecordDict) -> dict[str, Any]:
    """The plain values of a message.

    Raises:
        MessageError: there are none.
    """
    record = content.config_records.get(_PLAIN)
    text = None if record is None else record.get("json")
    if not isinstance(text, str):
        raise MessageError(f"the message has no record {_PLAIN!r} with a text 'json': it is not one of tap-flower's")
    if unknown := sorted(content.keys() - {_PLAIN, _TENSORS}):
        raise MessageError(f"the message has the record {shown(unknown[0])}, which the protocol does not know")
    try:
        values = parse_json(text)
        check_type(values, dict[str, Any], "the whole")
    except PlainError as error:
        raise MessageError(f"the message's plain values cannot be read: {error}") from error
    return cast(dict[str, Any], values)


def refuse_tensors(content: RecordDict) -> None:
    """Checks that a message carries plain values alone.

    Raises:
        MessageError: it has tensors.
    """
    if _TENSORS in content:
        raise MessageError(f"the message has the record {_TENSORS!r}, which does not belong in it")


def decode_tensors(content: RecordDict, encoding: Encoding = Encoding.float32) -> dict[str, Tensor]:
    """The tensors of a message (float32), as they came: names, shapes and values are the receiver's to check.

    Raises:
        MessageError: there are none, or one is not in `encoding`.
    """
    record = content.array_records.get(_TENSORS)
    if record is None:
        raise MessageError(f"the message has no record {_TENSORS!r}")
    return {name: _named(name, from_array, array, encoding) for name, array in record.items()}


def _named(name: str, convert: Callable[[_From, Encoding], _To], value: _From, encoding: Encoding) -> _To:
    try:
        return convert(value, encoding)
    except EncodingError as error:
        raise MessageError(f"tensor {shown(name)} {error}") from error


def payload_bytes(content: RecordDict) -> dict[str, int]:
    """Tensor name -> bytes on the wire."""
    record = content.array_records.get(_TENSORS)
    return {} if record is None else {name: len(array.data) for name, array in record.items()}


def instruction(message: Message) -> Instruction:
    """Reads what the server wants.

    Raises:
        MessageError: another protocol or package version, or a malformed instruction.
    """
    values = decode(message.content)
    check_version(values, "the server")
    _check_fields(values, _INSTRUCTION, "the instruction")
    server_round, state = _whole(values, "round", 0), _whole(values, "state", 0)
    if not NAME.fullmatch(values["run"]):
        raise MessageError(f"run is {shown(values['run'])}, not 1 to 64 letters and digits")
    held, best = (None if values.get(key) is None else _whole(values, key, 0) for key in ("held", "best"))
    return Instruction(values["run"], server_round, values["hyper_parameters"], state, held, best)


def encode_instruction(
    wanted: Instruction, tensors: Mapping[str, Tensor] | None = None, encoding: Encoding = Encoding.float32
) -> RecordDict:
    """What `instruction` reads, with the client's tensors."""
    values = asdict(wanted)
    values["round"] = values.pop("server_round")
    return encode({**_version(), **values}, tensors, encoding)


def encode_manifest(manifest: Manifest) -> RecordDict:
    """What `decode_manifest` reads."""
    values = {
        "client": manifest.client,
        "fingerprint": manifest.fingerprint,
        "tasks": [asdict(task) for task in manifest.tasks],
        "tensors": {
            n: [i.component, i.shape, i.initial.distribution, i.initial.scale] for n, i in manifest.tensors.items()
        },
        "reach": {task: sorted(components) for task, components in manifest.reach.items()},
    }
    return encode({**_version(), **values})


def decode_manifest(content: RecordDict) -> Manifest:
    """Reads and checks a client's manifest.

    Raises:
        MessageError: another version, or a malformed manifest.
    """
    values = decode(content)
    who = f"client {shown(values.get('client'))}"
    check_version(values, who)
    try:
        refuse_tensors(content)
        _check_fields(values, _MANIFEST, "the manifest")
        for key in ("client", "fingerprint"):
            _check_name(values[key], key)
        manifest = Manifest(
            client=values["client"],
            fingerprint=values["fingerprint"],
            tasks=tuple(_task(task) for task in values["tasks"]),
            tensors={name: _tensor(name, info) for name, info in values["tensors"].items()},
            reach={task: frozenset(components) for task, components in values["reach"].items()},
        )
        names = [task.pair.task for task in manifest.tasks]
        if not names or sorted(names) != sorted(manifest.reach):
            raise MessageError(f"tasks are {shown(names)}, reach is about {shown(sorted(manifest.reach))}")
        if (total := sum(math.prod(info.shape) for info in manifest.tensors.values())) > LARGEST_MANIFEST:
            raise MessageError(f"the tensors have {total} values, more than {LARGEST_MANIFEST}")
        _ = manifest.component_map  # its own checks
    except ValueError as error:
        raise MessageError(f"{who}: the manifest is malformed: {error}") from error
    return manifest


def _task(values: Mapping[str, Any]) -> TaskInfo:
    """A task of a manifest, in the words of a client spec."""
    _check_fields(values, _TASK, "a task")
    _check_fields(values["pair"], {"task": str, "modalities": list[str]}, "a pair")
    name, modalities, domains = values["pair"]["task"], values["pair"]["modalities"], values["domains"]
    for word in (name, values["kind"], *domains, *modalities):
        _check_name(word, "a task, kind, domain or modality")
    if not modalities or len(set(modalities)) < len(modalities):
        raise MessageError(f"task {name!r} has modalities {shown(modalities)}, not one or more different ones")
    pair = Pair(name, tuple(modalities))
    return TaskInfo(pair, values["kind"], tuple(domains), _whole(values, "head_size", 0), _whole(values, "examples", 1))


def _tensor(name: str, values: Any) -> TensorInfo:
    """A tensor of a manifest: component, shape, distribution, scale."""
    if len(values) != 4:
        raise MessageError(
            f"tensor {shown(name)} is {shown(values)}, not a component, a shape, a distribution and a scale"
        )
    try:
        for value, kind, what in zip(values, (str, list[int], str, float), _TENSOR, strict=True):
            check_type(value, kind, what)
        component, shape, distribution, scale = values
        for path in (name, component):
            if len(path) > _LONGEST_PATH or not _PATH.fullmatch(path.removeprefix(_COMPONENTS)):
                raise MessageError(f"{shown(path)} is no name of a tensor or component")
        if not name.startswith(_COMPONENTS):
            raise MessageError(f"its name does not begin with {_COMPONENTS!r}")
        return TensorInfo(component, tuple(shape), Initial(distribution, float(scale)))
    except ValueError as error:
        raise MessageError(f"tensor {shown(name)}: {error}") from error


def encode_report(
    report: Report, tensors: Mapping[str, Tensor] | None = None, encoding: Encoding = Encoding.float32
) -> RecordDict:
    """What `decode_report` reads, with what the client returns of tensors."""
    return encode(asdict(report), tensors, encoding)


def decode_report(content: RecordDict, tasks: Iterable[str]) -> Report:
    """Reads and checks a client's report.

    Args:
        content: of the reply.
        tasks: the names that the client's manifest has.

    Raises:
        MessageError: a field is missing, is about another task, or is no number of the right kind.
    """
    values, names = decode(content), set(tasks)
    _check_fields(values, _REPORT, "the report")
    for key in ("examples", "losses", "replacements", "validation"):
        if not values[key].keys() <= names:
            raise MessageError(f"{key} is {shown(values[key])}, not an object about the tasks {sorted(names)}")
    for what, key in (("loss", "losses"), ("validation score", "validation")):
        for task, value in values[key].items():
            _check_number(value, f"the {what} of task {task!r}")
    unchanged = values["unchanged"]
    return Report(
        server_round=_whole(values, "server_round", 0),
        examples={task: _whole(values["examples"], task, 1) for task in values["examples"]},
        losses=values["losses"],
        steps=_whole(values, "steps", 0),
        replacements={task: _whole(values["replacements"], task, 0) for task in values["replacements"]},
        unchanged=tuple(unchanged),
        validation=values["validation"],
    )


def decode_metrics(content: RecordDict, tasks: Iterable[str]) -> Metrics:
    """Reads and checks a client's evaluation: task -> model -> metric -> number.

    Raises:
        MessageError: it is anything else.
    """
    refuse_tensors(content)
    values, names = decode(content), set(tasks)
    _check_fields(values, {"metrics": dict[str, dict[str, dict[str, float]]]}, "the evaluation")
    metrics: Metrics = values["metrics"]
    if metrics.keys() != names:
        raise MessageError(f"the metrics are about {shown(sorted(metrics))}, not about the tasks {sorted(names)}")
    for task, by_model in metrics.items():
        for model, by_metric in by_model.items():
            for metric, value in by_metric.items():
                if not _WORD.fullmatch(model) or not _WORD.fullmatch(metric):
                    raise MessageError(f"{shown(model)}, {shown(metric)} are no names of a model and its metric")
                _check_number(value, f"{metric} of task {task!r}, model {model!r},")
    return metrics


def check_version(values: Mapping[str, Any], sender: str) -> None:
    """Refuses another protocol or another version of tap-flower.

    Raises:
        MessageError: with both versions.
    """
    theirs, ours = (values.get("protocol"), values.get("version")), tuple(_version().values())
    if theirs != ours:
        found = f"protocol {str(theirs[0])[:40]} of tap-flower {str(theirs[1])[:40]}"
        raise MessageError(
            f"{sender} speaks {found}, here is protocol {ours[0]} of tap-flower {ours[1]}: install the same version on the "
            f"server and on every node"
        )


def _version() -> dict[str, Any]:
    return {"protocol": PROTOCOL, "version": tap_flower.__version__}


def _whole(values: Mapping[str, Any], key: str, low: int) -> int:
    value = values.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value < 2**53:
        raise MessageError(f"{key} is {shown(value)}, not a whole number from {low} on")
    return value


def _check_number(value: float, what: str) -> None:
    if not abs(value) < LARGEST_NUMBER:
        raise MessageError(f"{what} is {value!r}, not a finite number below {LARGEST_NUMBER:g}")


def _check_name(value: str, what: str) -> None:
    if not NAME.fullmatch(value):
        raise MessageError(f"{what} is {shown(value)}, not 1 to 64 letters, digits, '-' and '_'")


def _check_fields(values: Mapping[str, Any], kinds: Mapping[str, Any], where: str) -> None:
    try:
        check_fields(values, kinds, where)
    except PlainError as error:
        raise MessageError(str(error)) from error


_VERSION = {"protocol": int, "version": str}
_INSTRUCTION = {
    **_VERSION,
    "run": str,
    "round": int,
    "hyper_parameters": dict[str, Any],
    "state": int,
    "held": int | None,
    "best": int | None,
}
_MANIFEST = {
    **_VERSION,
    "client": str,
    "fingerprint": str,
    "tasks": list[dict[str, Any]],
    "tensors": dict[str, list[Any]],
    "reach": dict[str, list[str]],
}
_TASK = {"pair": dict[str, Any], "kind": str, "domains": list[str], "head_size": int, "examples": int}
_TENSOR = ("its component", "its shape", "its distribution", "its scale")
_REPORT = {
    "server_round": int,
    "examples": dict[str, Any],
    "losses": dict[str, float],
    "steps": int,
    "replacements": dict[str, Any],
    "unchanged": list[str],
    "validation": dict[str, float],
}
"""Field -> its type, of the plain values of each message."""
