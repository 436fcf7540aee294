"""What every method does in a federation, whatever it does on its clients."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tap_flower.client.state import StateFolder
from tap_flower.core.tasks import TASK_KINDS
from tap_flower.files import read_tensors
from tap_flower.methods.registry import METHODS, find_method
from tap_flower.report.events import read_events
from tap_flower.wire.messages import Epoch
from tests.federations import SETTINGS, Federation, ToyFederation, each_kind, federation_of, plug_in_config

MODELS = {
    "tap": {"server", "server+finetune", "personal", "tap"},
    "tap-published": {"server", "server+finetune", "personal", "tap"},
    "local": {"personal", "local"},
    "fedavg": {"server"},
    "fedavg+finetune": {"server", "server+finetune"},
    "disentafl": {"server", "disentafl"},
    "fedprox": {"server", "fedprox"},
    "fedper": {"personal", "fedper"},
    "ditto": {"server", "personal", "ditto"},
    "pfedme": {"server", "pfedme"},
    "per-fedavg": {"server", "per-fedavg"},
    "fedrep": {"personal", "fedrep"},
    "fedala": {"server", "personal", "fedala"},
    "fedsa-lora": {"personal", "fedsa-lora"},
    "apfl": {"server", "personal", "apfl"},
    "feddat": {"server", "personal", "feddat"},
}
"""Method -> models in its results."""
KINDS = {"disentafl": "specs", "fedsa-lora": "low-rank"}
"""Method -> kind of the clients that show it; toys for the others.

DisentAFL looks into the fusion of tap-flower's own models.
"""
each_method = pytest.mark.parametrize(
    ("kind", "method"),
    [
        *((KINDS.get(method, "toys"), method) for method in METHODS),
        *(pytest.param("specs", method, marks=pytest.mark.slow) for method in METHODS if method != "disentafl"),
    ],
)
KEEP_HEADS = ("fedper", "fedrep")
OWN_NOISE = ("local", "apfl", "feddat")
"""Their dropout draws other numbers than FedAvg's: a model of its own name, or a second model beside the first."""
Run = tuple[ToyFederation | Federation, dict[str, Any]]
RunOf = Callable[[str, str], Run]


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> RunOf:
    """(kind of clients, method) -> a run of ann and bob."""

    @cache
    def run(kind: str, method: str) -> Run:
        return finished(kind, tmp_path_factory.mktemp("run"), f"method={method}")

    return run


def finished(kind: str, folder: Path, *settings: str) -> Run:
    federation = federation_of(kind, folder, *settings, count=2)
    return federation, federation.strategy().start(federation.grid()).summary


def test_every_method_is_listed_here() -> None:
    assert MODELS.keys() == METHODS.keys()


@each_method
def test_a_run_has_the_methods_models_on_every_client_and_task(run_of: RunOf, kind: str, method: str) -> None:
    _, results = run_of(kind, method)
    assert results["method"] == method
    assert {client: set(tasks) for client, tasks in results["clients"].items()} == {
        "ann": {"languages"},
        "bob": {"languages", "shape_images"},
    }
    for by_task in results["clients"].values():
        for task, found in by_task.items():
            assert found.keys() == MODELS[method]
            assert all(TASK_KINDS[results["kinds"][task]].headline in metrics for metrics in found.values())
    assert find_method(method).result in MODELS[method]


@each_method
def test_training_changes_the_model_that_the_method_is_judged_by(run_of: RunOf, kind: str, method: str) -> None:
    federation, results = run_of(kind, method)
    untrained = run_of(kind, "fedavg")[1]["clients"]["ann"]["languages"]["server"]["loss"]
    result = find_method(method).result
    loss = results["clients"]["ann"]["languages"][result]["loss"]
    assert (loss == untrained) == (method == "fedavg")
    assert {e["round"] for e in read_events(federation.out) if e["event"] == "round"} == {1, 2}


@each_method
def test_optimiser_steps_and_bytes_are_charged(run_of: RunOf, kind: str, method: str) -> None:
    federation, results = run_of(kind, method)
    # Of two steps, FedALA's .8 are two.
    config = plug_in_config(*SETTINGS, "clients_per_round=2", "baselines.fedala_share=1", f"method={method}")
    a_round, second_stage = find_method(method).trained(config)
    assert results["steps"] == dict.fromkeys(("ann", "bob"), 2 * 2 * a_round + 2 * second_stage)
    exchanged = read_tensors(federation.out / "server" / "server.safetensors")[0]
    total = results["bytes"]
    rounds = {way: total[way] - total["first_values"][way] for way in ("down", "up")}
    assert (rounds["down"] > 0) == (rounds["up"] > 0) == bool(exchanged) == (method != "local")
    if method in (*KEEP_HEADS, "fedsa-lora"):
        assert not [component for component in results["bytes"]["per_component"] if component.startswith("head/")]
        assert results["bytes"]["up"] < run_of(kind, "fedavg")[1]["bytes"]["up"]


