"""`TapStrategy`: rounds of stage 1, stage 2 and the evaluation, as a strategy of Flower's."""

from __future__ import annotations

import io
import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from logging import INFO
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords, log_strategy_start_info

from tap_flower.config import Config, client_specs, load_config, sent_hyper_parameters
from tap_flower.errors import MessageError, RunError
from tap_flower.files import write_json
from tap_flower.methods.registry import find_method
from tap_flower.report.events import EventLog
from tap_flower.report.results import RESULTS
from tap_flower.report.trackers import Tracked, open_trackers
from tap_flower.server import checkpoint
from tap_flower.server.checkpoint import Progress, record_config, start_or_resume
from tap_flower.server.gathering import wait_for_nodes, welcome
from tap_flower.server.grid import StreamingGrid
from tap_flower.server.outgoing import Outgoing, Values
from tap_flower.server.privacy import Privacy, PrivateAverage, budget_of
from tap_flower.server.result import TapResult, collect
from tap_flower.server.roster import Roster
from tap_flower.server.rounds import WeightedAverage
from tap_flower.wire import messages
from tap_flower.wire.messages import EVALUATE, PERSONALISE, TRAIN, Evaluation, Instruction, Report

warnings = logging.getLogger("tap_flower")
EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]
"""(round, arrays) -> metrics."""
Aggregate = Callable[[list[RecordDict], str], MetricRecord]
"""(contents of the replies, key of the weight) -> aggregated metrics."""


