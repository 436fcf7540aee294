"""`python -m benchmarks.attention`: attention as products against PyTorch's fused kernel, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure import parser, seconds, show
from tap_flower.models.cpu import attention as attention_of_products

HEADS, SIZE = 12, 64


def main() -> None:
    """Prints a row for each number of tokens and dtype; a stack of four paths with batches of 4, as in FLAVA."""
    given = parser(__doc__).parse_args()
    cpu, rows = torch.device("cpu"), []
    for tokens in (32, 64, 128, 197):
        for dtype in (torch.float32, torch.bfloat16):
            qkv = [torch.randn(16, HEADS, tokens, SIZE).to(dtype).requires_grad_() for _ in range(3)]
            gradient = torch.randn(16, HEADS, tokens, SIZE).to(dtype)

            def step(attention: Callable[..., Tensor], inputs: list[Tensor] = qkv, back: Tensor = gradient) -> None:
                torch.autograd.grad(attention(*inputs), inputs, back)

            ours = seconds(lambda: step(lambda q, k, v: attention_of_products(q, k, v, None)), cpu, 9)
            fused = seconds(lambda: step(F.scaled_dot_product_attention), cpu, 9)
            name = str(dtype).removeprefix("torch.")
            rows.append(
                {"tokens": tokens, "dtype": name, "ours ms": ours * 1e3, "fused ms": fused * 1e3, "ratio": ours / fused}
            )
    show(rows, given.json)


if __name__ == "__main__":
    main()
