"""`python -m benchmarks.step`: one optimiser step with one batch, for each of a client's tasks, against a matrix product.

Counted are the operations of matrix products, convolutions and attention that are really done, the low-rank ones included.
`share` is their speed over that of a large matrix product of the same dtype, measured in the same process just before and
after each step; the median of all steps is given.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median

import torch

from benchmarks.measure import Row, count_flop, matmul_speed, parser, peak_bytes, reset_peak, seconds, show
from benchmarks.workload import client
from tap_flower.core.training import Batch, Optimisation, train
from tap_flower.methods.local import LocalClient
from tap_flower.models.model import TapModel


def one_step(local: LocalClient, model: TapModel, batch: Batch) -> None:
    """Forward, backward and optimiser, as in every participation."""
    train(model, local.kinds, iter([batch]), Optimisation(1, 1e-4))


def measured(step: Callable[[], None], dtype: torch.dtype, device: torch.device, repeats: int) -> Row:
    """One row: operations, seconds, speed, its share of the matrix product's, and the peak of memory."""
    flop, shares, times = count_flop(step), [], []
    reset_peak(device)
    for _ in range(repeats):
        before = matmul_speed(dtype, device)
        times.append(seconds(step, device, 1))
        limit = (before + matmul_speed(dtype, device)) / 2
        shares.append(flop / times[-1] / limit)
    took = median(times)
    return {
        "GFLOP": flop / 1e9,
        "seconds": took,
        "GFLOP/s": flop / took / 1e9,
        "share": median(shares),
        "peak GB": peak_bytes(device) / 1e9,
    }


def main() -> None:
    """Prints a row for each task, and one for all of them, one step each."""
    options = parser(__doc__)
    options.add_argument("--model", choices=["flava", "vilt"], default="flava")
    options.add_argument("--size", choices=["tiny", "base"], default="base")
    options.add_argument("--pattern", type=int, choices=range(10), default=7, help="of the preset's clients")
    options.add_argument("--batch", type=int, default=4, help="examples in a batch")
    options.add_argument("--length", type=int, default=64, help="of the texts, in tokens")
    options.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options.add_argument("--recompute", action="store_true", help="gradient checkpointing")
    options.add_argument("--compile", action="store_true", help="torch.compile")
    options.add_argument("--device", default="cpu")
    options.add_argument("--repeats", type=int, default=5)
    given = options.parse_args()
    device, dtype = torch.device(given.device), getattr(torch, given.dtype)
    local = client(given.model, given.size, given.pattern, given.batch, given.length, dtype, given.recompute)
    local.device, local.holdings.backbone.compiled = device, given.compile
    local.holdings.backbone.to(device)
    model = local.model()

    def step(tasks: slice = slice(None)) -> None:
        for batch in batches[tasks]:
            one_step(local, model, batch)

    random = torch.Generator().manual_seed(0)
    batches = [local.data.batch(task, given.batch, random, device) for task in local.holdings.spec.tasks]
    parts = [(task.name, slice(i, i + 1)) for i, task in enumerate(local.holdings.spec.tasks)]
    parts += [("all", slice(None))] if len(parts) > 1 else []
    show([{"task": n} | measured(partial(step, part), dtype, device, given.repeats) for n, part in parts], given.json)


if __name__ == "__main__":
    main()
