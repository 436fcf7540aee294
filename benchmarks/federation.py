"""`python -m benchmarks.federation [--clients N ...] [--rounds R]`: a round of TAP against one of Flower's own FedAvg.

N copies of one of the demo's clients, each with rows of its own, all of them in every round, in this process. Both train
the same model with the same steps, batches and optimiser; TAP trains two of them, compares them on held-out rows, and keeps
the personal one on disk. Given are medians over the rounds after the first, of wall-clock time and of the processor's.
FedAvg runs before TAP and again after it, and counts with the mean: a shared machine changes its speed within minutes.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from benchmarks.measure import parser, show
from client_app.app import app as tap_app
from tap_flower.client.from_spec import client_from_spec
from tap_flower.client.node import Node
from tap_flower.config import Config, client_specs, load_config
from tap_flower.core.components import cpu_state
from tap_flower.methods.session import Session
from tap_flower.run.in_process import InProcessGrid
from tap_flower.server.strategy import TapStrategy

CLIENT = 1
"""Of the demo: `languages`."""
TRAIN, VALIDATION = 500, 80
"""Rows of a client, as in the demo; those of different clients overlap."""
Stamp = tuple[float, float]
"""Wall-clock and processor time, in seconds."""


def main() -> None:
    """Prints a row for each number of clients."""
    options = parser(__doc__)
    options.add_argument("--clients", type=int, nargs="+", default=[10, 30, 100])
    options.add_argument("--rounds", type=int, default=3, help="of each, with one to warm up (default: %(default)s)")
    options.add_argument("--steps", type=int, help="of a participation (default: the demo's)")
    given = options.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    rows = []
    for clients in given.clients:
        with tempfile.TemporaryDirectory() as folder:
            settings = [
                f"rounds={given.rounds}",
                f"clients_per_round={clients}",
                "start_timeout=1",
                "train.personal_from=1",
            ]
            settings += [f"train.steps={given.steps}"] if given.steps else []
            file = Path(folder) / "clients.yaml"
            file.write_text(yaml.safe_dump({"clients": copies(clients)}))
            config = load_config("demo", str(file), settings)
            run_config = {"preset": "demo", "config": str(file), "set": " ".join(settings), "out": f"{folder}/run"}
            before = fedavg(config)
            ours, sent = tap(config, run_config)
            after = fedavg(config)
            theirs = [(early + late) / 2 for early, late in zip(before, after, strict=True)]
        rows.append(
            {
                "clients": clients,
                "TAP s": ours[0],
                "FedAvg s": theirs[0],
                "ratio": ours[0] / theirs[0],
                "processor ratio": ours[1] / theirs[1],
                "MB a client and round": sent / clients / given.rounds / 1e6,
            }
        )
    show(rows, given.json)


def copies(count: int) -> list[dict[str, Any]]:
    """Specs of clients that differ in name and rows."""
    client = load_config("demo").clients[CLIENT]
    made = []
    for number in range(count):
        (task,) = client["tasks"]
        own = {
            split: {**task[split][0], "rows": [number, number + rows]}
            for split, rows in (("train", TRAIN), ("validation", VALIDATION))
        }
        made.append({**client, "name": f"client-{number}", "tasks": [{**task, **own}]})
    return made


class _Enough(Exception):
    """Stage 1 is over."""


class StageOne(TapStrategy):
    """Notes when rounds begin and when the last one ends, and ends the run there."""

    def __init__(self, config: Config, folder: Path) -> None:
        super().__init__(config=config, run_folder=folder)
        self.stamps: list[Stamp] = []

    def configure_train(self, *args: Any) -> Iterable[Message]:
        """Notes the time."""
        self.stamps.append(_now())
        return super().configure_train(*args)

    def configure_personalise(self, *_: Any) -> Iterable[Message]:
        """Ends the run."""
        self.stamps.append(_now())
        raise _Enough


def stage_one(config: Config, run_config: dict[str, Any]) -> StageOne:
    """Stage 1 of a run in this process, with all of its clients.

    Args:
        config: configuration of the run.
        run_config: Flower's run configuration, from which nodes and server take the same configuration and the run folder.

    Returns:
        The strategy, which knows when rounds were.
    """
    grid = InProcessGrid(tap_app, [{"partition-id": i} for i in range(len(client_specs(config)))], run_config)
    return rounds_of_stage_one(grid, config, Path(run_config["out"]))


def rounds_of_stage_one(
    grid: InProcessGrid, config: Config, folder: Path, train_config: ConfigRecord | None = None
) -> StageOne:
    """Stage 1 of a run in a folder; returns the strategy, which knows when rounds were."""
    strategy = StageOne(config, folder)
    with contextlib.suppress(_Enough):
        strategy.start(grid, train_config=train_config)
    return strategy


def tap(config: Config, run_config: dict[str, Any]) -> tuple[Stamp, int]:
    """Seconds of a round, and bytes of tensors in both directions in all rounds."""
    strategy = stage_one(config, run_config)
    sent = sum(strategy.progress.down.values()) + sum(strategy.progress.up.values())
    return round_of(strategy.stamps), sent


def fedavg(config: Config) -> Stamp:
    """Seconds of a round."""
    locals_ = [local_session(config, number) for number in range(config.clients_per_round)]
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        local = locals_[int(context.node_config["partition-id"])]
        server_round = int(message.content["config"]["server-round"])  # type: ignore[index, arg-type]
        model = local.model(message.content.array_records["arrays"].to_torch_state_dict())
        optimisation = local.settings.train.optimisation(server_round)
        losses = local.train(model, optimisation, order=(server_round,), noise=(server_round, "server"))
        metrics = {"num-examples": sum(local.data.sizes("train").values()), "loss": sum(losses.values())}
        arrays = ArrayRecord(cpu_state(model))
        return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord(metrics)}), reply_to=message)

    return round_of(flowers_rounds(app, ArrayRecord(cpu_state(locals_[0].model())), config.rounds, len(locals_)))


def flowers_rounds(app: ClientApp, start: ArrayRecord, rounds: int, clients: int) -> list[Stamp]:
    """When rounds of Flower's own FedAvg were, with all clients in each, in this process."""
    stamps: list[Stamp] = []
    grid = InProcessGrid(app, [{"partition-id": i} for i in range(clients)], {})
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)
    evaluated: Callable[[int, ArrayRecord], None] = lambda *_: stamps.append(_now())  # noqa: E731
    strategy.start(grid, start, num_rounds=rounds, evaluate_fn=evaluated)
    return stamps


def local_session(config: Config, number: int) -> Session:
    """One of the run's clients at work, in this process."""
    node = Node(client_specs(config)[number], None, None, "", config.metrics)
    return client_from_spec(node, config).session(config)


def _now() -> Stamp:
    return time.perf_counter(), time.process_time()


def round_of(stamps: list[Stamp]) -> Stamp:
    """The median time between two stamps, without the first."""
    wall, processor = (
        median(after[clock] - before[clock] for before, after in itertools.pairwise(stamps[1:])) for clock in (0, 1)
    )
    return wall, processor


if __name__ == "__main__":
    main()
