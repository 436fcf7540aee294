"""The examples: each is run with its own ClientApp and ServerApp, in this process, offline."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from flwr.app import Context, Message, RecordDict
from torch import Tensor
from torch.utils.data import DataLoader

from tap_flower import Client, TapResult, TapStrategy, load_personal
from tap_flower.config import Encoding
from tap_flower.files import read_tensors
from tap_flower.report.html_report import write_report
from tap_flower.run.in_process import InProcessGrid
from tap_flower.run.simulation import CONNECTION, flwr, status_of, superlink
from tap_flower.wire import messages
from tests.docs_blocks import blocks
from tests.hub_checks import check_for_the_hub

EXAMPLES = Path(__file__).parent.parent / "examples"


@dataclass(frozen=True)
class Ran:
    """A run of a project.

    Attributes:
        results: of the run.
        clients: as the project makes them.
        returned: client -> tensor name -> value that it trained to in the last round: what it received, and its difference.
    """

    results: dict[str, Any]
    clients: list[Client]
    returned: Mapping[str, Mapping[str, Tensor]]


@contextmanager
def importing(project: Path, package: str) -> Iterator[None]:
    """A project's own modules can be imported, and are forgotten afterwards."""
    sys.path.insert(0, str(project))
    try:
        yield
    finally:
        sys.path.remove(str(project))
        for name in [name for name in sys.modules if name.split(".")[0] == package]:
            del sys.modules[name]


def named(place: str) -> Any:
    """`module:name`."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def run(project: Path, nodes: int, folder: Path, apps: tuple[str, str, str], rounds: int = 1, **more: Any) -> Ran:
    """Runs a project.

    Args:
        project: its folder.
        nodes: number of clients.
        folder: of the run.
        apps: where its ServerApp, its ClientApp and the function that makes a client are.
        rounds: of all clients.
        more: run configuration.
    """
    run_config = {"num-server-rounds": rounds, "out": str(folder / "run"), **more}
    configs = [{"partition-id": i, "num-partitions": nodes, "state-dir": str(folder / "state")} for i in range(nodes)]
    returned: dict[int, dict[str, Tensor]] = {}

    def watch(instruction: Message, reply: Message) -> Message:
        if instruction.metadata.message_type == messages.TRAIN:
            sent, back = (messages.tensors_of(message.content, Encoding.float32) for message in (instruction, reply))
            returned[instruction.metadata.dst_node_id] = {name: sent[name] + back[name] for name in back}
        return reply

    with importing(project, apps[0].partition(".")[0]):
        server, client, make = map(named, apps)
        grid = InProcessGrid(client, configs, run_config, tamper=watch)
        server(grid, Context(1, 1, {}, RecordDict(), run_config))
        clients = {node: make(context) for node, context in grid.contexts.items()}
    (found,) = folder.rglob("results.json")
    by_name = {clients[node].name: tensors for node, tensors in returned.items()}
    return Ran(json.loads(found.read_text()), list(clients.values()), by_name)


def majority(train: Tensor, test: Tensor) -> float:
    """Accuracy of always giving the class that is most frequent in training."""
    return float((test == train.mode().values).double().mean())


def check_that_it_learned(ran: Ran) -> None:
    """Each client's TAP model is better on its test data than the same answer to everything, by more than luck.

    Models as they start are ahead of that by up to .03.
    """
    for client in ran.clients:
        for task in client.tasks:
            train, test = (
                torch.cat([task.target(batch) for batch in DataLoader(data, batch_size=64)])
                for data in (task.train, task.test)
            )
            found, same = ran.results["clients"][client.name][task.name]["tap"]["accuracy"], majority(train, test)
            assert found > same + 0.1, (client.name, task.name, found, same)


def check_the_average(ran: Ran, folder: Path, tensor: str, reached: dict[str, list[str]]) -> None:
    """A tensor's mean after the last round, over the clients that hold it and no others, by the examples that reached it.

    Args:
        ran: the run.
        folder: of the clients' states.
        tensor: its name.
        reached: client -> its tasks whose forward passes reach the tensor.
    """
    assert {name for name, tensors in ran.returned.items() if tensor in tensors} == reached.keys(), tensor
    # One in five training examples is set aside for validation.
    sizes = {c.name: {task.name: len(task.train) - len(task.train) // 5 for task in c.tasks} for c in ran.clients}
    weights = {name: sum(sizes[name][task] for task in tasks) for name, tasks in reached.items()}
    total = sum(weight * ran.returned[name][tensor].double() for name, weight in weights.items())
    mean = total / sum(weights.values())
    for client in ran.clients:
        (file,) = (folder / client.name).rglob("server.safetensors")
        received, _ = read_tensors(file)
        assert (tensor in received) == (client.name in reached), (tensor, client.name)
        if tensor in received:
            torch.testing.assert_close(received[tensor].double(), mean, atol=1e-6, rtol=1e-6)


@pytest.mark.slow
def test_encoders_of_transformers_under_the_fusion(tmp_path: Path) -> None:
    apps = ("backbones.server_app:app", "backbones.client_app:app", "backbones.client_app:client")
    ran = run(EXAMPLES / "backbones", 2, tmp_path, apps, rounds=3)
    found, clients = ran.results, {"ann": {"digits"}, "bob": {"digits", "languages"}}
    assert {name: set(tasks) for name, tasks in found["clients"].items()} == clients
    assert all({"server", "personal", "tap"} <= models.keys() for models in found["tasks"].values())
    assert {path.parent.parent.name for path in (tmp_path / "state").rglob("tap.safetensors")} == clients.keys()
    check_that_it_learned(ran)
    for tensor, reached in {
        "components.encoder/image.output.proj.weight": {"ann": ["digits"], "bob": ["digits"]},
        "components.mote/block/shared.0.query.A": {"ann": ["digits"], "bob": ["digits", "languages"]},
        "components.encoder/text.output.proj.weight": {"bob": ["languages"]},
    }.items():
        check_the_average(ran, tmp_path / "state", tensor, reached)
    write_report([tmp_path / "run"], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert all(f"{task}: training loss" in page for task in found["tasks"])


STOCK = {
    "quickstart": ("digits", "digits"),
    "resnet": ("digits", "digits"),
    "bert": ("languages", "languages"),
    "vit": ("digits", "digits"),
    "tabular": ("diagnosis", "diagnosis"),
    "vae": ("digits", "digits"),
    "lora": ("names", "names"),
    "modalities": ("digits", "languages"),
}
"""Stock project -> the task of its first client, and of its second."""
HUB = "backbones"
"""The example that can be published on Flower's hub as it is."""
RUN = {"num-server-rounds", "batch-size", "learning-rate", "local-epochs"}
"""Keys of the run configuration that each of them has."""


