"""`python -m benchmarks.padding`: tokens that count, per second, of batches of texts against padding all to 256 tokens.

Lengths are drawn like those of AG News, title and description together: log-normal with a mean of 53 tokens and a
deviation of 18, between 10 and 256 (an approximation; the data set cannot be reached from here). The batches are those
of a run: padded to the longest, and with `train.group_by_length` texts of about one length share a batch. FLAVA at full
size, random weights, forward, backward and optimiser.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import torch

from benchmarks.measure import parser, seconds, show
from benchmarks.step import one_step
from benchmarks.workload import client, specs_of
from tap_flower.core.training import Batch
from tap_flower.data.batching import batches_of
from tap_flower.data.loading import SourceRows
from tap_flower.data.text import Tokens

MEAN, DEVIATION, SHORTEST, LONGEST = 53, 18, 10, 256
TEXTS = 512


def main() -> None:
    """Prints a row for each way of padding."""
    options = parser(__doc__)
    options.add_argument("--batch", type=int, default=4, help="examples in a batch")
    options.add_argument("--batches", type=int, default=8, help="to measure; drawn from all")
    given = options.parse_args()
    cpu, random = torch.device("cpu"), np.random.default_rng(0)
    variance = math.log(1 + (DEVIATION / MEAN) ** 2)
    drawn = random.lognormal(math.log(MEAN) - variance / 2, math.sqrt(variance), TEXTS)
    lengths = drawn.round().clip(SHORTEST, LONGEST).astype(int)
    local = client("flava", "base", 1, given.batch, LONGEST)  # pattern 1: AG News alone
    model, (task,) = local.model(), specs_of(local)
    ids = random.integers(1000, 30_000, lengths.sum()).astype(np.int32)
    texts, order = Tokens(ids, lengths.cumsum()), list(range(TEXTS))
    examples = SourceRows(task, task.domains[0], order, {"text": texts, "label": [0] * TEXTS}, 0).examples()
    chosen = random.permutation(TEXTS // given.batch)[: given.batches]
    rows = []
    for title, grouped in (
        ("to 256 tokens", [order[at : at + given.batch] for at in range(0, TEXTS, given.batch)]),
        ("to the longest of a batch", [order[at : at + given.batch] for at in range(0, TEXTS, given.batch)]),
        ("that, texts of about one length together", list(batches_of(examples, order, given.batch, True))),
    ):
        batches = [examples.batch(grouped[i], cpu) for i in chosen]
        tokens = sum(int(lengths[grouped[i]].sum()) for i in chosen)
        if title == "to 256 tokens":
            batches = [_padded(batch) for batch in batches]
        took = seconds(lambda: [partial(one_step, local, model)(batch) for batch in batches], cpu, 1)  # noqa: B023
        shown = sum(batch.inputs["input_ids"].numel() for batch in batches)
        rows.append({"padded": title, "tokens that count": tokens / shown, "a second": tokens / took})
    show([row | {"ratio": row["a second"] / rows[0]["a second"]} for row in rows], given.json)


def _padded(batch: Batch) -> Batch:
    """The same batch, padded to 256 tokens."""
    ids = batch.inputs["input_ids"]
    mask = batch.inputs.get("attention_mask", torch.ones_like(ids))
    missing = (0, LONGEST - ids.shape[1])
    widened = {name: torch.nn.functional.pad(x, missing) for name, x in (("input_ids", ids), ("attention_mask", mask))}
    return Batch(batch.task, {**batch.inputs, **widened}, batch.target)


if __name__ == "__main__":
    main()
