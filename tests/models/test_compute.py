"""Precision, recomputation, compilation: how models compute changes no result beyond the precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tap_flower.core.components import Pair
from tap_flower.models.backbones import load_backbone
from tap_flower.models.model import ModelTask, TapModel

TASKS = [
    ModelTask(Pair("see", ("image",)), "image_classification", ("shapes",), classes=5),
    ModelTask(Pair("answer", ("image", "text")), "text_generation", ("questions",), target_length=8),
    ModelTask(Pair("draw", ("image",)), "image_generation", ("shapes",)),
]
RANDOM = torch.Generator().manual_seed(3)
IMAGE = torch.randn(2, 3, 64, 64, generator=RANDOM)
INPUTS: dict[str, dict[str, Any]] = {
    "see": {"domain": "shapes", "image": IMAGE},
    "answer": {
        "domain": "questions",
        "image": IMAGE,
        "input_ids": torch.tensor([[2, 50, 51, 3], [2, 60, 3, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
        "target_length": 4,
    },
    "draw": {"domain": "shapes", "image": IMAGE},
}


def model(**options: Any) -> TapModel:
    made = TapModel(load_backbone("demo", 1, **options), TASKS).initialise(3)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.requires_grad and name.endswith(".B"):  # zero at first
                parameter.normal_(0, 0.02, generator=torch.Generator().manual_seed(len(name)))
    return made


def outputs_and_gradients(made: TapModel, task: str) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(1)
    made.zero_grad(set_to_none=True)
    output = made.train()(task, INPUTS[task])
    output.square().mean().backward()
    return output.detach(), {n: p.grad for n, p in made.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("task", INPUTS)
def test_recomputing_gives_the_same_gradients(task: str) -> None:
    kept, again = (outputs_and_gradients(model(recompute=recompute), task) for recompute in (False, True))
    assert torch.equal(kept[0], again[0])
    assert kept[1].keys() == again[1].keys()
    for name, gradient in kept[1].items():
        torch.testing.assert_close(again[1][name], gradient, msg=name)


@pytest.mark.parametrize("task", INPUTS)
def test_bfloat16_computes_the_same_to_its_precision(task: str) -> None:
    exact, rounded = model(), model(dtype=torch.bfloat16)
    assert rounded.backbone.fingerprint == exact.backbone.fingerprint
    assert {p.dtype for p in rounded.components.parameters()} == {torch.float32}
    assert {p.dtype for p in rounded.backbone.parameters()} == {torch.bfloat16}
    output, gradients = outputs_and_gradients(exact, task)
    close, close_gradients = outputs_and_gradients(rounded, task)
    assert close.dtype == torch.float32
    assert (close - output).norm() < 0.05 * output.norm()
    assert {g.dtype for g in close_gradients.values()} == {torch.float32}
    assert close_gradients.keys() == gradients.keys()
    together, other = (torch.cat([g[n].flatten() for n in gradients]) for g in (gradients, close_gradients))
    assert torch.cosine_similarity(together, other, dim=0) > 0.98


def test_compiled_it_computes_the_same() -> None:
    plain, compiled = model().eval(), model(compiled=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled("see", INPUTS["see"]), plain("see", INPUTS["see"]))
    output, gradients = outputs_and_gradients(compiled, "see")
    assert torch.isfinite(output).all()
    reached = {name for name, gradient in gradients.items() if gradient.abs().sum() > 0}
    assert reached == set(compiled.component_map.tensors_of(Pair("see", ("image",))))
