"""A federation in this process: what must hold whatever the numbers are."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
import torch
import yaml
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from tap_flower.client.client_model import exchanged
from tap_flower.config import Encoding, client_specs
from tap_flower.core.tasks import IGNORE, IMAGE_STD, TASK_KINDS
from tap_flower.data.batching import ClientData
from tap_flower.errors import ConfigError, DivergedError, RunError
from tap_flower.files import read_tensors
from tap_flower.methods import tap
from tap_flower.methods.registry import METHODS
from tap_flower.report.events import read_events
from tap_flower.report.terminal_tables import exchange_line
from tap_flower.run.in_process import Tamper
from tap_flower.server import grid as exchange
from tap_flower.server.roster import Roster
from tap_flower.server.server_run import ServerRun
from tap_flower.server.strategy import TapStrategy
from tap_flower.wire import messages
from tap_flower.wire.messages import ARRAYS, FIELDS, Manifest
from tap_flower.wire.tensors import decode_tensors, encode_tensors
from tests.federations import (
    CLIENTS,
    LANGUAGES,
    Federation,
    MakeSpecs,
    ToyFederation,
    Whole,
    each_kind,
    federation_of,
    run_whole,
    sources,
)
from tests.grid import InProcessGrid, Playback, Replies, recorded, round_of
from tests.toys import TOYS, task

FLOAT = Encoding.float32
EVERYBODY = {"ann", "bob", "cleo", "dan"}
MODELS = {"server": "server", "server+finetune": "server+finetune", "personal": "personal", "tap": "tap"}
"""Model in the results -> its file in a client's folder."""


def sent(grid: InProcessGrid, message_type: str) -> list[tuple[int, int, dict[str, Tensor]]]:
    """(round, node, tensors) of what the server sent."""
    return [
        (round_of(m), m.metadata.dst_node_id, messages.tensors_of(m.content, FLOAT))
        for m in grid.sent
        if m.metadata.message_type == message_type
    ]


def without_times(results: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in results.items() if key != "seconds"}


def weight(manifest: Manifest, tensor: str) -> int:
    """Training examples of the client's tasks that reach the tensor's component."""
    component = manifest.tensors[tensor].component
    return sum(task.examples for task in manifest.tasks if component in manifest.reach[task.task])


def means(returned: dict[str, dict[str, Tensor]], manifests: dict[str, Manifest]) -> dict[str, Tensor]:
    """Tensor -> mean over its holders, weighted by their examples (float64)."""
    found = {}
    for name in {name for tensors in returned.values() for name in tensors}:
        holders = {client: weight(manifests[client], name) for client, own in returned.items() if name in own}
        total = torch.stack([count * returned[client][name].double() for client, count in holders.items()]).sum(0)
        found[name] = total / sum(holders.values())
    return found


def test_a_whole_run(whole: Whole) -> None:
    federation, strategy, results = whole.federation, whole.strategy, whole.results
    manifests = strategy.roster.manifests
    assert strategy.progress.dropped == {}
    assert results == json.loads((federation.out / "results.json").read_text())
    assert results["schema"] == 2
    assert results["clients"].keys() == EVERYBODY
    for client, by_task in results["clients"].items():
        assert by_task.keys() == manifests[client].reach.keys()
        for task_name, by_model in by_task.items():
            assert by_model.keys() == MODELS.keys()
            for metrics in by_model.values():
                assert all(math.isfinite(value) for value in metrics.values())
                assert TASK_KINDS[results["kinds"][task_name]].headline in metrics
            assert len({metrics["loss"] for metrics in by_model.values()}) == 4  # four models, and not one four times
    for model in MODELS:
        mean = fmean(results["clients"][name]["languages"][model]["accuracy"] for name in ("ann", "bob"))
        assert results["tasks"]["languages"][model]["accuracy"] == pytest.approx(mean)
        own = results["clients"]["cleo"]["answers"][model]
        value = own[TASK_KINDS["text_generation"].headline]
        assert results["tasks"]["answers"][model] == {**own, "worst": value, "p10": value, "std": 0.0}
    for name in EVERYBODY:
        files = {path.name for path in federation.state(name).iterdir()}
        assert files >= {"personal.safetensors", "tap.safetensors", "state.json"}
    assert (federation.out / "config.yaml").exists()
    # TAP: two models of 2 steps in each of two rounds, and two of 2 in stage 2.
    assert results["steps"] == dict.fromkeys(EVERYBODY, 2 * (2 + 2) + (2 + 2))
    # Each tensor is 4 bytes a value and a header of 128: twice there and back, there for stage 2 and for the evaluation.
    each = sum(4 * math.prod(info.shape) + 128 for m in manifests.values() for info in m.tensors.values())
    total = results["bytes"]
    rounds = {way: total[way] - total["first_values"][way] for way in ("down", "up")}
    assert rounds == {"down": 4 * each, "up": 2 * each}
    assert rounds == {way: sum(c[way] for c in total["per_component"].values()) for way in rounds}
    assert [e["event"] for e in read_events(federation.out)][-1] == "end"


