"""The frozen linear map with stacked LoRA: its equation, its gradients, its dropout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tap_flower.models import cpu
from tap_flower.models.cpu import kept
from tap_flower.models.lora import LoRA, LoraSettings, lora_linear, lora_linears

STACK, TOKENS, SIZE, FEATURES = 2, 9, 6, 7
FACTOR = 2.0  # alpha / rank


def adapters(groups: int, maps: int, inputs: int) -> tuple[list[list[LoRA]], Tensor]:
    """Groups of adapters, on one map or each on its own, and an input for all or for each: [inputs, STACK, 3, 3, SIZE]."""
    torch.manual_seed(0)
    linears = [nn.Linear(SIZE, FEATURES).double().requires_grad_(False) for _ in range(maps)]
    loras = [
        [LoRA(linears[number % maps], LoraSettings(3, 6)).double() for _ in range(STACK)] for number in range(groups)
    ]
    for adapter in (one for group in loras for one in group):
        nn.init.normal_(adapter.A)
        nn.init.normal_(adapter.B)
    return loras, torch.randn(inputs, STACK, 3, 3, SIZE, dtype=torch.float64, requires_grad=True)


def by_hand(groups: list[list[LoRA]], x: Tensor, masks: Tensor | None = None) -> Tensor:
    """`W x + bias + alpha / rank * B A dropout(x)` of each adapter, one after the other."""
    outputs = []
    for group, loras in enumerate(groups):
        part = x[group % len(x)]
        for number, adapter in enumerate(loras):
            linear, dropped = adapter.frozen, part[number]
            if masks is not None:
                dropped = dropped * masks[group, number].view(dropped.shape) * 256 / 179
            outputs.append(linear(part[number]) + FACTOR * dropped @ adapter.A.T @ adapter.B.T)
    return torch.stack(outputs).view(len(groups), STACK, 3, 3, FEATURES)


FORMS = pytest.mark.parametrize(
    ("groups", "maps", "inputs"), [(1, 1, 1), (2, 1, 1), (2, 2, 1), (2, 1, 2), (2, 2, 2), (3, 1, 1)]
)
"""Groups of adapters, maps that they adapt, inputs that they share or have."""


@pytest.mark.parametrize("mode", ["plain", "merged first", "training"])
def test_a_map_without_a_bias(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    adapter = LoRA(nn.Linear(SIZE, FEATURES, bias=False).requires_grad_(False), LoraSettings(3, 6, 0.0))
    nn.init.normal_(adapter.A)
    nn.init.normal_(adapter.B)
    adapter.train(mode == "training")
    monkeypatch.setattr(cpu, "_pays", lambda x, weight: mode == "merged first")
    x = torch.randn(1, 4, SIZE)
    with torch.no_grad():
        torch.testing.assert_close(lora_linear([adapter], x), x @ adapter.merged()["weight"].T)
    assert not adapter.merged()["bias"].any()


@FORMS
@pytest.mark.parametrize("merged_first", [False, True])
def test_without_dropout_it_is_its_equation(
    groups: int, maps: int, inputs: int, merged_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    loras, x = adapters(groups, maps, inputs)
    for adapter in (one for group in loras for one in group):
        adapter.eval()
    monkeypatch.setattr(cpu, "_pays", lambda x, weight: merged_first)
    expected = by_hand(loras, x)
    with torch.no_grad():
        torch.testing.assert_close(lora_linears(loras, x), expected)
    with_gradients = lora_linears(loras, x)
    torch.testing.assert_close(with_gradients, expected)
    found, wanted = (torch.autograd.grad(out.sum(), [x, loras[-1][0].A]) for out in (with_gradients, expected))
    torch.testing.assert_close(found, wanted)


def test_one_group_is_a_stack() -> None:
    loras, x = adapters(1, 1, 1)
    loras[0][0].eval()
    torch.testing.assert_close(lora_linear(loras[0], x[0]), by_hand(loras, x)[0])


@FORMS
@pytest.mark.parametrize("block", [1, 24, 1 << 18])
def test_with_dropout_it_is_its_equation_and_so_are_its_gradients(
    groups: int, maps: int, inputs: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    loras, x = adapters(groups, maps, inputs)
    torch.manual_seed(5)
    masks = kept((groups, STACK, TOKENS, SIZE), 77)
    monkeypatch.setattr(cpu, "_BLOCK", block)
    torch.manual_seed(5)
    output, expected = lora_linears(loras, x), by_hand(loras, x, masks)
    torch.testing.assert_close(output, expected)
    weights = torch.randn_like(output)
    trained = [x, *(p for group in loras for adapter in group for p in adapter.parameters())]
    found, wanted = (torch.autograd.grad((out * weights).sum(), trained) for out in (output, expected))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
