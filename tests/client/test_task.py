"""What a user says of a task, and the project's own loop and evaluation in a federation."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Context, MetricRecord, RecordDict
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

from tap_flower import IMAGE_CLASSIFICATION, Client, TapClientApp, TapResult, TapStrategy, Task, TaskKind, load_config
from tap_flower.config import HyperParameters
from tap_flower.config.options import Compute, Train
from tap_flower.errors import ClientError, RunError
from tap_flower.run.in_process import InProcessGrid
from tap_flower.server.result import mean_metrics
from tests.toys import pixels

COMPONENTS = {"trunk": "trunk.*", "head/digits": "head.*"}
FEW = ["train.steps=2", "distill.iterations=2", "start_timeout=1"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.trunk(x)))


def loader(count: int = 12, seed: int = 0, size: int = 4, **more: Any) -> DataLoader[Any]:
    return DataLoader(pixels(count, seed), batch_size=size, **more)


def task(train: Any = None, test: Any = None, **more: Any) -> Task:
    forward = {"forward": lambda net, batch: net(batch[0]), "target": lambda batch: batch[1]}
    train, test = loader() if train is None else train, loader(8, 1) if test is None else test
    return Task("digits", IMAGE_CLASSIFICATION, ["image"], train, test, **{**forward, **more})


class Loop:
    """A project's own loop and evaluation, which note what they were given."""

    def __init__(self, returns: Callable[[float], Any] = lambda loss: {"loss": loss, "epochs": 1}) -> None:
        self.returns = returns
        self.rows: list[torch.Tensor] = []
        self.rates: list[float] = []
        self.scored: list[int] = []

    def fit(self, net: nn.Module, data: DataLoader[Any], config: Mapping[str, Any]) -> Any:
        assert type(net) is Net
        self.rates.append(config["lr"])
        optimizer = torch.optim.SGD(net.parameters(), lr=config["lr"])
        losses = []
        for x, y in data:
            self.rows.append(x)
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return self.returns(sum(losses) / len(losses))

    def score(self, net: nn.Module, data: DataLoader[Any]) -> dict[str, float]:
        net.eval()
        losses = [F.cross_entropy(net(x), y).item() for x, y in data]
        right = [(net(x).argmax(1) == y).float().mean().item() for x, y in data]
        self.scored.append(len(losses))
        return {"loss": sum(losses) / len(losses), "accuracy": sum(right) / len(right)}

    def task(self, train: Any = None, **more: Any) -> Task:
        return task(train, **{"forward": None, "target": None, "fit": self.fit, "score": self.score, **more})


def run(
    folder: Path, tasks: Callable[[int], Task], *settings: str, rate: float = 0.05, nodes: int = 2, **node: Any
) -> TapResult:
    app = TapClientApp()

    @app.client()
    def make(context: Context) -> Client:
        number = int(context.node_config["partition-id"])
        return Client(f"c{number}", Net, [tasks(number)], COMPONENTS, state_dir=folder / "state")

    strategy = TapStrategy(
        config=load_config("plug-in", settings=["rounds=1", f"clients_per_round={nodes}", *FEW, *settings]),
        run_folder=folder / "run",
    )
    grid = InProcessGrid(app, [{"partition-id": i, **node} for i in range(nodes)], {})
    return strategy.start(grid, train_config=ConfigRecord({"lr": rate}))


def session(of: Task, name: str = "ann", **settings: Any) -> Any:
    return Client(name, Net, [of]).session(HyperParameters(**settings))


# --- data ------------------------------------------------------------------------------------------------------------


def test_rows_of_a_samplers_other_half_are_never_trained_on() -> None:
    x = torch.arange(20.0).repeat(4, 1).T
    whole = TensorDataset(x, torch.zeros(20, dtype=torch.int64))
    train, test = (DataLoader(whole, 3, sampler=SubsetRandomSampler(range(*ends))) for ends in ((12,), (12, 20)))
    data = session(task(train, test)).data
    seen = {
        split: {
            int(v) for batch in data.batches(split, 64, torch.device("cpu")) for v in batch.inputs["batch"][0][:, 0]
        }
        for split in ("train", "validation", "test")
    }
    assert data.sizes("train") == {"digits": 10}  # a fifth of the sampler's twelve rows is set aside
    assert data.sizes("validation") == {"digits": 2}
    assert seen["test"] == set(range(12, 20))
    assert seen["train"] | seen["validation"] == set(range(12))
    assert not seen["train"] & seen["validation"]


