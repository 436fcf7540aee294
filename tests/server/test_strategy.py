"""`TapStrategy` as a strategy of Flower's: what a Flower user overrides, passes and reads."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable
from flwr.common.logger import FLOWER_LOGGER
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg, Result, Strategy
from torch import nn

from tap_flower.config import Encoding
from tap_flower.errors import ConfigError, RunError
from tap_flower.report.events import read_events
from tap_flower.server.result import TapResult
from tap_flower.server.strategy import TapStrategy
from tap_flower.wire.messages import CONFIG, TRAIN
from tap_flower.wire.tensors import decode_tensors
from tests.federations import Make, ToyFederation
from tests.grid import InProcessGrid
from tests.toys import TOYS, toy_app


def of(federation: ToyFederation, kind: type[TapStrategy] = TapStrategy, **options: Any) -> TapStrategy:
    return kind(config=federation.strategy().config, run_folder=federation.out, **options)


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """What Flower's logger says at INFO."""
    found: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    handler = Handler(logging.INFO)
    FLOWER_LOGGER.addHandler(handler)
    yield found
    FLOWER_LOGGER.removeHandler(handler)


@pytest.mark.parametrize("name", ["min_train_nodes", "min_available_nodes"])
@pytest.mark.parametrize("count", [-1, 1.5, "2"])
def test_minimums_are_numbers_of_clients(name: str, count: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name} is {count!r}: give a number of clients, from 0 on"):
        TapStrategy(**{name: count})


def test_numbers_may_be_numpys(federation: ToyFederation) -> None:
    strategy = of(federation, min_train_nodes=np.int64(2), fraction_train=np.float32(0.5))
    strategy.start(federation.grid(), num_rounds=np.int64(1), timeout=np.float32(60.0))  # type: ignore[arg-type]
    assert [e["round"] for e in read_events(federation.out) if e["event"] == "round"] == [1]


@pytest.mark.parametrize("share", [5.0, -0.5, 0.0, "0.5"])
def test_a_fraction_is_a_share_of_the_clients(share: Any) -> None:
    with pytest.raises(
        ConfigError, match=f"fraction_train is {share!r}: give a share of the clients above 0, at most 1"
    ):
        TapStrategy(fraction_train=share)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"num_rounds": -3}, "num_rounds is -3: give a number of rounds, or 0 for stage 2 alone"),
        ({"num_rounds": 2.5}, "num_rounds is 2.5: give a number of rounds"),
        ({"timeout": -5.0}, "timeout is -5.0: give seconds, more than 0"),
        ({"timeout": "10"}, "timeout is '10': give seconds"),
        ({"initial_arrays": [np.zeros(3)]}, r"initial_arrays is a list: give an ArrayRecord with names, such as"),
        ({"initial_arrays": nn.Linear(2, 2).state_dict()}, r"initial_arrays is a OrderedDict: give an ArrayRecord"),
    ],
)
def test_what_a_run_is_started_with_is_checked(federation: ToyFederation, given: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        of(federation).start(federation.grid(), **given)


def test_a_configuration_is_one_that_was_loaded() -> None:
    with pytest.raises(
        ConfigError, match=r"config is a dict: give what load_config\(preset, config, settings\) returns"
    ):
        TapStrategy(config={"rounds": 3})  # type: ignore[arg-type]


def test_a_strategy_that_wraps_it_is_told(federation: ToyFederation) -> None:
    wrapping = DifferentialPrivacyServerSideFixedClipping(of(federation), 0.1, 1.0, 2)
    with pytest.raises(RunError, match="another strategy cannot wrap it .* set privacy.epsilon"):
        wrapping.start(federation.grid(), ArrayRecord({"w": Array(np.ones(1))}), num_rounds=1)


def test_a_weight_of_ones_own_is_of_metrics_alone(lines: list[str]) -> None:
    TapStrategy(weighted_by_key="rows")
    assert "weighted_by_key = 'rows' weights metrics; arrays are weighted by examples" in lines


def test_it_is_a_strategy_with_flowers_names() -> None:
    strategy = TapStrategy(fraction_train=0.5, min_train_nodes=3, min_available_nodes=4, method="fedavg")
    assert isinstance(strategy, Strategy)
    assert strategy.config.method == "fedavg"
    named = inspect.signature(TapStrategy.__init__).parameters
    flowers = inspect.signature(FedAvg.__init__).parameters
    shared = {"fraction_train", "min_train_nodes", "min_available_nodes", "weighted_by_key", "train_metrics_aggr_fn"}
    assert shared <= named.keys() & flowers.keys()
    ours, theirs = (list(inspect.signature(kind.start).parameters) for kind in (TapStrategy, Strategy))
    assert ours == theirs
    for hook in ("configure_train", "aggregate_train", "configure_evaluate", "aggregate_evaluate", "summary"):
        assert list(inspect.signature(getattr(TapStrategy, hook)).parameters) == list(
            inspect.signature(getattr(Strategy, hook)).parameters
        )


def test_a_subclass_chooses_who_trains(federation: ToyFederation) -> None:
    class OnlyCleo(TapStrategy):
        def configure_train(self, *args: Any) -> Iterable[Message]:
            cleo = self.roster.nodes["cleo"]
            return (message for message in super().configure_train(*args) if message.metadata.dst_node_id == cleo)

    strategy = of(federation, OnlyCleo)
    result = strategy.start(federation.grid())
    rounds = [e for e in read_events(federation.out) if e["event"] == "round"]
    assert [list(e["clients"]) for e in rounds] == [["cleo"], ["cleo"]]
    assert [e["dropped"] for e in rounds] == [[], []]  # nobody else was asked
    assert strategy.progress.dropped == {}
    assert set(result.clients) == {"ann", "bob", "cleo", "dan"}


def twice(messages: Iterable[Message]) -> Iterable[Message]:
    for message in messages:
        yield message
        yield Message(message.content, message.metadata.dst_node_id, message.metadata.message_type)


def elsewhere(messages: Iterable[Message]) -> Iterable[Message]:
    for message in messages:
        yield Message(message.content, 7, message.metadata.message_type)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (twice, r"two train messages are for client '\w+', which would count twice: send each client one"),
        (elsewhere, "a train message is for node 7, on which no client is: take nodes from `self.roster.nodes`"),
    ],
)
def test_messages_of_a_subclass_are_one_for_each_client(
    federation: ToyFederation, change: Callable[[Iterable[Message]], Iterable[Message]], problem: str
) -> None:
    class Changed(TapStrategy):
        def configure_train(self, *args: Any) -> Iterable[Message]:
            return change(super().configure_train(*args))

    with pytest.raises(RunError, match=problem):
        of(federation, Changed).start(federation.grid())


