"""The ways to run the federation, the command line, and the table."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import benchmarks.simulation
from benchmarks.gpu.check import ROOT, watch
from benchmarks.gpu.part import say
from benchmarks.measure import Row, machine, markdown, origin, parser
from benchmarks.simulation.small_cnn import Asked
from tap_flower.files import write_json

HERE = Path(__file__).parent
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "CUDA_VISIBLE_DEVICES": "",
    "PFL_PYTORCH_DEVICE": "cpu",
}
"""Environment of every framework: nothing asks the network, and all compute on the processor."""


@dataclass(frozen=True)
class Way:
    """One way to run the federation.

    Attributes:
        framework: as the table names it.
        script: of this folder.
        ray: whether clients are Ray actors.
        interpreter: the option that names its interpreter; nothing is this one.
    """

    framework: str
    script: str
    ray: bool = False
    interpreter: str = ""


WAYS = {
    "flower-ray": Way("Flower", "run_flower.py", ray=True),
    "tap-ray": Way("tap-flower", "run_tap.py", ray=True),
    "flower": Way("Flower", "run_flower.py"),
    "tap": Way("tap-flower", "run_tap.py"),
    "pfl": Way("pfl-research", "run_pfl.py", interpreter="pfl_python"),
}
"""The first is what the others are compared with."""


def options() -> argparse.ArgumentParser:
    """The command line."""
    made = parser(benchmarks.simulation.__doc__)
    made.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="(default: all)")
    made.add_argument("--clients", type=int, default=100)
    made.add_argument("--sample", type=int, default=10, help="clients of a round (default: %(default)s)")
    made.add_argument("--rounds", type=int, default=11, help="of which the first does not count (default: %(default)s)")
    made.add_argument("--steps", type=int, default=10, help="of a client in a round (default: %(default)s)")
    made.add_argument("--batch", type=int, default=20, help="images of a step (default: %(default)s)")
    made.add_argument("--repeats", type=int, default=3, help="of everything, in turn (default: %(default)s)")
    made.add_argument("--limit", type=float, default=900, help="seconds of one run, at most (default: %(default)s)")
    made.add_argument("--pfl-python", metavar="PATH", help="an interpreter that has pfl-research")
    return made


def run(way: Way, interpreter: str, asked: Asked, limit: float) -> dict[str, Any]:
    """Runs the federation one way, in a process of its own; returns what it told, or a note that says why not."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as home:
        paths = os.pathsep.join([str(HERE), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**QUIET, "FLWR_HOME": home, "PYTHONPATH": paths}
        command = [interpreter, str(HERE / way.script), json.dumps(asdict(asked))]
        status, last_line = watch(command, limit, environment, found.update)
    if status is None:
        return {"note": f"not done after {limit:g} s"}
    return found if found and not status else {"note": last_line or f"exit status {status}"}


def row_of(way: Way, found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A row of the table, from what each repeat of a way told."""
    row: dict[str, Any] = {"framework": way.framework, "clients are": "Ray actors" if way.ray else "in one process"}
    if notes := [told["note"] for told in found if "note" in told]:
        return row | {"note": notes[0]}
    seconds = [median(told["seconds"][1:]) for told in found]
    row |= {"version": found[0]["version"], "torch": found[0]["torch"], "s a round": median(seconds)}
    return row | {"least": min(seconds), "most": max(seconds), "loss": median(told["loss"] for told in found)}


def table(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Row]:
    """The rows, with ratios to the first way where it ran."""
    rows = {name: row_of(WAYS[name], told) for name, told in found.items() if told}
    base = rows.get(next(iter(WAYS)), {}).get("s a round")
    for row in rows.values():
        if base and "s a round" in row:
            row["ratio"] = row["s a round"] / base
    return list(rows.values())


def main() -> None:
    """Runs every way in turn, as often as asked for; the exit status is 1 where one failed."""
    command = options()
    given = command.parse_args()
    if given.rounds < 2 or given.sample > given.clients:
        command.error("--rounds must be 2 at least, and --sample not more than --clients")
    cores = len(os.sched_getaffinity(0))
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in WAYS if name in given.ways}
    failed = False
    for number in range(given.repeats):
        for name, told in found.items():
            way = WAYS[name]
            interpreter = sys.executable if not way.interpreter else getattr(given, way.interpreter)
            if interpreter is None:
                told.append({"note": f"left out: no --{way.interpreter.replace('_', '-')}"})
            else:
                say(f"{name}, {number + 1} of {given.repeats}")
                asked = Asked(given.clients, given.sample, given.rounds, given.steps, given.batch, cores, way.ray)
                told.append(run(way, interpreter, asked, given.limit))
                failed |= "note" in told[-1]
            if given.json is not None:
                write_json(given.json, {**origin(), "machine": machine(), "rows": table(found), "runs": found})
    say(markdown(table(found)))
    sys.exit(failed)
