"""What a client writes down for its own people."""

from __future__ import annotations

from base64 import b64decode
from io import BytesIO
from typing import Any

import pytest
from PIL import Image

from tap_flower.federation import messages
from tap_flower.federation.checkpoint import Writer
from tap_flower.reporting.client_records import read_decisions, read_examples, read_gradients

from .conftest import Federation


def test_a_run_leaves_decisions_examples_and_cosines_with_the_client(federation: Federation) -> None:
    grid = federation.grid()
    results = federation.strategy().start(grid)
    clients = federation.out / "clients"
    for name, counts in results["replacements"].items():
        decisions = read_decisions(clients / name)
        assert [d["round"] for d in decisions] == sorted([1, 2] * len(counts))
        for d in decisions:
            personal = float("inf") if d["personal_loss"] is None else d["personal_loss"]
            assert d["replaced"] == (d["teacher_loss"] + d["margin"] < personal)
            assert (d["personal_loss"] is None) == (d["round"] == 1)
        assert {t: sum(d["replaced"] for d in decisions if d["task"] == t) for t in counts} == counts

        examples = read_examples(clients / name)
        assert examples.keys() == counts.keys()
        for found in examples.values():
            assert len(found["items"]) == 4
            for item in found["items"]:
                assert item["answers"].keys() == {"server", "personal", "tap"}
    image = read_examples(clients / "bob")["shape_images"]["items"][0]
    assert Image.open(BytesIO(b64decode(image["image"]))).size == (64, 64)
    assert image["answers"]["tap"]["mse"] > 0
    text = read_examples(clients / "cleo")["answers"]["items"][0]
    assert text["text"].endswith("?")
    assert text["target"]["text"]

    (pair,) = read_gradients(clients / "bob")
    assert (pair["a"], pair["b"]) == ("languages", "shape_images")
    assert -1 <= pair["cosine"] <= 1
    assert "fusion/shared_proj" in pair["components"]
    assert not [component for component in pair["components"] if component.startswith(("encoder", "head"))]
    assert read_gradients(clients / "ann") == []  # it has one pair

    for reply in grid.received:  # none of it travels
        values = messages.decode(reply.content)
        assert not {"margin", "personal_loss", "decisions", "items", "answers", "cosine"} & values.keys()


def test_a_repeated_round_is_recorded_once(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    save, calls = Writer.save, list[int]()

    def crash(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("the server crashed in round 2")
        save(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "save", crash)
        with pytest.raises(RuntimeError, match="crashed"):
            federation.strategy().start(federation.grid())
    federation.strategy(resume=True).start(federation.grid())
    assert [d["round"] for d in read_decisions(federation.out / "clients" / "ann")] == [1, 2]
