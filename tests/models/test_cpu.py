"""Kernels for CPUs, against PyTorch's own; memory that stays with the process."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tap_flower.models import cpu
from tap_flower.models.cpu import PatchProjection


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("masked", [False, True])
def test_products_give_what_the_fused_kernel_gives(
    dtype: torch.dtype, tolerance: float, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    qkv = [torch.randn(3, 2, 7, 4).to(dtype).requires_grad_() for _ in range(3)]
    lengths, gradient = torch.tensor([7, 4, 1]), torch.randn(3, 2, 7, 4).to(dtype)
    mask = (torch.arange(7) < lengths[:, None])[:, None, None, :] if masked else None
    fused = F.scaled_dot_product_attention(*qkv, attn_mask=mask)
    wanted = torch.autograd.grad(fused, qkv, gradient)
    monkeypatch.setattr(cpu.F, "scaled_dot_product_attention", lambda *_, **__: pytest.fail("the fused kernel"))
    ours = cpu.attention(*qkv, mask)
    torch.testing.assert_close(ours, fused, rtol=tolerance, atol=tolerance)
    for found, other in zip(torch.autograd.grad(ours, qkv, gradient), wanted, strict=True):
        torch.testing.assert_close(found, other, rtol=tolerance, atol=tolerance)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator is Linux's")
def test_freed_memory_stays_with_the_process() -> None:
    code = """
import resource
from tap_flower.models.cpu import prepare_allocation
prepare_allocation()
import torch
for size in (100_000_000, 90_000_000):  # what little is taken between the two may lie in the first one's place
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(size).fill_(1)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second = map(int, done.stdout.split())
    assert first > 100
    assert second < 10


def test_a_projection_of_patches_is_the_convolution() -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 5, kernel_size=4, stride=4)
    projection = PatchProjection(convolution)
    assert list(projection.state_dict()) == list(convolution.state_dict())
    images = torch.randn(2, 3, 8, 12)
    found: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    for module in (convolution, projection):
        pixels = images.clone().requires_grad_()
        output = module(pixels)
        output.square().sum().backward()
        found.append((output, pixels.grad))
    torch.testing.assert_close(found[1], found[0])


def test_adapters_are_added_to_the_weights_first_where_tokens_are_many() -> None:
    weight = torch.empty(768, 3072)
    assert cpu._pays(torch.empty(1, 4, 1024, 3072), weight)
    assert not cpu._pays(torch.empty(1, 4, 64, 3072), weight)
    assert not cpu._pays(torch.empty(1, 4, 1024, 3072), weight.bfloat16())


def test_a_mask_is_as_frequent_as_it_says_and_follows_the_seed() -> None:
    torch.manual_seed(0)
    mask = cpu.kept((400, 501), 77)
    assert mask.unique().tolist() == [0, 1]
    dropped = mask == 0
    assert dropped.float().mean().item() == pytest.approx(77 / 256, abs=0.003)
    neighbours = (dropped[:, 1:] & dropped[:, :-1]).float().mean().item()
    assert neighbours == pytest.approx((77 / 256) ** 2, abs=0.005)  # independent of each other
    assert not torch.equal(cpu.kept((400, 501), 77), mask)
    torch.manual_seed(0)
    assert torch.equal(cpu.kept((400, 501), 77), mask)
