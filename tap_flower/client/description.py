"""`model.json` in a client's state folder: what its tensors belong to, so that its models can be used without the run."""

from __future__ import annotations

import hmac
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from tap_flower.config import HyperParameters, hyper_parameters
from tap_flower.core.components import Pair
from tap_flower.core.tasks import IMAGE_GENERATION
from tap_flower.data.fields import ImageForm
from tap_flower.data.spec import check_kind, class_names
from tap_flower.errors import ConfigError, SpecError, StorageError
from tap_flower.files import read_json
from tap_flower.methods.registry import find_method
from tap_flower.wire.fields import Epoch, Name

DESCRIPTION = "model.json"
SCHEMA = 2


class TaskDescription(Struct, frozen=True, forbid_unknown_fields=True):
    """A task, without where its data lie.

    Attributes:
        name: name of the task.
        kind: name of the kind of task.
        modalities: modalities of the input.
        domains: domains of its data; a batch has one of them.
        classes: names of the classes, in the order of the model's outputs (classification).
        image: what its images are made into, whole; as it is by default where the task has none.
    """

    name: Name
    kind: str
    modalities: tuple[str, ...]
    domains: Annotated[tuple[Name, ...], Meta(min_length=1)]
    classes: tuple[str, ...]
    image: ImageForm = ImageForm()

    def __post_init__(self) -> None:
        check_kind(self.kind, list(self.modalities), f"task {self.name!r}")
        class_names(list(self.classes), self.kind, f"task {self.name!r}")
        if ("image" in self.modalities or self.kind == IMAGE_GENERATION.name) and not self.image.is_complete:
            raise SpecError(f"task {self.name!r} lacks the form of its images")

    @property
    def pair(self) -> Pair:
        """The modality-task pair."""
        return Pair(self.name, self.modalities)


def hash_of_classes(run: str, task: str, classes: Sequence[str]) -> str:
    """A hash of the names of a task's classes, in order, by which the server sees whether two clients have the same ones.

    Its key is the run's random identity: no table of hashes made before gives the names. A server that guesses all of them,
    in order, can tell that it was right.
    """
    words = json.dumps([task, *classes]).encode()
    return hmac.new(run.encode(), words, "sha256").hexdigest()[:16] if classes else ""


class StatedSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """The hyper-parameters that a model depends on; see `HyperParameters`."""

    method: str
    seed: int
    model: dict[str, Any]
    compute: dict[str, Any]


class Description(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, dict=True):
    """What a client's tensors belong to.

    Attributes:
        schema: version of this file's format.
        run: identity of the run.
        epochs: the run's start and its resumes; see `wire.messages.Instruction`.
        best: round as of which the client's own model counts, where the run may stop early.
        client: name of the client.
        backbone: `demo`, a folder or a hub id, as in the client spec.
        revision: commit, tag or branch of a hub id.
        fingerprint: fingerprint of the backbone.
        stated: method, seed, the model's shape and the precision of the run.
        tasks: the client's tasks.
    """

    schema: int = SCHEMA
    run: str
    epochs: Annotated[tuple[Epoch, ...], Meta(min_length=1)]
    best: int | None
    client: Name
    backbone: str
    revision: str | None
    fingerprint: str
    stated: StatedSettings = msgspec.field(name="settings")
    tasks: Annotated[tuple[TaskDescription, ...], Meta(min_length=1)]

    def __post_init__(self) -> None:
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names):
            raise ValueError(f"client {self.client!r} has two tasks of one name: {names}")

    @cached_property
    def settings(self) -> HyperParameters:
        """The run's hyper-parameters; what the file does not state is a default."""
        return hyper_parameters(msgspec.to_builtins(self.stated))


def read_description(folder: Path) -> Description:
    """Reads what `from_spec.describe` wrote.

    Raises:
        StorageError: there is none, or it is damaged.
        ConfigError: its method is not installed here.
    """
    path = folder / DESCRIPTION
    values = read_json(path)
    if values.get("schema") != SCHEMA:
        raise StorageError(f"{path} has schema {values.get('schema')}, not {SCHEMA}: use the version that wrote it")
    try:
        found = msgspec.convert(values, Description)
        method = found.settings.method
    except (msgspec.ValidationError, ConfigError) as error:
        raise StorageError(f"{path} is damaged: {error}; restore it") from error
    try:
        find_method(method)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return found
