"""The public interface: its names and signatures stay as they are within a major version."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import fields, is_dataclass

import pytest

import tap_flower

SIGNATURES = {
    "Client": "(name, model, tasks, components=None, state_dir=None)",
    "ComponentMap": "(component_of, reach)",
    "Initial": "(distribution, scale)",
    "Pair": "(task, modalities)",
    "PersonalModel": "(description, which, model, tokenizer, device=None)",
    "TapStrategy": "(config, folder, resume=False)",
    "Task": "(name, kind, modalities, train, test, forward, target, validation=None, margin=None, batch_size=None)",
    "TaskKind": (
        "(name, losses, divergences, statistics, metrics, headline, higher_is_better, margin=0.0, distillation=1.0)"
    ),
    "client_app": "(make_client)",
    "load_module": "(module, folder, which='tap')",
    "load_config": "(preset='demo', config='', settings=())",
}
CONSTANTS = {
    "Config",
    "IMAGE_CLASSIFICATION",
    "IMAGE_GENERATION",
    "TEXT_CLASSIFICATION",
    "TEXT_GENERATION",
    "__version__",
}


def shape(signature: inspect.Signature) -> str:
    """Names and defaults, without types."""
    empty = inspect.Parameter.empty
    parts = [p.name if p.default is empty else f"{p.name}={p.default!r}" for p in signature.parameters.values()]
    return f"({', '.join(parts)})"


def test_the_names() -> None:
    assert set(tap_flower.__all__) == SIGNATURES.keys() | CONSTANTS
    assert dir(tap_flower) == tap_flower.__all__


@pytest.mark.parametrize(("name", "expected"), SIGNATURES.items())
def test_a_signature(name: str, expected: str) -> None:
    assert shape(inspect.signature(getattr(tap_flower, name))) == expected


def test_methods() -> None:
    assert shape(inspect.signature(tap_flower.TapStrategy.start)) == "(self, grid)"
    loads, predicts = tap_flower.PersonalModel.load, tap_flower.PersonalModel.predict
    assert shape(inspect.signature(loads)) == "(folder, which=None, device=None, dtype=None)"
    assert shape(inspect.signature(predicts)) == "(self, task, image=None, text=None, domain=None, batch_size=32)"
    assert shape(inspect.signature(tap_flower.TaskKind.of)) == "(name, losses, divergences, own)"


@pytest.mark.parametrize("name", sorted(SIGNATURES))
def test_everything_public_is_documented(name: str) -> None:
    public = getattr(tap_flower, name)
    text = inspect.getdoc(public) or ""
    assert len(text) > 40
    if is_dataclass(public):
        assert [f.name for f in fields(public) if f"{f.name}:" not in text] == []


def test_what_is_not_public_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'tap_flower' has no attribute 'nothing'"):
        _ = tap_flower.nothing


def test_neither_transformers_nor_datasets_is_imported() -> None:
    names = sorted(set(tap_flower.__all__) - {"PersonalModel"})
    told = "print('transformers' in sys.modules, 'datasets' in sys.modules)"
    code = f"from tap_flower import {', '.join(names)}; import sys; {told}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
