"""Methods that other packages bring, and what a method may do on the server."""

from __future__ import annotations

import importlib
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tap_flower import IMAGE_CLASSIFICATION, Client, TapClientApp, TapResult, TapStrategy, Task, load_config
from tap_flower.config import Encoding
from tap_flower.core.components import State
from tap_flower.errors import ConfigError, RunError
from tap_flower.methods import fedavg
from tap_flower.methods.method import Method, SecondStage, ServerHalf
from tap_flower.methods.registry import METHODS, find_method, installed
from tap_flower.run.in_process import InProcessGrid
from tap_flower.wire import messages
from tests.docs_blocks import ROOT, blocks
from tests.toys import pixels

Write = Callable[[Mapping[str, str], str], None]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """(entry points, code of the module `more_methods`) installs a package, as `pip install --target` would lay it out."""
    site = tmp_path / "site"

    def install(points: Mapping[str, str], code: str) -> None:
        info = site / "more_methods-1.0.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: more-methods\nVersion: 1.0.0\n")
        lines = [f"{name} = {place}" for name, place in points.items()]
        (info / "entry_points.txt").write_text("\n".join(["[tap_flower.methods]", *lines, ""]))
        (site / "more_methods.py").write_text(code)
        monkeypatch.syspath_prepend(str(site))
        importlib.invalidate_caches()
        installed.cache_clear()

    yield install
    installed.cache_clear()
    sys.modules.pop("more_methods", None)


