"""A federation of users' own modules, in this process."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from tap_flower import Client, TapClientApp, TapStrategy, load_config, load_module
from tap_flower.config import Encoding
from tap_flower.errors import RunError
from tap_flower.report.events import read_events
from tap_flower.run.in_process import InProcessGrid
from tap_flower.wire import messages
from tests.grid import round_of
from tests.own_clients import Net, client, digits, make, mood
from tests.toys import pixels

SETTINGS = ["rounds=2", "clients_per_round=3", "train.steps=30", "distill.iterations=30", "start_timeout=1"]


def run(folder: Path, *settings: str, making: Any = make, **options: Any) -> tuple[TapStrategy, dict[str, Any]]:
    nodes, app = [{"partition-id": i} for i in range(3)], TapClientApp()
    app.client()(making)
    grid = InProcessGrid(app, nodes, {"state": str(folder / "state")}, **options)
    strategy = TapStrategy(config=load_config("plug-in", settings=[*SETTINGS, *settings]), run_folder=folder / "run")
    return strategy, strategy.start(grid).summary


def test_a_run(tmp_path: Path) -> None:
    replies: dict[str, dict[str, torch.Tensor]] = {}
    sent: dict[str, dict[str, torch.Tensor]] = {}

    def watch(instruction: Message, reply: Message) -> Message:
        if instruction.metadata.message_type == messages.TRAIN:
            name = f"{round_of(instruction)}/{instruction.metadata.dst_node_id}"
            sent[name] = messages.tensors_of(instruction.content, Encoding.float32)
            differences = messages.tensors_of(reply.content, Encoding.float32)
            replies[name] = {tensor: value + sent[name][tensor] for tensor, value in differences.items()}
        return reply

    faster = ("train.learning_rate=0.01", "distill.learning_rate=0.01")
    _, results = run(tmp_path, "replacement.evidence=training", *faster, tamper=watch)
    assert {name: set(tasks) for name, tasks in results["clients"].items()} == {
        "ann": {"digits"},
        "bob": {"mood"},
        "cleo": {"digits", "mood"},
    }
    assert results["kinds"] == {"digits": "image_classification", "mood": "regression"}
    # The mean over the holders, weighted by the examples of their pairs that reach the component: 64 + 48, 48 and 64.
    first = {node: tensors for node, tensors in replies.items() if node.startswith("1/")}
    ann, bob, cleo = first["1/100"], first["1/101"], first["1/102"]
    trunk, head = "trunk.0.weight", "heads.digits.weight"
    mean = (64 * ann[trunk] + 48 * bob[trunk] + 112 * cleo[trunk]) / 224
    torch.testing.assert_close(sent["2/100"][trunk], mean, atol=1e-6, rtol=0)
    torch.testing.assert_close(sent["2/100"][head], (ann[head] + cleo[head]) / 2, atol=1e-6, rtol=0)
    assert head not in bob
    assert sent["1/100"][trunk].equal(sent["1/102"][trunk])

    # It learns: guessing has 1/3, and the mean of the target has the error 5/12.
    assert results["tasks"]["digits"]["tap"]["accuracy"] > 0.7
    assert results["tasks"]["mood"]["tap"]["loss"] < 5 / 12
    (state,) = (tmp_path / "state" / "cleo").iterdir()
    net = load_module(Net("digits", "mood"), state)
    images, labels = next(iter(torch.utils.data.DataLoader(client(2).tasks[0].test, batch_size=32)))
    accuracy = float((net.see(images).argmax(1) == labels).double().mean())
    assert accuracy == results["clients"]["cleo"]["digits"]["tap"]["accuracy"]
    assert json.loads((tmp_path / "run" / "results.json").read_text())["clients"] == results["clients"]


def test_a_run_again_gives_the_same(tmp_path: Path) -> None:
    (_, one), (_, other) = (run(tmp_path / name, "train.steps=3", "distill.iterations=3") for name in ("one", "other"))
    assert one["clients"] == other["clients"]


@pytest.mark.parametrize(
    "method", ["local", "fedavg+finetune", "fedprox", "ditto", "pfedme", "per-fedavg", "apfl", "feddat"]
)
def test_every_method_runs(tmp_path: Path, method: str) -> None:
    _, results = run(tmp_path, f"method={method}", "rounds=1", "train.steps=2", "distill.iterations=2")
    assert set(results["clients"]) == {"ann", "bob", "cleo"}


def test_a_method_that_needs_our_own_models_says_so(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="method=disentafl needs the fusion of tap-flower's own models"):
        run(tmp_path, "method=disentafl")
    with pytest.raises(RunError, match="method=fedper treats heads apart, and no component of the client's model"):
        run(tmp_path, "method=fedper")


def test_other_shapes_under_one_name_are_refused_with_both_clients(tmp_path: Path) -> None:
    def other(context: Context) -> Client:
        made = make(context)
        return (
            Client("bob", lambda: Net("mood", width=7), [mood(1)], state_dir=tmp_path) if made.name == "bob" else made
        )

    with pytest.raises(RunError, match=r"'trunk.0.weight' has shape \(7, 7\) on client 'bob' but \(6, 6\) on 'ann'"):
        run(tmp_path, making=other)


def test_what_no_task_reaches_stays_on_the_client_and_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def other(context: Context) -> Client:
        made = make(context)
        if made.name != "ann":
            return made
        return Client("ann", lambda: Net("digits", "mood"), [digits(0)], state_dir=tmp_path / "state")

    strategy, _ = run(tmp_path, "rounds=1", "train.steps=2", "distill.iterations=2", making=other)
    assert "no task reaches the trainable tensors 'words.weight_ih_l0', " in caplog.text
    assert not any(name.startswith("words") for name in strategy.roster.manifests["ann"].tensors)
    (kept,) = (tmp_path / "state" / "ann").glob("*/tap.safetensors")
    assert "words.weight_ih_l0" in load_file(kept)


def test_what_a_clients_own_code_says_stays_in_its_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def other(context: Context) -> Client:
        if context.node_config["partition-id"] == 1:
            raise KeyError("patient 17")
        return make(context)

    with pytest.raises(
        RunError, match="unexpected KeyError at test_own_modules.py:[0-9]+: the log of its node says more"
    ):
        run(tmp_path, making=other)
    assert "patient 17" in capfd.readouterr().err


class Late(Dataset[Any]):
    """Rows whose last is broken: its label is not one of the classes, or it cannot be read."""

    def __init__(self, label: int | None) -> None:
        self.rows, self.label = pixels(64, 0), label

    def __len__(self) -> int:
        return 64

    def __getitem__(self, row: int) -> Any:
        image, label = self.rows[row]
        if row < 63:
            return image, label
        if self.label is None:
            raise OSError("patient 17")
        return image, torch.tensor(self.label)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("loader", [False, True])
@pytest.mark.parametrize(
    ("label", "words"),
    [
        (-100, "task 'digits': a label is outside of the model's outputs, which are numbered from 0"),
        (7, "task 'digits': a label is outside of the model's outputs, which are numbered from 0"),
        (None, r"task 'digits': unexpected OSError at test_own_modules.py:\d+: the log of its node says more"),
    ],
)
def test_an_error_in_a_late_batch_names_the_task(
    tmp_path: Path, split: str, loader: bool, label: int | None, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    data = DataLoader(Late(label), batch_size=8) if loader else Late(label)

    def other(context: Context) -> Client:
        made = make(context)
        return replace(made, tasks=[replace(t, **{split: data}) if t.name == "digits" else t for t in made.tasks])

    caplog.clear()
    run(tmp_path, making=other)
    assert label is None or f"task 'digits': Target {label} is out of bounds" in caplog.text  # the log of the node
    problems = [event["problem"] for event in read_events(tmp_path / "run") if event["event"] == "dropped"]
    assert problems
    assert all(re.match(words, problem) for problem in problems), problems


@pytest.mark.parametrize(
    ("label", "words"),
    [
        (7, "client 'ann': task 'digits': a label is outside of the model's outputs"),
        (None, r"client 'ann': task 'digits': unexpected OSError at test_own_modules.py:\d+"),
    ],
)
def test_held_out_examples_are_tried_before_the_first_round(tmp_path: Path, label: int | None, words: str) -> None:
    def other(context: Context) -> Client:
        made = make(context)
        return replace(
            made, tasks=[replace(t, validation=Late(label)) if t.name == "digits" else t for t in made.tasks]
        )

    with pytest.raises(RunError, match=words):
        run(tmp_path, making=other)


def with_a_hole(data: TensorDataset) -> TensorDataset:
    x, y = data.tensors
    return TensorDataset(torch.cat([x[:-1], torch.full_like(x[-1:], torch.nan)]), y)


def test_held_out_values_that_are_not_finite_are_told_before_the_first_round(tmp_path: Path) -> None:
    def other(context: Context) -> Client:
        made = make(context)
        broken = [replace(t, validation=with_a_hole(t.test)) if t.name == "digits" else t for t in made.tasks]
        return replace(made, tasks=broken)

    with pytest.raises(
        RunError, match="task 'digits': the loss on its held-out examples is nan with the run's first values"
    ):
        run(tmp_path, making=other)


def test_test_values_that_are_not_finite_are_told_with_their_task(tmp_path: Path) -> None:
    def other(context: Context) -> Client:
        made = make(context)
        broken = [replace(t, test=with_a_hole(t.test)) if t.name == "digits" else t for t in made.tasks]
        return replace(made, tasks=broken if made.name == "ann" else made.tasks)

    reason = run(tmp_path, making=other)[1]["missing"]["ann"]
    assert "task 'digits': loss of the model 'server' is nan on the test data: look there for values" in reason


def test_labels_in_words_are_refused_before_the_first_round(tmp_path: Path) -> None:
    named = [(torch.zeros(12), "cat"), (torch.ones(12), "dog")]

    def other(context: Context) -> Client:
        return Client("ann", lambda: Net("digits"), [replace(digits(0), train=named, validation=named)])

    with pytest.raises(RunError, match="task 'digits': `target` returned a .* of str: return a tensor, of labels"):
        run(tmp_path, making=other)


def test_frozen_weights_are_neither_sent_nor_changed(tmp_path: Path) -> None:
    backbone = nn.Linear(4, 6).requires_grad_(False)
    before = backbone.weight.clone()

    class Tuned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = backbone, nn.Linear(6, 3)

        def see(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.relu(self.backbone(x)))

    def tuned(context: Context) -> Client:
        number = int(context.node_config["partition-id"])
        return Client(f"c{number}", Tuned, [digits(number)], state_dir=tmp_path / "state")

    _, results = run(tmp_path, "train.learning_rate=0.1", "distill.learning_rate=0.1", making=tuned)
    assert set(results["bytes"]["per_component"]) == {"head"}
    assert backbone.weight.equal(before)
    assert results["tasks"]["digits"]["tap"]["accuracy"] > 0.6
