"""`python -m benchmarks.gpu --minutes 8 --json FILE`: checks a GPU in one command, and measures it.

The parts, one after the other:

* `parity`: the tiny golden models against golden numbers and the CPU, see `benchmarks.parity`;
* `flava`, `vilt`: a step at full size with random weights, as in `benchmarks.step`: of all tasks of the paper's pattern 7,
  batches of 8, 32 and 64, float32 and bfloat16; its share of the matrix product's speed, its peak memory;
* `participation`: where the time of two participations goes, see `benchmarks.participation`;
* `demo`: the first round of the demo, all clients in one process;
* `flava-compiled`, `vilt-compiled`: the steps again under torch.compile; `first s` is the one that compiles.

Each part is a process of its own with a time limit of its own: its share of what is left of `--minutes`, by its `seconds` in
PARTS. What it has found is printed, and written to FILE, row by row; a part that fails or hangs leaves the others alone.
float32 is computed without TF32. torch, transformers, OmegaConf and Rich are enough; `demo` also needs Flower and the
demo's data, and is skipped where they are not installed. Nothing is downloaded.

The exit status is 1 where a part failed or parity was not shown.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import importlib
import json
import logging
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from benchmarks import BEGAN, parity, participation
from benchmarks.measure import (
    Row,
    cell,
    count_flop,
    machine,
    markdown,
    once,
    origin,
    parser,
    peak_bytes,
    reset_peak,
)
from benchmarks.step import batches_of, measured, steps
from benchmarks.workload import backbone_of, client
from tap_flower.files import write_json
from tap_flower.models.load import bfloat16_products

ROOT = Path(__file__).parent.parent
PATTERN = 7
BATCHES = {"base": (8, 32, 64), "tiny": (2, 4)}
"""Examples in a batch."""
LENGTH = {"base": 64, "tiny": 8}
"""Tokens of a text."""
REPEATS = {"base": 3, "tiny": 1}
"""Measurements of a step."""
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
OWN_SECONDS = 5.0
"""Of `--minutes`: to end processes and to print the tables."""
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Environment of a part: nothing asks the network."""
EVENT = "\x1e"
"""Begins a line of a part's output that is JSON for this process, as in RFC 7464; every other line is for people."""


@dataclass(frozen=True)
class Asked:
    """What a part is to do.

    Attributes:
        device: that it is about.
        size: of the models, `base` or `tiny`.
        golden: folder of the golden cases.
    """

    device: torch.device
    size: str
    golden: Path


class SkippedError(Exception):
    """A part cannot run here, which is no fault; the message says why."""


@dataclass(frozen=True)
class Part:
    """One part of the check.

    Attributes:
        seconds: its limit where eight minutes are shared among all parts.
        rows: what it does; a row of its results as soon as it has one.
    """

    seconds: float
    rows: Callable[[Asked], Iterator[Row]]


def parity_rows(asked: Asked) -> Iterator[Row]:
    """The deviations of the device's numbers from golden ones and from the CPU's, see `benchmarks.parity`.

    Raises:
        ArithmeticError: float32 deviates; the message says where, and by how much.
    """
    rows = []
    for row in parity.compare_all(asked.golden, asked.device):
        rows.append(row)
        yield row
    if found := parity.problems(rows):
        raise ArithmeticError(f"{len(found)} deviations: {found[0]}")


def step_rows(model: str, compiled: bool, asked: Asked) -> Iterator[Row]:
    """A row for each dtype and batch size, of the dtypes that have products; what a GPU is used for comes first."""
    for dtype in (torch.bfloat16, torch.float32) if bfloat16_products() else (torch.float32,):
        yield from _steps_of_dtype(model, compiled, asked, dtype)


def _steps_of_dtype(model: str, compiled: bool, asked: Asked, dtype: torch.dtype) -> Iterator[Row]:
    sizes, device = BATCHES[asked.size], asked.device
    local = client(model, asked.size, PATTERN, sizes[-1], LENGTH[asked.size], dtype, device=device)
    net, backbone = local.model(), backbone_of(local)
    for size in sizes:
        row: dict[str, Any] = {"model": model, "dtype": str(dtype).removeprefix("torch."), "batch": size}
        row["mode"] = "compiled" if compiled else "eager"
        try:
            step = partial(steps, local, net, batches_of(local, size))
            backbone.compiled = False
            flop = count_flop(step)  # the compiled kernels would hide some
            backbone.compiled = compiled
            row["first s"] = once(step, device)
            row |= measured(step, dtype, device, REPEATS[asked.size], flop)
        except torch.cuda.OutOfMemoryError:
            row["note"] = "out of memory"
        yield row
        if "note" in row:  # by now the error has let go of its tensors
            net.zero_grad(set_to_none=True)
            gc.collect()
            torch.cuda.empty_cache()


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
    if missing := absent(DEMO_NEEDS):
        raise SkippedError(f"not installed: {', '.join(missing)}")
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


