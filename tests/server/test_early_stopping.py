"""Early stopping."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from tap_flower.client.state import BEST, StateFolder
from tap_flower.core.components import cpu_state
from tap_flower.files import read_tensors
from tap_flower.methods.session import Session
from tap_flower.report.events import read_events
from tap_flower.server.early_stopping import Validation
from tap_flower.server.strategy import TapStrategy
from tap_flower.wire.messages import Epoch
from tests.federation.runs import sent
from tests.federations import Make, ToyFederation, federation_of_toys
from tests.grid import InProcessGrid
from tests.toys import TOYS


def test_the_best_round_is_that_of_the_best_mean_over_all_clients_so_far() -> None:
    validation = Validation()
    assert validation.take(1, {"ann": {"a": 0.5, "b": 0.7}}) == pytest.approx(0.6)
    assert validation.take(2, {"bob": {"a": 0.2}}) == pytest.approx(0.4)
    assert validation.best_round == 2  # bob has come in: what was before cannot be compared
    validation.take(3, {"bob": {"a": 0.1}})
    assert (validation.best_round, validation.waited(3)) == (2, 1)
    assert validation.take(4, {"ann": {"a": 0.9, "b": 0.9}}) == pytest.approx(0.5)
    assert (validation.best_round, validation.best_score) == (4, pytest.approx(0.5))


def test_a_client_that_never_has_a_score_is_not_new_for_ever() -> None:
    validation = Validation()
    for server_round in (1, 2, 3):
        validation.take(server_round, {"ann": {"a": 0.5}, "bob": {}})
    assert (validation.best_round, validation.waited(3)) == (1, 2)


def test_without_scores_nothing_is_better() -> None:
    validation = Validation()
    assert [validation.take(n, {}) for n in (1, 2)] == [0.0, 0.0]
    assert validation.waited(2) == 1


def stopping(folder: Path) -> ToyFederation:
    """Two clients, nine rounds and a patience of two."""
    return federation_of_toys(folder, TOYS[:2], "rounds=9", "stopping.patience=2", "distill.iterations=1")


@contextmanager
def best_after_round_2() -> Iterator[pytest.MonkeyPatch]:
    """In the place of the clients' scores."""
    take = Validation.take

    def scripted(self: Validation, server_round: int, scores: Any) -> float:
        return take(self, server_round, {name: {"t": {1: 0.1, 2: 0.9}.get(server_round, 0.5)} for name in scores})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Validation, "take", scripted)
        yield patch


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[ToyFederation, InProcessGrid, dict[str, Any]]:
    """A run that has stopped early, its grid and its results."""
    federation = stopping(tmp_path_factory.mktemp("stopped"))
    grid = federation.grid()
    with best_after_round_2():
        return federation, grid, federation.strategy().start(grid).summary


def test_stage_1_ends_after_the_patience_and_stage_2_starts_from_the_best_round(
    stopped: tuple[ToyFederation, InProcessGrid, dict[str, Any]],
) -> None:
    federation, grid, results = stopped
    events = list(read_events(federation.out))
    assert [e["round"] for e in events if e["event"] == "round"] == [1, 2, 3, 4]
    assert [(e["best"], e["validation"]) for e in events if e["event"] == "best"] == [(2, 0.9)]
    assert results["rounds"] == 4
    # What the clients got for stage 2 is what round 3 began with.
    after_2 = {node: tensors for number, node, tensors in sent(grid, "train") if number == 3}
    assert [len(after_2[node]) for node in (100, 101)] == [10, 14]  # ann's and bob's tensors
    for _, node, tensors in sent(grid, "train.personalise"):
        assert tensors.keys() >= after_2[node].keys()
        assert all(tensors[name].equal(value) for name, value in after_2[node].items())
    # And their personal models are those of round 2.
    record = read_tensors(federation.out / "server" / "server.safetensors")[1]
    epochs = [Epoch(**epoch) for epoch in record["epochs"]]
    for name in ("ann", "bob"):
        store = StateFolder(federation.state(name), record["run"], epochs)
        best, last = store.load_best(2), store.load()
        assert best is not None
        assert last is not None
        assert (best.round, last.round) == (2, 4)
        assert (store.folder / BEST).exists()


def test_a_resumed_run_stops_at_the_same_round(
    stopped: tuple[ToyFederation, InProcessGrid, dict[str, Any]], tmp_path: Path
) -> None:
    *_, whole = stopped

    class Crash(Exception):
        pass

    again = stopping(tmp_path)
    configure = TapStrategy.configure_train

    def crashing(self: Any, server_round: int, *rest: Any) -> Any:
        if server_round == 4:
            raise Crash
        return configure(self, server_round, *rest)

    with best_after_round_2() as patch:
        with patch.context() as crashes:
            crashes.setattr(TapStrategy, "configure_train", crashing)
            with pytest.raises(Crash):
                again.strategy().start(again.grid())
        results = again.strategy(resume=True).start(again.grid()).summary
    assert results["clients"] == whole["clients"]
    assert results["rounds"] == whole["rounds"]


def test_scores_are_the_clients_own_models_on_validation_data(
    federation: ToyFederation, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation.settings += ["rounds=1", "stopping.patience=1", "train.steps=1", "distill.iterations=1"]
    scores, seen = Session.scores, dict[str, tuple[str, Any, dict[str, float]]]()

    def watched(self: Session, model: Any, split: str) -> dict[str, float]:
        found = scores(self, model, split)
        seen[self.name] = split, cpu_state(model), found
        return found

    monkeypatch.setattr(Session, "scores", watched)
    federation.strategy().start(federation.grid())
    record = read_tensors(federation.out / "server" / "server.safetensors")[1]
    epochs = [Epoch(**epoch) for epoch in record["epochs"]]
    for name, (split, state, _) in seen.items():
        kept = StateFolder(federation.state(name), record["run"], epochs).load()
        assert split == "validation"
        assert kept is not None
        assert all(state[tensor].equal(value) for tensor, value in kept.memory.models["personal"].items())
    mean = fmean(fmean(found.values()) for _, _, found in seen.values())
    (event,) = [e for e in read_events(federation.out) if e["event"] == "round"]
    (best,) = [e for e in read_events(federation.out) if e["event"] == "best"]
    assert len(seen) == 4
    assert event["validation"] == best["validation"] == pytest.approx(mean)


def test_without_patience_nothing_is_scored(make_federation: Make) -> None:
    federation = make_federation(TOYS[:2], "rounds=1", "train.steps=1", "distill.iterations=1")
    federation.strategy().start(federation.grid())
    (event,) = [e for e in read_events(federation.out) if e["event"] == "round"]
    assert "validation" not in event
    assert [path.name for path in federation.out.glob("clients/*/*/personal*")] == ["personal.safetensors"] * 2
