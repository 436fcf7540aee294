"""The server: manifests, rounds of stage 1, stage 2, evaluation."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from tap_flower.config import Config, client_specs, sent_hyper_parameters
from tap_flower.core.averaging import BadUpdateError
from tap_flower.files import write_json
from tap_flower.report.events import EventLog
from tap_flower.report.results import RESULTS, results
from tap_flower.report.trackers import Tracked, open_trackers
from tap_flower.server import checkpoint
from tap_flower.server.accounting import budget_of
from tap_flower.server.grid import exchange, patiently
from tap_flower.server.outgoing import Outgoing
from tap_flower.server.privacy import Privacy
from tap_flower.server.roster import RosterError
from tap_flower.server.rounds import Average, WeightedAverage
from tap_flower.server.start_or_resume import new_run, record_config, resumed_run
from tap_flower.wire import messages
from tap_flower.wire.manifest import decode_manifest
from tap_flower.wire.messages import Instruction, LackingError, MessageError
from tap_flower.wire.reports import Metrics, Report, decode_metrics, decode_report
from tap_flower.wire.updates import restore

_WAIT = 0.5
"""Seconds between looks for nodes that have not registered yet."""
log = logging.getLogger("tap_flower")


class RunError(RuntimeError):
    """The run cannot go on; the message says why and what to do."""


class TapStrategy:
    """Runs TAP over a grid of nodes.

    The server holds one value for each component's tensors, whatever the number of clients. It averages a component over
    the clients that return it, as replies arrive, and keeps its value where none does.

    Args:
        config: the run; a resumed run must have been started with the same one.
        folder: the run folder; a new run's must not hold another run.
        resume: whether to go on from the last complete round.

    Raises:
        ConfigError: the folder holds another run, the configuration differs from the one to be resumed, there is no such
            method, or a tracker or differential privacy cannot be had.
        StorageError: the run folder cannot be read or written.
    """

    def __init__(self, config: Config, folder: str | Path, resume: bool = False) -> None:
        folder = Path(folder)
        self.config = config
        self.folder = folder
        progress, roster = (resumed_run if resume else new_run)(config, folder)
        self.progress = progress
        self.roster = roster
        budget = budget_of(config)
        self.privacy = None if budget is None else Privacy(budget, progress.privacy)
        after_round = progress.round or None
        trackers = open_trackers(config.trackers, Tracked(folder, config, progress.run, after_round))
        self.events = EventLog(folder, after_round, trackers)
        if not resume:
            record_config(config, folder)
        self._writer = checkpoint.Writer(folder / "server")
        self._hyper_parameters = sent_hyper_parameters(config)
        self._seconds: dict[str, float] = {}

    def start(self, grid: Grid) -> dict[str, Any]:
        """Runs to the end and returns what `results.json` then holds.

        Raises:
            RunError: clients are missing at the start, since they are not there or cannot take part; or none is left.
            StorageError: a checkpoint cannot be written.
        """
        complete = False
        try:
            with self._writer:
                found = self._run(grid)
            complete = True
        finally:
            self.events.close(complete)
        return found

    def _run(self, grid: Grid) -> dict[str, Any]:
        config, began = self.config, time.monotonic()
        self._phase("start", lambda: self._gather(grid))
        self.events.write(
            "start",
            round=self.progress.round,
            rounds=config.rounds,
            clients={name: sorted(self.roster.manifests[name].reach) for name in self.roster.names},
        )
        if self.privacy is not None:
            self.privacy.announce(self.roster, config.clients_per_round, self.events.write)
        self._phase("rounds", lambda: self._rounds(grid))
        self._phase("distillation", lambda: self._second_stage(grid))
        metrics = self._phase("evaluation", lambda: self._evaluation(grid))
        self._seconds["total"] = time.monotonic() - began
        found = results(
            preset=config.preset,
            method=config.method,
            seed=config.seed,
            rounds=self.progress.round,
            clients=metrics,
            kinds={task.pair.task: task.kind for m in self.roster.manifests.values() for task in m.tasks},
            replacements=self.progress.replacements,
            bytes_={
                "down": sum(self.progress.down.values()),
                "up": sum(self.progress.up.values()),
                "per_component": {
                    component: {"down": self.progress.down[component], "up": self.progress.up.get(component, 0)}
                    for component in sorted(self.progress.down)
                },
            },
            steps=self.progress.steps,
            seconds=self._seconds,
            privacy=None if self.privacy is None else self.privacy.spent(self.roster),
        )
        write_json(self.folder / RESULTS, found)
        private = {key: found[key] for key in ("privacy",) if key in found}
        self.events.write(
            "end", round=self.progress.round, seconds=self._seconds["total"], tasks=found["tasks"], **private
        )
        return found

    def _gather(self, grid: Grid) -> None:
        """Waits for the clients and asks each for its manifest."""
        expected = len(self.config.clients) or self.config.clients_per_round
        self._wait_for_nodes(grid, expected)
        refused = self._welcome(grid, self.progress.round)
        missing = sorted({spec.name for spec in client_specs(self.config)} - set(self.roster.names))
        if not missing and len(self.roster.names) >= expected:
            return
        if refused:
            raise RunError("; ".join(refused))
        raise RunError(
            f"{len(self.roster.names)} of {expected} clients are there after {self.config.start_timeout:g} s"
            + (f", without {', '.join(missing)}" if missing else "")
            + f": start more nodes (`num-supernodes={expected}` in a simulation) or lower clients_per_round"
        )

    def _wait_for_nodes(self, grid: Grid, count: int) -> None:
        """Waits until so many nodes are there, at most `start_timeout` seconds."""
        deadline = time.monotonic() + self.config.start_timeout
        while len(list(patiently(grid.get_node_ids))) < count and time.monotonic() < deadline:
            time.sleep(_WAIT)

    def _welcome(self, grid: Grid, server_round: int) -> list[str]:
        """Admits the nodes that are not known yet; says which of them cannot take part, and why."""
        refused: list[str] = []

        def refuse(node: str, problem: str) -> None:
            refused.append(f"node {node} cannot take part: {problem}")
            self._drop(server_round, f"node {node}", problem)

        alive = set(patiently(grid.get_node_ids))
        self.roster.keep_only(alive)
        unknown = {str(node): node for node in sorted(alive - set(self.roster.nodes.values()))}
        ask = messages.encode_instruction(self._instruction(0))
        admitted: list[tuple[str, int, RecordDict]] = []
        for node, reply in exchange(grid, unknown, lambda _: ask, messages.MANIFEST, 0, self.config.round_timeout):
            problem = _problem(reply)
            if problem is None and reply is not None:
                admitted.append((node, unknown[node], reply.content))
            else:
                refuse(node, problem or "")
        for node, node_id, content in sorted(admitted):
            try:
                self.roster.admit(node_id, decode_manifest(content))
            except (RosterError, MessageError) as error:
                refuse(node, str(error))
        return refused

    def _rounds(self, grid: Grid) -> None:
        patience, validation = self.config.stopping.patience, self.progress.validation
        while self.progress.round < self.config.rounds:
            if patience and validation.waited(self.progress.round) >= patience:
                break
            server_round, began = self.progress.round + 1, time.monotonic()
            self._welcome(grid, server_round)
            names = self.roster.sample(server_round, self.config.clients_per_round)
            if not names:
                raise RunError(f"round {server_round}: no client is there; start the nodes again, then `--resume`")
            self.events.write("round_start", round=server_round, clients=names)
            reports = self._train(grid, server_round, names)
            self.progress.round = server_round
            self.progress.holds, self.progress.changed = dict(self.roster.holds), dict(self.roster.changed)
            score = self._validated(server_round, reports)
            self._writer.save(self.progress, self.roster.tensors, self.roster.best)
            # From round 1 on there is a checkpoint to go on from. A private round must be on disk before anything of it is
            # sent: a run that went on from an earlier one would release the round again, and spend more than it counts.
            if server_round == 1 or self.privacy is not None:
                self._writer.flush()
            self.events.write(
                "round",
                round=server_round,
                clients={name: {"losses": r.losses, "replacements": r.replacements} for name, r in reports.items()},
                dropped=sorted(set(names) - reports.keys()),
                seconds=time.monotonic() - began,
                **score,
                **({} if self.privacy is None else {"epsilon": self.privacy.epsilon}),
            )
        self._writer.flush()
        if patience:
            self.roster.go_back()
            best = {"best": validation.best_round, "validation": validation.best_score}
            self.events.write("best", round=self.progress.round, **best)

    def _validated(self, server_round: int, reports: Mapping[str, Report]) -> dict[str, float]:
        """Where the run may stop early: the mean validation score, for the round's event; the best tensors are kept."""
        if not self.config.stopping.patience:
            return {}
        validation = self.progress.validation
        mean = validation.take(server_round, {name: report.validation for name, report in reports.items()})
        if validation.best_round == server_round:
            self.roster.best = dict(self.roster.tensors)
        return {"validation": mean}

    def _train(self, grid: Grid, server_round: int, names: list[str]) -> dict[str, Report]:
        """One round: replies are folded in as they arrive and released."""
        roster, encoding, reports = self.roster, self.config.wire.encoding, dict[str, Report]()
        average = self._average(server_round, names)

        def fold(name: str, reply: Message) -> None:
            manifest = roster.manifests[name]
            report = decode_report(reply.content, manifest.reach)
            if report.server_round != server_round:
                raise MessageError(f"the reply is for round {report.server_round}, not {server_round}")
            roster.check_examples(name, report.examples)
            sent = messages.decode_tensors(reply.content, encoding)
            average.add(name, restore(sent, roster.tensors, encoding), report.unchanged)
            reports[name] = report

        self._for_each(grid, messages.TRAIN, server_round, names, fold)
        roster.update(*average.finish(), server_round)
        for name, report in sorted(reports.items()):
            self._count_steps(name, report)
            counts = Counter(self.progress.replacements.get(name, {}))
            counts.update(report.replacements)
            self.progress.replacements[name] = dict(counts)
        return dict(sorted(reports.items()))

    def _average(self, server_round: int, names: list[str]) -> Average:
        tell = partial(self.events.write, round=server_round)
        if self.privacy is not None:
            return self.privacy.average(self.roster, names, tell)
        return WeightedAverage(self.roster, names, self.config.aggregation.clip_norm, tell)

    def _second_stage(self, grid: Grid) -> None:
        """Stage 2 of every client; those that fail, or have gone, are waited for and asked once more."""
        ready: set[str] = set()

        def done(name: str, reply: Message) -> None:
            messages.refuse_tensors(reply.content)
            report = decode_report(reply.content, self.roster.manifests[name].reach)
            self._count_steps(name, report)
            self.events.write("distilled", round=self.progress.round, client=name, losses=report.losses)
            ready.add(name)

        for again in (False, True):
            if again and self.roster.manifests.keys() - ready:
                self._wait_for_nodes(grid, len(self.roster.manifests))
            self._welcome(grid, self.progress.round)
            if names := sorted(set(self.roster.names) - ready):
                self.events.write("distill_start", round=self.progress.round, clients=names)
                self._for_each(grid, messages.DISTILL, self.progress.round, names, done)

    def _evaluation(self, grid: Grid) -> dict[str, Metrics]:
        found: dict[str, Metrics] = {}

        def collect(name: str, reply: Message) -> None:
            found[name] = decode_metrics(reply.content, self.roster.manifests[name].reach)
            self.events.write("evaluated", round=self.progress.round, client=name, metrics=found[name])

        self.events.write("evaluate_start", round=self.progress.round, clients=self.roster.names)
        self._for_each(grid, messages.EVALUATE, self.progress.round, self.roster.names, collect)
        if not found:
            raise RunError("no client answered the evaluation: start the nodes again, then `--resume`")
        return found

    def _for_each(
        self,
        grid: Grid,
        message_type: str,
        server_round: int,
        names: Iterable[str],
        use: Callable[[str, Message], None],
    ) -> None:
        """Sends each client its own tensors; uses each good reply, and drops and logs a bad one."""
        lacking, left_out, holds = list[str](), set[str](), self.roster.holds
        outgoing = Outgoing(self.roster, self.config.wire.encoding)

        def content(name: str) -> RecordDict:
            arrays, held = outgoing.arrays_for(name)
            if held is not None:
                left_out.add(name)
            record = messages.encode_instruction(self._instruction(server_round, held), arrays)
            self._count(self.progress.down, record)
            return record

        # Most tensors first: these clients take longest, and where several share a machine its actors then end together.
        order = sorted(names, key=lambda name: (-len(self.roster.manifests[name].tensors), name))
        nodes = {name: self.roster.nodes[name] for name in order}
        for name, reply in exchange(grid, nodes, content, message_type, server_round, self.config.round_timeout):
            problem = _problem(reply)
            if reply is not None and reply.has_error() and reply.error.code == LackingError.CODE and name in left_out:
                del holds[name]
                lacking.append(name)
                continue
            if problem is None and reply is not None:
                holds[name] = self.progress.round
                try:
                    use(name, reply)
                    self._count(self.progress.up, reply.content)
                except (MessageError, BadUpdateError) as error:
                    problem = str(error)
            if problem is not None:
                self._drop(server_round, f"client {name!r}", problem)
        if lacking:  # nothing is left out for them now
            self._for_each(grid, message_type, server_round, lacking, use)

    def _instruction(self, server_round: int, held: int | None = None) -> Instruction:
        best = self.progress.validation.best_round if self.config.stopping.patience else None
        return Instruction(self.progress.run, server_round, self._hyper_parameters, self.progress.round, held, best)

    def _count(self, total: dict[str, int], content: RecordDict) -> None:
        for tensor, size in messages.payload_bytes(content).items():
            component = self.roster.component_of[tensor]
            total[component] = total.get(component, 0) + size

    def _count_steps(self, name: str, report: Report) -> None:
        self.progress.steps[name] = self.progress.steps.get(name, 0) + report.steps

    def _drop(self, server_round: int, who: str, problem: str) -> None:
        self.progress.dropped += 1
        log.warning("dropped the reply of %s: %s", who, problem)
        self.events.write("dropped", round=server_round, who=who, problem=problem)

    def _phase(self, name: str, run: Callable[[], Any]) -> Any:
        began = time.monotonic()
        outcome = run()
        self._seconds[name] = time.monotonic() - began
        return outcome


def _problem(reply: Message | None) -> str | None:
    """Why there is no content to use, or None."""
    if reply is None:
        return "no answer in time (raise round_timeout, or look at the node)"
    if reply.has_error():
        return f"{reply.error.reason} (code {reply.error.code})"
    return None
