"""Manifests: who a client is, which pairs it has, and which tensors it holds."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from flwr.app import RecordDict
from torch import Tensor

from tap_flower.core.components import ComponentMap, Pair
from tap_flower.core.initial import Initial
from tap_flower.plain import check_type, shown
from tap_flower.wire.messages import (
    VERSION,
    MessageError,
    check_name,
    check_values,
    check_version,
    decode,
    encode,
    refuse_tensors,
    version,
    whole,
)

LARGEST_MANIFEST = 2**29
"""Values of all tensors of a client, 2 GiB in float32; more are refused before anything is allocated for them."""
_DIMENSIONS = 8
_PATH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")
"""Names of components; a tensor's is one after `components.`: a file may hold other names beside them."""
_COMPONENTS, _LONGEST_PATH = "components.", 256


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
    return encode({**version(), **values})


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
        check_values(values, _MANIFEST, "the manifest")
        for key in ("client", "fingerprint"):
            check_name(values[key], key)
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
    check_values(values, _TASK, "a task")
    check_values(values["pair"], {"task": str, "modalities": list[str]}, "a pair")
    name, modalities, domains = values["pair"]["task"], values["pair"]["modalities"], values["domains"]
    for word in (name, values["kind"], *domains, *modalities):
        check_name(word, "a task, kind, domain or modality")
    if not modalities or len(set(modalities)) < len(modalities):
        raise MessageError(f"task {name!r} has modalities {shown(modalities)}, not one or more different ones")
    pair = Pair(name, tuple(modalities))
    return TaskInfo(pair, values["kind"], tuple(domains), whole(values, "head_size", 0), whole(values, "examples", 1))


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


_MANIFEST = {
    **VERSION,
    "client": str,
    "fingerprint": str,
    "tasks": list[dict[str, Any]],
    "tensors": dict[str, list[Any]],
    "reach": dict[str, list[str]],
}
_TASK = {"pair": dict[str, Any], "kind": str, "domains": list[str], "head_size": int, "examples": int}
_TENSOR = ("its component", "its shape", "its distribution", "its scale")
