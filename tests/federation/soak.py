"""`python -m tests.federation.soak FOLDER`: 50 rounds of 100 clients without models, and the server's memory on the way."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from flwr.app import Context, Message, MetricRecord
from flwr.clientapp import ClientApp
from torch import Tensor

from tap_flower.config import Encoding, load_config
from tap_flower.core.initial import Initial
from tap_flower.run.in_process import InProcessGrid
from tap_flower.server.strategy import TapStrategy
from tap_flower.wire import messages
from tap_flower.wire.messages import Evaluation, Instruction, Manifest, Report, TaskInfo, TensorInfo
from tap_flower.wire.tensors import encode_tensors

COMPONENTS = ("encoder", "fusion", "head")
SHAPES = {f"{component}.{name}": (64, 64) for component in COMPONENTS for name in "abc"}
app = ClientApp()


def examples(context: Context) -> int:
    return 10 + int(context.node_config["number"])


@app.query("manifest")
def manifest(message: Message, context: Context) -> Message:
    tensors = {n: TensorInfo(n.split(".")[0], shape, Initial("normal", 0.02)) for n, shape in SHAPES.items()}
    task = TaskInfo("t", ("text",), "text_classification", ("d",), 2, examples(context))
    name, reach = f"client-{examples(context)}", {"t": frozenset(COMPONENTS)}
    told = Manifest(client=name, fingerprint="f", tasks=(task,), tensors=tensors, reach=reach)
    return Message(messages.encode(told), reply_to=message)


def report(message: Message, context: Context, tensors: dict[str, Tensor] | None = None) -> Message:
    server_round = messages.decode(message.content, Instruction, "the server").round
    told = Report(round=server_round, examples={"t": examples(context)}, losses={"t": 1.0}, steps=1)
    arrays = None if tensors is None else encode_tensors(tensors, Encoding.float32)
    metrics = MetricRecord({"num-examples": examples(context)})
    return Message(messages.encode(told, arrays, metrics=metrics), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    return report(message, context, {name: torch.randn(shape) for name, shape in SHAPES.items()})


@app.train("personalise")
def personalise(message: Message, context: Context) -> Message:
    return report(message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    return Message(
        messages.encode(Evaluation({"t": {"tap": {"loss": 1.0}}}), metrics=MetricRecord({"num-examples": 1})),
        reply_to=message,
    )


class WatchedGrid(InProcessGrid):
    """Measures something whenever the strategy asks who is there: before each round, among others."""

    def __init__(self, clients: int, measure: Callable[[], int]) -> None:
        super().__init__(app, [{"number": number} for number in range(clients)], {})
        self.measure = measure
        self.found: list[int] = []

    def get_node_ids(self) -> Iterable[int]:
        self.found.append(self.measure())
        return super().get_node_ids()


def soak(folder: Path, clients: int, rounds: int, measure: Callable[[], int]) -> tuple[int, list[int]]:
    """A run: the dropped replies, and what was measured before the first round, after it, and so on."""
    settings = [f"rounds={rounds}", f"clients_per_round={clients}", "start_timeout=1"]
    grid = WatchedGrid(clients, measure)
    strategy = TapStrategy(config=load_config("plug-in", "", settings), run_folder=folder)
    strategy.start(grid)
    before_round_1 = 1  # asked once at the start
    return sum(strategy.progress.dropped.values()), grid.found[before_round_1 : before_round_1 + rounds + 1]


def resident_pages() -> int:
    """Of this process."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1])


if __name__ == "__main__":
    dropped, pages = soak(Path(sys.argv[1]), 100, 50, resident_pages)
    print(dropped, pages[10], pages[50])
