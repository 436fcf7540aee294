"""`python -m benchmarks.participation`: one client's participations at full size, and where their time goes.

FLAVA or ViLT at the size of the paper's checkpoints (`--size tiny`: 64 dimensions) with random weights (no download). The
client is the demo's client-7, which has the paper's pattern 7: images to classify and texts to classify, read, tokenised
and decoded as in a run (`--made-up`: random examples, for a machine without the demo's data). Teacher, replacement,
personal model, state on disk and messages are those of a run; without Flower, the last two are left out. `share` is each
part's of the participation; `compute` is forward, backward and optimiser of both models.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from benchmarks.measure import parser, peak_bytes, reset_peak, show, synchronize
from benchmarks.workload import backbone_of, client, configuration, session_of
from tap_flower.config import Encoding, client_specs, load_config
from tap_flower.core.components import ComponentModel, State
from tap_flower.core.training import Batch
from tap_flower.data.batching import ClientData
from tap_flower.hub import locate
from tap_flower.methods import tap
from tap_flower.methods.method import Memory, Participation
from tap_flower.methods.session import Session
from tap_flower.models.load import from_config
from tap_flower.models.model import TapModel

if TYPE_CHECKING:
    from tap_flower.client.state import StateFolder

CLIENT = 7
"""Pattern of the preset `flava`."""
TWO_TASKS = 3
"""Client of the demo that has two tasks."""


@dataclass
class Clock:
    """Seconds by part; a part within another counts for itself alone."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _open: list[str] = field(default_factory=list)
    _since: float = 0.0

    def run(self, part: str, function: Callable[[], Any]) -> Any:
        """Runs `function` and counts its time for `part`."""
        self._switch()
        self._open.append(part)
        try:
            return function()
        finally:
            self._switch()
            self._open.pop()

    def _switch(self) -> None:
        synchronize(self.device)
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


@dataclass
class TimedClient(Session):
    """A client whose parts are timed."""

    clock: Clock = field(default_factory=lambda: Clock(torch.device("cpu")))

    def model(self, state: Any = None) -> TapModel:
        """As `Session.model`."""
        return cast(TapModel, self.clock.run("models", lambda: super(TimedClient, self).model(state)))

    def train(self, model: ComponentModel, *arguments: Any, **options: Any) -> dict[str, float]:
        """As `Session.train`."""
        return cast(dict[str, float], self.clock.run("compute", lambda: self._train(model, *arguments, **options)))

    def _train(self, *arguments: Any, **options: Any) -> dict[str, float]:
        return super().train(*arguments, **options)

    def losses(self, model: ComponentModel, split: str) -> dict[str, float]:
        """As `Session.losses`."""
        return cast(dict[str, float], self.clock.run("evidence", lambda: super(TimedClient, self).losses(model, split)))


class TimedData:
    """Data whose batches are timed."""

    def __init__(self, data: Any, clock: Clock) -> None:
        self._data, self._clock = data, clock

    def training_batches(self, *arguments: Any) -> Iterator[Batch]:
        """As `ClientData.training_batches`."""
        batches = self._data.training_batches(*arguments)
        while True:
            yield self._clock.run("data", lambda: next(batches))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._data, name)


@dataclass(frozen=True)
class Measured:
    """What was measured.

    Attributes:
        rows: one for each part: seconds, and share of the participation, of the first one and of a later one.
        peak: bytes of memory at most, see `measure.peak_bytes`.
        sent: bytes of tensors in each direction.
    """

    rows: list[dict[str, Any]]
    peak: int
    sent: int


def timed_client(given: argparse.Namespace, clock: Clock) -> TimedClient:
    """The client of the benchmark."""
    dtype = getattr(torch, given.dtype)
    if given.made_up:
        made = client(given.model, given.size, CLIENT, given.batch, given.length, dtype, given.recompute, clock.device)
    else:
        # Not on top: they need `datasets`, which made-up examples do without.
        from tap_flower.data.loading import load_client_data
        from tap_flower.data.text import load_tokenizer

        settings = load_config(given.model, settings=[f"train.batch_size={given.batch}"])
        spec = client_specs(load_config("demo"))[TWO_TASKS]
        spec = replace(spec, tasks=tuple(replace(task, batch_size=None) for task in spec.tasks))
        architecture = configuration(given.model, given.size)
        backbone = from_config(architecture, settings.model.layers, settings.model.image_size)
        backbone.computing(dtype, given.recompute)
        data = load_client_data(
            spec, load_tokenizer(locate("demo")), settings.model.text_length, settings.seed, hold_out=False
        )
        made = session_of(spec, backbone, data, settings, clock.device)
    made.settings.train.steps, made.settings.train.accumulation = given.steps, given.accumulation
    backbone_of(made).to(clock.device)
    made.data = cast(ClientData, TimedData(made.data, clock))
    return TimedClient(**{f.name: getattr(made, f.name) for f in fields(made) if f.init}, clock=clock)