def test_every_client_may_get_a_configuration_of_its_own(federation: ToyFederation) -> None:
    class Slower(TapStrategy):
        def configure_train(self, *args: Any) -> Iterable[Message]:
            for number, message in enumerate(list(super().configure_train(*args))):
                message.content[CONFIG]["lr"] = float(number)
                yield message

    given, grid = ConfigRecord({"lr": 9.0}), federation.grid()
    of(federation, Slower).start(grid, num_rounds=1, train_config=given)
    rates = [dict(m.content[CONFIG]) for m in grid.sent if m.metadata.message_type == TRAIN]
    assert rates == [{"lr": float(number), "server-round": 1} for number in range(4)]
    assert dict(given) == {"lr": 9.0}


def test_arrays_of_a_subclass_are_a_record(federation: ToyFederation) -> None:
    class Plain(TapStrategy):
        def aggregate_train(self, *args: Any) -> Any:
            arrays, metrics = super().aggregate_train(*args)
            assert arrays is not None
            return arrays.to_torch_state_dict(), metrics

    with pytest.raises(RunError, match="the strategy's arrays are a .*Dict: return an ArrayRecord"):
        of(federation, Plain).start(federation.grid())


def test_a_subclass_adds_a_metric_and_changes_the_values(federation: ToyFederation) -> None:
    class Zeroed(TapStrategy):
        def aggregate_train(
            self, server_round: int, replies: Iterable[Message]
        ) -> tuple[ArrayRecord | None, MetricRecord | None]:
            arrays, metrics = super().aggregate_train(server_round, replies)
            assert arrays is not None
            assert metrics is not None
            metrics["seen"] = server_round
            state = arrays.to_torch_state_dict()
            state["trunk.0.weight"].zero_()
            return ArrayRecord(state), metrics

    grid = federation.grid()
    result = of(federation, Zeroed).start(grid)
    assert [metrics["seen"] for metrics in result.train_metrics_clientapp.values()] == [1, 2]
    assert not result.arrays.to_torch_state_dict()["trunk.0.weight"].any()
    second = [m for m in grid.sent if m.metadata.message_type == TRAIN and m.metadata.group_id == "2"]
    assert len(second) == 4
    for message in second:
        assert not decode_tensors(message.content.array_records["arrays"], Encoding.float32)["trunk.0.weight"].any()


