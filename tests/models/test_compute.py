"""Precision, recomputation, compilation: how models compute changes no result beyond the precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tap_flower.core.components import Pair, load_trainable_state
from tap_flower.models import backbone, cpu, heads, load
from tap_flower.models.load import load_backbone
from tap_flower.models.model import ModelTask, TapModel
from tests.checkpoints import tiny_flava, tiny_vilt
from tests.core.test_training import Waits

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


def model(name: str = "demo", **options: Any) -> TapModel:
    made = TapModel(load_backbone(name, 1, **options), TASKS)
    load_trainable_state(made, made.first_values(3))
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
def test_a_pass_asks_no_number_of_a_gpu(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = model()
    expected = made.eval()(task, INPUTS[task])
    monkeypatch.setattr(cpu, "lora_linears", lambda *_: None)  # as on a GPU, by the definition,
    monkeypatch.setattr(
        heads, "_causal", lambda length, _: torch.ones(1, 1, length, length).tril().bool()
    )  # and a mask
    torch.testing.assert_close(made(task, INPUTS[task]), expected)
    with Waits() as waits:
        outputs_and_gradients(made, task)
    assert not waits.seen


@pytest.fixture
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """Whether this machine seems to multiply bfloat16 matrices at speed."""
    monkeypatch.setattr(load, "bfloat16_products", lambda: request.param)
    load_backbone.cache_clear()
    yield request.param
    load_backbone.cache_clear()


@pytest.mark.parametrize("task", INPUTS)
@pytest.mark.parametrize("make", [tiny_flava, tiny_vilt])
@pytest.mark.parametrize("products", [True], indirect=True)
def test_bfloat16_computes_the_same_to_its_precision(
    make: Callable[[Path], None], task: str, products: bool, tmp_path: Path
) -> None:
    make(tmp_path)
    exact, rounded = model(str(tmp_path)), model(str(tmp_path), dtype=torch.bfloat16)
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


@pytest.mark.parametrize("products", [True, False], indirect=True)
def test_float32_takes_the_place_of_bfloat16_where_a_processor_has_no_products(
    products: bool, caplog: pytest.LogCaptureFixture
) -> None:
    dtype = torch.bfloat16 if products else torch.float32
    assert load_backbone("demo", 1, dtype=torch.bfloat16).dtype is dtype
    assert ("no bfloat16 products" in caplog.text) is not products


@pytest.mark.slow
def test_compiled_it_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    # Traced, differentiated and cut into graphs as for a run; the C++ compiler, which takes minutes, is left out.
    backbone._compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    plain, compiled = model().eval(), model(compiled=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled("see", INPUTS["see"]), plain("see", INPUTS["see"]))
    output, gradients = outputs_and_gradients(compiled, "see")
    assert torch.isfinite(output).all()
    reached = {name for name, gradient in gradients.items() if gradient.abs().sum() > 0}
    assert reached == set(compiled.component_map.tensors_of(Pair("see", ("image",))))
    backbone._compiled.cache_clear()


@pytest.mark.parametrize("supported", [True, False])
def test_a_gpu_is_asked_whether_it_has_bfloat16_products(supported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def is_bf16_supported(including_emulation: bool = True) -> bool:
        return including_emulation or supported  # an old GPU emulates them, slower than float32

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    assert load.bfloat16_products() is supported
