"""What every method does in a federation, whatever it does on its clients."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tap_flower.core.tasks import TASK_KINDS
from tap_flower.federation.store import ClientStore
from tap_flower.methods.registry import METHODS, find_method
from tap_flower.reporting.events import read_events
from tap_flower.storage import read_tensors

from .conftest import CLIENTS, SETTINGS, Federation

MODELS = {
    "tap": {"server", "server+finetune", "personal", "tap"},
    "local": {"personal", "local"},
    "fedavg": {"server"},
    "fedavg+finetune": {"server", "server+finetune"},
    "disentafl": {"server", "disentafl"},
    "fedprox": {"server", "fedprox"},
    "fedper": {"personal", "fedper"},
    "ditto": {"server", "personal", "ditto"},
    "pfedme": {"server", "pfedme"},
    "per-fedavg": {"server", "per-fedavg"},
}
"""Method -> models in its results."""
STEPS = {"tap": (4, 4), "local": (2, 2), "fedavg": (2, 0), "ditto": (4, 2)}
"""Method -> optimiser steps of a participation and of stage 2, where the settings say 2 and 2; (2, 2) for the others."""
each_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Federation, dict[str, Any]]]:
    @cache
    def run(method: str) -> tuple[Federation, dict[str, Any]]:
        return finished(tmp_path_factory.mktemp("run"), [f"method={method}"])

    return run


def small(folder: Path, settings: list[str]) -> Federation:
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump({"clients": CLIENTS[:2]}))
    return Federation(folder, file, [*SETTINGS, "clients_per_round=2", *settings], clients=2)


def finished(folder: Path, settings: list[str]) -> tuple[Federation, dict[str, Any]]:
    federation = small(folder, settings)
    return federation, federation.strategy().start(federation.grid())


def test_every_method_is_listed_here() -> None:
    assert MODELS.keys() == METHODS.keys()


@each_method
def test_a_run_has_the_methods_models_on_every_client_and_task(run_of: Any, method: str) -> None:
    _, results = run_of(method)
    assert results["method"] == method
    for client in CLIENTS[:2]:
        for task in client["tasks"]:
            found = results["clients"][client["name"]][task["name"]]
            assert found.keys() == MODELS[method]
            assert all(TASK_KINDS[task["kind"]].headline in metrics for metrics in found.values())
    assert find_method(method).result in MODELS[method]


@each_method
def test_training_changes_the_model_that_the_method_is_judged_by(run_of: Any, method: str) -> None:
    federation, results = run_of(method)
    untrained = run_of("fedavg")[1]["clients"]["ann"]["languages"]["server"]["loss"]
    result = find_method(method).result
    loss = results["clients"]["ann"]["languages"][result]["loss"]
    assert (loss == untrained) == (method == "fedavg")
    assert {e["round"] for e in read_events(federation.out) if e["event"] == "round"} == {1, 2}


@each_method
def test_optimiser_steps_and_bytes_are_charged(run_of: Any, method: str) -> None:
    federation, results = run_of(method)
    a_round, second_stage = STEPS.get(method, (2, 2))
    assert results["steps"] == dict.fromkeys(("ann", "bob"), 2 * a_round + second_stage)
    exchanged = read_tensors(federation.out / "server" / "server.safetensors")[0]
    assert (results["bytes"]["down"] > 0) == (results["bytes"]["up"] > 0) == bool(exchanged) == (method != "local")
    if method == "fedper":
        assert not [component for component in results["bytes"]["per_component"] if component.startswith("head/")]
        assert results["bytes"]["up"] < run_of("fedavg")[1]["bytes"]["up"]


@each_method
def test_what_a_client_keeps_is_in_its_own_folder(run_of: Any, method: str) -> None:
    federation, _ = run_of(method)
    folder = federation.out / "clients" / "bob"
    run = read_tensors(federation.out / "server" / "server.safetensors")[1]["run"]
    store = ClientStore(folder, run)
    kept = store.load()
    assert kept is not None
    assert kept.server_round == 2
    assert store.second_stage(find_method(method).results).keys() == set(find_method(method).results)
    exchanged = read_tensors(federation.out / "server" / "server.safetensors")[0].keys()
    for state in kept.memory.models.values():
        assert state
        if method == "fedper":
            assert not exchanged & state.keys()


@each_method
def test_all_methods_start_from_the_same_values_and_see_the_same_batches(run_of: Any, method: str) -> None:
    """The first round's training losses agree where nothing but the loss itself is trained on."""
    federation, _ = run_of(method)
    reference, _ = run_of("fedavg")

    def first(of: Federation) -> dict[str, float]:
        event = next(e for e in read_events(of.out) if e["event"] == "round")
        return {name: client["losses"]["languages"] for name, client in event["clients"].items()}

    if method == "per-fedavg":  # its second batch is seen after a plain gradient step
        assert first(federation).keys() == first(reference).keys()
    elif method == "local":  # its dropout has a name of its own
        assert first(federation) == pytest.approx(first(reference), rel=0.2)
    else:
        assert first(federation) == pytest.approx(first(reference), rel=1e-3)


class Crash(Exception):
    pass


def crash(*_: Any) -> None:
    raise Crash


@pytest.mark.parametrize("method", ["local", "fedper", "ditto"])
def test_a_run_that_crashed_before_stage_2_ends_the_same(run_of: Any, method: str, tmp_path: Path) -> None:
    """These keep models on the client; TAP's own resumption has tests of its own."""
    _, whole = run_of(method)
    federation = small(tmp_path, [f"method={method}"])
    strategy = federation.strategy()
    strategy._second_stage = crash  # type: ignore[method-assign]
    with pytest.raises(Crash):
        strategy.start(federation.grid())
    results = federation.strategy(resume=True).start(federation.grid())
    assert results["clients"] == whole["clients"]
    assert results["steps"] == whole["steps"]


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        (["replacement.enabled=false"], (4, 4)),
        (["distill.stage=finetuning"], (4, 2)),
        (["distill.stage=finetuning_twice"], (4, 4)),
    ],
)
def test_ablations_of_tap(tmp_path: Path, settings: list[str], steps: tuple[int, int]) -> None:
    _, results = finished(tmp_path, settings)
    assert results["steps"]["bob"] == 2 * steps[0] + steps[1]
    replaced = sum(sum(by_task.values()) for by_task in results["replacements"].values())
    assert (replaced == 0) == ("replacement.enabled=false" in settings)
    assert ("server+finetune" in results["tasks"]["languages"]) == ("replacement.enabled=false" in settings)
    assert "tap" in results["tasks"]["languages"]


def test_the_documentations_own_method_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "add-a-method.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) < 80
    names: dict[str, Any] = {}
    exec(code, names)
    monkeypatch.setitem(METHODS, names["NAME"], names["METHOD"])
    _, results = finished(tmp_path, [f"method={names['NAME']}"])
    assert set(results["tasks"]["languages"]) == {"personal", names["NAME"]}
    assert results["bytes"]["per_component"]
    assert not [component for component in results["bytes"]["per_component"] if component.startswith("encoder/")]
