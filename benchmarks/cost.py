"""`python -m benchmarks.cost [--preset flava|vilt]`: the floating-point operations of a whole run.

Counted are matrix products, convolutions and attention of both stages, the teacher of stage 2 included, on one example of
each task and multiplied; every text is as long as the preset allows, so that a real run needs fewer. Evaluation comes on
top. The expected number of participations of a client is rounds · clients a round / clients.
"""

from __future__ import annotations

from functools import partial
from typing import cast

import torch

from benchmarks.measure import count_flop, parser, show
from benchmarks.workload import MadeUpData, client, specs_of
from tap_flower.config import client_specs, load_config
from tap_flower.core.training import Batch
from tap_flower.models.model import TapModel


def main() -> None:
    """Prints a row for each pattern of clients, and one for the run."""
    options = parser(__doc__)
    options.add_argument("--preset", choices=["flava", "vilt"], default="flava")
    given = options.parse_args()
    config, cpu = load_config(given.preset), torch.device("cpu")
    clients = len(client_specs(config))
    participations = config.rounds * config.clients_per_round / clients
    rows, total = [], 0.0
    for pattern in range(clients // config.groups):
        local = client(given.preset, "base", pattern, 1, config.model.text_length)
        model, data, tasks = cast(TapModel, local.model()), cast(MadeUpData, local.data), specs_of(local)
        forward = both = 0.0
        for task in tasks:
            batch = data.batch(task, 1, torch.Generator().manual_seed(0), cpu)
            share = config.train.batch_size / len(tasks)
            forward += share * count_flop(partial(model, batch.task, batch.inputs))
            both += share * count_flop(partial(_there_and_back, model, batch))
        first = 2 * both * config.train.steps * config.train.accumulation
        second = (2 * both + forward) * config.distill.iterations * config.train.accumulation
        whole = config.groups * (participations * first + second)
        total += whole
        rows.append(
            {
                "pattern": pattern,
                "tasks": ", ".join(task.name for task in tasks),
                "TFLOP a batch": both / 1e12,
                "TFLOP a participation": first / 1e12,
                "PFLOP a run": whole / 1e15,
            }
        )
    rows.append(dict.fromkeys(rows[0], "") | {"pattern": "all", "PFLOP a run": total / 1e15})
    show(rows, given.json)


def _there_and_back(model: TapModel, batch: Batch) -> None:
    model(batch.task, batch.inputs).sum().backward()


if __name__ == "__main__":
    main()