@each_method
def test_what_a_client_keeps_is_in_its_own_folder(run_of: RunOf, kind: str, method: str) -> None:
    federation, _ = run_of(kind, method)
    exchanged, record = read_tensors(federation.out / "server" / "server.safetensors")
    store = StateFolder(federation.state("bob"), record["run"], [Epoch(**epoch) for epoch in record["epochs"]])
    kept = store.load()
    assert kept is not None
    assert kept.round == 2
    assert store.load_models(find_method(method).results).keys() == set(find_method(method).results)
    for state in kept.memory.models.values():
        assert state
        if method in (*KEEP_HEADS, "fedsa-lora"):
            assert not exchanged.keys() & state.keys()


def first_losses(run: Run) -> dict[str, float]:
    """Client -> training loss of the languages in the first round."""
    event = next(e for e in read_events(run[0].out) if e["event"] == "round")
    return {name: client["losses"]["languages"] for name, client in event["clients"].items()}


@each_method
def test_all_methods_start_from_the_same_values_and_see_the_same_batches(
    run_of: RunOf, kind: str, method: str, tmp_path: Path
) -> None:
    """The first round's training losses agree where nothing but the loss itself is trained on."""
    found, reference = first_losses(run_of(kind, method)), first_losses(run_of(kind, "fedavg"))
    if method == "per-fedavg":
        # Its second batch is seen after a plain gradient step: bob's are images. A single step does not look ahead.
        assert found["bob"] == reference["bob"]
        assert found["ann"] != reference["ann"]
        assert found["ann"] == pytest.approx(reference["ann"], rel=0.2)
        short = ["rounds=1", "train.steps=1", "distill.iterations=1"]
        one, other = (finished(kind, tmp_path / name, f"method={name}", *short) for name in (method, "fedavg"))
        assert first_losses(one) == first_losses(other)
    elif method in OWN_NOISE:
        assert found != reference
        assert found == pytest.approx(reference, rel=0.2)
    else:
        # FedRep's first steps leave the base as it was, so that its second batch is seen by another model.
        assert found == pytest.approx(reference, rel=1e-2 if method == "fedrep" else 1e-3)


class Crash(Exception):
    pass


def crash(*_: Any) -> None:
    raise Crash


@each_kind
@pytest.mark.parametrize("method", ["local", "fedper", "ditto", "fedrep", "fedala", "apfl", "feddat"])
def test_a_run_that_crashed_before_stage_2_ends_the_same(run_of: RunOf, kind: str, method: str, tmp_path: Path) -> None:
    """These keep models on the client; TAP's own resumption has tests of its own."""
    _, whole = run_of(kind, method)
    federation = federation_of(kind, tmp_path, f"method={method}", count=2)
    strategy = federation.strategy()
    strategy.configure_personalise = crash  # type: ignore[method-assign]
    with pytest.raises(Crash):
        strategy.start(federation.grid())
    results = federation.strategy(resume=True).start(federation.grid()).summary
    assert results["clients"] == whole["clients"]
    assert results["steps"] == whole["steps"]


@each_kind
@pytest.mark.parametrize(
    ("setting", "steps"),
    [
        ("replacement.enabled=false", (4, 4)),
        ("distill.stage=finetuning", (4, 2)),
        ("distill.stage=finetuning_twice", (4, 4)),
    ],
)
def test_ablations_of_tap(kind: str, tmp_path: Path, setting: str, steps: tuple[int, int]) -> None:
    _, results = finished(kind, tmp_path, setting)
    assert results["steps"]["bob"] == 2 * steps[0] + steps[1]
    trained = find_method("tap").trained(plug_in_config(setting))
    assert steps == (2 * trained[0], 2 * trained[1])
    replaced = sum(sum(by_task.values()) for by_task in results["replacements"].values())
    assert (replaced == 0) == (setting == "replacement.enabled=false")
    assert ("server+finetune" in results["tasks"]["languages"]) == (setting == "replacement.enabled=false")
    assert "tap" in results["tasks"]["languages"]


@each_kind
def test_the_documentations_own_method_runs(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "add-a-method.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) < 80
    names: dict[str, Any] = {}
    exec(code, names)
    monkeypatch.setitem(METHODS, names["NAME"], names["METHOD"])
    _, results = finished(kind, tmp_path, f"method={names['NAME']}")
    assert set(results["tasks"]["languages"]) == {"personal", names["NAME"]}
    exchanged = set(results["bytes"]["per_component"])
    assert exchanged >= {"head/languages", "head/shape_images"}
    assert not [component for component in exchanged if component.startswith("encoder/")]
    if kind == "toys":
        assert exchanged == {"fusion/mix", "fusion/norm", "head/languages", "head/shape_images"}


@each_kind
def test_a_run_of_tap_has_the_models_of_fedavg(run_of: RunOf, kind: str) -> None:
    """The training of the server's copy does not look at the personal model: three runs in one, digit for digit."""
    tap, fedavg, finetuned = (run_of(kind, method)[1]["clients"] for method in ("tap", "fedavg", "fedavg+finetune"))
    for client, by_task in tap.items():
        for task, by_model in by_task.items():
            assert by_model["server"] == fedavg[client][task]["server"] == finetuned[client][task]["server"]
            assert by_model["server+finetune"] == finetuned[client][task]["server+finetune"]
