"""`python -m benchmarks.step`: one optimiser step, one batch of each of a client's tasks, against a large matrix product.

Counted are the operations of matrix products, convolutions and attention that are really done, the low-rank ones included.
`share` is their speed over that of a matrix product of the same dtype, measured in the same process.
"""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.measure import count_flop, matmul_speed, parser, peak_bytes, reset_peak, seconds, show
from benchmarks.workload import client
from tap_flower.core.training import Batch, Optimisation, train
from tap_flower.methods.local import LocalClient
from tap_flower.models.model import TapModel


def one_step(local: LocalClient, model: TapModel, batch: Batch) -> None:
    """Forward, backward and optimiser, as in every participation."""
    train(model, local.kinds, iter([batch]), Optimisation(1, 1e-4))


def main() -> None:
    """Prints a row for each task, and its share of what the machine can do."""
    options = parser(__doc__)
    options.add_argument("--model", choices=["flava", "vilt"], default="flava")
    options.add_argument("--size", choices=["tiny", "base"], default="base")
    options.add_argument("--pattern", type=int, choices=range(10), default=7, help="of the preset's clients")
    options.add_argument("--batch", type=int, default=4, help="examples in a batch")
    options.add_argument("--length", type=int, default=64, help="of the texts, in tokens")
    options.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options.add_argument("--recompute", action="store_true", help="gradient checkpointing")
    options.add_argument("--device", default="cpu")
    options.add_argument("--repeats", type=int, default=5)
    given = options.parse_args()
    device, dtype = torch.device(given.device), getattr(torch, given.dtype)
    local = client(given.model, given.size, given.pattern, given.batch, given.length, dtype, given.recompute)
    local.device = device
    local.backbone.to(device)
    model = local.model()
    limit = matmul_speed(dtype, device)
    rows = []
    for task in local.spec.tasks:
        batch = local.data.batch(task, given.batch, torch.Generator().manual_seed(0), device)
        step = partial(one_step, local, model, batch)
        flop = count_flop(step)
        reset_peak(device)
        took = seconds(step, device, given.repeats)
        rows.append(
            {
                "task": task.name,
                "GFLOP": flop / 1e9,
                "seconds": took,
                "GFLOP/s": flop / took / 1e9,
                "share": flop / took / limit,
                "peak GB": peak_bytes(device) / 1e9,
            }
        )
    show(rows, given.json)


if __name__ == "__main__":
    main()
