"""The frozen linear map with stacked LoRA: its equation, its gradients, its dropout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tap_flower.models import lora
from tap_flower.models.lora import LoRA, LoraSettings, kept, lora_linear, lora_linears

STACK, TOKENS, SIZE, FEATURES = 2, 9, 6, 7
FACTOR = 2.0  # alpha / rank


def adapters(groups: int = 2) -> tuple[nn.Linear, list[list[LoRA]], Tensor]:
    torch.manual_seed(0)
    linear = nn.Linear(SIZE, FEATURES).double().requires_grad_(False)
    loras = [[LoRA(linear, LoraSettings(3, 6)).double() for _ in range(STACK)] for _ in range(groups)]
    for adapter in (one for group in loras for one in group):
        nn.init.normal_(adapter.A)
        nn.init.normal_(adapter.B)
    return linear, loras, torch.randn(STACK, 3, 3, SIZE, dtype=torch.float64, requires_grad=True)


def by_hand(linear: nn.Linear, group: list[LoRA], x: Tensor, masks: Tensor | None = None) -> Tensor:
    """`W x + bias + alpha / rank * B A dropout(x)` of each entry of the stack, one after the other."""
    outputs = []
    for number, adapter in enumerate(group):
        dropped = x[number] if masks is None else x[number] * masks[number].view(x[number].shape) * 256 / 179
        outputs.append(x[number] @ linear.weight.T + linear.bias + FACTOR * dropped @ adapter.A.T @ adapter.B.T)
    return torch.stack(outputs)


def test_without_dropout_it_is_its_equation() -> None:
    linear, loras, x = adapters()
    for adapter in (one for group in loras for one in group):
        adapter.eval()
    for output, group in zip(lora_linears(linear.weight, linear.bias, loras, x), loras, strict=True):
        torch.testing.assert_close(output, by_hand(linear, group, x))
    torch.testing.assert_close(lora_linear(linear, loras[0], x), by_hand(linear, loras[0], x))


@pytest.mark.parametrize("block", [1, 24, 1 << 18])
def test_with_dropout_it_is_its_equation_and_so_are_its_gradients(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    linear, loras, x = adapters()
    torch.manual_seed(5)
    masks = [kept((STACK, TOKENS, SIZE), 77) for _ in loras]
    monkeypatch.setattr(lora, "_BLOCK", block)
    torch.manual_seed(5)
    outputs = lora_linears(linear.weight, linear.bias, loras, x)
    expected = [by_hand(linear, group, x, mask) for group, mask in zip(loras, masks, strict=True)]
    weights = [torch.randn_like(output) for output in outputs]
    trained = [x, *(p for group in loras for adapter in group for p in adapter.parameters())]
    found, wanted = (
        torch.autograd.grad(sum((o * w).sum() for o, w in zip(out, weights, strict=True)), trained)
        for out in (outputs, expected)
    )
    for ours, theirs in [*zip(outputs, expected, strict=True), *zip(found, wanted, strict=True)]:
        torch.testing.assert_close(ours, theirs)


def test_a_mask_is_as_frequent_as_it_says_and_follows_the_seed() -> None:
    torch.manual_seed(0)
    mask = kept((400, 501), 77)
    assert mask.unique().tolist() == [0, 1]
    dropped = mask == 0
    assert dropped.float().mean().item() == pytest.approx(77 / 256, abs=0.003)
    neighbours = (dropped[:, 1:] & dropped[:, :-1]).float().mean().item()
    assert neighbours == pytest.approx((77 / 256) ** 2, abs=0.005)  # independent of each other
    assert not torch.equal(kept((400, 501), 77), mask)
    torch.manual_seed(0)
    assert torch.equal(kept((400, 501), 77), mask)
