"""ViLT: what differs from FLAVA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import ViltConfig, ViltModel

from tap_flower.core.components import Pair, load_trainable_state, trainable_state
from tap_flower.models.load import from_config, from_model
from tap_flower.models.model import ModelTask, TapModel

SEE = ModelTask(Pair("see", ("image",)), "image_classification", ("objects",), classes=5)
ASK = ModelTask(Pair("ask", ("image", "text")), "text_generation", ("answers",), target_length=6)


def config(**values: Any) -> ViltConfig:
    small: dict[str, Any] = {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "vocab_size": 50,
        "image_size": 64,
        "patch_size": 16,
    }
    return ViltConfig(**(small | values))


def inputs() -> dict[str, Any]:
    torch.manual_seed(1)
    return {
        "image": torch.randn(2, 3, 64, 64),
        "input_ids": torch.tensor([[2, 9, 8, 3], [2, 7, 3, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
        "domain": "",
        "target_length": 6,
    }


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("task", [SEE, ASK])
def test_a_pair_reaches_exactly_the_tensors_that_autograd_finds(task: ModelTask, layers: int) -> None:
    torch.manual_seed(0)
    model = TapModel(from_config(config(), layers), [task]).eval()
    for parameter in trainable_state(model).values():
        nn.init.normal_(parameter, std=0.1)
    model(task.pair.task, inputs() | {"domain": task.domains[0]}).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and parameter.grad.abs().max() > 0) == parameter.requires_grad, name


def test_it_starts_from_the_checkpoints_own_image_tokens() -> None:
    """At the start, with the projection as the identity and no LoRA, the tokens are those of transformers' ViLT."""
    torch.manual_seed(0)
    reference = ViltModel(config()).eval()
    nn.init.normal_(reference.embeddings.position_embeddings)
    nn.init.normal_(reference.embeddings.cls_token)
    model = TapModel(from_model(reference, 1, image_size=32), [SEE]).eval()
    load_trainable_state(model, model.first_values(0))
    encoder = model.components["encoder/image"]
    encoder.adaptor = nn.Identity()
    encoder.output = nn.Identity()
    pixels = torch.randn(
        2, 3, 32, 32
    )  # a grid of 2x2 patches, where the checkpoint's is 4x4: positions are interpolated
    with torch.no_grad():
        ours = encoder(model.backbone, pixels, None)
        # ViLT draws the patches in a random order; one image has them all in any case.
        theirs, _, (order, _) = reference.embeddings.visual_embed(pixels, torch.ones(2, 32, 32, dtype=torch.long))
    for row in range(2):
        index = order[row, :, 0] * 2 + order[row, :, 1]
        torch.testing.assert_close(ours[row, 1:][index], theirs[row, 1:], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours[row, 0], theirs[row, 0], atol=1e-6, rtol=1e-6)


def test_too_many_layers_and_a_size_of_no_whole_patches_are_errors() -> None:
    with pytest.raises(ValueError, match="model.layers = 3 needs 6 multimodal layers, the backbone has 4"):
        from_config(config(), 3)
    with pytest.raises(ValueError, match="image_size = 70 is no multiple of .* 16 pixels: choose 64 or 80"):
        from_config(config(), 1, image_size=70)


def test_vilt_b32_at_full_size_sends_its_tensors_only() -> None:
    with torch.device("meta"):
        model = TapModel(from_config(ViltConfig(), layers=4, image_size=224), [SEE])
    sent = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    assert sent["components.encoder/image.offsets.positions"] == (1, 50, 768)
    assert sent["components.encoder/image.patches.A"] == (4, 3 * 32 * 32)
    assert not any("word_embeddings" in name or "up.weight" in name for name in sent)


def test_a_fingerprint_covers_configuration_and_weights() -> None:
    torch.manual_seed(0)
    model = ViltModel(config())
    one = from_model(model, 1).fingerprint
    assert from_model(model, 1).fingerprint == one
    model.config.layer_norm_eps = 1e-3
    other = from_model(model, 1).fingerprint
    model.encoder.layer[0].attention.attention.query.weight.data[0, 0] += 1
    assert len({one, other, from_model(model, 1).fingerprint}) == 3
