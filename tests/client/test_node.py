"""A node's own settings: what is set on it is used, and a server changes nothing of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from flwr.app import ConfigRecord, Context, Message, RecordDict

from tap_flower.client import from_spec
from tap_flower.client.handlers import REFUSED
from tap_flower.client.node import this_node
from tap_flower.config import Metrics
from tap_flower.errors import SpecError
from tap_flower.wire import messages
from tests.federations import CLIENTS, federation_of_specs


def context(node: dict[str, Any], run_config: dict[str, Any]) -> Context:
    return Context(run_id=1, node_id=1, node_config=node, state=RecordDict(), run_config=run_config)


@pytest.fixture
def deployed(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "ann.yaml").write_text(yaml.safe_dump(CLIENTS[0]))
    return {"client-spec": str(tmp_path / "ann.yaml"), "state-dir": str(tmp_path / "state")}


def test_a_deployed_node_has_its_settings_from_itself(deployed: dict[str, Any], tmp_path: Path) -> None:
    of_the_run = {"set": "compute.compile=true metrics.meteor=true data.root=/elsewhere"}
    node = this_node(context(deployed, of_the_run))
    assert (node.spec.name, node.state_dir, node.folder) == ("ann", tmp_path / "state", None)
    assert (node.data_root, node.metrics, node.compile) == ("", Metrics(), False)
    chosen = {"compile": True, "meteor": True, "bertscore-model": "none/such", "data-root": "/mirror"}
    node = this_node(context({**deployed, **chosen}, {}))
    assert (node.data_root, node.metrics, node.compile) == ("/mirror", Metrics(True, "none/such"), True)


@pytest.mark.parametrize("name", ["compile", "meteor"])
def test_a_switch_is_true_or_false(deployed: dict[str, Any], name: str) -> None:
    with pytest.raises(SpecError, match=f"the node's {name} is 'yes': write {name}=true or {name}=false"):
        this_node(context({**deployed, name: "yes"}, {}))


def test_a_simulated_node_has_its_settings_from_the_runs_configuration(tmp_path: Path) -> None:
    run_config = {"preset": "demo", "set": "compute.compile=true metrics.meteor=true", "out": str(tmp_path)}
    node = this_node(context({"partition-id": 2}, run_config))
    assert (node.spec.name, node.folder) == ("client-2", tmp_path / "clients" / "client-2")
    assert (node.metrics, node.compile) == (Metrics(meteor=True), True)
    assert not this_node(context({"partition-id": 2}, {"preset": "demo", "out": str(tmp_path)})).compile


@pytest.mark.parametrize("chosen", [True, False])
def test_the_node_decides_whether_its_models_are_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: bool
) -> None:
    compiled: list[bool] = []
    load = from_spec.load_backbone

    def spy(name: str, *given: Any) -> Any:
        compiled.append(given[-1])
        return load(name, *given[:-1], False)

    monkeypatch.setattr(from_spec, "load_backbone", spy)
    federation = federation_of_specs(tmp_path, CLIENTS[:1], "rounds=1", f"compute.compile={str(chosen).lower()}")
    grid = federation.grid()
    federation.strategy().start(grid)
    assert compiled == [chosen]

    (message, *_) = [m for m in grid.sent if m.metadata.message_type == messages.TRAIN]
    values = json.loads(str(message.content.config_records[messages.FIELDS]["json"]))
    assert "compile" not in values["hyper_parameters"]["compute"]
    values["hyper_parameters"]["compute"]["compile"] = True
    asked = RecordDict({**message.content, "tap": ConfigRecord({"json": json.dumps(values)})})
    reply = grid.answer(Message(asked, dst_node_id=message.metadata.dst_node_id, message_type=messages.TRAIN))
    assert reply.has_error()
    assert reply.error.code == REFUSED
    assert "the server: unknown key 'compute.compile'" in str(reply.error.reason)
    assert compiled == [chosen]