@pytest.mark.parametrize("data", [loader(10), pixels(10, 0)], ids=["loader", "data set"])
def test_validation_is_a_share_or_data_or_none(data: Any) -> None:
    sizes = {share: session(task(data, validation=share)).data.sizes("validation")["digits"] for share in (0.1, 0.5)}
    assert sizes == {0.1: 1, 0.5: 5}
    given = session(task(data, validation=loader(7, 3))).data
    assert (given.sizes("train"), given.sizes("validation")) == ({"digits": 10}, {"digits": 7})
    with pytest.raises(ClientError, match="task 'digits' has validation=None, and the run compares losses of held-out"):
        session(task(data, validation=None))
    with pytest.raises(ClientError, match="task 'digits' has validation 1.5: give a share between 0 and 1"):
        task(data, validation=1.5)
    with pytest.raises(ClientError, match="task 'digits' has batch_size 0: give a whole number from 1 on"):
        task(pixels(4, 0), batch_size=0)


def test_a_batch_size_beside_a_loaders_own_is_refused() -> None:
    with pytest.raises(ClientError, match="has batch_size=2 and a DataLoader, which has its own batch size"):
        session(task(batch_size=2))
    with pytest.raises(ClientError, match="has a DataLoader that yields no batch"):
        session(task(loader(3, drop_last=True)))


def test_a_test_loader_has_its_own_batch_size() -> None:
    data = session(task(test=loader(8, 1, size=5))).data
    assert [len(batch.target) for batch in data.batches("test", 64, torch.device("cpu"))] == [5, 3]


def test_without_test_examples_a_client_is_not_tested_and_the_run_goes_on(tmp_path: Path) -> None:
    result = run(tmp_path, lambda number: task(test=loader(0 if number else 8, 1)))
    assert result.clients["c1"] == {"digits": {}}
    assert result.clients["c0"]["digits"].keys() == {"server", "server+finetune", "personal", "tap"}
    assert result.clients["c0"]["digits"]["tap"].items() <= result.tasks["digits"]["tap"].items()
    assert result.marks == {}


def test_a_run_without_any_test_examples_ends_well(tmp_path: Path) -> None:
    result = run(tmp_path, lambda _: task(test=loader(0, 1)))
    assert (result.tasks, set(result.clients)) == ({}, {"c0", "c1"})


def test_one_example_is_enough_where_none_is_set_aside(tmp_path: Path) -> None:
    with pytest.raises(ClientError, match="task 'digits'.* one row, and one is to be set aside|one training example"):
        session(task(loader(1)))
    result = run(tmp_path, lambda _: task(loader(1), loader(1, 1)), "replacement.evidence=training")
    assert set(result.clients) == {"c0", "c1"}


