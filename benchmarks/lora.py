"""`python -m benchmarks.lora`: our frozen linear map with LoRA, in training on the CPU, against plain PyTorch operations.

Forward and backward; the product with the frozen matrix is in both, dropout .3 on the adapter's input too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.measure import parser, seconds, show
from tap_flower.models.lora import LoRA, LoraSettings, lora_linear

SHAPES = ((4, 788, 768, 3072), (4, 788, 3072, 768), (1, 256, 768, 768), (4, 1040, 64, 256))
"""Stack, tokens of a batch, input and output features: of a fusion layer and an encoder at full size, and of the demo."""


def ours(loras: Sequence[LoRA], x: Tensor) -> Tensor:
    """Our function: [S, N, in] -> [S, N, out]."""
    return lora_linear(loras, x)


def plain(loras: Sequence[LoRA], x: Tensor) -> Tensor:
    """The same map in plain operations."""
    dropped = F.dropout(x, loras[0].dropout)
    a, b = torch.stack([lora.A for lora in loras]), torch.stack([lora.B for lora in loras])
    low = torch.bmm(dropped, a.transpose(1, 2))
    return torch.baddbmm(loras[0].frozen(x), low, b.transpose(1, 2), alpha=loras[0].scale)


def there_and_back(run: Callable[[Sequence[LoRA], Tensor], Tensor], loras: Sequence[LoRA], x: Tensor) -> None:
    """Forward and backward."""
    torch.autograd.backward(run(loras, x).sum())


def adapters(stack: int, size: int, features: int, dropout: float = 0.3) -> list[LoRA]:
    """Adapters with random values of one frozen map."""
    linear = nn.Linear(size, features).requires_grad_(False)
    loras = [LoRA(linear, LoraSettings(8, 16, dropout)) for _ in range(stack)]
    for lora in loras:
        nn.init.normal_(lora.A)
        nn.init.normal_(lora.B)
    return loras


def main() -> None:
    """Prints a row for each shape: milliseconds of each, and their ratio."""
    options = parser(__doc__)
    given, cpu, rows = options.parse_args(), torch.device("cpu"), []
    for stack, tokens, size, features in SHAPES:
        loras, x = adapters(stack, size, features), torch.randn(stack, tokens, size, requires_grad=True)
        took = [seconds(partial(there_and_back, run, loras, x), cpu, 9) for run in (ours, plain)]
        shape = f"[{stack}, {tokens}, {size}] -> {features}"
        rows.append({"shape": shape, "ours ms": took[0] * 1e3, "plain ms": took[1] * 1e3, "ratio": took[0] / took[1]})
    show(rows, given.json)


if __name__ == "__main__":
    main()
