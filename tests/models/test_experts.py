"""Attention as products, against PyTorch's own; memory that stays with the process."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from tap_flower.models import experts


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
    monkeypatch.setattr(experts.F, "scaled_dot_product_attention", lambda *_, **__: pytest.fail("the fused kernel"))
    ours = experts.attention(*qkv, mask)
    torch.testing.assert_close(ours, fused, rtol=tolerance, atol=tolerance)
    for found, other in zip(torch.autograd.grad(ours, qkv, gradient), wanted, strict=True):
        torch.testing.assert_close(found, other, rtol=tolerance, atol=tolerance)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator is Linux's")
def test_freed_memory_stays_with_the_process() -> None:
    code = """
import resource
from tap_flower.models.allocation import prepare_allocation
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
