"""A node's own settings: what is set on it is used, and a server changes nothing of it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from flwr.app import ConfigRecord, Context, Message, RecordDict

from tap_flower.client import from_spec
from tap_flower.client import node as node_module
from tap_flower.client.node import Limits, limits_of, this_node
from tap_flower.config import HyperParameters, Metrics, StageTwo
from tap_flower.errors import MessageError, RunError, SpecError
from tap_flower.methods.session import Session
from tap_flower.wire import messages
from tap_flower.wire.messages import REFUSED
from tests.federations import CLIENTS, Make, federation_of_specs
from tests.toys import TOYS


def context(node: dict[str, Any], run_config: dict[str, Any]) -> Context:
    return Context(run_id=1, node_id=1, node_config=node, state=RecordDict(), run_config=run_config)


@pytest.fixture
def deployed(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "ann.yaml").write_text(yaml.safe_dump(CLIENTS[0]))
    return {"client-spec": str(tmp_path / "ann.yaml"), "state-dir": str(tmp_path / "state")}


def test_a_deployed_node_has_its_settings_from_itself(deployed: dict[str, Any], tmp_path: Path) -> None:
    of_the_run = {"set": "compute.compile=true compute.loader_workers=3 metrics.meteor=true data.root=/elsewhere"}
    node = this_node(context(deployed, of_the_run))
    assert (node.spec.name, node.state_dir, node.folder) == ("ann", tmp_path / "state", None)
    assert (node.data_root, node.metrics, node.compile, node.loader_workers) == ("", Metrics(), False, None)
    chosen = {
        "compile": True, "meteor": True, "bertscore-model": "none/such", "data-root": "/mirror", "loader-workers": 0
    }  # fmt: skip
    node = this_node(context({**deployed, **chosen}, {}))
    assert (node.data_root, node.metrics, node.compile) == ("/mirror", Metrics(True, "none/such"), True)
    assert node.loader_workers == 0


@pytest.mark.parametrize("name", ["compile", "meteor"])
def test_a_switch_is_true_or_false(deployed: dict[str, Any], name: str) -> None:
    with pytest.raises(SpecError, match=f"the node's {name} is 'yes': write {name}=true or {name}=false"):
        this_node(context({**deployed, name: "yes"}, {}))


@pytest.mark.parametrize("value", [-1, 1.5, True, "two"])
def test_workers_are_a_whole_number(deployed: dict[str, Any], value: Any) -> None:
    with pytest.raises(SpecError, match=f"the node's loader-workers is {value!r}: write loader-workers=N"):
        this_node(context({**deployed, "loader-workers": value}, {}))


def test_a_simulated_node_has_its_settings_from_the_runs_configuration(tmp_path: Path) -> None:
    chosen = "compute.compile=true compute.loader_workers=3 metrics.meteor=true"
    run_config = {"preset": "demo", "set": chosen, "out": str(tmp_path)}
    node = this_node(context({"partition-id": 2}, run_config))
    assert (node.spec.name, node.folder) == ("client-2", tmp_path / "clients" / "client-2")
    assert (node.metrics, node.compile, node.loader_workers) == (Metrics(meteor=True), True, 3)
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


TRAINING = {"train.steps": 40, "distill.iterations": 3, "train.batch_size": 8, "train.accumulation": 2}


@pytest.mark.parametrize(
    ("limit", "problem"),
    [
        (
            {"max-steps": 39},
            "train.steps = 40, and this node allows 39: lower it in the run, or raise the node's limit",
        ),
        ({"max-batch-size": 15}, "train.batch_size · train.accumulation = 16, and this node allows 15"),
        ({"max-text-length": 100}, "model.text_length = 256, and this node allows 100"),
        ({"max-rounds": 1}, "round = 2, and this node allows 1.*tap-flower node --limit rounds=2.*`max-rounds`"),
        ({"max-steps": "many"}, None),
    ],
)
def test_a_node_refuses_what_is_above_its_limits(make_federation: Make, limit: dict[str, Any], problem: str) -> None:
    settings = [f"{key}={value}" for key, value in TRAINING.items()]
    federation = make_federation(TOYS[:1], "clients_per_round=1", "rounds=2", *settings)
    grid = federation.grid()
    federation.strategy().start(grid)  # without limits
    asked = [m for m in grid.sent if m.metadata.message_type == messages.TRAIN][-1]
    fresh = federation.grid()
    fresh.contexts[100].node_config.update(limit)
    reply = fresh.answer(Message(asked.content, dst_node_id=100, message_type=messages.TRAIN))
    assert reply.error.code == REFUSED
    if problem is None:
        problem = "the log of the node says where"
    assert re.search(problem, reply.error.reason)
    fresh.contexts[100].node_config.update(dict.fromkeys(limit, 1000))
    assert not fresh.answer(Message(asked.content, dst_node_id=100, message_type=messages.TRAIN)).has_error()


def test_a_limit_counts_the_steps_that_a_method_trains_a_model_for() -> None:
    settings = HyperParameters(method="fedala")
    settings.train.steps, settings.distill.iterations = 20, 30
    settings.baselines.fedala_start, settings.baselines.fedala_share = 10, 0.75
    with pytest.raises(MessageError, match=r"8 · train.steps = 160, and .* allows 159"):
        Limits(steps=159).check_settings(settings)
    with pytest.raises(MessageError, match=r"8 · distill.iterations = 240"):
        Limits(steps=239).check_settings(settings)
    Limits(steps=240).check_settings(settings)
    settings.train.steps, settings.baselines.fedala_share = 1, 0.01  # a pass has at least one step
    with pytest.raises(MessageError, match=r"10 · train.steps = 10"):
        Limits(steps=9).check_settings(settings)
    settings.method = "pfedme"  # its steps of θ are those of the run
    Limits(steps=30).check_settings(settings)
    settings.method, settings.distill.stage = "tap", StageTwo.finetuning_twice
    with pytest.raises(MessageError, match=r"2 · distill.iterations = 60"):
        Limits(steps=59).check_settings(settings)
    settings.method = "tap-published"
    Limits(steps=30).check_settings(settings)


def test_a_limit_is_a_whole_number_from_1_on() -> None:
    assert limits_of({"max-steps": 5, "client-spec": "x"}) == Limits(steps=5)
    for wrong in ("5", 0, -1, 1.5, True):
        with pytest.raises(SpecError, match="the node's max-steps is .*: write max-steps=N"):
            limits_of({"max-steps": wrong})


def test_work_is_broken_off_at_the_nodes_deadline(make_federation: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    federation = make_federation(TOYS[:1], "clients_per_round=1", "rounds=1")
    grid = federation.grid()
    federation.strategy().start(grid)
    asked = next(m for m in grid.sent if m.metadata.message_type == messages.TRAIN)
    fresh, tries = federation.grid(), list[int]()
    fresh.contexts[100].node_config["max-seconds"] = 4

    def hang(*_: Any, **__: Any) -> None:
        try:
            time.sleep(600)
        except Exception:  # the loop of a user that goes on whatever happens
            tries.append(1)
            time.sleep(600)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "train", hang)
        began = time.monotonic()
        reply = fresh.answer(Message(asked.content, dst_node_id=100, message_type=messages.TRAIN))
    assert time.monotonic() - began < 30
    assert tries == [1]
    assert "the work took longer than 4 s and was broken off" in reply.error.reason
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    fresh.contexts[100].node_config["max-seconds"] = 600
    assert not fresh.answer(Message(asked.content, dst_node_id=100, message_type=messages.TRAIN)).has_error()


def test_the_deadline_is_the_servers_where_the_node_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_module, "GRACE", 0.0)
    with pytest.raises(RunError, match=r"took longer than 0.2 s"), Limits(seconds=600).time(0.2):
        time.sleep(600)


@pytest.mark.slow
def test_a_process_that_never_comes_back_to_python_is_ended() -> None:
    """Its signals are blocked, as in a deadlock of a library."""
    code = (
        "import signal, time; from tap_flower.client import node; node.GRACE = node.LAST = 1.0\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])\n"
        "with node.Limits().time(0.0): time.sleep(600)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert "Timeout" in done.stderr