def test_the_metrics_of_a_run_are_those_of_the_models_that_the_clients_keep(whole_toys: Whole) -> None:
    """Computed here from the files and the test data, with torch alone."""
    compared = 0
    for toy in TOYS:
        for model, file in MODELS.items():
            net = toy.net().eval()
            state = load_file(whole_toys.federation.state(toy.name) / f"{file}.safetensors")
            net.load_state_dict({name: value for name, value in state.items() if ":" not in name})
            for name, examples in toy.tasks.items():
                *inputs, target = task(name, toy.name, examples).test.tensors
                with torch.no_grad():
                    output = net.run(name, inputs).double()
                found = whole_toys.results["clients"][toy.name][name][model]
                assert found == pytest.approx(metrics_of(whole_toys.results["kinds"][name], output, target), rel=1e-5)
                compared += 1
    assert compared == 4 * 5


def metrics_of(kind: str, output: Tensor, target: Tensor) -> dict[str, float]:
    if kind == "image_generation":
        error = (output - target).square()
        in_pixels = (error.mean((0, 2, 3)) * torch.tensor(IMAGE_STD, dtype=torch.float64) ** 2).mean()
        return {"loss": error.mean().item(), "mse": error.mean().item(), "psnr": 10 * math.log10(1 / in_pixels)}
    if kind == "text_generation":
        said, kept = output.argmax(-1), target != IGNORE
        loss = F.cross_entropy(output[kept], target[kept]).item()
        right = [bool((a[k] == b[k]).all()) for a, b, k in zip(said, target, kept, strict=True)]
        return {"loss": loss, "exact_match": fmean(right), "perplexity": math.exp(loss)}
    said, f1 = output.argmax(-1), []
    for label in {*said.tolist(), *target.tolist()}:
        both, either = ((said == label) & (target == label)).sum(), (said == label).sum() + (target == label).sum()
        f1.append(float(2 * both / either))
    return {
        "loss": F.cross_entropy(output, target).item(),
        "accuracy": (said == target).double().mean().item(),
        "macro_f1": fmean(f1),
    }


@each_kind
def test_two_runs_with_one_seed_are_equal_whatever_the_order_of_replies(
    kind: str, tmp_path: Path, whole_toys: Whole
) -> None:
    one = whole_toys if kind == "toys" else run_whole(kind, tmp_path / "one")
    two, other = federation_of(kind, tmp_path / "two"), federation_of(kind, tmp_path / "other", "seed=5")
    found = without_times(one.results)
    assert without_times(two.strategy().start(two.grid(order=lambda ids: ids[::-1])).summary) == found
    assert without_times(other.strategy().start(other.grid()).summary)["clients"] != found["clients"]