class Normed(Net):
    """With BatchNorm, which cannot be trained on one vector."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.trunk(x)))


def test_a_last_batch_of_one_works_or_is_refused_at_the_start(tmp_path: Path) -> None:
    nine, held = loader(9), pixels(4, 3)
    assert set(run(tmp_path, lambda _: task(nine, validation=held)).clients) == {"c0", "c1"}
    normed = Client("ann", Normed, [task(nine, validation=held)])
    with pytest.raises(
        ClientError, match="its loader has a batch of one example, .*: give the loader `drop_last=True`"
    ):
        normed.session(HyperParameters())
    Client("ann", Normed, [task(loader(9, drop_last=True), validation=held)]).session(HyperParameters())


# --- the project's own loop -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["tap", "local", "fedavg", "fedavg+finetune", "fedprox", "fedper", "ditto"])
def test_methods_work_with_a_projects_own_loop(tmp_path: Path, method: str) -> None:
    loops = [Loop(), Loop()]
    result = run(tmp_path, lambda number: loops[number].task(), f"method={method}")
    assert set(result.clients) == {"c0", "c1"}
    assert all(loop.rates and set(loop.rates) == {0.05} for loop in loops)  # the learning rate in use is the project's
    steps = result.summary["steps"]["c0"]
    assert steps == len(loops[0].rows) - 2  # one for each batch that the loop took, but for those of its trial
    metrics = result.train_metrics_clientapp[1]
    assert metrics["epochs"] == 1.0
    assert metrics["train-loss"] > 0


@pytest.mark.parametrize("method", ["pfedme", "per-fedavg", "fedrep", "fedala", "apfl", "feddat"])
def test_methods_that_need_our_loop_say_so_by_name(tmp_path: Path, method: str) -> None:
    with pytest.raises(RunError, match=f"task 'digits' has `fit`, and method={method} .*: use another method"):
        run(tmp_path, lambda _: Loop().task(), f"method={method}")


def test_the_same_loop_by_hand_gives_the_server_the_same_values(tmp_path: Path) -> None:
    result = run(tmp_path, lambda _: Loop().task(loader(12, 0)), "method=fedavg", nodes=1)
    session_ = session(Loop().task(), "c0", seed=41)
    net = Net()
    net.load_state_dict(session_.initial_values())
    rows = session_.data.loader("train", "digits")
    Loop().fit(net, rows, {"lr": 0.05})
    for name, value in result.arrays.to_torch_state_dict().items():
        torch.testing.assert_close(value, net.state_dict()[name], atol=1e-6, rtol=1e-6)


def test_the_distillation_of_an_own_loop_moves_the_student(tmp_path: Path) -> None:
    ends = []
    for weight in (0.0, 5.0):
        name = str(weight)
        run(tmp_path / name, lambda _: Loop().task(), f"distill.weight.image_classification={weight}", rate=0.3)
        (file,) = (tmp_path / name / "state" / "c0").rglob("tap.safetensors")
        ends.append(file.read_bytes())
    assert ends[0] != ends[1]


def test_held_out_rows_are_not_in_the_loader_that_fit_gets(tmp_path: Path) -> None:
    loop = Loop()
    run(tmp_path, lambda _: loop.task(loader(10, 0, size=10)), "method=fedavg", nodes=1)
    assert [len(rows) for rows in loop.rows] == [8, 8]  # a trial before the first round, and the round
    assert loop.scored == [1, 2]  # a trial, too; the test loader's own two batches for the server's model


def broken(net: nn.Module, data: DataLoader[Any], config: Mapping[str, Any]) -> float:
    return float(config["rate"])


def by_forward(net: nn.Module, data: DataLoader[Any], config: Mapping[str, Any]) -> None:
    for x, y in data:
        F.cross_entropy(net.forward(x), y).backward()


@pytest.mark.parametrize(
    ("fit", "words"),
    [
        (lambda *_: 0.5, "`fit` has changed no tensor of the model that it was called with"),
        (lambda *_: math.nan, "the training loss of task 'digits' is nan"),
    ],
)
def test_a_loop_that_cannot_have_trained_is_refused(tmp_path: Path, fit: Any, words: str) -> None:
    with pytest.raises(RunError, match=words):
        run(tmp_path, lambda _: Loop().task(fit=fit), "method=fedavg")


@pytest.mark.parametrize(
    ("fit", "net", "words"),
    [
        (broken, Net, r"task 'digits': unexpected KeyError at test_task.py:\d+"),
        (lambda *_: 0.5, Net, "`fit`: it must call the module that it gets"),
        (lambda *_: "low", Net, "task 'digits': `fit` returned"),
        (by_forward, Net, r"as `net\(...\)` and not `net.forward\(...\)`"),
        (
            lambda net, data, _: [net(x) for x, _ in data] and None,
            Normed,
            "task 'digits': its loader has a batch of one example",
        ),
    ],
)
def test_an_error_of_a_loop_comes_before_the_first_round(tmp_path: Path, fit: Any, net: Any, words: str) -> None:
    app = TapClientApp()
    app.client()(
        lambda _: Client("ann", net, [Loop().task(loader(11, 0, size=4), fit=fit)], state_dir=tmp_path / "state")
    )
    settings = ["rounds=1", "clients_per_round=1", "replacement.evidence=validation", *FEW]
    strategy = TapStrategy(config=load_config("plug-in", settings=settings), run_folder=tmp_path / "run")
    with pytest.raises(RunError, match=words):
        strategy.start(InProcessGrid(app, [{}], {}), train_config=ConfigRecord({"lr": 0.1}))
    assert strategy.progress.round == 0


class Two(Net):
    def forward(self, x: torch.Tensor) -> Any:
        latent = torch.relu(self.trunk(x))
        return self.head(latent), latent


def by_target(student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor, temperature: float) -> torch.Tensor:
    return (student - teacher).square().mean(-1) * (target >= 0)


@pytest.mark.parametrize(
    ("net", "kind", "words"),
    [
        (
            Two,
            IMAGE_CLASSIFICATION,
            "the output of the module is a tuple, which .*: return a tensor, or an output with",
        ),
        (
            Net,
            replace(IMAGE_CLASSIFICATION, name="own", divergences=by_target),
            r"the divergences of kind 'own', whose target is None with `fit`, raised TypeError: test_task.py:\d+",
        ),
    ],
)
def test_what_an_own_loop_cannot_distil_is_told_before_the_first_round(
    tmp_path: Path, net: Any, kind: TaskKind, words: str
) -> None:
    def fit(net: nn.Module, data: DataLoader[Any], config: Mapping[str, Any]) -> None:
        for x, y in data:
            output = net(x)
            F.cross_entropy(output[0] if isinstance(output, tuple) else output, y).backward()

    score = {"loss": 1.0, "accuracy": 0.5}
    own = replace(Loop().task(fit=fit, score=lambda *_: score), kind=kind)
    app = TapClientApp()
    app.client()(lambda _: Client("ann", net, [own], state_dir=tmp_path / "state"))
    strategy = TapStrategy(config=load_config("plug-in", settings=["clients_per_round=1", *FEW]), run_folder=tmp_path)
    with pytest.raises(RunError, match=f"task 'digits': {words}"):
        strategy.start(InProcessGrid(app, [{}], {}), train_config=ConfigRecord({"lr": 0.1}))
    assert strategy.progress.round == 0


def test_a_loop_that_trains_another_model_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def trains_a_copy(net: nn.Module, data: DataLoader[Any], config: Mapping[str, Any]) -> None:
        Loop().fit(deepcopy(net), data, config)

    run(tmp_path, lambda _: Loop().task(fit=trains_a_copy), "method=fedavg")
    assert caplog.text.count("client 'c0': `fit` has changed no tensor of the model that it was called with") == 1
    caplog.clear()
    run(tmp_path / "good", lambda _: Loop().task(), "method=fedavg")
    assert "changed no tensor" not in caplog.text


@pytest.mark.parametrize(
    ("returns", "words"),
    [
        (lambda loss: "fine", "`fit` returned loss of type str: return numbers by name"),
        (lambda loss: {"my loss": loss}, "`fit` returned a metric whose name the node's log shows: use letters"),
        (lambda loss: {"train-loss": loss}, "`fit` returned 'train-loss', which the reply has anyway"),
        (lambda loss: float("nan"), "the training loss of task 'digits' is nan"),
    ],
)
def test_what_a_loop_returns_is_checked(
    tmp_path: Path, returns: Callable[[float], Any], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "tap_flower"), suppress(RunError):
        run(tmp_path, lambda _: Loop(returns).task())
    assert words in caplog.text


@pytest.mark.parametrize("returned", [{"loss": "Ann has HIV"}, {"Ann has HIV": 1.0}, "Ann has HIV"])
def test_the_server_is_not_told_what_a_loop_returned(
    tmp_path: Path, returned: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for own in ({"fit": lambda *_: returned}, {"score": lambda *_: returned}):
        with pytest.raises(RunError) as error:
            run(tmp_path / min(own), lambda _, own=own: Loop().task(**own))  # type: ignore[misc]
        assert "HIV" not in str(error.value)
    assert "Ann has HIV" in caplog.text  # on the node


def test_a_method_that_compares_nothing_needs_neither_held_out_examples_nor_a_loss(tmp_path: Path) -> None:
    def silent(_: int) -> Task:
        return Loop(lambda loss: None).task(validation=None)

    assert run(tmp_path / "a", silent, "method=fedavg").clients
    assert run(tmp_path / "b", silent, "method=fedavg", "replacement.evidence=training").clients
    with pytest.raises(RunError, match="has validation=None, and the run compares losses"):
        run(tmp_path / "c", silent, "replacement.enabled=false", "distill.only_better=true")


def test_a_further_metric_that_is_not_finite_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def score(net: nn.Module, data: DataLoader[Any]) -> dict[str, float]:
        return {**Loop().score(net, data), "auc": math.nan}

    found = run(tmp_path, lambda _: Loop().task(score=score), "method=fedavg").clients
    assert found["c0"]["digits"]["server"].keys() == {"loss", "accuracy"}
    assert "task 'digits': auc of the model 'server' is not finite on the test data, and left out" in caplog.text


def test_keep_best_is_true_or_false_and_needs_held_out_examples(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(RunError, match="the log of the node says where"):
        run(tmp_path / "a", lambda _: task(), **{"keep-best": "false"})
    assert "the node's keep-best is 'false': write keep-best=true or keep-best=false" in caplog.text
    run(tmp_path / "b", lambda _: task(), "replacement.evidence=training", **{"keep-best": True})
    assert "keep-best does nothing: no held-out examples say which state is best" in caplog.text


def test_what_is_no_client_is_told(tmp_path: Path) -> None:
    app = TapClientApp()
    app.client()(lambda context: None)  # type: ignore[arg-type, return-value]
    strategy = TapStrategy(config=load_config("plug-in", settings=FEW), run_folder=tmp_path)
    grid = InProcessGrid(app, [{"partition-id": i} for i in range(2)], {})
    with pytest.raises(RunError, match=r"@app.client\(\) decorates returned a NoneType: return a tap_flower.Client"):
        strategy.start(grid)


def test_a_parameter_with_a_default_keeps_it(tmp_path: Path) -> None:
    seen, app = list[Any](), TapClientApp()

    @app.client()
    def make(context: Context, debug: bool = False) -> Client:
        seen.append(debug)
        return Client(f"c{context.node_config['partition-id']}", Net, [task()], COMPONENTS, state_dir=tmp_path)

    config = load_config("plug-in", settings=["rounds=1", *FEW])
    TapStrategy(config=config, run_folder=tmp_path / "run").start(
        InProcessGrid(app, [{"partition-id": i} for i in range(2)], {})
    )
    assert seen == [False, False]


def test_a_loss_that_decides_must_be_returned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "tap_flower"), suppress(RunError):
        run(tmp_path, lambda _: Loop(lambda loss: None).task(), "replacement.evidence=training")
    assert "`fit` returned no loss, and replacement.evidence = training compares it" in caplog.text


def test_a_loop_may_freeze_what_it_does_not_train(tmp_path: Path) -> None:
    """As people do in `train`, of a module that is built anew for every message of Flower's."""

    def fit(net: Any, data: DataLoader[Any], config: Mapping[str, Any]) -> None:
        net.trunk.requires_grad_(False)
        x, y = next(iter(data))
        F.cross_entropy(net(x), y).backward()
        torch.optim.SGD(net.parameters(), lr=config["lr"]).step()

    result = run(tmp_path, lambda _: Loop().task(fit=fit), "rounds=2", "method=fedavg", nodes=1)
    first = session(Loop().task(), "c0", seed=41).initial_values()
    moved = {name for name, value in result.arrays.to_torch_state_dict().items() if not value.equal(first[name])}
    assert moved == {"head.weight", "head.bias"}


