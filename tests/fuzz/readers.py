"""Everything that reads what others wrote: each with valid inputs to start from, and the errors that it may raise.

An input is bytes: the JSON of a message, the content of a file, or an array with a line of JSON before its data.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from unittest import mock

import pytest
import torch
import yaml
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as Proto

from tap_flower import files as storage
from tap_flower.client import state as store
from tap_flower.client.description import read_description
from tap_flower.client.state import ClientState, StateFolder
from tap_flower.config import Encoding, HyperParameters, client_specs, hyper_parameters, load_config, plain, read_yaml
from tap_flower.core.initial import Initial
from tap_flower.data.spec import client_spec
from tap_flower.errors import ConfigError, MessageError, SpecError, StorageError
from tap_flower.files import read_json, read_record, read_tensors, write_tensors
from tap_flower.methods.method import Memory
from tap_flower.plain import PlainError, parse_json
from tap_flower.report.client_records import read_decisions
from tap_flower.server import checkpoint
from tap_flower.server.checkpoint import Progress
from tap_flower.server.early_stopping import Validation
from tap_flower.server.privacy import Ledger
from tap_flower.server.roster import Roster
from tap_flower.wire import messages
from tap_flower.wire.messages import (
    ARRAYS,
    FIELDS,
    Epoch,
    Evaluation,
    Instruction,
    Manifest,
    Report,
    TaskInfo,
    TensorInfo,
)
from tap_flower.wire.tensors import encode_tensors, from_array, to_array

RUN, TASK = "r1", "triage"
DESCRIPTION: dict[str, Any] = {
    "schema": 2, "run": RUN, "epochs": [{"history": "h", "start": 0}],
    "best": 2, "client": "ann", "backbone": "demo", "revision": None, "fingerprint": "f" * 16,
    "settings": {
        "method": "tap", "seed": 41, "model": {"layers": 1, "text_length": 128, "image_size": None},
        "compute": {"precision": "float32"},
    },
    "tasks": [
        {"name": TASK, "kind": "text_classification", "modalities": ["text"], "domains": ["notes"], "classes": ["a", "b"]}
    ],
}  # fmt: skip
SMALL = 10_000
"""Values of a manifest's tensors up to which the server is asked to make them."""


@dataclass(frozen=True)
class Reader:
    """A reader.

    Attributes:
        read: it; takes an input.
        valid: inputs that it takes without an error.
        errors: that it may raise.
        form: `json`, `lines` of it, `yaml`, `binary` (JSON after 8 bytes, as in safetensors), `array` or `bytes`.
    """

    read: Callable[[bytes], object]
    valid: tuple[bytes, ...]
    errors: tuple[type[Exception], ...]
    form: str

    def attempt(self, data: bytes) -> bool:
        """Whether the reader takes the input; an error that it may not raise goes on."""
        try:
            self.read(data)
        except self.errors as error:
            if not str(error):  # an error without words is no answer
                raise
            return False
        return True


def readers(folder: Path, patch: pytest.MonkeyPatch) -> dict[str, Reader]:
    """All readers, by name; `folder` is theirs alone, and what they patch holds until `patch` is undone."""
    folder.mkdir(exist_ok=True)
    # A file that is written twice within a tick of the clock would not be read again; and what is behind the checksum is to
    # be reached, too.
    patch.setattr(store, "_CACHE_BYTES", -1)
    patch.setattr(storage, "_checksum", lambda *_: "0")
    return _of_messages() | _of_arrays() | _of_files(folder) | _of_specs(folder)


def text_of(content: RecordDict) -> bytes:
    """The JSON in a message."""
    return cast(str, cast(ConfigRecord, content[FIELDS])["json"]).encode()


def content_of(data: bytes) -> RecordDict:
    """A message with this JSON."""
    return RecordDict({FIELDS: ConfigRecord({"json": data.decode("utf-8", "replace")})})


def manifest() -> Manifest:
    tensors = {
        "encoder/text.weight": TensorInfo("encoder/text", (4, 4), Initial("identity", 1.0)),
        "encoder/text.bias": TensorInfo("encoder/text", (4,), Initial("constant", 0.0)),
        "head/triage.weight": TensorInfo("head/triage", (2, 4), Initial("uniform", 0.5)),
        "head/triage.scale": TensorInfo("head/triage", (), Initial("normal", 0.02)),
    }
    task = TaskInfo(TASK, ("text",), "text_classification", ("notes",), 2, 30)
    reach = {TASK: frozenset({"encoder/text", "head/triage"})}
    return Manifest(client="ann", fingerprint="7fa8b4c276937338", tasks=(task,), tensors=tensors, reach=reach)


def _admit(content: RecordDict) -> None:
    found = messages.decode(content, Manifest, "a node")
    if sum(torch.Size(info.shape).numel() for info in found.tensors.values()) <= SMALL:
        Roster(41).admit(1, found)


