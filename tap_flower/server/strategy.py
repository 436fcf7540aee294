"""`TapStrategy`: rounds of stage 1, stage 2 and the evaluation, as a strategy of Flower's."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from logging import INFO, WARNING
from numbers import Integral, Real
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from flwr.serverapp.strategy.strategy_utils import log_strategy_start_info

from tap_flower.config import Config, load_config
from tap_flower.errors import ConfigError, MessageError, RunError
from tap_flower.methods.own_results import NUM_EXAMPLES
from tap_flower.methods.registry import find_method
from tap_flower.report.results import RESULTS
from tap_flower.server import checkpoint
from tap_flower.server.checkpoint import Progress
from tap_flower.server.grid import StreamingGrid
from tap_flower.server.result import TapResult, as_record, mean_metrics, round_in_words, told, weight_of
from tap_flower.server.roster import Roster
from tap_flower.server.server_run import ServerRun
from tap_flower.wire import messages
from tap_flower.wire.messages import EVALUATE, PERSONALISE, TRAIN, Evaluation, Report

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
        fraction_train: share of the clients that train in a round. By default `config.clients_per_round` clients train.
        min_train_nodes: fewest clients that train in a round; by default 2 where `fraction_train` is given, else none.
        min_available_nodes: number of clients that a run waits for at its start, `config.start_timeout` seconds at most. By
            default those that the configuration names, or as many as train in a round.
        weighted_by_key: key of a metric's weight in the clients' MetricRecords; a round drops a reply without a usable
            weight. Arrays are weighted by examples, whatever the key.
        train_metrics_aggr_fn: aggregates the clients' MetricRecords of a round; by default the weighted mean of each metric
            over the clients that have it.
        evaluate_metrics_aggr_fn: aggregates the clients' MetricRecords of the evaluation; by default the same mean.

    Attributes:
        config: the run's configuration.
        run_folder: see the arguments.
    """

    def __init__(
        self,
        *,
        config: Config | None = None,
        run_folder: str | Path | None = None,
        resume: bool = False,
        method: str | None = None,
        fraction_train: float | None = None,
        min_train_nodes: int | None = None,
        min_available_nodes: int | None = None,
        weighted_by_key: str = NUM_EXAMPLES,
        train_metrics_aggr_fn: Aggregate | None = None,
        evaluate_metrics_aggr_fn: Aggregate | None = None,
    ) -> None:
        if config is not None and not isinstance(config, Config):
            raise ConfigError(
                f"config is a {type(config).__name__}: give what load_config(preset, config, settings) returns"
            )
        self.config = load_config("plug-in") if config is None else deepcopy(config)
        if method is not None:
            self.config.method = method
        find_method(self.config.method)
        if fraction_train is not None and not (isinstance(fraction_train, Real) and 0 < fraction_train <= 1):
            raise ConfigError(f"fraction_train is {fraction_train!r}: give a share of the clients above 0, at most 1")
        for name, count in (("min_train_nodes", min_train_nodes), ("min_available_nodes", min_available_nodes)):
            if count is not None and not (isinstance(count, Integral) and count >= 0):
                raise ConfigError(f"{name} is {count!r}: give a number of clients, from 0 on")
        named = time.strftime("%Y%m%d-%H%M%S")
        self.run_folder = Path.home() / "tap-flower-runs" / named if run_folder is None else Path(run_folder)
        self.resume = resume
        self.fraction_train = fraction_train
        by_default = 0 if fraction_train is None else 2
        self.min_train_nodes = by_default if min_train_nodes is None else min_train_nodes
        expected = len(self.config.clients) or self.config.clients_per_round
        expected = expected if min_available_nodes is None else min_available_nodes
        self.min_available_nodes = max(expected, self.min_train_nodes)
        self.weighted_by_key = weighted_by_key
        if weighted_by_key != NUM_EXAMPLES:
            log(WARNING, "weighted_by_key = %r weights metrics; arrays are weighted by examples", weighted_by_key)
        self._run: ServerRun | None = None
        self.train_metrics_aggr_fn = train_metrics_aggr_fn or mean_metrics
        self.evaluate_metrics_aggr_fn = evaluate_metrics_aggr_fn or mean_metrics

    def summary(self) -> None:
        """Logs the settings of the strategy."""
        sampled = (
            f"{max(self.config.clients_per_round, self.min_train_nodes)} clients a round"
            if self.fraction_train is None
            else f"fraction {self.fraction_train:.2f}, at least {self.min_train_nodes}"
        )
        log(INFO, "\t├──> Method: %s", self.config.method)
        log(INFO, "\t├──> Sampling: %s | minimum available: %d", sampled, self.min_available_nodes)
        log(INFO, "\t└──> Run folder: %s", self.run_folder.resolve())

    def round_size(self, clients: int) -> int:
        """How many of so many clients train in a round."""
        count = self.config.clients_per_round if self.fraction_train is None else int(clients * self.fraction_train)
        return min(clients, max(count, self.min_train_nodes))

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
            initial_arrays: first values of tensors by name (float32, finite). Other tensors start from the values the
                clients' own modules were built with; for tap-flower's models, from the run's seed. Names that no client
                exchanges are kept in `TapResult.arrays` as they are. A resumed run goes on with its own values.
            num_rounds: rounds of stage 1; by default `config.rounds`. With 0 all clients begin with stage 2.
            timeout: seconds that a client may take to answer; by default `config.round_timeout`.
            train_config: sent to clients with every round, with stage 2, and with the queries before the first round, whose
                `server-round` is 0.
            evaluate_config: sent to clients with the evaluation.
            evaluate_fn: (round, arrays) -> metrics, called before the first round and after each.

        Raises:
            ConfigError: an argument is of another type or out of bounds; the folder holds another run, or another process
                runs in it; the configuration differs from the one to be resumed; or a tracker or differential privacy
                cannot be had.
            RunError: clients are missing at the start, since they are not there or cannot take part; or none is left.
            StorageError: the run folder cannot be read or written.
        """
        if num_rounds is not None:
            if not isinstance(num_rounds, Integral) or num_rounds < 0:
                raise ConfigError(f"num_rounds is {num_rounds!r}: give a number of rounds, or 0 for stage 2 alone")
            self.config.rounds = int(num_rounds)
        if timeout is not None:
            if not (isinstance(timeout, Real) and timeout > 0):
                raise ConfigError(f"timeout is {timeout!r}: give seconds, more than 0")
            self.config.round_timeout = float(timeout)
        if not isinstance(initial_arrays, ArrayRecord | None):
            raise ConfigError(
                f"initial_arrays is a {type(initial_arrays).__name__}: give an ArrayRecord with names, such as "
                f"ArrayRecord(net.state_dict())"
            )
        train_config = ConfigRecord() if train_config is None else train_config
        evaluate_config = ConfigRecord() if evaluate_config is None else evaluate_config
        with checkpoint.locked(self.run_folder, self.resume):
            self._run = run = ServerRun(
                self.config, self.run_folder, self.resume, initial_arrays, self.round_size, train_config
            )
            log(INFO, "Starting %s strategy:", self.__class__.__name__)
            log_strategy_start_info(self.config.rounds, run.initial_arrays, train_config, evaluate_config)
            self.summary()
            if self.resume:
                log(INFO, "Resuming the run in %s after %d complete rounds", self.run_folder, run.progress.round)
            with run:
                result = self._loop(StreamingGrid(grid), train_config, evaluate_config, evaluate_fn)
        log(INFO, "Results: %s; a page of them: tap-flower report %s", self.run_folder / RESULTS, self.run_folder)
        log(INFO, "Final results:")
        for line in io.StringIO(str(result)):
            log(INFO, "\t%s", line.rstrip("\n"))
        return result

    @property
    def run(self) -> ServerRun:
        """What the server knows of the run; from `start` on.

        Raises:
            RunError: it has not been started.
        """
        if self._run is None:
            raise RunError(
                "the TapStrategy has not been started: call its `start`; another strategy cannot wrap it (for differential "
                "privacy, set privacy.epsilon)"
            )
        return self._run

    @property
    def progress(self) -> Progress:
        """What the run has done so far; from `start` on."""
        return self.run.progress

    @property
    def roster(self) -> Roster:
        """The clients and the server's values; from `start` on."""
        return self.run.roster

    def _loop(
        self,
        grid: StreamingGrid,
        train_config: ConfigRecord,
        evaluate_config: ConfigRecord,
        evaluate_fn: EvaluateFn | None,
    ) -> TapResult:
        run, result = self.run, self.run.result
        clock = [time.monotonic()]

        # --- GATHERING: who takes part, and what each client has --------------------------------------------------------
        run.gather(grid, self.min_available_nodes, self.fraction_train)
        arrays = result.arrays = run.arrays()
        self._evaluate_globally(evaluate_fn, run.progress.round, arrays)
        clock.append(time.monotonic())

        # --- STAGE 1: rounds ---------------------------------------------------------------------------------------------
        while run.progress.round < self.config.rounds and not run.stops_early():
            server_round, began = run.progress.round + 1, time.monotonic()
            log(INFO, "")
            log(INFO, "[ROUND %s/%s]", server_round, self.config.rounds)
            run.attendance.welcome()
            arrays = run.arrays()  # a newcomer may have brought tensors
            replies = run.exchange(grid, self.configure_train(server_round, arrays, train_config, grid))
            new_arrays, metrics = self.aggregate_train(server_round, replies)
            run.check_replies(f"round {server_round}", len(run.reports), len(run.asked))
            result.arrays = arrays if new_arrays is None else new_arrays
            result.train_metrics_clientapp |= _logged(server_round, "aggregate_train", metrics)
            run.complete_round(server_round, result.arrays, began)
            self._evaluate_globally(evaluate_fn, server_round, result.arrays)
        run.end_of_stage_1()
        clock.append(time.monotonic())

        # --- STAGE 2: every client personalises --------------------------------------------------------------------------
        server_round = run.progress.round
        for arrays in self._asked_twice(run.personalised, "STAGE 2"):
            replies = run.exchange(grid, self.configure_personalise(server_round, arrays, train_config, grid))
            metrics = self.aggregate_personalise(server_round, replies)
            result.personalise_metrics_clientapp |= _logged(server_round, "aggregate_personalise", metrics)
        run.check_replies("stage 2", len(run.personalised), len(run.roster.manifests))
        clock.append(time.monotonic())

        # --- EVALUATION: every client evaluates its models ---------------------------------------------------------------
        for arrays in self._asked_twice(result.clients, "EVALUATION"):
            replies = run.exchange(grid, self.configure_evaluate(server_round, arrays, evaluate_config, grid))
            metrics = self.aggregate_evaluate(server_round, replies)
            result.evaluate_metrics_clientapp |= _logged(server_round, "aggregate_evaluate", metrics)
        run.check_replies("the evaluation", len(result.clients), len(run.roster.manifests))
        clock.append(time.monotonic())

        phases = zip(("start", "rounds", "distillation", "evaluation"), clock, clock[1:], strict=False)
        run.write_results({name: end - began for name, began, end in phases} | {"total": clock[-1] - clock[0]})
        return result

    def _asked_twice(self, done: Mapping[str, object], phase: str) -> Iterator[ArrayRecord]:
        """Yields the server's values once for each time that a phase asks its clients.

        Those that have failed, or have gone, are waited for and asked once more.
        """
        run = self.run
        for again in (False, True):
            if again and run.roster.manifests.keys() - done.keys():
                run.attendance.wait_for_known()
            run.attendance.welcome()
            run.result.arrays = run.arrays()
            if run.roster.nodes.keys() - done.keys():
                log(INFO, "")
                log(INFO, "[%s]", phase)
                yield run.result.arrays

    # --- Flower's five methods, and the pair of stage 2 ------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Samples the clients of a round; each gets the tensors of its own components."""
        del grid  # the roster knows who is there
        run = self.run
        sampled = run.roster.sample(server_round, self.round_size(len(run.roster.names)))
        if not sampled:
            why = "no client is there: start the nodes again"
            if run.roster.names:
                why = (
                    f"fraction_train = {self.fraction_train} of {len(run.roster.names)} clients is none, and "
                    f"min_train_nodes is {self.min_train_nodes}: raise one of them"
                )
            raise RunError(f"round {server_round}: {why}")
        log(INFO, "configure_train: Sampled %s nodes (out of %s)", len(sampled), len(run.roster.names))
        log(INFO, "\t├──> %s", told(sampled))
        run.events.write("round_start", round=server_round, clients=sampled)
        return run.messages(TRAIN, server_round, arrays, config, sampled)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Adds each difference to the round's sums as it arrives; returns the new values and the aggregated metrics."""
        run, average = self.run, self.run.average(server_round)
        run.reports = {}

        def add(name: str, content: RecordDict) -> None:
            report = messages.decode(content, Report, "the reply")
            report.check(run.roster.manifests[name], server_round)
            run.attendance.check_state(name, report.state)
            if self.train_metrics_aggr_fn is mean_metrics:
                for record in content.metric_records.values():
                    weight_of(record, self.weighted_by_key)
            average.add(name, messages.tensors_of(content, self.config.wire.encoding))
            run.reports[name] = report
            run.count(run.progress.up, content)

        good = run.use("aggregate_train", server_round, replies, add)
        for line in round_in_words(run.reports):
            log(INFO, "\t├──> %s", line)
        return run.values.record(average.finish()), self._aggregated(self.train_metrics_aggr_fn, good)

    def configure_personalise(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Stage 2: asks all clients that are there and have not personalised yet."""
        del grid
        names = sorted(self.run.roster.nodes.keys() - self.run.personalised.keys())
        log(INFO, "configure_personalise: Asking %s nodes", len(names))
        self.run.events.write("distill_start", round=server_round, clients=names)
        return self.run.messages(PERSONALISE, server_round, arrays, config, names)

    def aggregate_personalise(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Notes who has personalised; returns the aggregated metrics of the fine-tuning."""
        run = self.run

        def note(name: str, content: RecordDict) -> None:
            messages.refuse_tensors(content)
            report = messages.decode(content, Report, "the reply")
            report.check(run.roster.manifests[name], server_round)
            run.attendance.check_state(name, report.state)
            run.count_steps(name, report)
            run.personalised[name] = report.models
            run.events.write("distilled", round=server_round, client=name, losses=report.losses)

        good = run.use("aggregate_personalise", server_round, replies, note)
        return self._aggregated(self.train_metrics_aggr_fn, good)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Asks all clients that are there and have not been evaluated yet."""
        del grid
        names = sorted(self.run.roster.nodes.keys() - self.run.result.clients.keys())
        log(INFO, "configure_evaluate: Asking %s nodes", len(names))
        self.run.events.write("evaluate_start", round=server_round, clients=names)
        return self.run.messages(EVALUATE, server_round, arrays, config, names)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Collects every client's metrics in `TapResult.clients`; returns the aggregated MetricRecords."""
        run = self.run

        def keep(name: str, content: RecordDict) -> None:
            messages.refuse_tensors(content)
            found = messages.decode(content, Evaluation, "the reply")
            found.check(run.roster.manifests[name])
            run.attendance.check_evaluation(name, found, run.personalised.get(name))
            run.result.clients[name] = found.metrics
            run.events.write("evaluated", round=server_round, client=name, metrics=found.metrics)

        good = run.use("aggregate_evaluate", server_round, replies, keep)
        return self._aggregated(self.evaluate_metrics_aggr_fn, good)

    def _aggregated(self, aggregate: Aggregate, contents: list[RecordDict]) -> MetricRecord | None:
        if not contents:
            return None
        try:
            return as_record("the aggregation of metrics", aggregate(contents, self.weighted_by_key))
        except MessageError as error:  # of the default mean: the clients' results do not depend on it
            log(WARNING, "The clients' metrics are not aggregated: %s", error)
            return None

    def _evaluate_globally(self, evaluate_fn: EvaluateFn | None, server_round: int, arrays: ArrayRecord) -> None:
        """Calls the project's own evaluation on the server."""
        if evaluate_fn is None:
            return
        metrics = as_record("evaluate_fn", evaluate_fn(server_round, arrays))
        log(INFO, "Global evaluation after round %s: %s", server_round, metrics)
        if metrics is not None:
            self.run.result.evaluate_metrics_serverapp[server_round] = metrics


def _logged(server_round: int, where: str, metrics: MetricRecord | None) -> dict[int, MetricRecord]:
    """Round -> metrics, as Flower's `Result` keeps them, and as its strategies log them."""
    if (found := as_record(where, metrics)) is None:
        return {}
    log(INFO, "\t└──> Aggregated MetricRecord: %s", found)
    return {server_round: found}
