"""What a client writes down for its own people."""

from __future__ import annotations

import json
from base64 import b64decode
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import pytest
from PIL import Image
from torch import Tensor

from tap_flower.report.client_records import read_decisions, read_examples, read_gradients
from tap_flower.server import checkpoint
from tap_flower.wire import messages
from tests.federations import Make, Whole
from tests.toys import TOYS, Net, Toy


def test_a_run_leaves_the_clients_decisions_with_the_client(whole: Whole) -> None:
    for name, counts in whole.results["replacements"].items():
        decisions = read_decisions(whole.federation.state(name))
        assert [d.round for d in decisions] == sorted([1, 2] * len(counts))
        for d in decisions:
            assert d.teacher_loss is not None
            personal = float("inf") if d.personal_loss is None else d.personal_loss
            assert d.replaced == (d.teacher_loss + d.margin < personal)
            assert (d.personal_loss is None) == (d.round == 1)
        assert {t: sum(d.replaced for d in decisions if d.task == t) for t in counts} == counts
    for reply in whole.grid.received:  # none of it travels, nor of what is below
        text = str(reply.content.config_records[messages.FIELDS]["json"])
        assert not [word for word in ("margin", "personal_loss", "decisions", "items", "cosine") if word in text]


def test_a_run_leaves_cosines_with_a_client_of_two_pairs(whole: Whole) -> None:
    (pair,) = read_gradients(whole.federation.state("bob"))
    assert (pair["a"], pair["b"]) == ("languages", "shape_images")
    assert -1 <= pair["cosine"] <= 1
    if whole.kind == "toys":
        assert pair["components"].keys() == {"fusion/mix", "fusion/norm"}
    assert whole.kind == "toys" or "fusion/shared_proj" in pair["components"]
    assert not [component for component in pair["components"] if component.startswith(("encoder", "head"))]
    assert read_gradients(whole.federation.state("ann")) == []  # it has one pair


class Branched(Net):
    """Its norm, which both pairs share, is used in training only."""

    def run(self, task: str, inputs: Sequence[Tensor]) -> Tensor:
        trunk = self.trunk
        self.trunk = trunk if self.training else trunk[0]
        found = super().run(task, inputs)
        self.trunk = trunk
        return found


class Detached(Net):
    """Its output has no gradient in evaluation."""

    def run(self, task: str, inputs: Sequence[Tensor]) -> Tensor:
        found = super().run(task, inputs)
        return found if self.training else found.detach()


@pytest.mark.parametrize("kind", [Branched, Detached])
def test_a_diagnostic_that_fails_costs_no_result(
    make_federation: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: type[Net]
) -> None:
    monkeypatch.setattr(Toy, "net", lambda self: kind(*self.tasks))
    federation = make_federation(TOYS[1:2], "clients_per_round=1", "rounds=1")
    results = federation.strategy().start(federation.grid()).summary
    assert results["clients"]["bob"]["languages"].keys() >= {"server", "personal", "tap"}
    if kind is Branched:
        (pair,) = read_gradients(federation.state("bob"))
        assert pair["components"]["fusion/norm"] is None  # a gradient of zero
        assert pair["components"]["fusion/mix"] is not None
    else:
        assert read_gradients(federation.state("bob")) == []
        assert "gradient cosines are skipped: RuntimeError: " in caplog.text
        record = json.loads((federation.state("bob") / "gradients.json").read_text())
        assert record["skipped"].keys() == {"gradient cosines"}


def test_a_run_leaves_examples_with_the_clients_of_client_specs(whole_specs: Whole) -> None:
    state = whole_specs.federation.state
    for name, by_task in whole_specs.results["clients"].items():
        examples = read_examples(state(name))
        assert examples.keys() == by_task.keys()
        for found in examples.values():
            assert len(found["items"]) == 4
            for item in found["items"]:
                assert item["answers"].keys() == {"server", "personal", "tap"}
    image = read_examples(state("bob"))["shape_images"]["items"][0]
    assert Image.open(BytesIO(b64decode(image["image"]))).size == (40, 40)
    assert image["answers"]["tap"]["mse"] > 0
    text = read_examples(state("cleo"))["answers"]["items"][0]
    assert text["text"].endswith("?")
    assert text["target"]["text"]


def test_the_data_of_ones_own_clients_are_not_written_down(whole_toys: Whole) -> None:
    assert read_examples(whole_toys.federation.state("bob")) == {}


def test_a_repeated_round_is_recorded_once(make_federation: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    federation = make_federation(TOYS[:1])
    save, calls = checkpoint.save, list[int]()

    def crash(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("the server crashed in round 2")
        save(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", crash)
        with pytest.raises(RuntimeError, match="crashed"):
            federation.strategy().start(federation.grid())
    federation.strategy(resume=True).start(federation.grid())
    assert [d.round for d in read_decisions(federation.state("ann"))] == [1, 2]
