"""`metrics.jsonl`: one line for each event of a run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tap_flower.storage import write_atomically

METRICS = "metrics.jsonl"


class EventLog:
    """Appends events to a run's `metrics.jsonl`, each a JSON object with the key `event`.

    Args:
        run: the run folder.
        after_round: keep only what was written up to this round: the run is resumed there. None starts anew.
    """

    def __init__(self, run: Path, after_round: int | None = None) -> None:
        self._path = run / METRICS
        kept = [] if after_round is None else [e for e in read_events(run) if _is_of_rounds(e, after_round)]
        write_atomically(self._path, "".join(f"{json.dumps(event)}\n" for event in kept).encode())

    def write(self, event: str, **values: Any) -> None:
        """Appends one event; a reader sees it at once."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, **values}) + "\n")


def _is_of_rounds(event: dict[str, Any], last: int) -> bool:
    return event["event"] in ("round_start", "round", "dropped") and event["round"] <= last


def read_events(run: Path, start: int = 0) -> Iterator[dict[str, Any]]:
    """The events of a run, from the one numbered `start`; a line that is still being written is left out."""
    path = run / METRICS
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file):
            if number >= start and line.endswith("\n"):
                yield json.loads(line)
