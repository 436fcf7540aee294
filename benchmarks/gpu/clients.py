"""Whole participations: where their time goes, the demo's round, several at once, and one seed twice."""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import median

import torch

from benchmarks import participation
from benchmarks.gpu.part import Asked, SkippedError, absent
from benchmarks.measure import Row, once, peak_bytes, reset_peak
from benchmarks.workload import client
from tap_flower.core.components import State
from tap_flower.methods.session import Session
from tap_flower.models.load import bfloat16_products

PARTICIPATION = {
    "base": ("--batch", "32"),
    "tiny": ("--size", "tiny", "--batch", "2", "--length", "8", "--steps", "1", "--accumulation", "1"),
}
DEMO = {"base": (), "tiny": ("clients_per_round=2", "train.steps=1")}
DEMO_NEEDS = {
    "flwr": "flwr",
    "datasets": "datasets",
    "PIL": "pillow",
    "easy_vqa": "easy-vqa",
    "sklearn": "scikit-learn",
    "emoji": "emoji",
}
"""Module -> package."""
AT_ONCE = (1, 2, 4)
PATTERNS = (7, 8)
"""Images and texts to classify; texts and images to generate."""
SEEDED = {"base": (8, 64, 5), "tiny": (2, 8, 1)}
"""Examples in a batch, tokens of a text, steps."""


def participation_rows(asked: Asked) -> Iterator[Row]:
    """The parts of the first participation and of a later one, and a row for all of them, in each dtype."""
    for dtype in ("float32", "bfloat16") if bfloat16_products() else ("float32",):
        arguments = ["--made-up", "--device", str(asked.device), "--dtype", dtype, *PARTICIPATION[asked.size]]
        found = participation.measured(participation.options().parse_args(arguments))
        for row in found.rows:
            yield {"dtype": dtype, **row}
        whole = {name: math.fsum(row[name] for row in found.rows) for name in found.rows[0] if name != "part"}
        yield {"dtype": dtype, "part": "all", **whole, "peak GB": found.peak / 1e9, "MB sent": found.sent / 1e6}


def demo_rows(asked: Asked) -> Iterator[Row]:
    """The losses and replacements of the clients of the demo's first round, and its seconds.

    Raises:
        SkippedError: Flower or the demo's data are not installed.
        RuntimeError: a client's reply was dropped, a loss is not finite, or the clients did not compute on the device.
    """
    _needs_the_demo()
    from benchmarks.federation import stage_one
    from tap_flower.config import load_config
    from tap_flower.report.events import read_events

    logging.getLogger("flwr").setLevel(logging.ERROR)
    settings = ["rounds=1", "start_timeout=1", *DEMO[asked.size]]
    reset_peak(asked.device)
    with tempfile.TemporaryDirectory() as folder:
        run_config = {"preset": "demo", "config": "", "set": " ".join(settings), "out": f"{folder}/run"}
        strategy = stage_one(load_config("demo", settings=settings), run_config)
        events = list(read_events(Path(run_config["out"])))
    if dropped := [event for event in events if event["event"] == "dropped"]:
        raise RuntimeError(f"{dropped[0]['who']}: {dropped[0]['problem']}")
    (round_,) = (event for event in events if event["event"] == "round")
    for name, found in round_["clients"].items():
        for task, loss in found["losses"].items():
            yield {"client": name, "task": task, "loss": loss, "replaced": found["replacements"].get(task, 0)}
            if not math.isfinite(loss):
                raise RuntimeError(f"client {name!r}: task {task!r} has the loss {loss}")
    peak, progress = peak_bytes(asked.device), strategy.progress
    sent = {"MB down": sum(progress.down.values()) / 1e6, "MB up": sum(progress.up.values()) / 1e6}
    yield {"client": "all", "task": "all", "seconds": round_["seconds"], "peak GB": peak / 1e9, **sent}
    if not peak:
        raise RuntimeError(f"the clients took no memory on {asked.device}: they computed elsewhere")


def _needs_the_demo() -> None:
    if missing := absent(DEMO_NEEDS):
        raise SkippedError(f"not installed: {', '.join(missing)}")


def at_once_rows(asked: Asked) -> Iterator[Row]:
    """Seconds for a participation of each of four of the demo's clients, by how many of them work at the same time.

    They are threads of one process, so that they share the backbone and a context on the GPU, and Python's lock. Random
    numbers come from one generator, in whichever order: the times are meant, not the results.

    Raises:
        SkippedError: Flower or the demo's data are not installed.
    """
    _needs_the_demo()
    from benchmarks.federation import local_session
    from tap_flower.config import load_config

    config = load_config("demo", settings=DEMO[asked.size])
    sessions = [local_session(config, number) for number in range(max(AT_ONCE))]

    def participate(session: Session) -> None:
        stream = torch.cuda.Stream(asked.device) if asked.device.type == "cuda" else None
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            session.train_round(1, None, "server")

    for session in sessions:  # the backbone goes to the GPU, and data are decoded, once
        participate(session)
    for count in AT_ONCE:
        reset_peak(asked.device)
        seconds = once(partial(_all_of, participate, sessions, count), asked.device)
        rate = len(sessions) / seconds
        yield {"at once": count, "seconds": seconds, "a second": rate, "peak GB": peak_bytes(asked.device) / 1e9}


def _all_of(participate: Callable[[Session], None], sessions: Sequence[Session], count: int) -> None:
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(participate, sessions))


def deterministic_rows(asked: Asked) -> Iterator[Row]:
    """How far the tensors of participations with one seed are apart, and their seconds, with the option and without.

    Raises:
        ArithmeticError: they differ with `compute.deterministic`.
    """
    size, length, count = SEEDED[asked.size]
    for pattern in PATTERNS:
        for option in (True, False):  # cuBLAS takes its workspace once in a process
            local = client("flava", asked.size, pattern, size, length, device=asked.device)
            local.settings.compute.deterministic = option
            local.settings.train.steps, local.settings.train.accumulation = count, 1
            trained: list[State] = []
            times = [once(partial(_train, local, trained), asked.device) for _ in range(3)]
            _, one, other = trained
            apart = max(float((one[name] - other[name]).abs().max()) for name in one)
            row = {
                "pattern": pattern,
                "deterministic": str(option).lower(),
                "seconds": median(times[1:]),
                "apart": apart,
            }
            yield row
            if option and apart:
                raise ArithmeticError(f"two participations of pattern {pattern} with one seed are {apart:g} apart")


def _train(local: Session, trained: list[State]) -> None:
    trained.append(_trained(local))


def _trained(local: Session) -> State:
    return local.train_round(1, None, "server")[0]