def test_after_aggregation_every_client_starts_from_the_servers_value_plus_the_mean_difference(whole: Whole) -> None:
    roster = whole.strategy.roster
    began = {
        round_: {
            name: value for r, _, own in sent(whole.grid, messages.TRAIN) if r == round_ for name, value in own.items()
        }
        for round_ in (1, 2)
    }
    assert whole.returned(1).keys() == whole.returned(2).keys() == EVERYBODY
    compared = 0
    for message_type, after in ((messages.TRAIN, 1), (messages.PERSONALISE, 2)):
        difference = means(whole.returned(after), roster.manifests)
        for _, _, tensors in [row for row in sent(whole.grid, message_type) if row[0] == 2]:
            for name, value in tensors.items():
                expected = began[after][name].double() + difference[name]
                torch.testing.assert_close(value.double(), expected, atol=1e-9, rtol=1e-6)
                compared += 1
    # After each of two rounds every tensor of every client; the toys have 10, 14, 12 and 10.
    assert compared == 2 * sum(len(manifest.tensors) for manifest in roster.manifests.values())
    assert compared == 92 if whole.kind == "toys" else compared > 600
    moved = [n for n, v in began[1].items() if not torch.equal(v, roster.tensors[n])]
    assert len(moved) > 0.9 * len(began[1])


def test_components_are_averaged_over_those_who_reach_them(whole_toys: Whole) -> None:
    """By hand: ann has 16 texts; bob 12 texts and 8 images; cleo 8 of both at once; dan 10 texts."""
    returned, new = whole_toys.returned(2), whole_toys.strategy.roster.tensors
    old = {name: value for r, _, own in sent(whole_toys.grid, messages.TRAIN) if r == 2 for name, value in own.items()}
    expected = {
        "words.weight_ih_l0": {"ann": 16, "bob": 12, "cleo": 8, "dan": 10},
        "image.weight": {"bob": 8, "cleo": 8},
        "trunk.0.weight": {"ann": 16, "bob": 20, "cleo": 8, "dan": 10},
        "trunk.1.weight": {"ann": 16, "bob": 20, "cleo": 8, "dan": 10},
        "heads.languages.weight": {"ann": 16, "bob": 12},
        "heads.translation.weight": {"dan": 10},
    }
    for name, weights in expected.items():
        total = torch.stack([count * returned[client][name].double() for client, count in weights.items()]).sum(0)
        expected_value = old[name].double() + total / sum(weights.values())
        torch.testing.assert_close(new[name].double(), expected_value, atol=1e-9, rtol=1e-6)
        assert {client for client, tensors in returned.items() if name in tensors} == weights.keys()


def test_the_client_trains_what_it_received(whole: Whole) -> None:
    received = [tensors for _, _, tensors in sent(whole.grid, messages.TRAIN) + sent(whole.grid, messages.PERSONALISE)]
    assert len(whole.started) == len(received) == 12
    for (_, start), tensors in zip(whole.started, received, strict=True):
        assert start.keys() == tensors.keys()
        assert all(torch.equal(start[name], tensors[name]) for name in start)


def test_a_component_that_nobody_returned_keeps_its_value(federation: ToyFederation) -> None:
    federation.settings.append("clients_per_round=1")
    grid, states = federation.grid(), list[dict[str, Tensor]]()

    def note(server_round: int, arrays: ArrayRecord) -> None:
        states.append(decode_tensors(arrays, FLOAT))

    federation.strategy().start(grid, evaluate_fn=note)
    rounds = [tensors.keys() for _, _, tensors in sent(grid, messages.TRAIN)]
    assert len(rounds) == 2
    for old, new, trained in zip(states, states[1:], rounds, strict=False):
        kept = old.keys() - trained
        assert kept
        assert all(torch.equal(old[name], new[name]) for name in kept)
        assert any(not torch.equal(old[name], new[name]) for name in trained)


class Gathered(Exception):
    """Ends a run that has come far enough."""


