"""`model.json` in a client's state folder: what its tensors are of, so that its models can be used without the run."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tap_flower.config import HyperParameters, hyper_parameters
from tap_flower.core.components import Pair
from tap_flower.data.spec import ClientSpec, SpecError, check_kind, check_name, class_names
from tap_flower.errors import ConfigError
from tap_flower.files import StorageError, read_json, write_json
from tap_flower.methods.registry import find_method
from tap_flower.plain import PlainError, check_fields

DESCRIPTION = "model.json"
SCHEMA = 1
_FIELDS = {
    "schema": int,
    "run": str,
    "best": int | None,
    "client": str,
    "backbone": str,
    "revision": str | None,
    "fingerprint": str,
    "settings": dict[str, Any],
    "tasks": list[dict[str, Any]],
}
_SETTINGS = {"method": str, "seed": int, "model": dict[str, Any], "compute": dict[str, Any]}
_TASK = {"name": str, "kind": str, "modalities": list[str], "domains": list[str], "classes": list[str]}


@dataclass(frozen=True)
class TaskDescription:
    """A task, without where its data lie.

    Attributes:
        name: of the task.
        kind: of task.
        modalities: of the input.
        domains: of its data; a batch has one of them.
        classes: names of the classes, in the order of the model's outputs (classification).
    """

    name: str
    kind: str
    modalities: tuple[str, ...]
    domains: tuple[str, ...]
    classes: tuple[str, ...]

    @property
    def pair(self) -> Pair:
        """The modality-task pair."""
        return Pair(self.name, self.modalities)


@dataclass(frozen=True)
class Description:
    """What a client's tensors are of.

    Attributes:
        run: identity of the run.
        best: round as of which the client's own model counts, where the run may stop early; see `messages.Instruction`.
        client: its name.
        backbone: as in the client spec.
        revision: likewise.
        fingerprint: of the backbone.
        settings: method, seed, the model's shape and the precision of the run; the rest are defaults.
        tasks: of the client.
    """

    run: str
    best: int | None
    client: str
    backbone: str
    revision: str | None
    fingerprint: str
    settings: HyperParameters
    tasks: tuple[TaskDescription, ...]


def describe(
    folder: Path, spec: ClientSpec, fingerprint: str, wanted: HyperParameters, run: str, best: int | None
) -> None:
    """Writes `model.json`, unless it says the same already.

    Args:
        folder: of the client's state.
        spec: of the client.
        fingerprint: of its backbone.
        wanted: the run's hyper-parameters.
        run: identity of the run.
        best: see `Description`.

    Raises:
        StorageError: the folder cannot be written.
    """
    values = {
        "schema": SCHEMA,
        "run": run,
        "best": best,
        "client": spec.name,
        "backbone": spec.backbone,
        "revision": spec.revision,
        "fingerprint": fingerprint,
        "settings": {
            "method": wanted.method,
            "seed": wanted.seed,
            "model": asdict(wanted.model),
            "compute": {"precision": wanted.compute.precision.value},
        },
        "tasks": [
            {
                "name": task.name,
                "kind": task.kind,
                "modalities": list(task.modalities),
                "domains": list(task.domains),
                "classes": list(task.classes),
            }
            for task in spec.tasks
        ],
    }
    with suppress(StorageError):
        if read_json(folder / DESCRIPTION) == values:
            return
    write_json(folder / DESCRIPTION, values)


def read_description(folder: Path) -> Description:
    """Reads what `describe` wrote.

    Raises:
        StorageError: there is none, or it is damaged.
    """
    path = folder / DESCRIPTION
    values = read_json(path)
    if values.get("schema") != SCHEMA:
        raise StorageError(f"{path} has schema {values.get('schema')}, not {SCHEMA}: use the version that wrote it")
    try:
        return description_of(values)
    except (PlainError, SpecError, ConfigError) as error:
        raise StorageError(f"{path} is damaged: {error}; restore it") from error


def description_of(values: dict[str, Any]) -> Description:
    """Checks the content of a `model.json`.

    Raises:
        PlainError: a field is missing, unknown or of another type.
        SpecError: the client or a task is none that a client spec could have.
        ConfigError: the method or a hyper-parameter is unknown, or out of bounds.
    """
    check_fields(values, _FIELDS, "it")
    where = f"client {values['client'][:64]!r}"
    check_name(values["client"], where, "name")
    tasks = tuple(_task(task, where) for task in values["tasks"])
    names = [task.name for task in tasks]
    if not names or len(set(names)) < len(names):
        raise SpecError(f"{where} has no tasks, or two of one name")
    check_fields(values["settings"], _SETTINGS, "settings")
    settings = hyper_parameters(values["settings"])
    find_method(settings.method)
    kept = {key: values[key] for key in _FIELDS if key not in ("schema", "settings", "tasks")}
    return Description(**kept, settings=settings, tasks=tasks)


def _task(values: dict[str, Any], client: str) -> TaskDescription:
    check_fields(values, _TASK, f"a task of {client}")
    where = f"{client}: task {values['name'][:64]!r}"
    check_name(values["name"], where, "name")
    check_kind(values["kind"], values["modalities"], where)
    if not values["domains"]:
        raise SpecError(f"{where} has no domain")
    for domain in values["domains"]:
        check_name(domain, where, "domain")
    class_names(values["classes"], values["kind"], where)
    modalities, domains, classes = (tuple(values[key]) for key in ("modalities", "domains", "classes"))
    return TaskDescription(values["name"], values["kind"], modalities, domains, classes)
