"""`ServerRun`: what the server knows of a run, and the steps that every phase of it is made of."""

from __future__ import annotations

import itertools
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from logging import ERROR, INFO, WARNING
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.common.logger import log
from torch import Tensor

from tap_flower.config import Config, Encoding, sent_hyper_parameters, to_yaml
from tap_flower.errors import ConfigError, MessageError, RunError
from tap_flower.files import write_atomically, write_json
from tap_flower.methods.registry import find_method
from tap_flower.plain import printable
from tap_flower.report.events import END, FAILED, EventLog
from tap_flower.report.results import RESULTS
from tap_flower.report.trackers import Tracked, open_trackers
from tap_flower.server import checkpoint
from tap_flower.server.attendance import Attendance
from tap_flower.server.checkpoint import start_or_resume
from tap_flower.server.first_values import FIRST, FirstValues
from tap_flower.server.grid import SILENT, UNSENT, StreamingGrid, content_of
from tap_flower.server.likely_mistakes import (
    fewer_batches_than_tasks,
    frozen_and_trained,
    likely_mistakes,
    without_effect,
)
from tap_flower.server.outgoing import Outgoing, Values
from tap_flower.server.privacy import Privacy, PrivateAverage, budget_of
from tap_flower.server.result import TapResult, collect
from tap_flower.server.roster import Roster
from tap_flower.server.rounds import MethodAverage, WeightedAverage
from tap_flower.wire import messages
from tap_flower.wire.messages import Instruction, Report
from tap_flower.wire.tensors import encode_tensors

warnings = logging.getLogger("tap_flower")
_MEMORY = "method:"
"""Begins the names, in the checkpoint, of what the method's server half keeps."""


