"""No pickle is ever read: not by this package's code, and not by what it calls on files that somebody else wrote."""

from __future__ import annotations

import ast
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig

from tap_flower.client.state import PERSONAL, PREVIOUS, StateFolder
from tap_flower.client.text_metrics import MissingError, load_bertscore
from tap_flower.errors import BackboneError, StorageError
from tap_flower.files import read_json
from tap_flower.hub import demo_folder
from tap_flower.models.load import load_backbone, outline
from tap_flower.server import checkpoint
from tap_flower.wire.fields import Epoch

ROOT = Path(__file__).parent.parent
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
CALLS = {"eval", "exec", "compile", "__import__", "read_pickle", "unsafe_load", "full_load"}


def unsafe(text: str) -> list[str]:
    """What in a Python file reads pickles or runs text as code."""
    found = []
    for node in ast.walk(ast.parse(text)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [f"import {name}" for name in names if name.split(".")[0] in MODULES]
        if not isinstance(node, ast.Call):
            continue
        keywords = {k.arg: k.value.value if isinstance(k.value, ast.Constant) else None for k in node.keywords}
        called = ast.unparse(node.func)
        if called in CALLS or called.split(".")[-1] in CALLS - {"compile", "eval"}:
            found.append(called)
        if called == "torch.load" and keywords.get("weights_only") is not True:
            found.append(called)
        if keywords.get("allow_pickle", False) is not False or keywords.get("trust_remote_code", False) is not False:
            found.append(called)
        if called.startswith("yaml.load") and ast.unparse(node.args[-1]) != "_Loader":
            found.append(called)
    return found


@pytest.mark.parametrize(
    "text",
    [
        "import pickle", "from joblib import load", "import a, dill.session", "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "np.load(f, allow_pickle=True)", "pd.read_pickle(f)", "eval(x)", "yaml.load(f, yaml.Loader)", "yaml.unsafe_load(f)",
        "A.from_pretrained(x, trust_remote_code=True)", "A.from_pretrained(x, trust_remote_code=flag)",
    ],
)  # fmt: skip
def test_the_search_finds(text: str) -> None:
    assert unsafe(text)


def test_no_code_of_the_package_reads_pickles_or_runs_text() -> None:
    files = [path for folder in ("tap_flower", "client_app", "server_app") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 90
    assert [(path.name, found) for path in files for found in unsafe(path.read_text())] == []


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """The file that a payload leaves behind; it does where a pickle is read."""
    path = tmp_path / "mark"
    pickle.loads(pickle.dumps(Payload(path)))
    assert path.exists()
    path.unlink()
    return path


def state_folder(folder: Path) -> StateFolder:
    return StateFolder(folder, "r1", [Epoch("h", 0)])


READERS: list[tuple[str, Callable[[Path], Any]]] = [
    *((name, lambda folder: state_folder(folder).load()) for name in (PERSONAL, PREVIOUS)),
    ("tap.safetensors", lambda folder: state_folder(folder).load_models(["tap"])),
    ("server.safetensors", checkpoint.load),
    ("state.json", lambda folder: read_json(folder / "state.json")),
]


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(("name", "read"), READERS)
def test_a_pickle_in_the_place_of_a_state_is_damage(
    tmp_path: Path, mark: Path, name: str, read: Callable[[Path], Any], zipped: bool
) -> None:
    if zipped:  # as torch.save writes it
        torch.save({"w": Payload(mark)}, tmp_path / name)
    else:
        (tmp_path / name).write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(StorageError, match=rf"{name} is damaged"):
        read(tmp_path)
    assert state_folder(tmp_path).load_server() is None
    assert not mark.exists()


@pytest.fixture
def pickled(tmp_path: Path, mark: Path) -> Path:
    """A checkpoint whose weights are a pickle with a payload."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(demo_folder(), folder)
    (folder / "model.safetensors").unlink()
    torch.save({"w": Payload(mark)}, folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize("load", [load_backbone, outline])
def test_a_checkpoint_with_pickled_weights_alone_is_refused(
    pickled: Path, mark: Path, load: Callable[..., Any]
) -> None:
    with pytest.raises(
        BackboneError, match=r"`tap-flower fetch .*pytorch_model.bin is a pickle and never read: the same"
    ) as refused:
        load(str(pickled), 1)
    assert "model.safetensors" in str(refused.value)
    assert not mark.exists()


def test_pickled_weights_beside_safetensors_are_not_looked_at(pickled: Path, mark: Path) -> None:
    shutil.copy(demo_folder() / "model.safetensors", pickled)
    assert load_backbone(str(pickled), 1).fingerprint == load_backbone("demo", 1).fingerprint
    assert not mark.exists()


def test_a_damaged_checkpoint_is_named(pickled: Path) -> None:
    (pickled / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    with pytest.raises(BackboneError, match=r"cannot be loaded"):
        load_backbone(str(pickled), 1)


@pytest.mark.slow
def test_the_model_of_bertscore_runs_no_payload(pickled: Path, mark: Path) -> None:
    """It may be a pickle, which transformers reads with `weights_only`: no objects but tensors are made of it."""
    BertConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=1, intermediate_size=8).save_pretrained(pickled)
    with pytest.raises(MissingError, match="BERTScore is left out"):
        load_bertscore(str(pickled))
    assert not mark.exists()