@dataclass(frozen=True)
class Changed:
    """A stock project that the patch has turned into one of TAP's.

    Attributes:
        name: its name.
        folder: where it lies.
        run_config: of both runs.
    """

    name: str
    folder: Path
    run_config: Mapping[str, Any]

    @property
    def apps(self) -> tuple[str, str, str]:
        """Where its apps are, and what makes a client."""
        return f"{self.name}.tap:server", f"{self.name}.tap:client", f"{self.name}.tap:make_client"


def changed(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Changed:
    """A copy of a stock project, patched; what it writes below the home folder is below `folder / "home"`."""
    project = folder / name
    shutil.copytree(EXAMPLES / name, project)
    subprocess.run(["patch", "-p1", "-i", "tap.diff"], cwd=project, check=True, capture_output=True)
    monkeypatch.setenv("HOME", str(folder / "home"))
    (folder / "home").mkdir()
    run_config = tomllib.loads((project / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"] | {
        "num-server-rounds": 1,
        "batch-size": 16,
    }
    if "checkpoint" in run_config:
        run_config["checkpoint"] = str(folder / "checkpoint")
        with importing(project, name):
            sys.modules.pop("make_checkpoint", None)
            importlib.import_module("make_checkpoint").main(run_config["checkpoint"], steps=60)
    return Changed(name, project, run_config)


@pytest.mark.parametrize("name", STOCK)
def test_a_stock_project_becomes_tap_by_a_diff_of_less_than_30_lines(name: str) -> None:
    patch = (EXAMPLES / name / "tap.diff").read_text()
    lines = [line for line in patch.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    assert len(lines) < 30
    assert f"```diff\n{patch.rstrip()}\n```" in (EXAMPLES / name / "README.md").read_text()
    project = tomllib.loads((EXAMPLES / name / "pyproject.toml").read_text())
    assert project["tool"]["flwr"]["app"]["config"].keys() >= RUN


@pytest.mark.parametrize(
    "project", sorted(path.parent for path in EXAMPLES.glob("*/pyproject.toml")), ids=lambda project: project.name
)
def test_an_example_says_what_it_is(project: Path) -> None:
    assert project.name in {*STOCK, "backbones"}
    assert len(re.findall("^## ", (project / "README.md").read_text(), re.MULTILINE)) == 5
    licence = {"file": "LICENSE"} if project.name == HUB else "Apache-2.0"
    assert tomllib.loads((project / "pyproject.toml").read_text())["project"]["license"] == licence
    assert f"`examples/{project.name}`" in (EXAMPLES.parent / "docs" / "plug-in.md").read_text()


def test_the_app_for_flowers_hub_passes_its_checks(tmp_path: Path) -> None:
    folder = shutil.copytree(EXAMPLES / HUB, tmp_path / HUB, ignore=shutil.ignore_patterns("__pycache__", "runs"))
    check_for_the_hub(folder)
    assert (folder / "LICENSE").read_bytes() == (EXAMPLES.parent / "LICENSE").read_bytes()
    _, front, _ = (folder / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front).keys() == {"tags", "dataset", "framework"}


def rows(batches: Iterable[Any]) -> set[tuple[float, ...]]:
    """The inputs in some batches, each without the zeros that fill it up."""
    found = set()
    for batch in batches:
        inputs = next(iter(batch.values())) if isinstance(batch, Mapping) else batch[0]
        for values in inputs.flatten(1).tolist():
            while values and not values[-1]:
                values.pop()
            found.add(tuple(values))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", STOCK)
def test_a_stock_project_runs_before_and_after_the_patch(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = changed(name, tmp_path, monkeypatch)
    configs = [{"partition-id": i, "num-partitions": 8, "state-dir": str(tmp_path / "state")} for i in range(2)]
    rates: set[float] = set()
    first: list[dict[str, Tensor]] = []
    trained: set[tuple[float, ...]] = set()
    with importing(project.folder, name):
        # As it is: Flower's FedAvg.
        server, client = named(f"{name}.server_app:app"), named(f"{name}.client_app:app")
        server(InProcessGrid(client, configs, dict(project.run_config)), context_of(project))

        # After the patch: what the project's own `train` is called with.
        task = importlib.import_module(f"{name}.task")
        train = task.train

        def noted(net: Any, loader: Any, epochs: int, rate: float) -> float:
            rates.add(rate)
            first.append({key: value.clone() for key, value in net.state_dict().items()})
            trained.update(rows(loader))
            return float(train(net, loader, epochs, rate))

        monkeypatch.setattr(task, "train", noted)
        server, client, make = map(named, project.apps)
        grid = InProcessGrid(client, configs, dict(project.run_config))
        server(grid, context_of(project))
        made = [make(context) for context in grid.contexts.values()]
    (found,) = (tmp_path / "home").rglob("results.json")
    results = json.loads(found.read_text())
    models = {"server", "server+finetune", "personal", "tap"}
    for client, expected in zip(made, STOCK[name], strict=True):
        assert {task: found.keys() for task, found in results["clients"][client.name].items()} == {expected: models}
    assert rates == {project.run_config["learning-rate"]}  # the learning rate in use is the run configuration's
    tasks = [task for client in made for task in client.tasks]
    both = [rows(chain.from_iterable(getattr(task, split) for task in tasks)) for split in ("train", "test")]
    assert trained
    assert trained.isdisjoint(both[1] - both[0])  # two clients may have a row in common
    if "checkpoint" in project.run_config:
        # Training starts from the pretrained values, frozen ones and buffers included: from all that two builds agree on.
        for client in made:
            built, again = client.model().state_dict(), client.model().state_dict()
            start = next(state for state in first if state.keys() == built.keys())
            pretrained = {key for key, value in built.items() if value.equal(again[key])}
            assert {key for key in pretrained if not start[key].equal(built[key])} == set()
            assert pretrained >= {key for key in built if LEARNED[name] in key}
    if name == "quickstart":
        samplers = [(set(task.train.sampler), set(task.test.sampler)) for of in made for task in of.tasks]
        assert all(train and test and not train & test for train, test in samplers)
        (state,) = (tmp_path / "state" / "client-0").rglob("tap.safetensors")
        tensors, _ = read_tensors(state)
        assert not tensors["norm1.running_mean"].equal(torch.zeros(16))  # BatchNorm's statistics are the client's own
    if name == "lora":
        check_the_adapter(made[0], first[0], results, tmp_path / "state")


LEARNED = {"resnet": "", "bert": "", "vit": "", "lora": "lora_B", "modalities": "trunk."}
"""Stock project with a checkpoint -> part of the names of tensors whose first values are known."""


def check_the_adapter(client: Client, start: Mapping[str, Tensor], results: dict[str, Any], states: Path) -> None:
    """LoRA begins at 0 and is all that is trained; a merged personal model is a plain one that does the same."""
    (task,) = client.tasks
    net = load_personal(client.model(), client.name, state_dir=states)
    for key, value in net.state_dict().items():
        assert start[key].count_nonzero() == 0 or "lora_B" not in key
        assert value.equal(start[key]) == ("lora_" not in key), key
    loss = results["clients"][client.name][task.name]["tap"]["loss"]
    for module in (net, net.merge_and_unload()):
        assert task.score(module, task.test)["loss"] == pytest.approx(loss, rel=1e-5)


def context_of(project: Changed) -> Context:
    """Flower's context of the server."""
    return Context(1, 1, {}, RecordDict(), dict(project.run_config))


@pytest.mark.slow
def test_the_changed_quickstart_under_flwr_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = changed("quickstart", tmp_path, monkeypatch).folder
    (tmp_path / "work").mkdir()
    with superlink(tmp_path / "work") as flower:
        said = flwr(
            flower, "run", str(project), CONNECTION, "--run-config", "num-server-rounds=1",
            "--federation-config", "num-supernodes=2 client-resources-num-cpus=1",
        )  # fmt: skip
        while not (status := status_of(flower, said["run-id"])).startswith("finished"):
            time.sleep(2)
        assert status == "finished:completed", flower.log.read_text()
    (found,) = (tmp_path / "home").rglob("results.json")
    assert set(json.loads(found.read_text())["clients"]) == {"client-0", "client-1"}
    # Each client's personal model is on its own node, here in Flower's home.
    assert len(list((tmp_path / "work" / "flwr" / "tap-flower").rglob("tap.safetensors"))) == 2


def test_the_docs_show_that_diff() -> None:
    shown = (EXAMPLES.parent / "docs" / "plug-in.md").read_text()
    assert f"```diff\n{(EXAMPLES / 'quickstart' / 'tap.diff').read_text().rstrip()}\n```" in shown


def test_the_strategy_in_the_docs_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two clients as the page defines them, and its ServerApp with its own kind of `TapStrategy`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    results: list[TapResult] = []
    start = TapStrategy.start

    def noted(*arguments: Any, **options: Any) -> TapResult:
        results.append(start(*arguments, **options))
        return results[-1]

    monkeypatch.setattr(TapStrategy, "start", noted)
    names: dict[str, Any] = {}
    python = [block for block in blocks(EXAMPLES.parent / "docs" / "plug-in.md") if block.language == "python"]
    for begins in ("import torch", "from flwr.app import ArrayRecord"):
        block = next(block for block in python if block.begins == begins or block.text.startswith(begins))
        exec(compile(block.text, str(block), "exec"), names)
    configs = [{"partition-id": i, "state-dir": str(tmp_path / "state")} for i in range(2)]
    names["server"](InProcessGrid(names["app"], configs, {}), Context(1, 1, {}, RecordDict(), {}))
    (result,) = results
    assert set(result.clients) == {"hospital-0", "hospital-1"}
    assert result.train_metrics_clientapp.keys() == {1, 2, 3}
    assert all(metrics["moved"] > 0 for metrics in result.train_metrics_clientapp.values())
    assert result.evaluate_metrics_serverapp.keys() == {0, 1, 2, 3}
    assert names["accuracy"](3, result.arrays) == result.evaluate_metrics_serverapp[3]
