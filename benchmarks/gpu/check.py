"""All parts of a check: each in a process with a limit, what it tells, and what became of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

from benchmarks.gpu.part import EVENT, say
from benchmarks.measure import Row, cell
from tap_flower.files import write_json

ROOT = Path(__file__).parent.parent.parent


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
