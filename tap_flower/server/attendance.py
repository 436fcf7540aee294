"""`Attendance`: who is there, who is missing and why, and whose state was lost."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from pathlib import Path

from flwr.app import RecordDict

from tap_flower.config import Config, client_specs
from tap_flower.errors import RunError
from tap_flower.methods.registry import find_method
from tap_flower.report.events import EventLog
from tap_flower.server import checkpoint
from tap_flower.server.checkpoint import Progress
from tap_flower.server.gathering import Gathering
from tap_flower.server.grid import StreamingGrid
from tap_flower.server.roster import Roster
from tap_flower.wire.messages import Evaluation, Manifest

log = logging.getLogger("tap_flower")


class Attendance:
    """Keeps the roster as the nodes come and go, and remembers what has gone wrong with each client.

    Args:
        config: configuration of the run.
        folder: folder of the server.
        roster: clients of the run; changed in place.
        progress: what the run has done; marks and dropped replies are noted in it.
        events: log of events.

    Attributes:
        problems: client -> why its last reply was dropped.
    """

    gathering: Gathering

    def __init__(self, config: Config, folder: Path, roster: Roster, progress: Progress, events: EventLog) -> None:
        self.config, self.folder, self.roster, self.progress, self.events = config, folder, roster, progress, events
        self.problems: dict[str, str] = {}
        self._absent: dict[str, str] = {}

    def begin(self, grid: StreamingGrid, expected: int, ask: Callable[[], RecordDict]) -> None:
        """Waits for the clients and asks each for its manifest.

        A resumed run waits for all clients that it has known, and goes on with those that have come back.

        Args:
            grid: where the nodes are.
            expected: clients that a new run needs.
            ask: makes the content of the question for a manifest.

        Raises:
            RunError: fewer than `expected` are there in a new run, none in a resumed one, or one that the configuration
                names is missing.
        """
        config, roster, known = self.config, self.roster, set(self.roster.manifests)
        self.gathering = Gathering(grid, roster, ask, self._admit, self._refuse, config.round_timeout)
        awaited = len(known) or expected
        self.wait(lambda: len(roster.nodes) >= awaited and known <= roster.nodes.keys(), awaited)
        named = {spec.name for spec in client_specs(config)}
        missing = sorted((named | known) - roster.nodes.keys())
        if named.intersection(missing) or len(roster.nodes) < (1 if known else expected):
            raise RunError(
                "; ".join(
                    f"node {node} cannot take part: {problem}" for node, problem in self.gathering.refused.items()
                )
                or f"{len(roster.nodes)} of {awaited} clients are there after {config.start_timeout:g} s"
                + (f", without {', '.join(missing)}" if missing else "")
                + f": start more nodes (`num-supernodes={awaited}` in a simulation) or lower clients_per_round"
            )
        for name in missing:
            self._absent[name] = f"it has not come back within {config.start_timeout:g} s after the run was resumed"
            log.warning("going on without client %r: %s", name, self._absent[name])
        self._save()
        self.events.write(
            "start",
            round=self.progress.round,
            rounds=config.rounds,
            clients={name: sorted(roster.manifests[name].reach) for name in roster.names},
            missing=missing,
        )

    def wait_for_known(self) -> None:
        """Waits for all clients that the run has known, `config.start_timeout` seconds at most."""
        known = self.roster.manifests
        self.wait(lambda: known.keys() <= self.roster.nodes.keys(), len(known))

    def wait(self, complete: Callable[[], bool], expected: int) -> None:
        """Waits for clients, `config.start_timeout` seconds at most.

        Args:
            complete: whether everybody is there.
            expected: nodes that are expected; with fewer it waits although all of them have answered.
        """
        self.gathering.wait(complete, expected, self.config.start_timeout)

    def welcome(self) -> None:
        """Forgets the nodes that have gone, admits the clients that have come, asks the new nodes. Does not wait."""
        before = dict(self.roster.manifests)
        self.gathering.look()
        if before != self.roster.manifests:
            self._save()

    def _save(self) -> None:
        checkpoint.save_manifests(self.folder, self.roster.manifests.values())

    def _admit(self, node: int, manifest: Manifest) -> None:
        self.roster.admit(node, manifest)
        self._absent.pop(manifest.client, None)
        self.check_state(manifest.client, manifest.state)

    def _refuse(self, node: int, problem: str) -> None:
        self.drop(self.progress.round, f"node {node}", problem)

    def drop(self, server_round: int, who: str, problem: str) -> None:
        """Notes a reply that cannot be used."""
        self.progress.dropped[who] = self.progress.dropped.get(who, 0) + 1
        log.warning("dropped the reply of %s: %s", who, problem)
        self.events.write("dropped", round=server_round, who=who, problem=problem)

    def check_state(self, name: str, found: int) -> None:
        """Compares the state that a client says it has with the last round that it took part in.

        A client whose state was lost goes on from its first values. That is marked in the results, since its metrics are
        not what they would have been.

        Args:
            name: the client.
            found: round of its state; 0 where it has none.

        Raises:
            RunError: the state was lost, and `config.require_state` is set.
        """
        if found < (expected := self.progress.took_part.get(name, 0)):
            had = f"the state of round {found}" if found else "no state of this run"
            self._mark_lost(name, f"it had {had} after it had taken part in round {expected}")

    def check_evaluation(self, name: str, found: Evaluation, made: Collection[str] | None) -> None:
        """Marks a client that had no state, has not personalised, or lacks models of stage 2.

        Args:
            name: the client.
            found: its evaluation.
            made: the models that its stage 2 has made; None where that was not done.

        Raises:
            RunError: it had lost something, and `config.require_state` is set.
        """
        self.check_state(name, found.state)
        there = set.intersection(*(set(models) for models in found.metrics.values()))
        results = set(find_method(self.config.method).results)
        if made is None and results and not results & there:
            self._mark(name, f"stage 2 was not done: {self.problems.get(name, 'it was not there')}")
        elif lost := sorted(set(made or ()) - there):
            self._mark_lost(name, f"at the evaluation it had lost what stage 2 had made: {', '.join(lost)}")

    def _mark_lost(self, name: str, problem: str) -> None:
        self._mark(name, problem)
        if self.config.require_state:
            raise RunError(
                f"client {name!r}: {problem}: restore its state folder and go on with `--resume`, or set require_state=false"
            )

    def _mark(self, name: str, problem: str) -> None:
        """Notes what a reader of a client's metrics must know."""
        noted = self.progress.marks.setdefault(name, [])
        if problem not in noted:
            noted.append(problem)
            log.warning("client %r: %s", name, problem)
            self.events.write("mark", round=self.progress.round, client=name, problem=problem)

    def missing(self, evaluated: Collection[str]) -> dict[str, str]:
        """Client -> why it was not evaluated, of all clients that the run has known."""
        names = sorted(self.roster.manifests.keys() - set(evaluated))
        return {name: self.problems.get(name) or self._absent.get(name, "its node has gone") for name in names}