def gathered(strategy: TapStrategy, grid: Grid) -> Roster:
    """The roster of a run before its first round."""

    def stop(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        raise Gathered

    with pytest.raises(Gathered):
        strategy.start(grid, evaluate_fn=stop)
    return strategy.roster


def test_a_check_tells_the_tensors_and_bytes_of_the_manifest(spec_federation: Federation) -> None:
    strategy = spec_federation.strategy()
    roster = gathered(strategy, spec_federation.grid())
    assert roster.manifests.keys() == EVERYBODY
    for spec in client_specs(strategy.config):
        tensors = exchanged(spec, strategy.config.model)
        manifest = roster.manifests[spec.name].tensors
        assert {name: tuple(t.shape) for name, t in tensors.items()} == {n: i.shape for n, i in manifest.items()}
        megabytes = sum(math.prod(info.shape) * 4 for info in manifest.values()) / 1e6
        assert f"{len(manifest)} tensors, {megabytes:.3f} MB of values to the client" in exchange_line(tensors)
        arrays = encode_tensors({name: roster.tensors[name] for name in manifest}, FLOAT)
        on_the_wire = {name: len(array.data) for name, array in arrays.items()}
        header = 128  # of an array
        assert on_the_wire == {name: tensor.nbytes + header for name, tensor in tensors.items()}


def test_messages_hold_the_tensors_of_the_clients_own_pairs_and_nothing_else(whole: Whole) -> None:
    grid, roster = whole.grid, whole.strategy.roster
    names = {node: name for name, node in roster.nodes.items()}
    checked = 0
    for message in [*grid.sent, *grid.received]:
        if message.metadata.message_type == messages.MANIFEST:
            assert not message.content.array_records
            continue
        assert set(message.content.keys()) <= {FIELDS, ARRAYS, "config" if message in grid.sent else "metrics"}
        if ARRAYS not in message.content:
            continue
        tensors = messages.tensors_of(message.content, FLOAT)
        node = message.metadata.dst_node_id if message in grid.sent else message.metadata.src_node_id
        if message.metadata.message_type == messages.VALUES:  # before the first round: what this client alone is to say
            assert tensors.keys() <= roster.manifests[names[node]].tensors.keys()
            continue
        assert tensors.keys() == roster.manifests[names[node]].tensors.keys()
        assert not any(name.startswith("backbone.") for name in tensors)
        checked += 1
    assert checked == 4 * (2 + 2 + 1 + 1)  # two rounds there and back, stage 2 and evaluation there
    text_only = roster.manifests["ann"].tensors
    assert not any("image" in name or "generation" in name or "shapes" in name for name in text_only)


def test_nothing_of_a_personal_model_is_in_a_message(whole: Whole) -> None:
    wire: set[bytes] = set()
    text = ""
    for message in [*whole.grid.sent, *whole.grid.received]:
        record = message.content.array_records.get(ARRAYS, {})
        wire |= {array.numpy().tobytes() for array in record.values()}
        text += str(message.content.config_records[FIELDS]["json"])
    personal = 0
    for name in EVERYBODY:
        folder = whole.federation.state(name)
        for file in ("personal", "tap", "server+finetune"):
            tensors, _ = read_tensors(folder / f"{file}.safetensors")
            # A tensor that is all zeros, or still at its initial value, is no secret.
            secret = {t.numpy().tobytes() for t in tensors.values() if t.unique().numel() > 1}
            shared = len(secret & wire)
            assert shared == 0, (name, file, shared)
            personal += len(secret)
        losses = json.loads((folder / "state.json").read_text())["record"]["personal_losses"]
        assert losses
        assert not any(str(loss) in text for loss in losses.values())
    assert personal == 3 * 46 if whole.kind == "toys" else personal > 500  # all tensors of the toys
    assert '"classes"' not in text
    assert "columns" not in text


Change = Callable[[dict[str, Any]], None]


def broken(change: Change, node: int = 100, round_: int = 1) -> Tamper:
    """Changes the tensors of one reply."""

    def tamper(message: Message, reply: Message) -> Message | None:
        if (message.metadata.message_type, message.metadata.dst_node_id) != (messages.TRAIN, node):
            return reply
        if round_of(message) != round_:
            return reply
        tensors = dict(messages.tensors_of(reply.content, FLOAT))
        change(tensors)
        content = RecordDict(
            {
                **reply.content,
                ARRAYS: ArrayRecord({n: Array(np.asarray(t)) for n, t in tensors.items()}),
            }
        )
        return Message(content, reply_to=message)

    return tamper


@pytest.fixture(scope="module")
def replies(whole_toys: Whole) -> Replies:
    return recorded(whole_toys.grid)


def first_name(tensors: dict[str, Any]) -> str:
    return sorted(tensors)[0]


def nan(tensors: dict[str, Any]) -> None:
    tensors[first_name(tensors)].view(-1)[0] = math.nan


def shape(tensors: dict[str, Any]) -> None:
    tensors[first_name(tensors)] = torch.zeros(2, 2, 2)


def dtype(tensors: dict[str, Any]) -> None:
    tensors[first_name(tensors)] = tensors[first_name(tensors)].double()


def unknown(tensors: dict[str, Any]) -> None:
    tensors["backbone.secret"] = torch.zeros(1)


def missing(tensors: dict[str, Any]) -> None:
    del tensors[first_name(tensors)]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (nan, "holds a value that is not finite"),
        (shape, r"has shape \(2, 2, 2\), not"),
        (dtype, "is float64 in numpy.ndarray, not float32"),
        (unknown, "tensors that were not sent, such as 'backbone.secret'"),
        (missing, "the reply lacks 1 tensors"),
    ],
)
def test_a_bad_reply_is_dropped_and_logged_and_the_round_goes_on(
    federation: ToyFederation, replies: Replies, change: Change, problem: str, caplog: pytest.LogCaptureFixture
) -> None:
    strategy = federation.strategy()
    results = strategy.start(Playback(replies, tamper=broken(change))).summary
    (event,) = [e for e in read_events(federation.out) if e["event"] == "dropped"]
    assert event["who"] == "client 'ann'"
    assert re.search(problem, event["problem"])
    assert event["problem"] in caplog.text
    rounds = [e for e in read_events(federation.out) if e["event"] == "round"]
    assert rounds[0]["dropped"] == ["ann"]
    assert sorted(rounds[0]["clients"]) == ["bob", "cleo", "dan"]
    assert rounds[1]["dropped"] == []
    assert results["clients"].keys() == EVERYBODY
    assert all(bool(t.isfinite().all()) for t in strategy.roster.tensors.values())


