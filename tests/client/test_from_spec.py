"""A client spec as a client."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tap_flower.client.client_model import client_model, exchanged
from tap_flower.client.from_spec import client_from_spec
from tap_flower.client.node import Node
from tap_flower.config import HyperParameters, Metrics, Model, client_specs, load_config
from tap_flower.errors import BackboneError
from tap_flower.models.load import load_backbone


def test_texts_longer_than_the_backbone_has_positions_for_are_refused() -> None:
    images, names, *_ = client_specs(load_config("demo"))
    backbone = load_backbone("demo", 1)
    longest = backbone.text_length
    refusal = rf"model.text_length = {longest + 1} is too long for backbone 'demo', .* choose at most {longest}"
    with pytest.raises(BackboneError, match=refusal):
        client_model(backbone, names, longest + 1)
    with pytest.raises(BackboneError, match=refusal):
        exchanged(names, Model(text_length=longest + 1))
    client_model(backbone, names, longest)
    client_model(backbone, images, longest + 1)  # it has no texts


@pytest.mark.parametrize(
    ("chosen", "gpu", "expected"), [(None, False, 0), (3, False, 3), (None, True, 4), (0, True, 0)]
)
def test_a_nodes_loader_workers_read_its_clients_data(
    chosen: int | None, gpu: bool, expected: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    spec, settings = client_specs(load_config("demo"))[1], HyperParameters()
    node = Node(spec, tmp_path, None, "", Metrics(), loader_workers=chosen)
    load_backbone(spec.backbone, 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    (task,) = client_from_spec(node, settings).tasks
    assert [part.workers for part in task.train] == [expected]  # type: ignore[union-attr]
