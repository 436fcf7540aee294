"""`metrics.jsonl`: one line for each event of a run."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tap_flower.files import write_atomically
from tap_flower.report.trackers import Tracker, scalars

METRICS = "metrics.jsonl"
END, FAILED = "end", "failed"
"""The events after which there is no other."""
_OF_ROUNDS = {"joined", "round_start", "round", "dropped", "mark", "clipped", "privacy_round"}
"""Events that a resumed run keeps."""
log = logging.getLogger("tap_flower")


class EventLog:
    """Appends events to a run's `metrics.jsonl`, each a JSON object with the key `event`.

    Args:
        run: the run folder.
        after_round: the round after which the run is resumed: what was written later is removed. None starts a new file.
        trackers: experiment trackers that get the numbers of each event.
    """

    def __init__(self, run: Path, after_round: int | None = None, trackers: Sequence[Tracker] = ()) -> None:
        self._trackers = list(trackers)
        self._path = run / METRICS
        kept = [] if after_round is None else [e for e in read_events(run) if _is_of_rounds(e, after_round)]
        write_atomically(self._path, "".join(f"{json.dumps(event)}\n" for event in kept).encode())

    def write(self, event: str, **values: Any) -> None:
        """Appends an event with its values.

        Readers see an event at once; the one that ends the run is written after the trackers have closed. Whoever reads that
        a run has ended may stop its process, in which a tracker would still be sending what it has.
        """
        if self._trackers and (found := scalars({"event": event, **values})):
            self._tell(lambda tracker: tracker.log(values["round"], found))
        if event in (END, FAILED):
            self.close(complete=event == END)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, **values}) + "\n")

    def close(self, complete: bool) -> None:
        """Ends the trackers' records of the run, if they have not ended: `complete`, or broken off."""
        self._tell(lambda tracker: tracker.close(complete))
        self._trackers = []

    def _tell(self, what: Callable[[Tracker], None]) -> None:
        """A tracker that fails is left out from then on: a run does not end because a server of records is down."""
        for tracker in list(self._trackers):
            try:
                what(tracker)
            except Exception as error:
                log.warning("%s is not told any more: %s", type(tracker).__name__, error)
                self._trackers.remove(tracker)


def _is_of_rounds(event: dict[str, Any], last: int) -> bool:
    return event["event"] in _OF_ROUNDS and event["round"] <= last


def read_events(run: Path, start: int = 0) -> Iterator[dict[str, Any]]:
    """Reads the events of a run; a line that is still being written is left out.

    Args:
        run: the run folder; without a `metrics.jsonl` there are no events.
        start: number of the first event to read, counted from 0.
    """
    path = run / METRICS
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file):
            if number >= start and line.endswith("\n"):
                yield json.loads(line)