def test_what_a_flower_user_reads_of_a_result(federation: ToyFederation, lines: list[str]) -> None:
    calls: list[tuple[int, float]] = []

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        calls.append((server_round, float(arrays.to_torch_state_dict()["trunk.0.weight"].sum())))
        return MetricRecord({"sum": calls[-1][1]})

    result = of(federation).start(federation.grid(), evaluate_fn=evaluate)
    assert isinstance(result, Result)
    assert isinstance(result, TapResult)
    assert [server_round for server_round, _ in calls] == [0, 1, 2]  # before the first round, and after each
    assert len({value for _, value in calls}) == 3
    assert {r: m["sum"] for r, m in result.evaluate_metrics_serverapp.items()} == dict(calls)
    assert result.train_metrics_clientapp.keys() == {1, 2}
    assert all(isinstance(metrics, MetricRecord) for metrics in result.train_metrics_clientapp.values())
    losses = next(e["clients"] for e in read_events(federation.out) if e["event"] == "round")
    examples = {"ann": 16, "bob": 20, "cleo": 8, "dan": 10}
    means = {name: sum(c["losses"].values()) / len(c["losses"]) for name, c in losses.items()}
    mean = sum(examples[name] * loss for name, loss in means.items()) / sum(examples.values())
    assert result.train_metrics_clientapp[1]["train-loss"] == pytest.approx(mean)
    assert 0 < float(str(result.evaluate_metrics_clientapp[2]["score"])) < 1
    state = result.arrays.to_torch_state_dict()
    net = TOYS[3].net()
    own = {name: state[name] for name in net.state_dict()}
    net.load_state_dict(own)
    assert result.clients["cleo"]["answers"].keys() == {"server", "personal", "server+finetune", "tap"}
    assert result.missing == {}
    text = "\n".join(lines)
    for said in ("Starting TapStrategy strategy:", "[ROUND 1/2]", "configure_train: Sampled 4 nodes (out of 4)",
                 "aggregate_train: Received 4 results and 0 failures", "Aggregated MetricRecord", "[STAGE 2]",
                 "Final results:", "Aggregated ClientApp-side Train Metrics"):  # fmt: skip
        assert said in text


@pytest.mark.parametrize(("fraction", "fewest", "sampled"), [(0.5, 1, 2), (0.1, 3, 3), (0.1, None, 2), (1.0, 2, 4)])
def test_fractions_and_minimums_are_flowers(
    federation: ToyFederation, fraction: float, fewest: int | None, sampled: int
) -> None:
    strategy = of(federation, fraction_train=fraction, min_train_nodes=fewest)
    strategy.start(federation.grid(), num_rounds=1)
    (event,) = [e for e in read_events(federation.out) if e["event"] == "round_start"]
    assert len(event["clients"]) == sampled
    assert strategy.progress.round == 1


def test_a_share_of_nobody_is_told(federation: ToyFederation) -> None:
    with pytest.raises(RunError, match="round 1: fraction_train = 0.1 of 4 clients is none, and min_train_nodes is 0"):
        of(federation, fraction_train=0.1, min_train_nodes=0).start(federation.grid())


def test_a_round_is_not_smaller_than_its_minimum(federation: ToyFederation) -> None:
    with pytest.raises(RunError, match="4 of 9 clients are there"):
        of(federation, min_train_nodes=9).start(federation.grid(), num_rounds=1)


@pytest.mark.parametrize(("fewest", "sampled"), [(None, 1), (3, 3)])
def test_a_minimum_counts_beside_the_configurations_number(
    make_federation: Make, fewest: int | None, sampled: int
) -> None:
    federation = make_federation(TOYS, "clients_per_round=1")
    of(federation, min_train_nodes=fewest).start(federation.grid(), num_rounds=1)
    (event,) = [e for e in read_events(federation.out) if e["event"] == "round_start"]
    assert len(event["clients"]) == sampled


def test_a_run_waits_for_the_nodes_that_must_be_there(federation: ToyFederation) -> None:
    with pytest.raises(
        RunError, match="4 of 5 clients are there after 1 s: start more nodes .*, or lower min_available_"
    ):
        of(federation, min_available_nodes=5).start(federation.grid())


def test_initial_arrays_are_where_a_run_begins(make_federation: Make) -> None:
    federation = make_federation(TOYS[3:])
    net = TOYS[3].net()
    arrays = ArrayRecord({**net.state_dict(), "frozen.weight": torch.full((2,), 7.0)})
    seen: list[ArrayRecord] = []
    result = of(federation).start(
        federation.grid(), initial_arrays=arrays, num_rounds=1, evaluate_fn=lambda _, found: seen.append(found)
    )
    first = seen[0].to_torch_state_dict()
    assert all(torch.equal(first[name], value) for name, value in net.state_dict().items())
    assert not torch.equal(result.arrays.to_torch_state_dict()["trunk.0.weight"], net.state_dict()["trunk.0.weight"])
    assert result.arrays.to_torch_state_dict()["frozen.weight"].tolist() == [7.0, 7.0]  # no client exchanges it


