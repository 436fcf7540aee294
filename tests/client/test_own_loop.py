"""The project's own loop and evaluation in a federation."""

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
from flwr.app import ConfigRecord
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from tap_flower import IMAGE_CLASSIFICATION, Client, TapClientApp, TapStrategy, Task, TaskKind, load_config
from tap_flower.config import HyperParameters
from tap_flower.errors import ClientError, RunError
from tap_flower.run.in_process import InProcessGrid
from tests.small_projects import FEW, Loop, Net, Normed, loader, run, session, task


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
        (broken, Net, r"task 'digits': unexpected KeyError at test_own_loop.py:\d+"),
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


class Shifting(Net):
    """Changes its input in place, which a frozen layer does not notice."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.add_(1))


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
        (Shifting, IMAGE_CLASSIFICATION, "the module changes '0' of its batch, which a second model"),
        (
            Net,
            replace(IMAGE_CLASSIFICATION, name="own", divergences=by_target),
            r"the divergences of kind 'own', whose target is None with `fit`, raised TypeError: test_own_loop.py:\d+",
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


def test_a_loop_that_trains_a_copy_is_refused_or_takes_its_values_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def trains_a_copy(net: nn.Module, data: DataLoader[Any], config: Mapping[str, Any]) -> nn.Module:
        Loop().fit(copied := deepcopy(net), data, config)
        return copied

    def takes_over(net: nn.Module, data: DataLoader[Any], config: Mapping[str, Any]) -> None:
        net.load_state_dict(trains_a_copy(net, data, config).state_dict())

    words = "changed no tensor of the model that it was called with"
    with pytest.raises(
        RunError,
        match=f"client 'c0': task 'digits': `fit` has {words}: its optimiser has the parameters of another one",
    ):
        run(tmp_path, lambda _: Loop().task(fit=lambda *given: trains_a_copy(*given) and None), "method=fedavg")
    caplog.clear()
    run(tmp_path / "good", lambda _: Loop().task(fit=takes_over), "method=fedavg")
    assert words not in caplog.text
    run(tmp_path / "still", lambda _: Loop().task(), "method=fedavg", rate=0.0)
    assert f"client 'c0': task 'digits': `fit` has {words}: train that one, with a learning rate" in caplog.text


def test_an_optimiser_that_is_kept_over_the_calls_of_a_loop_is_refused(tmp_path: Path) -> None:
    """It trains the copy of its first call, in which the trial sees nothing wrong."""
    kept: list[torch.optim.Optimizer] = []

    def fit(net: nn.Module, data: DataLoader[Any], config: Mapping[str, Any]) -> None:
        kept[:] = kept or [torch.optim.SGD(net.parameters(), lr=config["lr"], momentum=0.9)]
        for x, y in data:
            kept[0].zero_grad()
            F.cross_entropy(net(x), y).backward()
            kept[0].step()

    with pytest.raises(RunError, match="has the parameters of another one; make the optimiser in each call, from"):
        run(tmp_path, lambda _: Loop().task(fit=fit), nodes=1)


def test_what_a_loop_does_to_its_config_is_gone_at_its_next_call(tmp_path: Path) -> None:
    """Server copy, personal model, teacher and student have the rate that the server has sent."""
    loop = Loop()

    def fit(net: nn.Module, data: DataLoader[Any], config: dict[str, Any]) -> Any:
        config["lr"] /= 2
        return loop.fit(net, data, {"lr": config.pop("lr")})

    run(tmp_path, lambda _: loop.task(fit=fit), nodes=1, rate=0.5)
    assert loop.rates == [0.25] * 5


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


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (0.5, "`score` returned a float: return numbers by name"),
        ({"loss": 1.0}, "`score` returned loss, and the kind 'image_classification' is judged by 'accuracy'"),
        ({"loss": 1.0, "accuracy": 87.5}, "`score` returned accuracy = 87.5, .* return the share, not a percentage"),
        (
            dict.fromkeys(["accuracy", "loss", *map(str, range(99))], 0.5),
            "`score` returned 101 numbers, and at most 100",
        ),
        ({"accuracy": 1.0}, "`score` returned no 'loss', and replacement.evidence = validation compares it"),
    ],
)
def test_an_evaluation_that_cannot_be_used_is_refused_before_the_first_round(
    tmp_path: Path, returned: Any, words: str
) -> None:
    with pytest.raises(RunError, match=words):
        run(tmp_path, lambda _: Loop().task(score=lambda net, data: returned))


def test_a_forward_beside_a_loop_may_use_its_batch_up() -> None:
    uses = {"forward": lambda net, batch: net(batch.pop(0)), "target": lambda batch: batch[1]}
    assert session(Loop().task(**uses)).outline.component_map.reach


def test_own_loops_for_some_tasks_only_are_refused() -> None:
    other = replace(task(), name="others")
    with pytest.raises(ClientError, match="task 'digits' has `fit` and task 'others' has not: give it to all tasks"):
        Client("ann", Net, [Loop().task(), other]).session(HyperParameters())
