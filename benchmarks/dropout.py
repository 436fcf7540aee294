"""`python -m benchmarks.dropout`: our dropout on the CPU against PyTorch's, forward and backward, one thread."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional as F

from tap_flower.models.lora import dropout

SHAPES = ((4, 1040, 64), (4, 1040, 256), (8, 1040, 256))
"""Inputs of LoRA in a demo step: [stack, batch · tokens, features]."""


def seconds(function: Callable[[Tensor, float], Tensor], x: Tensor, runs: int = 15) -> float:
    """Median seconds of one forward and backward pass."""
    times = []
    for _ in range(runs + 1):
        began = time.perf_counter()
        function(x, 0.3).sum().backward()  # type: ignore[no-untyped-call]
        times.append(time.perf_counter() - began)
    return median(times[1:])


def main() -> None:
    """Prints a row for each shape: milliseconds of each, and their ratio."""
    torch.set_num_threads(1)
    print(f"{'shape':>16}  {'ours ms':>8}  {'PyTorch ms':>10}  {'ratio':>6}")
    for shape in SHAPES:
        x = torch.randn(shape, requires_grad=True)
        ours, theirs = seconds(dropout, x), seconds(lambda x, p: F.dropout(x, p), x)
        print(f"{shape!s:>16}  {ours * 1e3:8.2f}  {theirs * 1e3:10.2f}  {ours / theirs:6.2f}")


if __name__ == "__main__":
    main()
