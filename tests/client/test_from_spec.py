"""A client spec as a client."""

from __future__ import annotations

import pytest

from tap_flower.client.client_model import client_model, exchanged
from tap_flower.config import Model, client_specs, load_config
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