def test_initial_arrays_of_another_shape_are_refused(make_federation: Make) -> None:
    federation = make_federation(TOYS[3:])
    with pytest.raises(
        RunError, match=r"initial_arrays: 'trunk.0.bias' has shape \(9,\), the tensor of client 'dan' \(6,\)"
    ):
        of(federation).start(federation.grid(), initial_arrays=ArrayRecord({"trunk.0.bias": torch.zeros(9)}))


@pytest.mark.parametrize(
    ("arrays", "problem"),
    [
        ({"trunk.0.bias": torch.full((6,), 0.1, dtype=torch.float64)}, "'trunk.0.bias' is torch.float64"),
        ({"trunk.0.bias": torch.full((6,), math.nan)}, "'trunk.0.bias' is torch.float32, or holds a value that is not"),
        (
            {"module.trunk.0.bias": torch.zeros(6)},
            "is a tensor of any client: it has 'module.trunk.0.bias', the clients have",
        ),
    ],
    ids=["dtype", "nan", "names"],
)
def test_initial_arrays_that_would_be_changed_or_dropped_are_refused(
    make_federation: Make, arrays: dict[str, torch.Tensor], problem: str
) -> None:
    federation = make_federation(TOYS[3:])
    with pytest.raises(RunError, match=f"initial_arrays:? {problem}"):
        of(federation).start(federation.grid(), initial_arrays=ArrayRecord(arrays))


def test_configurations_and_mods_reach_the_clients(make_federation: Make) -> None:
    federation = make_federation(TOYS[3:], "rounds=1")
    seen: list[tuple[str, dict[str, Any]]] = []

    def mod(message: Message, context: Any, call_next: ClientAppCallable) -> Message:
        config = message.content.config_records.get(CONFIG)
        seen.append((message.metadata.message_type, {} if config is None else dict(config)))
        return call_next(message, context)

    inner = toy_app(federation.toys, federation.out / "clients")
    app = ClientApp(mods=[mod])
    for register in (app.query("manifest"), app.query("values"), app.train(), app.train("personalise"), app.evaluate()):
        register(inner)
    of(federation).start(
        InProcessGrid([{"partition-id": 0}], {}, app),
        train_config=ConfigRecord({"lr": 0.5}),
        evaluate_config=ConfigRecord({"deep": True}),
    )
    assert seen == [
        ("query.manifest", {"lr": 0.5, "server-round": 0}),
        ("query.values", {"lr": 0.5, "server-round": 0}),
        ("train", {"lr": 0.5, "server-round": 1}),
        ("train.personalise", {"lr": 0.5, "server-round": 1}),
        ("evaluate", {"deep": True, "server-round": 1}),
    ]


def pair(*_: object) -> Any:
    """What a function of Flower's earlier strategies returns."""
    return 0.5, {"accuracy": 0.5}


class Paired(TapStrategy):
    aggregate_personalise = pair


@pytest.mark.parametrize(
    ("kind", "options", "given", "where"),
    [
        (TapStrategy, {}, {"evaluate_fn": pair}, "evaluate_fn"),
        (TapStrategy, {"train_metrics_aggr_fn": pair}, {}, "the aggregation of metrics"),
        (Paired, {}, {}, "aggregate_personalise"),
    ],
)
def test_metrics_that_are_no_record_are_refused(
    federation: ToyFederation, kind: type[TapStrategy], options: Any, given: Any, where: str
) -> None:
    with pytest.raises(RunError, match=f"{where} returned a tuple: return a MetricRecord of numbers by name, or None"):
        of(federation, kind, **options).start(federation.grid(), **given)


def test_a_dict_of_numbers_is_a_record(federation: ToyFederation) -> None:
    def plain(*_: object) -> Any:
        return {"accuracy": 0.5}

    result = of(federation).start(federation.grid(), evaluate_fn=plain)
    assert result.evaluate_metrics_serverapp[0] == MetricRecord({"accuracy": 0.5})


def test_metrics_are_aggregated_by_the_functions_that_are_given(federation: ToyFederation) -> None:
    def count(contents: list[RecordDict], key: str) -> MetricRecord:
        assert key == "num-examples"
        found = [int(str(next(iter(content.metric_records.values()))[key])) for content in contents]
        return MetricRecord({"clients": len(contents), "examples": sum(found)})

    result = of(federation, train_metrics_aggr_fn=count, evaluate_metrics_aggr_fn=count).start(federation.grid())
    assert dict(result.train_metrics_clientapp[1]) == {"clients": 4, "examples": 16 + 20 + 8 + 10}
    assert dict(result.evaluate_metrics_clientapp[2]) == {"clients": 4, "examples": 10 + 20 + 10 + 10}
    assert result.personalise_metrics_clientapp[2]["clients"] == 4
