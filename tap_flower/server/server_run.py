"""`ServerRun`: what the server knows of a run, and the steps that every phase of it is made of."""

from __future__ import annotations

import itertools
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from logging import INFO
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.common.logger import log

from tap_flower.config import Config, client_specs, sent_hyper_parameters
from tap_flower.errors import MessageError, RunError
from tap_flower.files import write_json
from tap_flower.plain import printable
from tap_flower.report.events import EventLog
from tap_flower.report.results import RESULTS
from tap_flower.report.trackers import Tracked, open_trackers
from tap_flower.server import checkpoint
from tap_flower.server.checkpoint import record_config, start_or_resume
from tap_flower.server.gathering import wait_for_nodes, welcome
from tap_flower.server.grid import StreamingGrid
from tap_flower.server.outgoing import Outgoing, Values
from tap_flower.server.privacy import Privacy, PrivateAverage, budget_of
from tap_flower.server.result import TapResult, collect
from tap_flower.server.roster import Roster
from tap_flower.server.rounds import WeightedAverage
from tap_flower.wire import messages
from tap_flower.wire.messages import Instruction, Report

warnings = logging.getLogger("tap_flower")


class ServerRun:
    """A run on the server: its folder, its clients, the values, the events. `TapStrategy` says what happens when.

    As a context it ends the log of events, also where the run fails.

    Args:
        config: configuration of the run.
        folder: the run folder.
        resume: whether to go on with the run that the folder holds.
        initial_arrays: first values by name, or None.
        round_size: (number of clients) -> how many of them train in a round.

    Attributes:
        progress: what the run has done so far.
        roster: clients and values.
        values: the values as an ArrayRecord.
        events: log of events.
        privacy: budget and ledger of a private run, else None.
        result: filled by the strategy.
        asked: the clients that the last messages went to.
        reports: client -> report of the last round.
        personalised: the clients whose stage 2 is done.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        resume: bool,
        initial_arrays: ArrayRecord | None,
        round_size: Callable[[int], int],
    ) -> None:
        self.config, self.folder = config, folder
        found = start_or_resume(config, folder, resume)
        self.progress = found.progress
        self.roster = Roster(config.seed, found.tensors, config.admission)
        self._best = found.best
        self.initial_arrays = ArrayRecord() if initial_arrays is None else initial_arrays
        self.values = Values(self.initial_arrays)
        self._round_size = round_size
        budget = budget_of(config, round_size(len(config.clients) or sys.maxsize))
        self.privacy = None if budget is None else Privacy(budget, self.progress.privacy)
        after_round = self.progress.round if resume else None
        trackers = open_trackers(config.trackers, Tracked(folder, config, self.progress.run, after_round))
        self.events = EventLog(folder, after_round, trackers)
        if not resume:
            record_config(config, folder)
        self.progress.begin()
        self._hyper_parameters = sent_hyper_parameters(config)
        self.result = TapResult()
        self.asked: list[str] = []
        self.reports: dict[str, Report] = {}
        self.personalised: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        if isinstance(error, Exception):
            self.events.write("failed", round=self.progress.round, problem=str(error), type=type(error).__name__)
        self.events.close(complete=error is None)

    def gather(self, grid: StreamingGrid, expected: int) -> None:
        """Waits for the clients and asks each for its manifest.

        Raises:
            RunError: fewer than `expected` are there, or one that the configuration names is missing.
        """
        config = self.config
        wait_for_nodes(grid, expected, config.start_timeout)
        refused = self.welcome(grid, self.progress.round)
        missing = sorted({spec.name for spec in client_specs(config)} - set(self.roster.names))
        if missing or len(self.roster.names) < expected:
            raise RunError(
                "; ".join(refused)
                or f"{len(self.roster.names)} of {expected} clients are there after {config.start_timeout:g} s"
                + (f", without {', '.join(missing)}" if missing else "")
                + f": start more nodes (`num-supernodes={expected}` in a simulation) or lower clients_per_round"
            )
        if not self.progress.round:
            self._take_initial_arrays()
        self.events.write(
            "start",
            round=self.progress.round,
            rounds=config.rounds,
            clients={name: sorted(self.roster.manifests[name].reach) for name in self.roster.names},
            fingerprints=sorted({manifest.fingerprint for manifest in self.roster.manifests.values()}),
        )
        if self.privacy is not None:
            self.privacy.announce(self.roster, self._round_size(len(self.roster.names)), self.events.write)

    def _take_initial_arrays(self) -> None:
        """Puts `initial_arrays` in place of the seed's first values.

        Raises:
            RunError: an array is not as the clients' tensor, or not finite, or none is a tensor of theirs.
        """
        tensors = self.roster.tensors
        ours = self.initial_arrays.keys() & tensors.keys()
        if self.initial_arrays and not ours:
            raise RunError(
                f"initial_arrays names no tensor that a client trains: it has {min(self.initial_arrays)!r}, the clients "
                f"have {min(tensors)!r}: give the names of the clients' own model"
            )
        for name in sorted(ours):
            given = torch.from_numpy(self.initial_arrays[name].numpy())
            if given.dtype != torch.float32 or not bool(given.isfinite().all()):
                raise RunError(
                    f"initial_arrays: {name!r} is {given.dtype}, or holds a value that is not finite: give finite "
                    f"torch.float32 values, such as those of `model.float().state_dict()`"
                )
            if given.shape != tensors[name].shape:
                raise RunError(
                    f"initial_arrays: {name!r} has shape {tuple(given.shape)}, the clients' tensor "
                    f"{tuple(tensors[name].shape)}: give the values of the clients' own model"
                )
            tensors[name] = given

    def welcome(self, grid: StreamingGrid, server_round: int) -> list[str]:
        """Admits the nodes that are not known yet; says which of them cannot take part, and why."""
        ask = messages.encode(self._instruction(0))
        return welcome(grid, self.roster, ask, self.config.round_timeout, partial(self._drop, server_round))

    def arrays(self) -> ArrayRecord:
        """The server's values, and what else `initial_arrays` named."""
        return self.values.record(self.roster.tensors)

    def messages(
        self, message_type: str, server_round: int, arrays: ArrayRecord, config: ConfigRecord, names: list[str]
    ) -> Iterator[Message]:
        """A message for each client with the tensors of its own components, made when it is sent."""
        config["server-round"] = server_round
        tensors = self.values.tensors(arrays, self.roster.tensors)
        outgoing = Outgoing(self.roster, arrays, tensors, self.config.wire.encoding)
        # Most tensors first: these clients take longest, and where several share a machine its actors then end together.
        for name in sorted(names, key=lambda name: (-len(self.roster.manifests[name].tensors), name)):
            content = messages.encode(self._instruction(server_round), outgoing.arrays_for(name), config=config)
            self.count(self.progress.down, content)
            yield Message(content, self.roster.nodes[name], message_type, group_id=str(server_round))

    def _instruction(self, server_round: int) -> Instruction:
        return Instruction(
            run=self.progress.run,
            epochs=tuple(self.progress.epochs),
            round=server_round,
            hyper_parameters=self._hyper_parameters,
            best=self.progress.validation.best_round if self.config.stopping.patience else None,
        )

    def exchange(self, grid: StreamingGrid, sent: Iterable[Message]) -> Iterator[Message]:
        """Sends messages, notes whom they ask, and returns the replies as they come."""
        self.asked = []

        def noted() -> Iterator[Message]:
            for message in sent:
                self.asked.append(self.roster.name_of(message.metadata.dst_node_id))
                yield message

        replies = grid.send_and_receive(noted(), timeout=self.config.round_timeout)
        first = list(itertools.islice(replies, 1))  # all messages have been sent when the first reply is there
        return itertools.chain(first, replies)

    def average(self, server_round: int) -> WeightedAverage | PrivateAverage:
        """The average of a round over the clients that were asked."""
        tell = partial(self.events.write, round=server_round)
        if self.privacy is not None:
            return PrivateAverage(self.privacy, self.roster, self.asked, tell)
        return WeightedAverage(self.roster, self.asked, self.config.aggregation.clip_norm, tell)

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
        good: list[RecordDict] = []
        for reply in replies:
            name = self.roster.name_of(reply.metadata.src_node_id)
            try:
                use(name, messages.content_of(reply))
                good.append(RecordDict(dict(reply.content.metric_records)))
            except MessageError as error:
                self._drop(server_round, f"client {name!r}", printable(str(error)))
        log(INFO, "%s: Received %s results and %s failures", where, len(good), len(self.asked) - len(good))
        return good

    def _drop(self, server_round: int, who: str, problem: str) -> None:
        self.progress.dropped += 1
        warnings.warning("dropped the reply of %s: %s", who, problem)
        self.events.write("dropped", round=server_round, who=who, problem=problem)

    def complete_round(self, server_round: int, arrays: ArrayRecord, began: float) -> None:
        """Takes the values that the strategy has aggregated; the round is on disk before the next one's messages leave."""
        roster, progress, reports = self.roster, self.progress, dict(sorted(self.reports.items()))
        roster.tensors = self.values.tensors(arrays, roster.tensors)
        progress.round = server_round
        for name, report in reports.items():
            self.count_steps(name, report)
            counts = Counter(progress.replacements.get(name, {}))
            counts.update(report.replacements)
            progress.replacements[name] = dict(counts)
        score: dict[str, float] = {}
        if self.config.stopping.patience:
            scores = {name: report.validation for name, report in reports.items()}
            score = {"validation": progress.validation.take(server_round, scores)}
            if progress.validation.best_round == server_round:
                self._best = dict(roster.tensors)
        checkpoint.save(self.folder / "server", progress, roster.tensors, self._best)
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
        """Writes `results.json`.

        Raises:
            RunError: no client was evaluated.
        """
        if not self.result.clients:
            raise RunError("no client answered the evaluation: start the nodes again, then `--resume`")
        collect(self.result, self.config, self.progress, self.roster, self.privacy, seconds)
        summary = self.result.summary
        write_json(self.folder / RESULTS, summary)
        private = {key: summary[key] for key in ("privacy",) if key in summary}
        self.events.write(
            "end", round=self.progress.round, seconds=seconds["total"], tasks=self.result.tasks, **private
        )