class ServerRun:
    """A run on the server: its folder, its clients, the values, the events. `TapStrategy` says what happens when.

    As a context it ends the log of events, also where the run fails.

    Args:
        config: configuration of the run.
        folder: the run folder.
        resume: whether to go on with the run that the folder holds.
        initial_arrays: first values by name, or None.
        round_size: (number of clients) -> how many of them train in a round.
        train_config: Flower's `config` of the rounds, which queries carry, too: a client's mods may read it in any message.

    Attributes:
        progress: what the run has done so far.
        roster: clients and values.
        values: the values as an ArrayRecord.
        first: the run's first values.
        events: log of events.
        privacy: budget and ledger of a private run, else None.
        result: filled by the strategy.
        asked: client -> node of the last messages.
        reasons: why the last replies that were dropped could not be used.
        reports: client -> report of the last round.
        attendance: who is there, who is not, and why.
        personalised: client -> models that its stage 2 has made.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        resume: bool,
        initial_arrays: ArrayRecord | None,
        round_size: Callable[[int], int],
        train_config: ConfigRecord,
    ) -> None:
        self.config, self.folder, self._train_config = config, folder, train_config
        self._half = find_method(config.method).server
        if self._half is not None and config.privacy.epsilon is not None:
            raise ConfigError(
                f"method={config.method} has a server half, and privacy.epsilon = {config.privacy.epsilon:g} covers the "
                f"mean difference alone: use another method, or leave privacy.epsilon null"
            )
        found = start_or_resume(config, folder, resume)
        self._memory = _taken_out(found.tensors)
        _taken_out(found.best)
        self.progress = found.progress
        self.roster = Roster(config.seed, found.tensors, config.admission)
        for manifest in found.manifests:
            self.roster.recall(manifest)
        self._note_train_config()
        self._best = found.best
        self.initial_arrays = ArrayRecord() if initial_arrays is None else initial_arrays
        patience = min(config.start_timeout, config.round_timeout)  # a newcomer that hangs holds up a round no longer
        self.first = FirstValues(self.roster, self.initial_arrays, folder / "server", resume, patience, self._query)
        self.values = Values({**self.initial_arrays, **encode_tensors(self.first.given(), Encoding.float32)})
        self._round_size = round_size
        budget = budget_of(config, round_size(len(config.clients) or sys.maxsize))
        self.privacy = None if budget is None else Privacy(budget, self.progress.privacy)
        after_round = self.progress.round if resume else None
        trackers = open_trackers(config.trackers, Tracked(folder, config, self.progress.run, after_round))
        self.progress.begin()
        if not resume:  # from here on the run can be resumed
            (folder / "server" / FIRST).unlink(missing_ok=True)  # of an attempt that failed before its first round
            checkpoint.save(folder / "server", self.progress, {}, {})
            write_atomically(folder / "config.yaml", to_yaml(config).encode())
        self.events = EventLog(folder, after_round, trackers)
        self._hyper_parameters = sent_hyper_parameters(config)
        self.result = TapResult()
        self.asked: dict[str, int] = {}
        self.reasons: list[str] = []
        self.reports: dict[str, Report] = {}
        self.personalised: dict[str, tuple[str, ...]] = {}
        self.attendance = Attendance(config, folder / "server", self.roster, self.progress, self.events)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        if isinstance(error, Exception):
            self.events.write(FAILED, round=self.progress.round, problem=str(error), type=type(error).__name__)
            log(ERROR, "The run has failed after %d complete rounds: %s", self.progress.round, error)
            if self.progress.round:
                how = f"`tap-flower simulate --out {self.folder} --resume`, or TapStrategy(run_folder=..., resume=True)"
                log(ERROR, "Fix this, then go on with %s", how)
            else:
                log(
                    ERROR,
                    "No round was completed: fix this and start the run again; it can use the folder %s",
                    self.folder,
                )
        self.events.close(complete=error is None)

    def gather(self, grid: StreamingGrid, expected: int, fraction_train: float | None) -> None:
        """Waits for the clients, takes what they bring, and warns about likely mistakes.

        Raises:
            RunError: clients are missing; see `Attendance.begin`.
        """
        self.attendance.begin(grid, expected, self.first, self._query)
        self.first.check_names()
        manifests = self.roster.manifests
        for sentence in (
            *without_effect(self.config, all(manifest.built for manifest in manifests.values())),
            *likely_mistakes(self.config.clients_per_round, fraction_train, self.roster.held()),
            *fewer_batches_than_tasks(self.config, self.roster.held()),
            *frozen_and_trained(
                {n: m.tensors for n, m in manifests.items()}, {n: m.built for n, m in manifests.items()}
            ),
        ):
            log(WARNING, "%s", sentence)
        if self.privacy is not None:
            self.privacy.announce(self.roster, self._round_size(len(self.roster.names)), self.events.write)

    def arrays(self) -> ArrayRecord:
        """The server's values, and what else `initial_arrays` named."""
        return self.values.record(self.roster.tensors)

    def messages(
        self, message_type: str, server_round: int, arrays: ArrayRecord, config: ConfigRecord, names: list[str]
    ) -> Iterator[Message]:
        """A message for each client with the tensors of its own components, made when it is sent."""
        tensors = self.values.tensors(arrays, self.roster.tensors)
        outgoing = Outgoing(self.roster, arrays, tensors, self.config.wire.encoding)
        # Most tensors first: these clients take longest, and where several share a machine its actors then end together.
        for name in sorted(names, key=lambda name: (-len(self.roster.manifests[name].tensors), name)):
            own = ConfigRecord({**config, "server-round": server_round})
            content = messages.encode(self._instruction(server_round), outgoing.arrays_for(name), config=own)
            self.count(self.progress.down, content)
            yield Message(content, self.roster.nodes[name], message_type, group_id=str(server_round))

    def _note_train_config(self) -> None:
        """Tells where a resumed run has another `train_config` than before: a lower rate may well be meant."""
        given = msgspec.to_builtins(dict(self._train_config))
        before, self.progress.train_config = self.progress.train_config, given
        if before is not None and (different := checkpoint.differences(before, given)):
            log(WARNING, "The run goes on with another train_config: %s", different)

    def _query(self, wanted: Sequence[str], arrays: ArrayRecord | None) -> RecordDict:
        instruction = msgspec.structs.replace(self._instruction(0), wanted=tuple(wanted))
        return messages.encode(instruction, arrays, config=ConfigRecord({**self._train_config, "server-round": 0}))

    def _instruction(self, server_round: int) -> Instruction:
        return Instruction(
            run=self.progress.run,
            epochs=tuple(self.progress.epochs),
            round=server_round,
            hyper_parameters=self._hyper_parameters,
            best=self.progress.validation.best_round if self.config.stopping.patience else None,
        )

    def exchange(self, grid: StreamingGrid, sent: Iterable[Message]) -> Iterator[Message]:
        """Sends messages, notes whom they ask, and returns the replies as they come.

        Raises:
            RunError: a message of a subclass is for a node without a client, or for a client that has had one.
        """
        self.asked = {}
        client_on = {node: name for name, node in self.roster.nodes.items()}

        def noted() -> Iterator[Message]:
            for message in sent:
                node = message.metadata.dst_node_id
                if node not in client_on:
                    raise RunError(
                        f"a {message.metadata.message_type} message is for node {node}, on which no client is: take nodes "
                        f"from `self.roster.nodes`"
                    )
                if (name := client_on[node]) in self.asked:
                    raise RunError(
                        f"two {message.metadata.message_type} messages are for client {name!r}, which would count twice: "
                        f"send each client one"
                    )
                self.asked[name] = node
                yield message

        look = self.attendance.gathering.look  # who comes meanwhile is asked, and admitted for the next round
        replies = grid.send_and_receive(noted(), timeout=self.config.round_timeout, meanwhile=look)
        first = list(itertools.islice(replies, 1))  # all messages have been sent when the first reply is there
        return itertools.chain(first, replies)

    def average(self, server_round: int) -> WeightedAverage | PrivateAverage:
        """The average of a round over the clients that were asked."""
        tell = partial(self.events.write, round=server_round)
        if self.privacy is not None:
            return PrivateAverage(self.privacy, self.roster, list(self.asked), tell)
        usual = (self.roster, list(self.asked), self.config.aggregation.clip_norm, tell)
        if self._half is not None:
            return MethodAverage(self._half, self._memory, server_round, *usual)
        return WeightedAverage(*usual)

    def use(
        self, where: str, server_round: int, replies: Iterable[Message], use: Callable[[str, RecordDict], None]
    ) -> list[RecordDict]:
        """Uses the content of each good reply, as it comes; drops and logs the others.

        Args:
            where: name of the strategy's method, for Flower's log.
            server_round: of the messages.
            replies: from `exchange`.
            use: called with (client, content); it raises a MessageError where the content cannot be used.

        Returns:
            The good replies' records without arrays, for an aggregation of metrics.
        """
        good, self.reasons = list[RecordDict](), []
        client_on = {node: name for name, node in self.asked.items()}
        for reply in replies:
            name = client_on[reply.metadata.src_node_id]
            try:
                if reply.has_error() and reply.error.code in (SILENT, UNSENT, messages.LOST):
                    self.roster.leave(name)  # it is asked who it is, and takes part again once it has answered
                use(name, content_of(reply))
                good.append(RecordDict(dict(reply.content.metric_records)))
                self.attendance.problems.pop(name, None)
            except MessageError as error:
                problem = printable(str(error)).removeprefix(f"client {name!r}: ")
                self.attendance.problems[name] = problem
                self.attendance.drop(server_round, f"client {name!r}", problem)
                self.reasons.append(f"client {name!r}: {problem}")
        log(INFO, "%s: Received %s results and %s failures", where, len(good), len(self.asked) - len(good))
        return good

    def check_replies(self, phase: str, good: int, asked: int) -> None:
        """Ends the run where fewer than `config.min_replies` clients have given a usable answer.

        Args:
            phase: as the error names it.
            good: how many clients have given one.
            asked: how many were to.

        Raises:
            RunError: with the reasons.
        """
        if good < self.config.min_replies:
            reasons = "; ".join(self.reasons[:3]) + (f" and {len(self.reasons) - 3} more" if self.reasons[3:] else "")
            go_on = ", then go on with `--resume`" if self.progress.round else ""
            raise RunError(
                f"{phase}: {good} of {asked} clients have given a usable answer, min_replies is {self.config.min_replies}: "
                f"{reasons or 'nobody was there to be asked'}; fix or start the nodes{go_on}"
            )

    def complete_round(self, server_round: int, arrays: ArrayRecord, began: float) -> None:
        """Takes the values that the strategy has aggregated; the round is on disk before the next one's messages leave."""
        roster, progress, reports = self.roster, self.progress, dict(sorted(self.reports.items()))
        roster.tensors = self.values.take(arrays, roster.tensors)
        progress.round = server_round
        for name, report in reports.items():
            self.count_steps(name, report)
            progress.took_part[name] = server_round
            counts = Counter(progress.replacements.get(name, {}))
            counts.update(report.replacements)
            progress.replacements[name] = dict(counts)
        score: dict[str, float] = {}
        if self.config.stopping.patience:
            scores = {name: report.validation for name, report in reports.items()}
            score = {"validation": progress.validation.take(server_round, scores)}
            if progress.validation.best_round == server_round:
                self._best = dict(roster.tensors)
        self.events.write(
            "round",
            round=server_round,
            clients={
                name: {"examples": r.examples, "losses": r.losses, "replacements": r.replacements}
                for name, r in reports.items()
            },
            dropped=sorted(set(self.asked) - reports.keys()),
            seconds=time.monotonic() - began,
            **score,
            **({} if self.privacy is None else {"epsilon": self.privacy.epsilon}),
        )
        # After the event: a resumed run removes the events of rounds that no checkpoint has, and makes none up.
        memory = {f"{_MEMORY}{name}": value for name, value in self._memory.items()}
        checkpoint.save(self.folder / "server", progress, {**roster.tensors, **memory}, self._best)

    def stops_early(self) -> bool:
        """Whether `config.stopping.patience` rounds have brought no better validation score."""
        patience = self.config.stopping.patience
        return bool(patience) and self.progress.validation.waited(self.progress.round) >= patience

    def end_of_stage_1(self) -> None:
        """Goes back to the best round's values, where the run may stop early."""
        if self.config.stopping.patience:
            self.roster.tensors |= self._best
            found = self.progress.validation
            self.events.write("best", round=self.progress.round, best=found.best_round, validation=found.best_score)

    def count(self, total: dict[str, int], content: RecordDict) -> None:
        """Adds the bytes of a message's tensors to a component's total."""
        for tensor, size in messages.payload_bytes(content).items():
            component = self.roster.component_of[tensor]
            total[component] = total.get(component, 0) + size

    def count_steps(self, name: str, report: Report) -> None:
        """Adds the optimiser steps of a report to those of its client."""
        self.progress.steps[name] = self.progress.steps.get(name, 0) + report.steps

    def write_results(self, seconds: Mapping[str, float]) -> None:
        """Writes `results.json`."""
        self.result.missing = self.attendance.missing(self.result.clients)
        for who, reason in sorted(self.result.missing.items()):
            log(WARNING, "Not in the results: %s: %s", who, reason)
        collect(self.result, self.config, self.progress, self.roster, self.first.sent, self.privacy, seconds)
        summary = self.result.summary
        write_json(self.folder / RESULTS, summary)
        private = {key: summary[key] for key in ("privacy",) if key in summary}
        self.events.write(
            END,
            round=self.progress.round,
            seconds=seconds["total"],
            tasks=self.result.tasks,
            missing=self.result.missing,
            **private,
        )


def final_values(run: Path) -> ArrayRecord:
    """The server's values with which stage 1 of a run has ended, as `initial_arrays` of another run.

    Args:
        run: the run folder.

    Raises:
        StorageError: there are none, or they are damaged.
    """
    found = checkpoint.load(run / "server")
    _taken_out(found.tensors)
    _taken_out(found.best)
    return encode_tensors({**found.tensors, **found.best}, Encoding.float32)


def _taken_out(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Takes what the method's server half keeps out of the tensors of a checkpoint."""
    kept = [name for name in tensors if name.startswith(_MEMORY)]
    return {name.removeprefix(_MEMORY): tensors.pop(name) for name in kept}
