"""`python -m benchmarks.step`: one optimiser step with one batch, for each of a client's tasks, against a matrix product.

Counted are the operations of matrix products, convolutions and attention that are really done, the low-rank ones included.
`share` is their speed over that of a large matrix product of the same dtype, measured in the same process just before and
after each step; the median of all steps is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import cast

import torch

from benchmarks.measure import Row, count_flop, matmul_speed, parser, peak_bytes, reset_peak, seconds, show
from benchmarks.workload import MadeUpData, backbone_of, client, specs_of
from tap_flower.core.components import ComponentModel
from tap_flower.core.training import Batch, Optimisation, train
from tap_flower.methods.session import Session


def one_step(local: Session, model: ComponentModel, batch: Batch) -> None:
    """Forward, backward and optimiser, as in every participation."""
    train(model, local.kinds, iter([batch]), Optimisation(1, 1e-4))


def steps(local: Session, model: ComponentModel, batches: Sequence[Batch]) -> None:
    """One step with each batch."""
    for batch in batches:
        one_step(local, model, batch)


def batches_of(local: Session, batch_size: int) -> list[Batch]:
    """A random batch of each of a client's tasks, on its device."""
    data, random = cast(MadeUpData, local.data), torch.Generator().manual_seed(0)
    return [data.batch(task, batch_size, random, local.device) for task in specs_of(local)]


def measured(
    step: Callable[[], None], dtype: torch.dtype, device: torch.device, repeats: int, flop: int | None = None
) -> dict[str, float]:
    """One row: operations, seconds, speed, its share of the matrix product's, and the peak of memory.

    Args:
        step: what is measured.
        dtype: of the matrix product that it is compared with.
        device: where it computes.
        repeats: how often it is measured.
        flop: its operations; None counts them.
    """
    flop = count_flop(step) if flop is None else flop
    shares, times, peaks = [], [], []
    for _ in range(repeats):
        before = matmul_speed(dtype, device)
        reset_peak(device)
        times.append(seconds(step, device, 1))
        peaks.append(peak_bytes(device))
        limit = (before + matmul_speed(dtype, device)) / 2
        shares.append(flop / times[-1] / limit)
    took = median(times)
    return {
        "GFLOP": flop / 1e9,
        "seconds": took,
        "GFLOP/s": flop / took / 1e9,
        "share": median(shares),
        "peak GB": max(peaks) / 1e9,
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
    local = client(given.model, given.size, given.pattern, given.batch, given.length, dtype, given.recompute, device)
    backbone_of(local).compiled = given.compile
    model, batches = local.model(), batches_of(local, given.batch)
    parts = [(batch.task, [batch]) for batch in batches]
    parts += [("all", batches)] if len(parts) > 1 else []
    rows: list[Row] = [
        {"task": name, **measured(partial(steps, local, model, part), dtype, device, given.repeats)}
        for name, part in parts
    ]
    show(rows, given.json)


if __name__ == "__main__":
    main()
