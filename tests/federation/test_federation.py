"""A federation in this process: what must hold whatever the numbers are."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
import torch
from flwr.app import ArrayRecord, Message
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from tap_flower.client.client_model import exchanged
from tap_flower.config import client_specs
from tap_flower.core.tasks import IGNORE, IMAGE_STD, TASK_KINDS
from tap_flower.errors import ConfigError
from tap_flower.files import read_tensors
from tap_flower.report.events import read_events
from tap_flower.report.terminal_tables import exchange_line
from tap_flower.wire import messages
from tap_flower.wire.messages import ARRAYS, FIELDS
from tap_flower.wire.tensors import decode_tensors, encode_tensors
from tests.federation.runs import (
    EVERYBODY,
    FLOAT,
    gathered,
    is_train,
    means,
    sent,
    without_times,
)
from tests.federations import (
    Federation,
    ToyFederation,
    Whole,
    each_kind,
    federation_of,
    run_whole,
)
from tests.grid import round_of
from tests.toys import TOYS, task

MODELS = {"server": "server", "server+finetune": "server+finetune", "personal": "personal", "tap": "tap"}
"""Model in the results -> its file in a client's folder."""


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
        pulls += is_train(message) and round_of(message) == crash_round
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
    with pytest.raises(ConfigError, match=r"another configuration \(rounds was 2, and is 3\)"):
        other.strategy(resume=True).start(other.grid())