def test_a_module_whose_frozen_weights_an_evaluation_has_changed_is_built_anew(tmp_path: Path) -> None:
    """One client merges into what another in its process trains: its replies are refused, the other's are untouched."""

    def frozen() -> Net:
        net = Net()
        net.trunk.requires_grad_(False)
        nn.init.ones_(net.trunk.weight)
        return net

    def merging(net: Any, data: DataLoader[Any]) -> dict[str, float]:
        net.trunk.weight.data += 1
        return {"loss": 0.0, "accuracy": 1.0}

    with pytest.raises(ClientError, match="task 'digits': `score` must leave the module .* 'trunk.weight' has changed"):
        Client("c0", frozen, [Loop().task(score=merging)]).session(HyperParameters())
    other = Client("c1", frozen, [task()]).session(HyperParameters())
    assert dict(other.model().named_parameters())["trunk.weight"].equal(torch.ones(6, 4))


@pytest.mark.parametrize("option", [False, True])
def test_deterministic_algorithms_are_for_training_and_evaluation_alone(option: bool) -> None:
    seen: list[bool] = []

    def noted(net: Any, batch: Any) -> torch.Tensor:
        seen.append(torch.are_deterministic_algorithms_enabled())
        output: torch.Tensor = net(batch[0])
        return output

    def fit(net: Any, data: Any, config: Any) -> float:
        return F.cross_entropy(noted(net, next(iter(data))), next(iter(data))[1]).item()

    def score(net: Any, data: Any) -> dict[str, float]:
        return {"loss": fit(net, data, {}), "accuracy": 0.0}

    for of in (
        task(forward=noted, validation=loader(5, 3)),
        Loop().task(fit=fit, score=score, validation=loader(5, 3)),
    ):
        made = session(of, compute=Compute(deterministic=option), train=Train(steps=1, accumulation=1))
        seen.clear()
        made.train_round(1, None, "server")
        trained = len(seen)
        made.losses(made.model(), "validation")
        assert len(seen) > trained > 0
        assert set(seen) == {option}
        assert not torch.are_deterministic_algorithms_enabled()