class Low(nn.Module):
    """A frozen layer with a LoRA pair beside it, and a head."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():  # two runs are compared
            torch.manual_seed(0)
            self.frozen = nn.Linear(4, 4).requires_grad_(False)
            self.lora_A, self.lora_B = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)
            self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.frozen(x) + self.lora_B(self.lora_A(x))))


Differences = dict[tuple[int, int], dict[str, Tensor]]
"""(round, node) -> difference that it returned."""


def run(folder: Path, method: str, rounds: int = 2, **options: Any) -> tuple[TapResult, Differences]:
    app, returned = TapClientApp(), Differences()

    @app.client()
    def make(context: Context) -> Client:
        number = int(context.node_config["partition-id"])
        task = Task(
            "digits",
            IMAGE_CLASSIFICATION,
            ["image"],
            DataLoader(pixels(16, number), batch_size=8),
            pixels(8, 9),
            forward=lambda net, batch: net(batch[0]),
            target=lambda batch: batch[1],
        )
        return Client(f"c{number}", Low, [task], state_dir=folder / "state")

    def watch(asked: Any, reply: Any) -> Any:
        if asked.metadata.message_type == messages.TRAIN:
            key = int(asked.metadata.group_id), asked.metadata.dst_node_id
            returned[key] = messages.tensors_of(reply.content, Encoding.float32)
        return reply

    grid = InProcessGrid(app, [{"partition-id": i} for i in range(3)], {}, tamper=watch)
    settings = ["clients_per_round=3", "train.steps=2", "distill.iterations=2", f"rounds={rounds}", f"method={method}"]
    strategy = TapStrategy(config=load_config("plug-in", settings=settings), run_folder=folder / "run", **options)
    return strategy.start(grid), returned


def mean(returned: Differences, server_round: int, name: str) -> Tensor:
    """All clients have as many examples."""
    found = [tensors[name].double() for (number, _), tensors in returned.items() if number == server_round]
    return torch.stack(found).mean(0)


def the_pages() -> tuple[dict[str, str], str]:
    """The package of docs/add-a-method.md: its entry points, and its module."""
    found = {block.language: block.text for block in blocks(ROOT / "docs" / "add-a-method.md")}
    return tomllib.loads(found["toml"])["project"]["entry-points"]["tap_flower.methods"], found["python"]


def test_the_pages_package_brings_two_methods(tmp_path: Path, write: Write) -> None:
    write(*the_pages())
    assert {"fedadam", "fedmedian"} == set(installed())
    result, returned = run(tmp_path / "adam", "fedadam")
    assert set(result.tasks["digits"]) == {"server", "server+finetune"}

    # Adam by hand, from what the clients returned.
    first, _ = run(tmp_path / "none", "fedadam", rounds=1)
    name, m, v, moves = "head.weight", 0.0, 1e-6, []
    for number in (1, 2):
        delta = mean(returned, number, name)
        m, v = 0.9 * m + 0.1 * delta, 0.99 * v + 0.01 * delta.square()  # type: ignore[assignment, operator]
        moves.append(0.01 * m / (v.sqrt() + 1e-3))  # type: ignore[attr-defined]
    values = [found.arrays.to_torch_state_dict()[name].double() for found in (first, result)]
    torch.testing.assert_close(values[1] - values[0], moves[1], atol=1e-6, rtol=1e-4)

    # The median by hand.
    before, _ = run(tmp_path / "before", "fedmedian", rounds=1)
    median, returned = run(tmp_path / "median", "fedmedian")
    found = torch.stack([tensors[name] for (number, _), tensors in returned.items() if number == 2])
    values = [result.arrays.to_torch_state_dict()[name] for result in (before, median)]
    torch.testing.assert_close(values[1] - values[0], found.median(0).values, atol=1e-6, rtol=1e-4)


def test_fedsa_lora_exchanges_a_alone_of_a_module_of_ones_own(tmp_path: Path) -> None:
    result, returned = run(tmp_path, "fedsa-lora")
    assert all(set(tensors) == {"lora_A.weight"} for tensors in returned.values())
    assert {"personal", "fedsa-lora"} == set(result.tasks["digits"])


def test_what_a_server_keeps_is_in_its_checkpoint(tmp_path: Path, write: Write) -> None:
    write(*the_pages())
    whole, _ = run(tmp_path / "whole", "fedadam", rounds=3)

    class Cut(TapStrategy):
        def configure_train(self, server_round: int, *others: Any) -> Any:
            if server_round == 3:
                raise KeyboardInterrupt
            return super().configure_train(server_round, *others)

    folder = tmp_path / "cut"
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(run.__globals__, "TapStrategy", Cut)
        with pytest.raises(KeyboardInterrupt):
            run(folder, "fedadam", rounds=3)
    resumed, _ = run(folder, "fedadam", rounds=3, resume=True)
    for name, value in whole.arrays.to_torch_state_dict().items():
        assert resumed.arrays.to_torch_state_dict()[name].equal(value), name


def test_a_server_half_and_differential_privacy_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = ServerHalf(step=lambda means, memory, server_round: (means, memory))
    monkeypatch.setitem(METHODS, "stepping", replace(fedavg.FEDAVG, name="stepping", server=half))
    config = load_config("plug-in", settings=["method=stepping", "privacy.epsilon=4"])
    with pytest.raises(ConfigError, match="method=stepping has a server half, and privacy.epsilon = 4 covers the mean"):
        TapStrategy(config=config, run_folder=tmp_path).start(InProcessGrid(TapClientApp(), [], {}))


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (("mine", "other"), "`second_stage` has made the model 'other', which its `results` do not name"),
        (("early",), "`second_stage` has not made the model 'mine', the last of its `results`"),
    ],
)
def test_a_stage_2_makes_what_the_method_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: tuple[str, ...], words: str
) -> None:
    def second_stage(session: Any, received: State, memory: Any) -> SecondStage:
        return SecondStage(dict.fromkeys(made, received))

    mine = replace(fedavg.METHOD, name="mine", second_stage=second_stage, results=("early", "mine"))
    monkeypatch.setitem(METHODS, "mine", mine)
    with pytest.raises(RunError, match=f"client 'c0': method 'mine': {words}"):
        run(tmp_path, "mine", rounds=1)


@pytest.mark.parametrize(
    ("name", "place", "words"),
    [
        ("late", "more_methods:METHOD", "cannot be loaded: AttributeError: module 'more_methods' has no attribute"),
        ("late", "not_there:METHOD", "cannot be loaded: ModuleNotFoundError: No module named 'not_there'"),
        ("late", "more_methods:TEXT", "is a str: it must be a tap_flower.methods.method.Method of that name"),
        ("late", "more_methods:LOCAL", "is a method named 'local': it must be"),
    ],
)
def test_a_method_that_cannot_be_used_names_its_package(write: Write, name: str, place: str, words: str) -> None:
    write({name: place}, "from tap_flower.methods.local_only import METHOD as LOCAL\nTEXT = 'a'\n")
    with pytest.raises(ConfigError, match=f"method '{name}' of package 'more-methods' .*{words}"):
        find_method(name)


def test_a_name_of_our_own_is_not_taken_over(write: Write) -> None:
    write({"tap": "more_methods:METHOD"}, "")
    assert isinstance(find_method("tap"), Method)
    with pytest.raises(
        ConfigError, match="package 'more-methods' brings method 'tap', as tap-flower does: uninstall one"
    ):
        find_method("tapp")


def test_installed_methods_are_among_those_that_an_error_names(write: Write) -> None:
    write({"late": "more_methods:METHOD"}, "")
    with pytest.raises(
        ConfigError, match=r"unknown method 'lade' \(did you mean 'late'\?\): use one of tap, .*, late, or"
    ):
        find_method("lade")