class TapStrategy(Strategy):
    """TAP, and every other method of tap-flower, as a Flower strategy.

    The server holds one value for each component's tensors, whatever the number of clients. A client gets the tensors of its
    own components and returns differences; the server averages a component over the clients that hold it, weighted by their
    examples, as replies arrive. After the last round every client personalises (stage 2), then evaluates its models.

    Args:
        config: the run; by default the preset `plug-in`.
        run_folder: folder for checkpoints, `metrics.jsonl` and `results.json`; a new run's must be empty. By default
            `tap-flower-runs/TIME` in the user's home.
        resume: whether to go on from the last complete round of the run in `run_folder`.
        method: name of the method, in place of `config.method`.
        fraction_train: share of the clients that train in a round, at least `min_train_nodes` of them. By default
            `config.clients_per_round` clients train.
        min_train_nodes: fewest clients that train in a round, where `fraction_train` is given.
        min_available_nodes: number of clients that a run waits for at its start, `config.start_timeout` seconds at most. By
            default those that the configuration names, or as many as train in a round.
        weighted_by_key: key of the weight in the clients' MetricRecords.
        train_metrics_aggr_fn: aggregates the clients' MetricRecords of a round; by default Flower's weighted mean.
        evaluate_metrics_aggr_fn: aggregates the clients' MetricRecords of the evaluation; by default Flower's weighted mean.

    Attributes:
        config: the run's configuration.
        run_folder: see the arguments.
        progress: what the run has done so far; from `start` on.
        roster: clients and values; from `start` on.
    """

    def __init__(
        self,
        *,
        config: Config | None = None,
        run_folder: str | Path | None = None,
        resume: bool = False,
        method: str | None = None,
        fraction_train: float | None = None,
        min_train_nodes: int = 2,
        min_available_nodes: int | None = None,
        weighted_by_key: str = "num-examples",
        train_metrics_aggr_fn: Aggregate | None = None,
        evaluate_metrics_aggr_fn: Aggregate | None = None,
    ) -> None:
        self.config = load_config("plug-in") if config is None else config
        if method is not None:
            self.config.method = method
        find_method(self.config.method)
        named = time.strftime("%Y%m%d-%H%M%S")
        self.run_folder = Path.home() / "tap-flower-runs" / named if run_folder is None else Path(run_folder)
        self.resume = resume
        self.fraction_train = fraction_train
        self.min_train_nodes = min_train_nodes
        self.min_available_nodes = (
            len(self.config.clients) or self.config.clients_per_round
            if min_available_nodes is None
            else min_available_nodes
        )
        self.weighted_by_key = weighted_by_key
        self.train_metrics_aggr_fn = train_metrics_aggr_fn or aggregate_metricrecords
        self.evaluate_metrics_aggr_fn = evaluate_metrics_aggr_fn or aggregate_metricrecords

    def summary(self) -> None:
        """Logs the settings of the strategy."""
        sampled = (
            f"{self.config.clients_per_round} clients a round"
            if self.fraction_train is None
            else f"fraction {self.fraction_train:.2f}, at least {self.min_train_nodes}"
        )
        log(INFO, "\t├──> Method: %s", self.config.method)
        log(INFO, "\t├──> Sampling: %s | minimum available: %d", sampled, self.min_available_nodes)
        log(INFO, "\t└──> Run folder: %s", self.run_folder)

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int | None = None,
        timeout: float | None = None,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
    ) -> TapResult:
        """Runs to the end.

        Args:
            grid: Flower's grid.
            initial_arrays: first values of tensors by name; those of other tensors come from the run's seed. Names that no
                client exchanges are kept in `TapResult.arrays` as they are.
            num_rounds: rounds of stage 1; by default `config.rounds`.
            timeout: seconds that a client may take to answer; by default `config.round_timeout`.
            train_config: sent to clients with every round, and with stage 2.
            evaluate_config: sent to clients with the evaluation.
            evaluate_fn: (round, arrays) -> metrics, called before the first round and after each.

        Raises:
            ConfigError: the folder holds another run, the configuration differs from the one to be resumed, or a tracker or
                differential privacy cannot be had.
            RunError: clients are missing at the start, since they are not there or cannot take part; or none is left.
            StorageError: the run folder cannot be read or written.
        """
        if num_rounds is not None:
            self.config.rounds = num_rounds
        if timeout is not None:
            self.config.round_timeout = timeout
        self._open(initial_arrays)
        log(INFO, "Starting %s strategy:", self.__class__.__name__)
        log_strategy_start_info(self.config.rounds, self._initial, train_config, evaluate_config)
        self.summary()
        complete = False
        try:
            result = self._run(
                StreamingGrid(grid),
                ConfigRecord() if train_config is None else train_config,
                ConfigRecord() if evaluate_config is None else evaluate_config,
                evaluate_fn,
            )
            complete = True
        except Exception as error:
            self.events.write("failed", round=self.progress.round, problem=str(error), type=type(error).__name__)
            raise
        finally:
            self.events.close(complete)
        log(INFO, "Final results:")
        for line in io.StringIO(str(result)):
            log(INFO, "\t%s", line.rstrip("\n"))
        return result

    def _open(self, initial_arrays: ArrayRecord | None) -> None:
        """Opens the run folder, anew or after the last complete round."""
        config, folder = self.config, self.run_folder
        found = start_or_resume(config, folder, self.resume)
        self.progress: Progress = found.progress
        self.roster = Roster(config.seed, found.tensors)
        self._best = found.best
        self._initial = ArrayRecord() if initial_arrays is None else initial_arrays
        self._values = Values(self._initial)
        budget = budget_of(config)
        self.privacy = None if budget is None else Privacy(budget, self.progress.privacy)
        after_round = self.progress.round if self.resume else None
        trackers = open_trackers(config.trackers, Tracked(folder, config, self.progress.run, after_round))
        self.events = EventLog(folder, after_round, trackers)
        if not self.resume:
            record_config(config, folder)
        self.progress.begin()
        self._hyper_parameters = sent_hyper_parameters(config)
        self._asked: list[str] = []
        self._reports: dict[str, Report] = {}
        self._personalised: set[str] = set()
        self._result = TapResult()

    def _run(
        self,
        grid: StreamingGrid,
        train_config: ConfigRecord,
        evaluate_config: ConfigRecord,
        evaluate_fn: EvaluateFn | None,
    ) -> TapResult:
        config, result, progress = self.config, self._result, self.progress
        clock = [time.monotonic()]

        # --- GATHERING: who takes part, and what each client has --------------------------------------------------------
        self._gather(grid)
        arrays = result.arrays = self._values.record(self.roster.tensors)
        self._evaluate_globally(evaluate_fn, progress.round, arrays)
        clock.append(time.monotonic())

        # --- STAGE 1: rounds ---------------------------------------------------------------------------------------------
        while progress.round < config.rounds and not self._waited_long_enough():
            server_round, began = progress.round + 1, time.monotonic()
            log(INFO, "")
            log(INFO, "[ROUND %s/%s]", server_round, config.rounds)
            self._welcome(grid, server_round)
            arrays = self._values.record(self.roster.tensors)  # a newcomer may have brought tensors
            replies = self._exchange(grid, self.configure_train(server_round, arrays, train_config, grid))
            new_arrays, metrics = self.aggregate_train(server_round, replies)
            result.arrays = arrays if new_arrays is None else new_arrays
            if metrics is not None:
                log(INFO, "\t└──> Aggregated MetricRecord: %s", metrics)
                result.train_metrics_clientapp[server_round] = metrics
            self._complete_round(server_round, result.arrays, began)
            self._evaluate_globally(evaluate_fn, server_round, result.arrays)
        if config.stopping.patience:
            self.roster.tensors |= self._best
            best = {"best": progress.validation.best_round, "validation": progress.validation.best_score}
            self.events.write("best", round=progress.round, **best)
        clock.append(time.monotonic())

        # --- STAGE 2: every client personalises; those that fail, or have gone, are waited for and asked once more -------
        for again in (False, True):
            if again and self.roster.manifests.keys() - self._personalised:
                wait_for_nodes(grid, len(self.roster.manifests), config.start_timeout)
            self._welcome(grid, progress.round)
            arrays = result.arrays = self._values.record(self.roster.tensors)
            if set(self.roster.names) - self._personalised:
                log(INFO, "")
                log(INFO, "[STAGE 2]")
                replies = self._exchange(grid, self.configure_personalise(progress.round, arrays, train_config, grid))
                metrics = self.aggregate_personalise(progress.round, replies)
                if metrics is not None:
                    log(INFO, "\t└──> Aggregated MetricRecord: %s", metrics)
                    result.personalise_metrics_clientapp = metrics
        clock.append(time.monotonic())

        # --- EVALUATION: every client evaluates its models ---------------------------------------------------------------
        log(INFO, "")
        log(INFO, "[EVALUATION]")
        replies = self._exchange(grid, self.configure_evaluate(progress.round, arrays, evaluate_config, grid))
        metrics = self.aggregate_evaluate(progress.round, replies)
        if metrics is not None:
            log(INFO, "\t└──> Aggregated MetricRecord: %s", metrics)
            result.evaluate_metrics_clientapp[progress.round] = metrics
        if not result.clients:
            raise RunError("no client answered the evaluation: start the nodes again, then `--resume`")
        clock.append(time.monotonic())

        phases = zip(("start", "rounds", "distillation", "evaluation"), clock, clock[1:], strict=False)
        seconds = {name: end - began for name, began, end in phases} | {"total": clock[-1] - clock[0]}
        collect(result, config, progress, self.roster, self.privacy, seconds)
        write_json(self.run_folder / RESULTS, result.summary)
        private = {key: result.summary[key] for key in ("privacy",) if key in result.summary}
        self.events.write("end", round=progress.round, seconds=seconds["total"], tasks=result.tasks, **private)
        return result

    # --- Flower's five methods, and the pair of stage 2 ------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Samples the clients of a round; each gets the tensors of its own components."""
        del grid  # the roster knows who is there
        count = self.config.clients_per_round
        if self.fraction_train is not None:
            count = max(int(len(self.roster.names) * self.fraction_train), self.min_train_nodes)
        sampled = self.roster.sample(server_round, count)
        if not sampled:
            raise RunError(f"round {server_round}: no client is there; start the nodes again, then `--resume`")
        log(INFO, "configure_train: Sampled %s nodes (out of %s)", len(sampled), len(self.roster.names))
        self.events.write("round_start", round=server_round, clients=sampled)
        return self._messages(TRAIN, server_round, arrays, config, sampled)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Adds each difference to the round's sums as it arrives; returns the new values and the aggregated metrics."""
        roster, tell = self.roster, partial(self.events.write, round=server_round)
        average: WeightedAverage | PrivateAverage = (
            WeightedAverage(roster, self._asked, self.config.aggregation.clip_norm, tell)
            if self.privacy is None
            else PrivateAverage(self.privacy, roster, self._asked, tell)
        )
        self._reports = {}

        def add(name: str, content: RecordDict) -> None:
            report = messages.decode(content, Report, f"client {name!r}")
            report.check(roster.manifests[name], server_round)
            average.add(name, messages.tensors_of(content, self.config.wire.encoding))
            self._reports[name] = report
            self._count(self.progress.up, content)

        good = self._used("aggregate_train", server_round, replies, add)
        self._reports = dict(sorted(self._reports.items()))
        return self._values.record(average.finish()), self._aggregated(self.train_metrics_aggr_fn, good)

    def configure_personalise(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Stage 2: asks all clients that are there and have not personalised yet."""
        del grid
        names = sorted(set(self.roster.names) - self._personalised)
        log(INFO, "configure_personalise: Asking %s nodes", len(names))
        self.events.write("distill_start", round=server_round, clients=names)
        return self._messages(PERSONALISE, server_round, arrays, config, names)

    def aggregate_personalise(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Notes who has personalised; returns the aggregated metrics of the fine-tuning."""

        def note(name: str, content: RecordDict) -> None:
            messages.refuse_tensors(content)
            report = messages.decode(content, Report, f"client {name!r}")
            report.check(self.roster.manifests[name], server_round)
            self._count_steps(name, report)
            self._personalised.add(name)
            self.events.write("distilled", round=server_round, client=name, losses=report.losses)

        return self._aggregated(
            self.train_metrics_aggr_fn, self._used("aggregate_personalise", server_round, replies, note)
        )

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Asks all clients that are there."""
        del grid
        log(INFO, "configure_evaluate: Asking %s nodes", len(self.roster.names))
        self.events.write("evaluate_start", round=server_round, clients=self.roster.names)
        return self._messages(EVALUATE, server_round, arrays, config, self.roster.names)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Collects every client's metrics in `TapResult.clients`; returns the aggregated MetricRecords."""

        def keep(name: str, content: RecordDict) -> None:
            messages.refuse_tensors(content)
            found = messages.decode(content, Evaluation, f"client {name!r}")
            found.check(self.roster.manifests[name])
            self._result.clients[name] = found.metrics
            self.events.write("evaluated", round=server_round, client=name, metrics=found.metrics)

        return self._aggregated(
            self.evaluate_metrics_aggr_fn, self._used("aggregate_evaluate", server_round, replies, keep)
        )

    def _aggregated(self, aggregate: Aggregate, contents: list[RecordDict]) -> MetricRecord | None:
        return aggregate(contents, self.weighted_by_key) if contents else None

    # --- the pieces of the loop ------------------------------------------------------------------------------------------

    def _gather(self, grid: StreamingGrid) -> None:
        """Waits for the clients and asks each for its manifest."""
        config, expected = self.config, self.min_available_nodes
        wait_for_nodes(grid, expected, config.start_timeout)
        refused = self._welcome(grid, self.progress.round)
        missing = sorted({spec.name for spec in client_specs(config)} - set(self.roster.names))
        if missing or len(self.roster.names) < expected:
            raise RunError(
                "; ".join(refused)
                or f"{len(self.roster.names)} of {expected} clients are there after {config.start_timeout:g} s"
                + (f", without {', '.join(missing)}" if missing else "")
                + f": start more nodes (`num-supernodes={expected}` in a simulation) or lower clients_per_round"
            )
        self._take_first_values()
        self.events.write(
            "start",
            round=self.progress.round,
            rounds=config.rounds,
            clients={name: sorted(self.roster.manifests[name].reach) for name in self.roster.names},
        )
        if self.privacy is not None:
            self.privacy.announce(self.roster, config.clients_per_round, self.events.write)

    def _take_first_values(self) -> None:
        """Puts `initial_arrays` in the place of the seed's first values, where a run begins."""
        if self.progress.round:
            return
        tensors = self.roster.tensors
        for name in self._initial.keys() & tensors.keys():
            given = torch.from_numpy(self._initial[name].numpy()).float()
            if given.shape != tensors[name].shape:
                raise RunError(
                    f"initial_arrays: {name!r} has shape {tuple(given.shape)}, the clients' tensor "
                    f"{tuple(tensors[name].shape)}: give the values of the clients' own model"
                )
            tensors[name] = given

    def _welcome(self, grid: StreamingGrid, server_round: int) -> list[str]:
        """Admits the nodes that are not known yet; says which of them cannot take part, and why."""
        ask = messages.encode(self._instruction(0))
        return welcome(grid, self.roster, ask, self.config.round_timeout, partial(self._drop, server_round))

    def _messages(
        self, message_type: str, server_round: int, arrays: ArrayRecord, config: ConfigRecord, names: list[str]
    ) -> Iterator[Message]:
        """A message for each client with the tensors of its own components, made when it is sent."""
        config["server-round"] = server_round
        tensors = self._values.tensors(arrays, self.roster.tensors)
        outgoing = Outgoing(self.roster, arrays, tensors, self.config.wire.encoding)
        # Most tensors first: these clients take longest, and where several share a machine its actors then end together.
        for name in sorted(names, key=lambda name: (-len(self.roster.manifests[name].tensors), name)):
            content = messages.encode(self._instruction(server_round), outgoing.arrays_for(name), config=config)
            self._count(self.progress.down, content)
            yield Message(content, self.roster.nodes[name], message_type, group_id=str(server_round))

    def _exchange(self, grid: StreamingGrid, sent: Iterable[Message]) -> Iterator[Message]:
        """Sends messages, notes whom they ask, and returns the replies as they come."""
        self._asked = []

        def noted() -> Iterator[Message]:
            for message in sent:
                self._asked.append(self.roster.name_of(message.metadata.dst_node_id))
                yield message

        replies = grid.send_and_receive(noted(), timeout=self.config.round_timeout)
        first = list(itertools.islice(replies, 1))  # all messages have been sent when the first reply is there
        return itertools.chain(first, replies)

    def _instruction(self, server_round: int) -> Instruction:
        return Instruction(
            run=self.progress.run,
            epochs=tuple(self.progress.epochs),
            round=server_round,
            hyper_parameters=self._hyper_parameters,
            best=self.progress.validation.best_round if self.config.stopping.patience else None,
        )

    def _used(
        self, where: str, server_round: int, replies: Iterable[Message], use: Callable[[str, RecordDict], None]
    ) -> list[RecordDict]:
        """Uses the content of each good reply, as it comes; drops and logs the others.

        Returns:
            The good replies' records without arrays, for an aggregation of metrics.
        """
        good: list[RecordDict] = []
        for reply in replies:
            name = self.roster.name_of(reply.metadata.src_node_id)
            try:
                if reply.has_error():
                    raise MessageError(f"{reply.error.reason} (code {reply.error.code})")
                use(name, reply.content)
                good.append(RecordDict(dict(reply.content.metric_records)))
            except MessageError as error:
                self._drop(server_round, f"client {name!r}", str(error))
        log(INFO, "%s: Received %s results and %s failures", where, len(good), len(self._asked) - len(good))
        return good

    def _drop(self, server_round: int, who: str, problem: str) -> None:
        self.progress.dropped += 1
        warnings.warning("dropped the reply of %s: %s", who, problem)
        self.events.write("dropped", round=server_round, who=who, problem=problem)

    def _complete_round(self, server_round: int, arrays: ArrayRecord, began: float) -> None:
        """Takes the values that `aggregate_train` returned; the round is on disk before the next one's messages leave."""
        roster, progress, reports = self.roster, self.progress, self._reports
        roster.tensors = self._values.tensors(arrays, roster.tensors)
        progress.round = server_round
        for name, report in reports.items():
            self._count_steps(name, report)
            counts = Counter(progress.replacements.get(name, {}))
            counts.update(report.replacements)
            progress.replacements[name] = dict(counts)
        score: dict[str, float] = {}
        if self.config.stopping.patience:
            scores = {name: report.validation for name, report in reports.items()}
            score = {"validation": progress.validation.take(server_round, scores)}
            if progress.validation.best_round == server_round:
                self._best = dict(roster.tensors)
        checkpoint.save(self.run_folder / "server", progress, roster.tensors, self._best)
        self.events.write(
            "round",
            round=server_round,
            clients={name: {"losses": r.losses, "replacements": r.replacements} for name, r in reports.items()},
            dropped=sorted(set(self._asked) - reports.keys()),
            seconds=time.monotonic() - began,
            **score,
            **({} if self.privacy is None else {"epsilon": self.privacy.epsilon}),
        )

    def _waited_long_enough(self) -> bool:
        """Whether the run stops early: `config.stopping.patience` rounds have brought no better validation score."""
        patience = self.config.stopping.patience
        return bool(patience) and self.progress.validation.waited(self.progress.round) >= patience

    def _count(self, total: dict[str, int], content: RecordDict) -> None:
        for tensor, size in messages.payload_bytes(content).items():
            component = self.roster.component_of[tensor]
            total[component] = total.get(component, 0) + size

    def _count_steps(self, name: str, report: Report) -> None:
        self.progress.steps[name] = self.progress.steps.get(name, 0) + report.steps

    def _evaluate_globally(self, evaluate_fn: EvaluateFn | None, server_round: int, arrays: ArrayRecord) -> None:
        """Calls the project's own evaluation on the server."""
        if evaluate_fn is None:
            return
        metrics = evaluate_fn(server_round, arrays)
        log(INFO, "Global evaluation after round %s: %s", server_round, metrics)
        if metrics is not None:
            self._result.evaluate_metrics_serverapp[server_round] = metrics
