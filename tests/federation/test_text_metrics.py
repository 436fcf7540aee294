"""Who decides which further metrics a client computes, and where they end up."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from tap_flower.client import text_metrics
from tap_flower.errors import RunError
from tap_flower.wire import messages
from tests.federations import CLIENTS, Federation, MakeSpecs

SHORT = ["rounds=1", "train.steps=1", "distill.iterations=1"]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """What was loaded; the metrics themselves are replaced by the number of texts."""

    def count(predictions: Sequence[str], references: Sequence[str]) -> float:
        assert len(predictions) == len(references)
        assert all(references)
        return float(len(references))

    loaded: list[tuple[str, ...]] = []
    for name in ("load_meteor", "load_bertscore"):
        monkeypatch.setattr(text_metrics, name, lambda *given, name=name: loaded.append((name, *given)) or count)
    return loaded


def found(clients: dict[str, Any], client: str, task: str) -> dict[str, float]:
    """The metrics of one task, whose names are the same for every model."""
    by_model = clients[client][task]
    assert len({frozenset(metrics) for metrics in by_model.values()}) == 1
    return dict(by_model["personal"])


def test_a_simulation_asks_in_its_configuration(make_spec_federation: MakeSpecs, asked: list[tuple[str, ...]]) -> None:
    federation = make_spec_federation(CLIENTS[1:], *SHORT, "metrics.meteor=true", "metrics.bertscore=some/model")
    grid = federation.grid()
    results = federation.strategy().start(grid).summary
    for client, task in (("cleo", "answers"), ("dan", "dates")):
        metrics = found(results["clients"], client, task)
        assert metrics.keys() == {"loss", "exact_match", "perplexity", "meteor", "bertscore_f1"}
        assert metrics["meteor"] == metrics["bertscore_f1"] == 10  # all test rows
    assert found(results["clients"], "bob", "languages").keys() == {"loss", "accuracy", "macro_f1"}
    assert found(results["clients"], "bob", "shape_images").keys() == {"loss", "mse", "psnr"}
    assert results["tasks"]["answers"]["server"]["meteor"] == 10
    assert set(asked) == {("load_meteor",), ("load_bertscore", "some/model")}
    instructions = [messages.decode(sent.content, messages.Instruction, "the server") for sent in grid.sent]
    assert all("metrics" not in instruction.hyper_parameters for instruction in instructions)


def deploy(federation: Federation, folder: Path, **more: dict[str, Any]) -> Any:
    """A grid of nodes with specs of their own, and `more` in the configuration of the clients of these names."""
    grid = federation.grid()
    clients = yaml.safe_load(federation.config_file.read_text())["clients"]
    for node, client in zip(grid.contexts.values(), clients, strict=True):
        spec = folder / f"{client['name']}.yaml"
        spec.write_text(yaml.safe_dump(client))
        node.node_config = {"client-spec": str(spec), "state-dir": str(folder), **more.get(client["name"], {})}
    return grid


def test_a_node_asks_in_its_own_settings(
    make_spec_federation: MakeSpecs, asked: list[tuple[str, ...]], tmp_path: Path
) -> None:
    theirs = ["metrics.meteor=true", "metrics.bertscore=from/the-server"]
    federation = make_spec_federation(CLIENTS[2:], *theirs)
    grid = deploy(federation, tmp_path, dan={"bertscore-model": "mine/own"})
    federation.settings += ["rounds=1", "train.steps=1", "distill.iterations=1"]
    clients = federation.strategy().start(grid).clients
    assert found(clients, "dan", "dates").keys() == {"loss", "exact_match", "perplexity", "bertscore_f1"}
    assert found(clients, "cleo", "answers").keys() == {"loss", "exact_match", "perplexity"}
    assert set(asked) == {("load_bertscore", "mine/own")}


def test_a_wrong_setting_of_a_node(
    make_spec_federation: MakeSpecs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    federation = make_spec_federation(CLIENTS[:1])
    grid = deploy(federation, tmp_path, ann={"meteor": "yes"})
    with pytest.raises(RunError, match="node 100 cannot take part: the node's client spec is wrong"):
        federation.strategy().start(grid)
    assert "the node's meteor is 'yes': write meteor=true or meteor=false in its --node-config" in caplog.text