def lost(message: Message, reply: Message) -> Message | None:
    """Ann does not answer when she is to train."""
    return None if message.metadata.dst_node_id == 100 and _is_train(message) else reply


@each_kind
def test_a_dropped_reply_leaves_no_trace(kind: str, tmp_path: Path, whole_toys: Whole, replies: Replies) -> None:
    """The server after a round with a bad reply equals the server after a round without that client."""
    found: list[dict[str, Tensor]] = []
    for number, tamper in enumerate((broken(nan), lost)):
        states: list[dict[str, Tensor]] = []

        def note(server_round: int, arrays: ArrayRecord, states: list[dict[str, Tensor]] = states) -> None:
            states.append(decode_tensors(arrays, FLOAT))
            if server_round == 1:
                raise Gathered

        federation = federation_of(kind, tmp_path / str(number), "round_timeout=1", "rounds=1")
        grid = Playback(replies, tamper=tamper) if kind == "toys" else federation.grid(tamper=tamper)
        with pytest.raises(Gathered):
            federation.strategy().start(grid, evaluate_fn=note)
        found.append(states[1])
        (event,) = [e for e in read_events(federation.out) if e["event"] == "dropped"]
        assert event["who"] == "client 'ann'"
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    if kind == "toys":  # and it is the mean of the others' replies
        returned = {name: own for name, own in whole_toys.returned(1).items() if name != "ann"}
        for name, mean in means(returned, whole_toys.strategy.roster.manifests).items():
            torch.testing.assert_close(found[0][name].double(), states[0][name].double() + mean, atol=1e-9, rtol=1e-6)


def _is_train(message: Message) -> bool:
    return message.metadata.message_type == messages.TRAIN


