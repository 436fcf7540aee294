"""The parts of the check, its command line, and how its time is shared."""

from __future__ import annotations

import argparse
import math
import signal
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

import benchmarks.gpu
from benchmarks import BEGAN, parity
from benchmarks.gpu import clients, feeding, steps
from benchmarks.gpu.check import Check
from benchmarks.gpu.part import Asked, Part, say, work
from benchmarks.measure import markdown, origin, parser

OWN_SECONDS = 5.0
"""Of `--minutes`: to end processes and to print the tables."""
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Environment of a part: nothing asks the network."""
PARTS = {
    "parity": Part(50, steps.parity_rows),
    "flava": Part(80, partial(steps.step_rows, "flava", False)),
    "vilt": Part(70, partial(steps.step_rows, "vilt", False)),
    "participation": Part(40, clients.participation_rows),
    "demo": Part(50, clients.demo_rows),
    "graph": Part(40, steps.graph_rows),
    "at-once": Part(40, clients.at_once_rows),
    "loader": Part(20, feeding.loader_rows),
    "deterministic": Part(20, clients.deterministic_rows),
    "flava-compiled": Part(110, partial(steps.step_rows, "flava", True)),
    "vilt-compiled": Part(80, partial(steps.step_rows, "vilt", True)),
}
"""What matters most comes first: a run that is cut short loses its end."""


def limit_of(name: str, waiting: Sequence[str], left: float) -> float:
    """The seconds that a part may take, at least 0: what others have left over is shared as well.

    Args:
        name: of the part.
        waiting: the parts that have not begun, this one among them.
        left: seconds for all of these.
    """
    return max(0.0, left) * PARTS[name].seconds / sum(PARTS[one].seconds for one in waiting)


def options() -> argparse.ArgumentParser:
    """The command line."""
    made = parser(benchmarks.gpu.__doc__)
    made.add_argument("--minutes", type=float, default=10, help="for all parts together (default: %(default)s)")
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
