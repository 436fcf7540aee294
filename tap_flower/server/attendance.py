"""Who takes part: asks nodes for their manifests, knows who is missing and why, and whose state was lost."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

from flwr.app import Message, RecordDict
from flwr.common.constant import ErrorCode

from tap_flower.config import Config, client_specs
from tap_flower.errors import MessageError, RunError
from tap_flower.methods.registry import find_method
from tap_flower.plain import printable
from tap_flower.report.events import EventLog
from tap_flower.server import checkpoint
from tap_flower.server.checkpoint import Progress
from tap_flower.server.first_values import FirstValues, Query
from tap_flower.server.grid import UNSENT, Pending, StreamingGrid, content_of, words_of
from tap_flower.server.roster import Roster
from tap_flower.wire import messages
from tap_flower.wire.messages import MANIFEST, Evaluation, Manifest

log = logging.getLogger("tap_flower")
_LOOK, _LONGEST_LOOK = 0.1, 0.5
"""Seconds between looks for nodes and manifests, while a run waits for them: half as long again after each look."""
_NOT_THE_NODES_WORD = {
    ErrorCode.UNKNOWN,
    ErrorCode.MESSAGE_UNAVAILABLE,
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
    ErrorCode.NODE_UNAVAILABLE,
    ErrorCode.CLIENT_APP_CRASHED,
    UNSENT,
}
"""Codes of errors after which a node is asked again in time: it was busy, away, or has died and been started again."""


class Gathering:
    """Asks the nodes that are not known for their manifests. It never waits for one node while others work.

    A node that was refused, or that does not answer, is left alone until it has gone and come back; a question that expires
    is asked again.

    Args:
        grid: where the nodes are.
        roster: the clients; those whose nodes have gone are taken from it.
        ask: makes the content of the question.
        admit: called with (node, manifest); raises a MessageError where the client cannot take part.
        refuse: told (node, problem) of each node that cannot take part.
        timeout: seconds for which a question stays valid.

    Attributes:
        refused: node -> why it cannot take part, of the nodes that are there.
        alive: the nodes that were there at the last look.
        answered: node -> manifest, of those that have answered and are not yet admitted.
    """

    def __init__(
        self,
        grid: StreamingGrid,
        roster: Roster,
        ask: Callable[[], RecordDict],
        admit: Callable[[int, Manifest], None],
        refuse: Callable[[int, str], None],
        timeout: float,
    ) -> None:
        self._grid, self._roster, self._ask, self._admit, self._refuse = grid, roster, ask, admit, refuse
        self._timeout = timeout
        self._pending = Pending(grid)
        self._expires: dict[int, float] = {}
        self.refused: dict[int, str] = {}
        self.alive: set[int] = set()
        self.answered: dict[int, Manifest] = {}

    def look(self) -> None:
        """Forgets the nodes that have gone, takes the answers that have come, asks the new nodes. Returns at once."""
        self.alive = set(self._grid.get_node_ids())
        self._roster.keep_only(self.alive)
        now = time.monotonic()
        for unheard in (self.refused, self._expires, self.answered):
            for node in unheard.keys() - self.alive:
                del unheard[node]
        asked = {node for node, expires in self._expires.items() if expires > now}
        for node in sorted(self.alive - self._heard() - asked):
            question = Message(self._ask(), node, MANIFEST, group_id="0", ttl=self._timeout)
            self._expires[node] = now + self._timeout
            if (error := self._pending.send(question)) is not None:
                self._take(error)
        for reply in self._pending.collect():
            self._take(reply)

    def _heard(self) -> set[int]:
        return {*self._roster.nodes.values(), *self.refused, *self.answered}

    def admit(self) -> None:
        """Admits the clients that have answered.

        By name: whose first values count, and which of two clients of one name is refused, does not depend on the order in
        which they have answered.
        """
        for node, manifest in sorted(self.answered.items(), key=lambda found: (found[1].client, found[0])):
            try:
                self._admit(node, manifest)
            except MessageError as error:
                self.refuse(node, str(error))
        self.answered.clear()

    def wait(self, names: Collection[str], count: int, timeout: float) -> None:
        """Looks until clients are there, at most `timeout` seconds, and admits those that have come.

        Args:
            names: the clients that are waited for. Without any, it ends when all nodes that are there have answered.
            count: the fewest nodes that are waited for.
            timeout: seconds.
        """
        deadline, pause = time.monotonic() + timeout, _LOOK
        while True:
            self.look()
            here = self._roster.nodes.keys() | {manifest.client for manifest in self.answered.values()}
            everybody = len(self.alive) >= count and self.alive <= self._heard()
            if (here >= set(names) if names else everybody) or time.monotonic() >= deadline:
                self.admit()
                return
            time.sleep(pause)
            pause = min(1.5 * pause, _LONGEST_LOOK)

    def refuse(self, node: int, problem: str) -> None:
        """Leaves a node alone until it has gone and come back."""
        self.refused[node] = printable(problem)
        self._refuse(node, self.refused[node])

    def _take(self, reply: Message) -> None:
        node = reply.metadata.src_node_id
        if reply.has_error() and reply.error.code in _NOT_THE_NODES_WORD:
            self._refuse(node, printable(words_of(reply.error)))
            return
        self._expires.pop(node, None)
        try:
            content = content_of(reply)
            messages.refuse_tensors(content)
            self.answered[node] = messages.decode(content, Manifest, f"node {node}")
        except MessageError as error:
            self.refuse(node, str(error))


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

    def begin(self, grid: StreamingGrid, expected: int, first: FirstValues, query: Query) -> None:
        """Waits for the clients and asks each for its manifest.

        A new run waits until `expected` nodes are there and all have answered. A resumed run waits for all clients that it
        has known, and goes on with those that have come back.

        Args:
            grid: where the nodes are.
            expected: clients that a new run needs.
            first: the run's first values, which new clients bring or get.
            query: makes the content of a question.

        Raises:
            RunError: fewer than `expected` are there in a new run, none in a resumed one, or one that the configuration
                names is missing.
        """
        config, roster, known = self.config, self.roster, set(self.roster.manifests)
        self._grid, self._first = grid, first
        ask = partial(query, (), None)
        self.gathering = Gathering(grid, roster, ask, self._admit, self._refuse, config.round_timeout)
        awaited = len(known) or expected
        self._wait(known, awaited)
        named = {spec.name for spec in client_specs(config)}
        missing = sorted((named | known) - roster.nodes.keys())
        if named.intersection(missing) or len(roster.nodes) < (1 if known else expected):
            raise RunError(
                self._refusals()
                or f"{len(roster.nodes)} of {awaited} clients are there after {config.start_timeout:g} s"
                + (f", without {', '.join(missing)}" if missing else "")
                + f": start more nodes (`num-supernodes={awaited}` in a simulation){_or_lower(config, known, expected)}"
            )
        for name in missing:
            self._absent[name] = f"it has not come back within {config.start_timeout:g} s after the run was resumed"
            log.warning("going on without client %r: %s", name, self._absent[name])
        _tell_unread(roster)
        self.events.write(
            "start",
            round=self.progress.round,
            rounds=config.rounds,
            clients={name: sorted(roster.manifests[name].reach) for name in roster.names},
            fingerprints=sorted({manifest.fingerprint for manifest in roster.manifests.values()}),
            missing=missing,
        )

    def _refusals(self) -> str:
        """Why nodes cannot take part, each reason once."""
        nodes_of = defaultdict[str, list[int]](list)
        for node, problem in self.gathering.refused.items():
            nodes_of[problem].append(node)
        return "; ".join(
            f"node {nodes[0]}{f' and {len(nodes) - 1} more' if nodes[1:] else ''} cannot take part: {problem}"
            for problem, nodes in nodes_of.items()
        )

    def wait_for_known(self) -> None:
        """Waits for all clients that the run has known, `config.start_timeout` seconds at most."""
        self._wait(self.roster.manifests.keys(), len(self.roster.manifests))

    def _wait(self, names: Collection[str], count: int) -> None:
        self.gathering.wait(names, count, self.config.start_timeout)
        self._settle()

    def welcome(self) -> None:
        """Forgets the nodes that have gone, admits the clients that have come, asks the new nodes. Does not wait."""
        self.gathering.look()
        if came := set(self.gathering.answered):
            self.gathering.admit()
            self._settle()
            for name in sorted(name for name, node in self.roster.nodes.items() if node in came):
                log.info("client %r has joined", name)
                self.events.write("joined", round=self.progress.round, client=name)

    def _settle(self) -> None:
        """Hands out first values to new clients, and notes who takes part."""
        for node, problem in self._first.hand_out(self._grid):
            self.gathering.refuse(node, problem)
        self._save()

    def _save(self) -> None:
        checkpoint.save_manifests(self.folder, self.roster.manifests.values())

    def _admit(self, node: int, manifest: Manifest) -> None:
        self._first.admit(self._grid, node, manifest)
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
        tested = [set(models) for models in found.metrics.values() if models]  # a task may have no test examples
        if not tested:
            return
        there = set.intersection(*tested)
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
        """Client -> why it was not evaluated, of all clients that the run has known.

        A node that was refused, whose client's name nobody knows, is "node NUMBER".
        """
        names = sorted(self.roster.manifests.keys() - set(evaluated))
        missing = {name: self.problems.get(name) or self._absent.get(name, "its node has gone") for name in names}
        return missing | {f"node {node}": problem for node, problem in sorted(self.gathering.refused.items())}


def _or_lower(config: Config, known: Collection[str], expected: int) -> str:
    """Which option asks for as many clients, where one does."""
    if known or config.clients:
        return ""
    options = "clients_per_round" if expected == config.clients_per_round else "min_available_nodes or min_train_nodes"
    return f", or lower {options}"


def _tell_unread(roster: Roster) -> None:
    """Names the keys of Flower's run configuration that no client has read."""
    manifests = roster.manifests.values()
    if unread := set.intersection(*(set(manifest.unread) for manifest in manifests)):
        log.warning(
            "run config: no client has read %s: what the ServerApp does not read either does nothing; tap-flower's own "
            "loop takes train.learning_rate and train.steps of its configuration, `Task(fit=...)` the project's own",
            ", ".join(map(repr, sorted(unread))),
        )