def test_an_operation_that_cannot_be_deterministic_is_refused_at_the_start() -> None:
    def puts(net: Any, batch: Any) -> torch.Tensor:
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))
        output: torch.Tensor = net(batch[0])
        return output

    assert session(task(forward=puts)).steps == 0
    with pytest.raises(
        ClientError, match=r"compute.deterministic = true, and torch's put_ \(test_task.py:\d+\) has no"
    ):
        session(task(forward=puts), compute=Compute(deterministic=True))
    assert session(task(), compute=Compute(deterministic=True)).steps == 0


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (0.5, "`score` returned a float: return numbers by name"),
        ({"loss": 1.0}, "`score` returned loss, and the kind 'image_classification' is judged by 'accuracy'"),
        ({"loss": 1.0, "accuracy": 87.5}, "`score` returned accuracy = 87.5, .* return the share, not a percentage"),
        ({"accuracy": 1.0}, "`score` returned no 'loss', and replacement.evidence = validation compares it"),
    ],
)
def test_an_evaluation_that_cannot_be_used_is_refused_before_the_first_round(
    tmp_path: Path, returned: Any, words: str
) -> None:
    with pytest.raises(RunError, match=words):
        run(tmp_path, lambda _: Loop().task(score=lambda net, data: returned))


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: Loop().task(pixels(8, 0)), "has `fit`, and its train data are a TensorDataset: give a DataLoader"),
        (
            lambda: Loop().task(test=pixels(8, 0)),
            "has `score`, and its test data are a TensorDataset: give a DataLoader",
        ),
        (lambda: Loop().task(score=None), "has `fit`, and nothing to evaluate by: give `score`"),
    ],
)
def test_tasks_that_are_refused(made: Callable[[], Task], words: str) -> None:
    with pytest.raises(ClientError, match=f"task 'digits' {words}"):
        session(made())


