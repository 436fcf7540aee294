"""A merged model computes what the model with adapters computes, and holds nothing that it does not need."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from tap_flower.core.components import Pair
from tap_flower.models.load import load_backbone, outline
from tap_flower.models.lora import LoRA
from tap_flower.models.merged import merged_outline, merged_state
from tap_flower.models.model import ModelTask, TapModel
from tests.checkpoints import tiny_flava, tiny_vilt
from tests.models.test_model import randomise

TASKS = [
    ModelTask(Pair("shapes", ("image",)), "image_classification", ("objects", "drawings"), classes=5),
    ModelTask(Pair("news", ("text",)), "text_classification", ("news",), classes=3),
    ModelTask(Pair("answers", ("image", "text")), "text_generation", ("answering",), target_length=6),
    ModelTask(Pair("painting", ("image",)), "image_generation", ("objects",)),
]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.pair.task)
@pytest.mark.parametrize("make", [tiny_flava, tiny_vilt])
def test_it_computes_the_same(make: Callable[[Path], None], task: ModelTask, tmp_path: Path) -> None:
    make(tmp_path)
    model = randomise(TapModel(load_backbone(str(tmp_path), 1), TASKS))
    state = merged_state(model, merged_outline(outline(str(tmp_path), 1), task))
    load_backbone.cache_clear()
    alone = load_backbone(str(tmp_path), 1)
    for parameter in alone.parameters():
        nn.init.constant_(parameter, 7.0)  # every tensor comes from the state
    merged = merged_outline(alone, task)
    merged.load_state_dict(state)
    load_backbone.cache_clear()
    assert not any(isinstance(module, LoRA) for module in merged.modules())

    inputs = {
        "image": torch.randn(3, 3, 64, 64),
        "input_ids": torch.tensor([[3, 4, 5, 6], [3, 4, 5, 0], [7, 8, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]]),
        "target_length": 6,
    }
    for domain in task.domains:
        with torch.no_grad():
            expected = model(task.pair.task, {**inputs, "domain": domain})
            torch.testing.assert_close(
                merged(task.pair.task, {**inputs, "domain": domain}), expected, rtol=1e-3, atol=1e-4
            )
    for name, parameter in merged.named_parameters():  # and the result depends on each of them
        parameter.requires_grad_()
        assert state[name].shape == parameter.shape
    for domain in task.domains:
        merged(task.pair.task, {**inputs, "domain": domain}).square().sum().backward()
    unused = {name for name, parameter in merged.named_parameters() if parameter.grad is None}
    assert not [name for name in unused if not any(part in name for part in UNUSED)]


UNUSED = ("mask_token", "pooler")
"""Of transformers' own modules."""