def _of_messages() -> dict[str, Reader]:
    epochs = (Epoch("h1", 0), Epoch("h2", 2))
    settings = plain(HyperParameters())
    instruction = Instruction(run=RUN, epochs=epochs, round=3, hyper_parameters=settings, best=0)
    own = {TASK: 0.5}
    report = Report(round=3, examples={TASK: 30}, losses=own, steps=4, replacements={TASK: 1}, validation={TASK: 0.25})
    evaluation = Evaluation({TASK: {"server": {"loss": 0.5, "accuracy": 0.75}, "tap": {"loss": 0.25}}})

    def decoder(kind: Any) -> Callable[[RecordDict], object]:
        return lambda content: messages.decode(content, kind, "a node")

    known: dict[str, tuple[Callable[[RecordDict], object], RecordDict]] = {
        "instruction": (decoder(Instruction), messages.encode(instruction)),
        "manifest": (_admit, messages.encode(manifest())),
        "report": (lambda content: decoder(Report)(content).check(manifest(), 3), messages.encode(report)),  # type: ignore[attr-defined]
        "metrics": (lambda content: decoder(Evaluation)(content).check(manifest()), messages.encode(evaluation)),  # type: ignore[attr-defined]
    }

    def reader(decode: Callable[[RecordDict], object], content: RecordDict) -> Reader:
        return Reader(lambda data: decode(content_of(data)), (text_of(content),), (MessageError,), "json")

    def every(data: bytes) -> None:
        """A whole message as it travels; what Flower does not take is not ours."""
        try:
            content = recorddict_from_proto(Proto.FromString(data))
        except Exception:
            return
        for decode, _ in known.values():
            decode(content)
        messages.payload_bytes(content)
        messages.tensors_of(content, Encoding.float32)

    arrays = encode_tensors({"a": torch.ones(2, 3), "b": torch.zeros(4)}, Encoding.float32)
    whole = tuple(
        recorddict_to_proto(content).SerializeToString()
        for content in (messages.encode(report, arrays), known["manifest"][1], known["metrics"][1])
    )
    hyper = Reader(
        lambda data: hyper_parameters(parse_json(data.decode("utf-8", "replace"))),
        (json.dumps(plain(HyperParameters())).encode(),),
        (ConfigError, PlainError),
        "json",
    )
    found = {name: reader(*parts) for name, parts in known.items()}
    return found | {"hyper_parameters": hyper, "record": Reader(every, whole, (MessageError,), "bytes")}


def array_input(array: Array) -> bytes:
    """An array as an input."""
    return json.dumps([array.dtype, array.shape, array.stype]).encode() + b"\n" + array.data


def _of_arrays() -> dict[str, Reader]:
    tensor = torch.linspace(-1, 1, 600).view(3, 200)

    def reader(encoding: Encoding) -> Reader:
        def read(data: bytes) -> None:
            line, _, rest = data.partition(b"\n")
            try:
                dtype, shape, stype = json.loads(line)
                array = Array(dtype, tuple(shape), stype, rest)
            except (ValueError, TypeError, RecursionError):
                return  # what Flower does not make an array of
            found = messages.tensors_of(RecordDict({ARRAYS: ArrayRecord({"x": array})}), encoding)["x"]
            assert (found.dtype, found.shape) == (torch.float32, array.shape)

        assert torch.allclose(from_array(to_array(tensor, encoding), encoding), tensor, atol=0.01)
        return Reader(read, (array_input(to_array(tensor, encoding)),), (MessageError,), "array")

    return {f"array {encoding.value}": reader(encoding) for encoding in Encoding}


def state_folder(folder: Path) -> StateFolder:
    return StateFolder(folder, RUN, [Epoch("h", 0)])