PARTS = {
    "parity": Part(50, parity_rows),
    "flava": Part(80, partial(step_rows, "flava", False)),
    "vilt": Part(70, partial(step_rows, "vilt", False)),
    "participation": Part(40, participation_rows),
    "demo": Part(50, demo_rows),
    "flava-compiled": Part(110, partial(step_rows, "flava", True)),
    "vilt-compiled": Part(80, partial(step_rows, "vilt", True)),
}
"""What matters most comes first: a run that is cut short loses its end."""


def absent(needed: Mapping[str, str]) -> list[str]:
    """The packages whose modules (module -> package) cannot be imported."""
    found = []
    for module, package in needed.items():
        try:
            importlib.import_module(module)
        except ImportError:
            found.append(package)
    return found


def limit_of(name: str, waiting: Sequence[str], left: float) -> float:
    """The seconds that a part may take, at least 0: what others have left over is shared as well.

    Args:
        name: of the part.
        waiting: the parts that have not begun, this one among them.
        left: seconds for all of these.
    """
    return max(0.0, left) * PARTS[name].seconds / sum(PARTS[one].seconds for one in waiting)


@dataclass
class Outcome:
    """What became of a part.

    Attributes:
        part: its name.
        state: `waiting`, `running`, `done`, `skipped`, `cut short` or `failed`.
        limit: seconds that it was given.
        seconds: that it took.
        note: why it was skipped, cut short or failed.
        rows: what it has found.
    """

    part: str
    state: str = "waiting"
    limit: float = 0.0
    seconds: float = 0.0
    note: str = ""
    rows: list[Row] = field(default_factory=list)

    def ended(self, status: int | None, last_line: str) -> None:
        """Takes in the end of the part's process.

        Args:
            status: with which it ended; negative where a signal ended it, None where its time was up.
            last_line: of what it printed.
        """
        if self.state != "running":  # it has told why it stopped
            return
        if status is None:
            self.state, self.note = "cut short", f"not done after its {self.limit:.3g} s"
        elif status:
            self.state, self.note = "failed", last_line or f"exit status {status}, and not a word"
        else:
            self.state = "done"

    def __str__(self) -> str:
        return f"{self.part}: {self.state}" + (f" ({self.note})" if self.note else "")


