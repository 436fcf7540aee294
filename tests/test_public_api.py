"""The public interface: its names and signatures stay as they are within a major version."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import fields, is_dataclass

import pytest
from flwr.serverapp.strategy import Result, Strategy

import tap_flower

SIGNATURES = {
    "Client": (
        "(name, model, tasks, components=None, state_dir=None, folder=None, fingerprint='own-modules', outline=None, "
        "observe=None, describe=None, buffers='personal', reach=None)"
    ),
    "ComponentMap": "(component_of, reach)",
    "Pair": "(task, modalities)",
    "PersonalModel": "(description, which, model, tokenizer, device=None)",
    "TapClientApp": "(mods=None, quotes=<lambda>)",
    "TapResult": (
        "(arrays=<factory>, train_metrics_clientapp=<factory>, evaluate_metrics_clientapp=<factory>, "
        "evaluate_metrics_serverapp=<factory>, personalise_metrics_clientapp=<factory>, clients=<factory>, tasks=<factory>, "
        "bytes=<factory>, missing=<factory>, marks=<factory>, summary=<factory>)"
    ),
    "TapStrategy": (
        "(*, config=None, run_folder=None, resume=False, method=None, fraction_train=None, min_train_nodes=None, "
        "min_available_nodes=None, weighted_by_key='num-examples', train_metrics_aggr_fn=None, "
        "evaluate_metrics_aggr_fn=None)"
    ),
    "Task": (
        "(name, kind, modalities, train, test, forward=None, target=None, validation=0.2, margin=None, "
        "batch_size=None, domains=(), head_size=0, classes=(), fit=None, score=None)"
    ),
    "TaskKind": (
        "(name, losses, divergences, statistics, metrics, headline, higher_is_better, margin=0.0, distillation=1.0)"
    ),
    "load_module": "(module, folder, which='tap')",
    "load_personal": "(module, client, run=None, which=None, state_dir=None)",
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
    """Names and defaults, without types; what follows `*` is given by name alone."""
    parts = []
    for p in signature.parameters.values():
        if p.kind is inspect.Parameter.KEYWORD_ONLY and "*" not in parts:
            parts.append("*")
        default = getattr(p.default, "__name__", repr(p.default))  # that of a function has an address
        parts.append(p.name if p.default is inspect.Parameter.empty else f"{p.name}={default}")
    return f"({', '.join(parts)})"


def test_the_names() -> None:
    assert set(tap_flower.__all__) == SIGNATURES.keys() | CONSTANTS
    assert dir(tap_flower) == tap_flower.__all__


@pytest.mark.parametrize(("name", "expected"), SIGNATURES.items())
def test_a_signature(name: str, expected: str) -> None:
    assert shape(inspect.signature(getattr(tap_flower, name))) == expected


def test_methods() -> None:
    start = tap_flower.TapStrategy.start
    assert shape(inspect.signature(start)) == (
        "(self, grid, initial_arrays=None, num_rounds=None, timeout=None, train_config=None, evaluate_config=None, "
        "evaluate_fn=None)"
    )
    assert shape(inspect.signature(tap_flower.TapClientApp.client)) == "(self)"
    loads, predicts = tap_flower.PersonalModel.load, tap_flower.PersonalModel.predict
    assert shape(inspect.signature(loads)) == "(folder, which=None, device=None, dtype=None)"
    assert shape(inspect.signature(predicts)) == "(self, task, image=None, text=None, domain=None, batch_size=32)"
    assert shape(inspect.signature(tap_flower.TaskKind.of)) == "(name, losses, divergences, own)"


def test_the_strategy_takes_what_flowers_take() -> None:
    assert issubclass(tap_flower.TapStrategy, Strategy)
    assert issubclass(tap_flower.TapResult, Result)
    hooks = ("configure_train", "aggregate_train", "configure_evaluate", "aggregate_evaluate", "summary")
    for name in (*hooks, "start"):
        ours, flowers = (inspect.signature(getattr(of, name)).parameters for of in (tap_flower.TapStrategy, Strategy))
        assert list(ours) == list(flowers), name
    for stage_2, stage_1 in (("configure_personalise", hooks[0]), ("aggregate_personalise", hooks[1])):
        ours, others = (inspect.signature(getattr(tap_flower.TapStrategy, name)) for name in (stage_2, stage_1))
        assert shape(ours) == shape(others)


@pytest.mark.parametrize("name", sorted(SIGNATURES))
def test_everything_public_is_documented(name: str) -> None:
    public = getattr(tap_flower, name)
    text = inspect.getdoc(public) or ""
    assert len(text) > 40
    if is_dataclass(public):
        inherited = {f.name for f in fields(Result)} if issubclass(public, Result) else set()  # Flower documents them
        assert [f.name for f in fields(public) if f"{f.name}:" not in text and f.name not in inherited] == []


def test_what_is_not_public_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'tap_flower' has no attribute 'nothing'"):
        _ = tap_flower.nothing


def test_neither_transformers_nor_datasets_is_imported() -> None:
    names = sorted(set(tap_flower.__all__) - {"PersonalModel"})
    told = "print('transformers' in sys.modules, 'datasets' in sys.modules)"
    code = f"from tap_flower import {', '.join(names)}; import sys; {told}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