def _of_files(folder: Path) -> dict[str, Reader]:
    example, broken = folder / "example", folder / "broken"

    def copies() -> dict[str, torch.Tensor]:
        return {"w": torch.ones(2, 3), "b": torch.zeros(4)}

    tensors = copies()
    own = state_folder(example)
    memory = Memory({"personal": copies(), "anchor": copies()}, {"personal_losses": {TASK: 0.5}})
    own.save(ClientState(3, memory, residual=copies()))
    own.save_server(tensors, 3)
    own.save_models({"tap": tensors}, 1)
    progress = Progress(
        run=RUN,
        config={"seed": 41},
        round=3,
        replacements={"ann": {TASK: 1}},
        epochs=[Epoch("h", 0)],
        down={"head/triage": 2},
        up={"head/triage": 2},
        steps={"ann": 2},
        took_part={"ann": 3},
        dropped={"client 'ann'": 1},
        marks={"ann": ["it had no state"]},
        validation=Validation({"ann": 0.5}, 2, 0.5),
        privacy=Ledger({"ann": 1}, {"head/triage": {"ann": 1}}, {"head/triage": 1}),
    )
    checkpoint.save(example, progress, tensors, {"w": torch.zeros(2, 3), "b": tensors["b"]})
    write_tensors(example / "tensors", tensors, {"record": [1, None]})
    decision = {
        "run": RUN,
        "round": 1,
        "task": TASK,
        "teacher_loss": 0.5,
        "personal_loss": None,
        "margin": 0.01,
        "replaced": True,
    }
    (example / "model.json").write_text(json.dumps(DESCRIPTION))
    (example / "decisions.jsonl").write_text(json.dumps(decision) + "\n" + json.dumps(decision) + "\n")

    def reader(
        name: str,
        read: Callable[[], object],
        form: str = "binary",
        errors: tuple[type[Exception], ...] = (StorageError,),
    ) -> Reader:
        def written(data: bytes) -> None:
            broken.mkdir(exist_ok=True)
            (broken / name).write_bytes(data)
            read()

        return Reader(written, ((example / name).read_bytes(),), errors, form)

    def server() -> None:
        state_folder(broken).load_server()  # what is damaged is None, never an error

    return {
        "personal": reader(store.PERSONAL, lambda: state_folder(broken).load()),
        "server": reader(store.SERVER, server),
        "second stage": reader("tap.safetensors", lambda: state_folder(broken).load_models(["tap"])),
        "checkpoint": reader("server.safetensors", lambda: checkpoint.load(broken)),
        "tensors": reader("tensors", lambda: (read_record(broken / "tensors"), read_tensors(broken / "tensors"))),
        "json": reader("state.json", lambda: read_json(broken / "state.json"), "json"),
        "description": reader("model.json", lambda: read_description(broken), "json", (StorageError, ConfigError)),
        "decisions": reader("decisions.jsonl", lambda: read_decisions(broken), "lines"),
    }


def _of_specs(folder: Path) -> dict[str, Reader]:
    file = folder / "spec.yaml"
    source: dict[str, Any] = {
        "format": "csv",
        "path": "train.csv",
        "rows": [0, None],
        "shuffle": True,
        "domain": "letters",
    }
    task = {
        "name": TASK, "kind": "text_classification", "modalities": ["text"], "domain": "notes", "classes": ["a", "b"],
        "labels": [1, 2], "margin": 0.5, "batch_size": 4, "columns": {"text": ["x", "y"], "label": "z"},
        "train": [source, {**source, "templates": {"text": "{{ x | upper }}"}}],
        "test": {"format": "hub", "name": "o/n", "split": "test", "config": "c", "revision": "main"},
    }  # fmt: skip
    spec = {"name": "ann", "backbone": "demo", "revision": "main", "tasks": [task]}
    pattern = {
        "tasks": [
            {
                **task,
                "train": {"data": "d", "split": "train", "share": [0, 0.5]},
                "test": {"data": "d", "split": "test", "share": "rest"},
            }
        ]
    }
    config = {
        "replacement": {"source": "received", "evidence": "validation"}, "rounds": 2,
        "train": {"steps": 3, "learning_rate": 1.0e-3}, "patterns": [pattern],
        "groups": 2, "datasets": {"d": {"name": "o/n", "rows": 20}},
    }  # fmt: skip

    def read_spec(data: bytes) -> None:
        file.write_bytes(data)
        spec = client_spec(read_yaml(file, "client spec"))
        assert hash(spec) == hash(spec)
        for task in spec.tasks:
            for source in (*task.train, *task.validation, *task.test):
                assert all(field.reads is not None for field in task.fields(source).values())

    preset = folder / "preset.yaml"
    preset.write_text("rounds: 3\n")  # the demo's own takes long to read

    def loaded(file: str, settings: list[str]) -> None:
        with mock.patch("tap_flower.config.presets", return_value={"demo": preset}):
            client_specs(load_config("demo", file, settings))

    def read_config(data: bytes) -> None:
        file.write_bytes(data)
        loaded(str(file), [])

    def setting(data: bytes) -> None:
        loaded("", [data.decode("utf-8", "replace")])

    specs = tuple(
        yaml.safe_dump(values).encode()
        for values in (spec, {**spec, "tasks": [task, {**task, "name": "b", "classes": 2}]})
    )
    configs = tuple(yaml.safe_dump(values).encode() for values in (config, {"clients": [spec], "seed": 5}))
    return {
        "spec": Reader(read_spec, specs, (ConfigError, SpecError), "yaml"),
        "config": Reader(read_config, configs, (ConfigError,), "yaml"),
        "setting": Reader(
            setting, (b"train.steps=5", b"wire.encoding=int8", b"data={root: /a}"), (ConfigError,), "bytes"
        ),
    }