def test_own_loops_for_some_tasks_only_are_refused() -> None:
    other = replace(task(), name="others")
    with pytest.raises(ClientError, match="task 'digits' has `fit` and task 'others' has not: give it to all tasks"):
        Client("ann", Net, [Loop().task(), other]).session(HyperParameters())


# --- Flower's conveniences --------------------------------------------------------------------------------------------

FLOWERS = {"num-server-rounds": 1, "learning-rate": 0.1, "local-epochs": 2, "batch-size": 4}


def told_of_keys(folder: Path, make_task: Callable[[Any], Task], caplog: pytest.LogCaptureFixture) -> str:
    app = TapClientApp()

    @app.client()
    def make(context: Context) -> Client:
        return Client(f"c{context.node_config['partition-id']}", Net, [make_task(context.run_config)], state_dir=folder)

    config = load_config("plug-in", settings=["rounds=1", *FEW])
    with caplog.at_level(logging.INFO):
        TapStrategy(config=config, run_folder=folder / "run").start(
            InProcessGrid(app, [{"partition-id": i} for i in range(2)], dict(FLOWERS)),
            train_config=ConfigRecord({"lr": 0.1}),
        )
    return caplog.text


def test_keys_of_the_run_config_that_no_client_reads_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told = told_of_keys(tmp_path, lambda run: task(loader(size=run["batch-size"])), caplog)
    assert (
        "no client has read 'learning-rate', 'local-epochs', 'num-server-rounds': what the ServerApp does not" in told
    )


def test_keys_that_a_loop_reads_later_are_not_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loop = Loop()
    assert "no client has read" not in told_of_keys(tmp_path, lambda _: loop.task(), caplog)


def test_the_log_says_who_was_asked_what_came_back_and_where_results_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told = told_of_keys(tmp_path, lambda _: task(), caplog)
    assert "├──> c0, c1" in told
    assert "digits: training loss " in told
    assert "(mean of 2 clients), replaced on 2 of 2 clients" in told
    assert f"Results: {tmp_path / 'run' / 'results.json'}" in told


def test_metrics_are_means_over_the_clients_that_have_them() -> None:
    records = [{"num-examples": 3, "a": 1.0}, {"num-examples": 1, "a": 5.0, "b": 7.0}, {"num-examples": 0, "c": 1.0}]
    found = mean_metrics([RecordDict({"metrics": MetricRecord(record)}) for record in records], "num-examples")
    assert dict(found) == {"a": 2.0, "b": 7.0}


def test_a_kind_by_its_name_is_refused() -> None:
    with pytest.raises(ClientError, match="task 'digits' has kind 'image_classification': give a TaskKind, such as"):
        Task("digits", "image_classification", ["image"], [], [])  # type: ignore[arg-type]
