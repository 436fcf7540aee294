"""`python -m benchmarks.plug_in [--repeats N]`: a round of TAP over a plug-in client against one of Flower's own FedAvg.

Ten clients, all in every round, in this process. Flower's are a stock project's: they build the model, load the values,
train, return the state. Ours have the same model and the same data, and take the same steps: by the project's loop
(`Task(fit=...)`), or by ours. `fedavg` trains the server's copy; `tap` a personal model, too, and compares the two on
held-out rows. Given are medians over repeats of ratios to FedAvg, of wall-clock time and of the processor's; within a
repeat each takes its turn, in an order that changes, and counts with the median of its rounds after the first.
"""

from __future__ import annotations

import itertools
import logging
import tempfile
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.federation import Stamp, flowers_rounds, round_of, rounds_of_stage_one
from benchmarks.measure import parser, show
from tap_flower import IMAGE_CLASSIFICATION, Client, TapClientApp, Task, load_config
from tap_flower.run.in_process import InProcessGrid

TRAIN, HELD_OUT, BATCH, CLASSES = 640, 128, 32, 10
"""Rows of a client, rows that only TAP looks at, rows of a batch, classes."""
LEARNING_RATE = 1e-3
Loader = DataLoader[Any]


def small_cnn() -> nn.Module:
    """62,006 parameters: [B, 3, 32, 32] -> [B, 10]."""
    return nn.Sequential(
        nn.Unflatten(1, (3, 32, 32)), nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, CLASSES),
    )  # fmt: skip


def mlp() -> nn.Module:
    """5,080,260 parameters: [B, 3072] -> [B, 10]."""
    return nn.Sequential(
        nn.Linear(3072, 1200), nn.ReLU(), nn.Linear(1200, 1150), nn.ReLU(), nn.Linear(1150, CLASSES),
    )  # fmt: skip


MODELS: Mapping[str, Callable[[], nn.Module]] = {"CNN": small_cnn, "MLP": mlp}


def main() -> None:
    """Prints a row for each model and loop."""
    options = parser(__doc__)
    options.add_argument("--clients", type=int, default=10)
    options.add_argument("--rounds", type=int, default=4, help="of each, with one to warm up (default: %(default)s)")
    options.add_argument("--steps", type=int, default=20, help="of a participation (default: %(default)s)")
    options.add_argument("--repeats", type=int, default=5)
    given = options.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    show([row for name in MODELS for row in measured(name, given)], given.json)


def measured(name: str, given: Any) -> Iterable[dict[str, Any]]:
    """The rows of a model: how often the time of FedAvg each method and loop takes."""
    model, settings = MODELS[name], (given.rounds, given.clients, given.steps)
    runs: dict[tuple[str, str], Callable[[], Stamp]] = {("FedAvg", ""): partial(flowers, model, *settings)}
    for loop, method in itertools.product(("own", "ours"), ("fedavg", "tap")):
        runs[method, loop] = partial(ours, model, *settings, method, loop == "own")
    found: dict[tuple[str, str], list[Stamp]] = {key: [] for key in runs}
    for number in range(given.repeats):
        keys = list(runs)
        for key in keys[number % len(keys) :] + keys[: number % len(keys)]:
            found[key].append(runs[key]())
    theirs = found.pop(("FedAvg", ""))
    for (method, loop), times in found.items():
        wall, processor = (
            median(mine[clock] / other[clock] for mine, other in zip(times, theirs, strict=True)) for clock in (0, 1)
        )
        yield {
            "model": name,
            "method": method,
            "loop": loop,
            "s": median(mine[0] for mine in times),
            "FedAvg s": median(other[0] for other in theirs),
            "ratio": wall,
            "processor ratio": processor,
        }


def data(number: int) -> tuple[Loader, Loader]:
    """Training and held-out rows of a client, made up."""
    random = torch.Generator().manual_seed(number)

    def loader(rows: int, shuffle: bool) -> Loader:
        x, y = torch.randn(rows, 3072, generator=random), torch.randint(CLASSES, (rows,), generator=random)
        return DataLoader(TensorDataset(x, y), BATCH, shuffle=shuffle)

    return loader(TRAIN, shuffle=True), loader(HELD_OUT, shuffle=False)


def train(net: nn.Module, loader: Loader, steps: int) -> float:
    """The project's own loop; returns the mean loss of a batch."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE)
    net.train()
    total = 0.0
    for x, y in itertools.islice(itertools.chain.from_iterable(itertools.repeat(loader)), steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        total += loss.item()
    return total / steps


@torch.no_grad()
def score(net: nn.Module, loader: Loader) -> dict[str, float]:
    """The project's own evaluation."""
    net.eval()
    loss, right = torch.zeros(()), torch.zeros(())
    for x, y in loader:
        output: Tensor = net(x)
        loss += F.cross_entropy(output, y, reduction="sum")
        right += (output.argmax(1) == y).sum()
    return {"loss": float(loss) / HELD_OUT, "accuracy": float(right) / HELD_OUT}


def flowers(model: Callable[[], nn.Module], rounds: int, clients: int, steps: int) -> Stamp:
    """Seconds of a round of Flower's FedAvg."""
    loaders = [data(number)[0] for number in range(clients)]
    app = ClientApp()

    @app.train()
    def answer(message: Message, context: Context) -> Message:
        net, loader = model(), loaders[int(context.node_config["partition-id"])]
        net.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
        metrics = MetricRecord({"loss": train(net, loader, steps), "num-examples": TRAIN})
        return Message(RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics}), reply_to=message)

    return round_of(flowers_rounds(app, ArrayRecord(model().state_dict()), rounds, clients))


def ours(model: Callable[[], nn.Module], rounds: int, clients: int, steps: int, method: str, own_loop: bool) -> Stamp:
    """Seconds of a round of tap-flower's, with a loop of the project's own or with ours."""
    loaders = [data(number) for number in range(clients)]
    app = TapClientApp()
    with tempfile.TemporaryDirectory() as folder:

        @app.client()
        def client(context: Context) -> Client:
            number = int(context.node_config["partition-id"])
            training, held_out = loaders[number]
            loop: dict[str, Any] = (
                {"fit": lambda net, loader, config: train(net, loader, config["steps"]), "score": score}
                if own_loop
                else {"forward": lambda net, batch: net(batch[0]), "target": lambda batch: batch[1]}
            )
            task = Task("t", IMAGE_CLASSIFICATION, ["image"], training, [], validation=held_out, **loop)
            return Client(f"client-{number}", model, [task], state_dir=Path(folder) / "state")

        settings = [f"rounds={rounds}", f"clients_per_round={clients}", f"train.steps={steps}", "start_timeout=1"]
        config = load_config("plug-in", settings=[*settings, f"method={method}"])
        grid = InProcessGrid(app, [{"partition-id": number} for number in range(clients)], {})
        strategy = rounds_of_stage_one(grid, config, Path(folder) / "run", ConfigRecord({"steps": steps}))
    return round_of(strategy.stamps)


if __name__ == "__main__":
    main()