def options() -> argparse.ArgumentParser:
    """The command line."""
    made = parser(__doc__)
    made.add_argument("--model", choices=["flava", "vilt"], default="flava")
    made.add_argument("--size", choices=["tiny", "base"], default="base")
    made.add_argument("--batch", type=int, default=4, help="examples in a batch")
    made.add_argument("--steps", type=int, default=2, help="optimiser steps")
    made.add_argument("--accumulation", type=int, default=4, help="batches in a step")
    made.add_argument("--length", type=int, default=64, help="of made-up texts, in tokens")
    made.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    made.add_argument("--recompute", action="store_true", help="gradient checkpointing")
    made.add_argument("--device", default="cpu")
    made.add_argument("--made-up", action="store_true", help="random examples")
    return made


def main() -> None:
    """Prints a row for each part of the first participation and of a later one."""
    given = options().parse_args()
    found = measured(given)
    show(found.rows, given.json)
    print(f"peak memory {found.peak / 1e9:.2f} GB; {found.sent / 1e6:.2f} MB of tensors in each direction")


def measured(given: argparse.Namespace) -> Measured:
    """Two participations, with what `options` says."""
    device = torch.device(given.device)
    clocks = [Clock(device), Clock(device)]
    local = clocks[0].run("load", lambda: timed_client(given, clocks[0]))
    received, memory = local.initial_values(), Memory()
    reset_peak(device)
    with tempfile.TemporaryDirectory() as path:
        folder = state_folder(Path(path))
        for number, clock in enumerate(clocks, 1):
            local.clock = clock
            cast(TimedData, local.data)._clock = clock
            result = clock.run("rest", lambda: participate(local, folder, number, received, memory))  # noqa: B023
            received, memory = result.returned, result.memory
    rows = []
    for part in sorted(clocks[0].seconds.keys() | clocks[1].seconds.keys(), key=list(clocks[0].seconds).index):
        row: dict[str, Any] = {"part": part}
        for title, clock in zip(("first", "later"), clocks, strict=True):
            took = clock.seconds.get(part, 0.0)
            row |= {f"{title} s": took, f"{title} share": took / sum(clock.seconds.values())}
        rows.append(row)
    return Measured(rows, peak_bytes(device), sum(tensor.nbytes for tensor in received.values()))


def state_folder(path: Path) -> StateFolder | None:
    """The client's state folder; None without Flower."""
    try:
        from tap_flower.client.state import StateFolder
        from tap_flower.wire.messages import Epoch
    except ImportError:
        return None
    return StateFolder(path, "benchmark", [Epoch("history", 0)])


def participate(
    local: TimedClient, folder: StateFolder | None, number: int, received: State, memory: Memory
) -> Participation:
    """What a client does with a `train` message, between the message and its reply, both included.

    Args:
        local: the client.
        folder: its state; None leaves state and messages out.
        number: of the round, counted from 1.
        received: the server's tensors.
        memory: what it kept from the round before, where there is no folder.
    """
    clock = local.clock
    if folder is None:
        return tap.participate(local, number, received, memory)
    from tap_flower.client.state import ClientState

    state = clock.run("state", lambda: folder.load(before_round=number))
    result = tap.participate(local, number, received, Memory() if state is None else state.memory)
    clock.run("encode", lambda: _sent(local, number, received, result))
    clock.run("state", lambda: folder.save(ClientState(number, result.memory)))
    return result


def _sent(local: TimedClient, number: int, received: State, result: Participation) -> None:
    """The difference, to a message and back."""
    from tap_flower.wire import messages
    from tap_flower.wire.tensors import encode_tensors, make_update

    difference, _ = make_update(received, result.returned, {}, Encoding.float32)
    report = messages.Report(round=number, examples=local.data.sizes("train"), losses=result.losses, steps=local.steps)
    content = messages.encode(report, encode_tensors(difference, Encoding.float32))
    messages.tensors_of(content, Encoding.float32)


if __name__ == "__main__":
    main()