def test_a_client_that_fails_is_named_and_the_round_goes_on(
    federation: ToyFederation, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(client: Any, server_round: int, *rest: Any) -> Any:
        if (client.name, server_round) == ("bob", 1):
            raise DivergedError("the training loss of task 'languages' is nan: lower the learning rate")
        if (client.name, server_round) == ("cleo", 2):
            raise RuntimeError("cosmic ray")
        return tap.participate(client, server_round, *rest)

    monkeypatch.setitem(METHODS, "tap", replace(tap.METHOD, participate=fail))
    strategy = federation.strategy()
    results = strategy.start(federation.grid()).summary
    dropped = [(e["who"], e["problem"]) for e in read_events(federation.out) if e["event"] == "dropped"]
    assert [who for who, _ in dropped] == ["client 'bob'", "client 'cleo'"]
    assert dropped[0][1] == "the training loss of task 'languages' is nan: lower the learning rate (code 1001)"
    assert re.search(r"unexpected RuntimeError at test_federation.py:\d+: the log of its node says more", dropped[1][1])
    assert "cosmic ray" in capfd.readouterr().err
    rounds = [sorted(e["clients"]) for e in read_events(federation.out) if e["event"] == "round"]
    assert rounds == [["ann", "cleo", "dan"], ["ann", "bob", "dan"]]
    assert results["clients"].keys() == EVERYBODY


def test_a_simulation_of_client_specs_tells_what_went_wrong_on_a_client(
    spec_federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is one machine: nothing is a secret between its clients."""

    def fail(self: ClientData, split: str) -> dict[str, int]:
        raise RuntimeError("cosmic ray")

    monkeypatch.setattr(ClientData, "sizes", fail)
    with pytest.raises(RunError, match=r"unexpected RuntimeError at test_federation.py:\d+: cosmic ray"):
        spec_federation.strategy().start(spec_federation.grid())


def test_fewer_nodes_than_clients_is_an_error_that_says_who_is_missing(spec_federation: Federation) -> None:
    grid, strategy = spec_federation.grid(), spec_federation.strategy()
    del grid.contexts[102]
    with pytest.raises(RunError, match=r"3 of 4 clients are there.*without cleo.*num-supernodes=4"):
        strategy.start(grid)


def test_fewer_nodes_than_a_round_has_clients_is_an_error_that_counts_them(federation: ToyFederation) -> None:
    grid, strategy = federation.grid(), federation.strategy()
    del grid.contexts[102]
    with pytest.raises(RunError, match=r"3 of 4 clients are there after 1 s: start more nodes .*num-supernodes=4"):
        strategy.start(grid)


def test_a_node_too_many_is_told_how_many_there_are(spec_federation: Federation) -> None:
    spec_federation.clients += 1
    assert set(gathered(spec_federation.strategy(), spec_federation.grid()).names) == EVERYBODY
    (event,) = [e for e in read_events(spec_federation.out) if e["event"] == "dropped"]
    assert event["who"] == "node 104"
    assert re.search("more nodes than the 4 clients.*num-supernodes=4", event["problem"])


def test_a_node_too_many_is_refused_and_the_run_goes_on(federation: ToyFederation) -> None:
    federation.settings.append("rounds=1")
    grid, strategy = federation.grid(), federation.strategy()
    grid.contexts[104] = replace(grid.contexts[103], node_id=104, node_config={"partition-id": 4})  # of four
    assert strategy.start(grid).summary["clients"].keys() == EVERYBODY
    problems = {(e["who"], e["problem"]) for e in read_events(federation.out) if e["event"] == "dropped"}
    assert {who for who, _ in problems} == {"node 104"}
    assert all("unexpected IndexError at toys.py" in problem for _, problem in problems)


def test_a_second_node_of_one_name_is_refused_while_the_first_is_there(federation: ToyFederation) -> None:
    federation.settings += ["rounds=1", "clients_per_round=3"]
    grid, strategy = federation.grid(), federation.strategy()
    grid.contexts[103].node_config["partition-id"] = 0
    assert set(strategy.start(grid).summary["clients"]) == {"ann", "bob", "cleo"}
    assert strategy.roster.nodes["ann"] == 100
    problems = {e["problem"] for e in read_events(federation.out) if e["event"] == "dropped"}
    assert any("client 'ann' is already there on node 100: node 103 is refused" in problem for problem in problems)


def test_where_a_refused_node_is_needed_the_run_says_why_it_cannot_start(federation: ToyFederation) -> None:
    grid, strategy = federation.grid(), federation.strategy()
    grid.contexts[101].node_config["partition-id"] = 0
    with pytest.raises(RunError, match="node 101 cannot take part: client 'ann' is already there on node 100"):
        strategy.start(grid)


def test_tasks_of_one_name_with_other_classes_are_refused(make_spec_federation: MakeSpecs) -> None:
    clash = {**LANGUAGES, "classes": [*LANGUAGES["classes"], "xx"], **sources("names", 40, 8)}
    federation = make_spec_federation([*CLIENTS[:1], {"name": "zoe", "backbone": "demo", "tasks": [clash]}])
    with pytest.raises(RunError, match=r"'languages' has the number of classes 9 on client 'zoe' but 8 on 'ann'"):
        federation.strategy().start(federation.grid())


def test_another_version_is_refused(federation: ToyFederation, monkeypatch: pytest.MonkeyPatch) -> None:
    grid, strategy = federation.grid(), federation.strategy()
    instruction = ServerRun._instruction
    other = partial(msgspec.structs.replace, version="9.9")
    monkeypatch.setattr(ServerRun, "_instruction", lambda self, number: other(instruction(self, number)))
    with pytest.raises(RunError, match=r"the server speaks protocol 6 of tap-flower.*install one version"):
        strategy.start(grid)


@each_kind
@pytest.mark.parametrize("crash_round", [1, 2])
def test_a_resumed_run_gives_the_results_of_an_uninterrupted_one(
    kind: str, tmp_path: Path, whole_toys: Whole, crash_round: int
) -> None:
    crashed = federation_of(kind, tmp_path / "crashed")
    grid = crashed.grid()
    pulls = 0

    def crash(message: Message, reply: Message) -> Message | None:
        nonlocal pulls
        pulls += _is_train(message) and round_of(message) == crash_round
        if pulls == 3:  # three clients have trained, and kept their new personal models
            raise KeyboardInterrupt
        return reply

    grid.tamper = crash
    with pytest.raises(KeyboardInterrupt):
        crashed.strategy().start(grid)
    resumed = without_times(crashed.strategy(resume=True).start(crashed.grid()).summary)
    whole = whole_toys if kind == "toys" else run_whole(kind, tmp_path / "whole")
    assert resumed == without_times(whole.results)
    assert [e["round"] for e in read_events(crashed.out) if e["event"] == "round"] == [1, 2]


def test_resuming_with_another_configuration_is_refused(whole: Whole) -> None:
    other = replace(whole.federation, settings=[*whole.federation.settings, "rounds=3"])
    with pytest.raises(ConfigError, match=r"another configuration \(rounds differ\)"):
        other.strategy(resume=True).start(other.grid())


def test_sampling_goes_by_names_not_by_node_ids(federation: ToyFederation, replies: Replies) -> None:
    roster = gathered(federation.strategy(), Playback(replies))
    rounds = [roster.sample(r, 2) for r in range(1, 60)]
    roster.nodes = {name: 9000 - node for name, node in roster.nodes.items()}
    assert [roster.sample(r, 2) for r in range(1, 60)] == rounds
    assert {name for names in rounds for name in names} == EVERYBODY
    assert all(len(set(names)) == 2 for names in rounds)


def test_a_new_client_with_a_new_pair_may_join_in_any_round(federation: ToyFederation) -> None:
    federation.settings += ["rounds=3", "clients_per_round=3"]
    grid, strategy = federation.grid(), federation.strategy()
    late = grid.contexts.pop(103)
    known: list[set[str]] = []

    def join(message: Message, reply: Message) -> Message:
        if _is_train(message) and round_of(message) == 1:
            grid.contexts[103] = late
            strategy.config.clients_per_round = 4
            known.append(set(strategy.roster.tensors))
        return reply

    grid.tamper = join
    results = strategy.start(grid).summary
    assert "dan" in results["clients"]
    assert not any("translation" in name for name in known[0])
    first = next(t for r, node, t in sent(grid, messages.TRAIN) if node == 103)
    manifest = strategy.roster.manifests["dan"]
    new = {name for name in first if name not in known[0]}
    assert new == {"heads.translation.weight", "heads.translation.bias"}
    for name, value in strategy.roster.first_values(manifest, new).items():
        assert torch.equal(first[name], value)


def test_a_deployed_node_is_configured_on_the_node(make_spec_federation: MakeSpecs, tmp_path: Path) -> None:
    federation = make_spec_federation(CLIENTS[:2], "rounds=1", "train.steps=1", "distill.iterations=1")
    grid = federation.grid()
    for node, client in zip(grid.contexts.values(), CLIENTS[:2], strict=True):
        spec = tmp_path / f"{client['name']}.yaml"
        spec.write_text(yaml.safe_dump(client))
        node.node_config = {"client-spec": str(spec), "state-dir": str(tmp_path / "state")}
        node.run_config = {"preset": "nonsense", "out": "/nonexistent"}  # what a server says of these is not read
    results = federation.strategy().start(grid).summary
    assert set(results["clients"]) == {"ann", "bob"}
    (run,) = (tmp_path / "state" / "ann").iterdir()
    assert (run / "tap.safetensors").exists()
    assert not (federation.out / "clients").exists()


@pytest.mark.parametrize(
    ("node_config", "problem"),
    [
        ({}, "the node has no client-spec: start it with --node-config"),
        ({"client-spec": "none.yaml"}, "no state-dir"),
        ({"client-spec": "none.yaml", "state-dir": "x"}, "client spec 'none.yaml' cannot be read"),
    ],
)
def test_a_badly_configured_node_says_what_to_do(
    make_spec_federation: MakeSpecs, node_config: dict[str, Any], problem: str, caplog: pytest.LogCaptureFixture
) -> None:
    federation = make_spec_federation(CLIENTS[:1])
    grid = federation.grid()
    grid.contexts[100].node_config = node_config
    told = "client spec is wrong, or does not fit its data: the log of the node says where" if node_config else problem
    with pytest.raises(RunError, match=told):
        federation.strategy().start(grid)
    assert not node_config or problem in caplog.text


def test_a_busy_superlink_is_asked_again(
    federation: ToyFederation, replies: Replies, whole_toys: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "_AGAIN", 0.0)
    grid, failures = Playback(replies), {"get_node_ids": 2, "push_messages": 1, "pull_messages": 3}
    for name in list(failures):
        real = getattr(grid, name)

        def busy(*arguments: Any, real: Any = real, name: str = name) -> Any:
            failures[name] -= 1
            if failures[name] >= 0:
                request = httpx.Request("POST", "https://superlink")
                raise httpx.HTTPStatusError("busy", request=request, response=httpx.Response(500, request=request))
            return real(*arguments)

        monkeypatch.setattr(grid, name, busy)
    assert without_times(federation.strategy().start(grid).summary) == without_times(whole_toys.results)
    assert all(count < 0 for count in failures.values())


def test_a_message_that_the_superlink_does_not_take_is_told(federation: ToyFederation, replies: Replies) -> None:
    class Refusing(Playback):
        def push_messages(self, asked: Iterable[Message]) -> Iterable[str]:
            (message,) = asked
            lost = _is_train(message) and message.metadata.dst_node_id == 101
            return [""] if lost and round_of(message) == 1 else super().push_messages([message])

    federation.strategy().start(Refusing(replies))
    dropped = [(e["who"], e["problem"]) for e in read_events(federation.out) if e["event"] == "dropped"]
    assert dropped == [
        (
            "client 'bob'",
            "the SuperLink did not take the message, with 0.00334 MB of tensors: its log says why (code 1005)",
        )
    ]


@pytest.mark.parametrize(("status", "patience"), [(403, 60.0), (500, 0.0)])
def test_a_superlink_that_refuses_or_stays_busy_ends_the_run(
    status: int, patience: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "_PATIENCE", patience)
    request = httpx.Request("POST", "https://superlink")

    def refuse() -> None:
        raise httpx.HTTPStatusError("no", request=request, response=httpx.Response(status, request=request))

    with pytest.raises(httpx.HTTPStatusError):
        exchange.patiently(refuse)