class Check:
    """All parts of one check, and where they are written down.

    Args:
        names: of the parts, in the order in which they run.
        file: JSON, written anew after every row; None for none.
        facts: about the check, for the file.
    """

    def __init__(self, names: Sequence[str], file: Path | None, facts: Mapping[str, Any]) -> None:
        self.outcomes = {name: Outcome(name) for name in names}
        self.file, self.facts = file, dict(facts)

    def hear(self, outcome: Outcome, event: Mapping[str, Any]) -> None:
        """Takes in what a part tells: its machine, a row, or why it stops."""
        for kind, value in event.items():
            if kind == "row":
                outcome.rows.append(value)
                say(f"  {', '.join(f'{name} {cell(found)}' for name, found in value.items())}")
            elif kind == "machine":
                if kind not in self.facts:
                    say(f"  on {value}")
                self.facts[kind] = value
            else:
                outcome.state, outcome.note = kind, value
        self.write()

    def write(self) -> None:
        """Writes the file."""
        if self.file is not None:
            write_json(self.file, {**self.facts, "parts": [asdict(outcome) for outcome in self.outcomes.values()]})

    def run(self, name: str, limit: float, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Runs a part in a process of its own."""
        outcome, began = self.outcomes[name], time.monotonic()
        outcome.limit = limit
        say(f"{name}: at most {limit:.3g} s")
        outcome.state = "running"
        self.write()
        status, last_line = None, ""
        try:
            if limit > 0:
                status, last_line = watch(command, limit, environment, partial(self.hear, outcome))
        except BaseException:
            outcome.state, outcome.note = "cut short", "the whole check was ended"
            raise
        finally:
            outcome.seconds = time.monotonic() - began
            outcome.ended(status, last_line)
            self.write()
            say(f"{outcome}, {outcome.seconds:.3g} s")

    @property
    def problems(self) -> list[str]:
        """Why the check has not passed: parts that failed, and parity where it was asked for and not shown."""
        return [
            str(outcome)
            for outcome in self.outcomes.values()
            if outcome.state == "failed" or (outcome.part == "parity" and outcome.state != "done")
        ]

    @property
    def summary(self) -> str:
        """One line: how many parts came to which end, with their names where they are not done."""
        ends: dict[str, list[str]] = {}
        for outcome in self.outcomes.values():
            ends.setdefault(outcome.state, []).append(outcome.part)
        told = [f"{len(ends.pop('done', []))} of {len(self.outcomes)} parts done"]
        told += [f"{state}: {', '.join(names)}" for state, names in ends.items()]
        return f"{'FAILED' if self.problems else 'passed'}: {'; '.join(told)}"


def say(line: str) -> None:
    """Prints a line at once."""
    print(line, flush=True)


def watch(
    command: Sequence[str], limit: float, environment: Mapping[str, str], hear: Callable[[Mapping[str, Any]], None]
) -> tuple[int | None, str]:
    """Runs a command, and ends it with all of its group when it ends, when its time is up, and when this process must end.

    Args:
        command: in the root of the repository.
        limit: seconds.
        environment: of the command, added to that of this process.
        hear: is given each event that it prints; its other lines are printed.

    Returns:
        Its exit status, or None where its time was up, and the last line that was no event.
    """
    last_line = ""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    assert process.stdout is not None
    output = process.stdout

    def listen() -> None:
        nonlocal last_line
        for line in output:
            if line.startswith(EVENT) and line.endswith("\n"):
                hear(json.loads(line[len(EVENT) :]))
            elif line.strip():
                last_line = line.strip()
                say(f"  | {line.rstrip()}")

    listener = Thread(target=listen, daemon=True)
    listener.start()
    try:
        status: int | None = process.wait(limit)
    except subprocess.TimeoutExpired:
        status = None
    finally:
        with suppress(ProcessLookupError):  # what it started, such as the processes that compile, may outlive it
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        listener.join(5)  # not for ever: who has left the group may hold the pipe open
    return status, last_line


def work(part: Part, limit: float, asked: Asked) -> int:
    """Does a part, in a process of its own, and tells what it finds; returns the exit status."""

    def tell(**event: Any) -> None:
        say(f"{EVENT}{json.dumps(event)}")

    # Where it hangs is told just before it is killed.
    left = limit - (time.monotonic() - BEGAN)
    faulthandler.dump_traceback_later(max(left - 2, 0.9 * left, 0.1), file=sys.stdout)
    transformers_logging.disable_progress_bar()
    parity.exact_float32()
    try:
        tell(machine=machine())
        for row in part.rows(asked):
            tell(row=row)
    except SkippedError as error:
        tell(skipped=str(error))
    except Exception as error:
        traceback.print_exc()
        tell(failed=f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
        return 1
    finally:
        faulthandler.cancel_dump_traceback_later()
    return 0


def options() -> argparse.ArgumentParser:
    """The command line."""
    made = parser(__doc__)
    made.add_argument("--minutes", type=float, default=8, help="for all parts together (default: %(default)s)")
    made.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="which to run (default: all)")
    made.add_argument("--limit", action="append", default=[], metavar="PART=SECONDS", help="of one part, at most")
    made.add_argument("--size", choices=["base", "tiny"], default="base", help="of the models (default: %(default)s)")
    made.add_argument("--device", choices=["cuda", "cpu"], help="(default: a GPU, if torch sees one)")
    made.add_argument("--golden", type=Path, default=parity.GOLDEN, help="folder of golden cases")
    made.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # what each process is told
    return made


def limits_of(pairs: Sequence[str]) -> dict[str, float]:
    """Part -> seconds, from `PART=SECONDS`.

    Raises:
        ValueError: one is no such pair.
    """
    found = {}
    for pair in pairs:
        name, _, seconds = pair.partition("=")
        if name not in PARTS:
            raise ValueError(f"--limit {pair}: there is no part {name!r}: use one of {', '.join(PARTS)}")
        found[name] = float(seconds)
    return found


def main() -> None:
    """Runs all parts, prints their tables and a summary, and exits with 1 where the check has not passed."""
    command = options()
    given = command.parse_args()
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        command.error("torch sees no GPU: look at `nvidia-smi`, CUDA_VISIBLE_DEVICES and `torch.version.cuda`")
    try:
        limits = limits_of(given.limit)
    except ValueError as error:
        command.error(str(error))
    if given.part:
        sys.exit(work(PARTS[given.part], limits[given.part], Asked(torch.device(device), given.size, given.golden)))

    signal.signal(
        signal.SIGTERM, lambda number, _: sys.exit(128 + number)
    )  # so that the part that is running ends, too
    facts = {"device": device, "size": given.size, "minutes": given.minutes, "tf32": False}
    names = [name for name in PARTS if name in given.parts]
    check = Check(names, given.json, origin() | facts)
    say(f"{len(names)} parts on {device}, models of size {given.size}, float32 without TF32")
    arguments = ["--device", device, "--size", given.size, "--golden", str(given.golden.absolute())]
    environment = QUIET | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})
    for number, name in enumerate(names):
        left = 60 * given.minutes - OWN_SECONDS - (time.monotonic() - BEGAN)
        limit = min(limit_of(name, names[number:], left), limits.get(name, math.inf))
        part = [sys.executable, "-m", "benchmarks.gpu", "--part", name, "--limit", f"{name}={limit}", *arguments]
        check.run(name, limit, part, environment)
    for outcome in check.outcomes.values():
        if outcome.rows:
            say(f"\n## {outcome.part}\n{markdown(outcome.rows)}")
    say("\n" + "\n".join([*check.problems, check.summary]))
    sys.exit(bool(check.problems))


if __name__ == "__main__":
    main()
