"""First values of users' own modules: kept as they were built, on every client, in every process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakSet

import pytest
import torch
from flwr.app import ArrayRecord, Context, Error, Message, RecordDict
from safetensors.torch import load_file
from torch import Tensor, nn

from tap_flower import Client, TapClientApp, TapResult, TapStrategy, load_config, load_personal
from tap_flower.client import module as modules
from tap_flower.config import Encoding
from tap_flower.errors import RunError, StorageError
from tap_flower.files import write_tensors
from tap_flower.run.in_process import InProcessGrid, Tamper
from tap_flower.server.first_values import FIRST, FirstValues
from tap_flower.server.roster import Roster
from tap_flower.wire import messages
from tap_flower.wire.tensors import encode_tensors
from tests.grid import round_of
from tests.own_clients import digits

SHORT = ["rounds=1", "clients_per_round=2", "train.steps=2", "distill.iterations=2", "start_timeout=1"]
Sent = dict[tuple[str, int], dict[str, Tensor]]


class Normed(nn.Module):
    """A frozen trunk made at random, a norm, a zero head, a counter of its own."""

    scale: Tensor
    seen: Tensor
    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(4, 6).requires_grad_(False)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 3)
        nn.init.zeros_(self.head.weight)
        self.register_buffer("mask", torch.rand(6))  # of zeros and ones, two in 64 would be equal
        self.register_buffer("seen", torch.zeros(()))

    def see(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += len(x)
        return self.head(self.mask + self.norm(self.trunk(x)))


def run(
    folder: Path,
    model: Callable[[int], Callable[[], nn.Module]],
    *settings: str,
    initial: dict[str, Tensor] | None = None,
    nodes: int = 2,
    sent: Sent | None = None,
    tamper: Tamper | None = None,
    resume: bool = False,
    **more: Any,
) -> TapResult:
    """A run of clients c0, c1, …; `model` gives the one's function by its number."""
    app = TapClientApp()

    @app.client()
    def make(context: Context) -> Client:
        number = int(context.node_config["partition-id"])
        return Client(f"c{number}", model(number), [digits(number)], state_dir=folder / "state", **more)

    def watch(instruction: Message, reply: Message) -> Message | None:
        if sent is not None and messages.ARRAYS in instruction.content:
            key = instruction.metadata.message_type, instruction.metadata.dst_node_id - 100
            sent[key] = messages.tensors_of(instruction.content, Encoding.float32)
        return reply if tamper is None else tamper(instruction, reply)

    grid = InProcessGrid(app, [{"partition-id": i} for i in range(nodes)], {}, tamper=watch)
    config = load_config("plug-in", settings=[*SHORT, *settings])
    strategy = TapStrategy(config=config, run_folder=folder / "run", resume=resume)
    return strategy.start(grid, None if initial is None else ArrayRecord(initial))


def fails_in(server_round: int) -> Tamper:
    """All clients fail in a round of stage 1."""

    def fail(instruction: Message, reply: Message) -> Message:
        fails = instruction.metadata.message_type == "train" and round_of(instruction) == server_round
        return Message(Error(0, "no room"), reply_to=instruction) if fails else reply

    return fail


def test_training_starts_from_what_the_first_client_has_built(tmp_path: Path) -> None:
    nets = [Normed(), Normed()]
    sent: Sent = {}
    run(tmp_path, lambda number: lambda: nets[number], sent=sent)
    first = nets[0].state_dict()
    exchanged = {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    for client in (0, 1):
        assert sent["train", client].keys() == exchanged
        assert all(value.equal(first[name]) for name, value in sent["train", client].items())
    # The second client has built other values: it gets the first one's, frozen ones and buffers included.
    assert ("query.values", 0) not in sent
    assert {"trunk.weight", "trunk.bias"} <= sent["query.values", 1].keys()
    (kept,) = (tmp_path / "state" / "c1").glob("*/first.safetensors")
    assert load_file(kept)["trunk.weight"].equal(nets[0].trunk.weight)
    # What the user holds is not touched.
    assert not nets[1].trunk.weight.equal(nets[0].trunk.weight)
    assert int(nets[0].norm.num_batches_tracked) == 0


def test_bytes_of_first_values_are_counted_apart(tmp_path: Path) -> None:
    nets = [Normed(), Normed()]
    nets[1].mask.copy_(nets[0].mask)
    bytes_ = run(tmp_path, lambda number: lambda: nets[number]).bytes
    # The first client sends its norm (6, 6) and its head (18, 3); then its trunk (24, 6), which the second has built
    # otherwise and gets with the bias of the head. The other values of the two are equal. A tensor has a header of 128.
    assert bytes_["first_values"] == {"up": 4 * (33 + 30) + 6 * 128, "down": 4 * (30 + 3) + 3 * 128}
    for way in ("down", "up"):
        of_rounds = sum(component[way] for component in bytes_["per_component"].values())
        assert bytes_[way] == bytes_["first_values"][way] + of_rounds


@pytest.mark.parametrize(
    ("client", "wanted", "change", "problem"),
    [
        (0, True, None, r"node 100 cannot take part: no room \(Flower's error 0\)"),
        (0, True, lambda tensors: tensors["head.weight"].add_(1), "its first values: 'head.weight' is not what the"),
        (1, False, None, r"node 101 cannot take part: no room \(Flower's error 0\)"),
    ],
    ids=["does not give them", "gives others", "does not take them"],
)
def test_a_client_that_fails_at_first_values_is_refused_with_the_reason(
    tmp_path: Path, client: int, wanted: bool, change: Callable[[dict[str, Tensor]], Any] | None, problem: str
) -> None:
    nets = [Normed(), Normed()]

    def tamper(instruction: Message, reply: Message) -> Message:
        told = instruction.metadata
        asked = messages.ARRAYS not in instruction.content
        if (told.message_type, told.dst_node_id, asked) != ("query.values", 100 + client, wanted):
            return reply
        if change is None:
            return Message(Error(0, "no room"), reply_to=instruction)
        tensors = {name: value.clone() for name, value in messages.tensors_of(reply.content, Encoding.float32).items()}
        change(tensors)
        arrays = encode_tensors(tensors, Encoding.float32)
        return Message(RecordDict({**reply.content, messages.ARRAYS: arrays}), reply_to=instruction)

    with pytest.raises(RunError, match=problem):
        run(tmp_path, lambda number: lambda: nets[number], tamper=tamper)


def test_first_values_of_another_version_are_refused(tmp_path: Path) -> None:
    write_tensors(tmp_path / FIRST, {}, {"schema": 99})
    with pytest.raises(StorageError, match="was written by another version of tap-flower: use that version"):
        FirstValues(Roster(41), ArrayRecord(), tmp_path, True, 1.0, lambda *_: RecordDict())


def test_a_new_run_has_no_first_values_of_an_attempt_that_failed(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no room"):
        run(tmp_path, lambda _: Normed, initial={"head.weight": torch.ones(3, 6)}, tamper=fails_in(1))
    sent: Sent = {}
    run(tmp_path, lambda _: Normed, sent=sent)
    assert not sent["train", 0]["head.weight"].any()


@pytest.mark.parametrize("changed", [0, 1])
def test_a_resumed_run_goes_on_with_its_own_frozen_values(tmp_path: Path, changed: int) -> None:
    def filled(value: float) -> type[Normed]:
        class Filled(Normed):
            def __init__(self) -> None:
                super().__init__()
                nn.init.constant_(self.trunk.bias, value)

        return Filled

    before, now = filled(1.0), filled(2.0)
    nets = [now if number == changed else before for number in (0, 1)]
    with pytest.raises(RunError, match="no room"):
        run(tmp_path, lambda _: before, "rounds=2", tamper=fails_in(2))
    other = {"trunk.bias": torch.full((6,), 5.0), "norm.bias": torch.full((6,), 5.0)}
    result = run(tmp_path, lambda number: nets[number], "rounds=2", initial=other, resume=True)
    for number, net in enumerate(nets):
        own = load_personal(net(), f"c{number}", state_dir=tmp_path / "state")
        assert own.trunk.bias.tolist() == [1.0] * 6
        assert own.norm.bias.abs().max() < 1
    assert result.missing == {}
    alone = tmp_path / "alone"
    with pytest.raises(RunError, match="no room"):
        run(alone, lambda _: before, "rounds=2", tamper=fails_in(2))
    with pytest.raises(
        RunError, match="'trunk.bias' with another value than the run's, which no client that is there has"
    ):
        run(alone, lambda _: now, "rounds=2", resume=True)


def test_equal_modules_are_built_from_the_seed_and_nothing_is_sent(tmp_path: Path) -> None:
    sent: Sent = {}
    run(tmp_path, lambda _: lambda: Normed(), sent=sent)
    assert {kind for kind, _ in sent} == {"train", "train.personalise", "evaluate"}
    assert sent["train", 0]["head.weight"].count_nonzero() == 0


def test_initial_arrays_go_first_whatever_they_name(tmp_path: Path) -> None:
    given = {name: torch.full_like(value, 2) for name, value in Normed().state_dict().items()}
    sent: Sent = {}
    result = run(tmp_path, lambda _: Normed, initial=given, sent=sent)
    assert sent["train", 0]["norm.weight"].equal(given["norm.weight"])
    (folder,) = (tmp_path / "state" / "c0").iterdir()
    assert load_file(folder / "first.safetensors")["mask"].tolist() == [2.0] * 6
    net = load_personal(Normed(), "c0", state_dir=tmp_path / "state")
    assert net.trunk.weight.equal(given["trunk.weight"])
    assert float(net.seen) == 2 + 3 * 2 * 32  # 2 at first; as below, in batches of 32
    assert result.arrays["trunk.weight"].numpy().tolist() == given["trunk.weight"].tolist()


def test_initial_arrays_that_fit_nothing(tmp_path: Path) -> None:
    with pytest.raises(
        RunError, match=r"initial_arrays: 'head.weight' has shape \(2, 6\), the tensor of client 'c0' \(3, 6\)"
    ):
        run(tmp_path, lambda _: Normed, initial={"head.weight": torch.zeros(2, 6)})


def test_a_client_that_initial_arrays_do_not_fit_is_refused_and_the_run_goes_on(tmp_path: Path) -> None:
    class Wide(Normed):
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.Linear(6, 7)

        def see(self, x: Tensor) -> Tensor:
            return super().see(x) + self.wide(self.mask).mean()

    initial = {**Normed().state_dict(), "wide.bias": torch.zeros(5)}
    result = run(tmp_path, lambda number: Wide if number == 2 else Normed, initial=initial, nodes=3)
    assert result.missing.keys() == {"node 102"}
    assert "'wide.bias' has shape (5,), the tensor of client 'c2' (7,)" in result.missing["node 102"]


def test_initial_arrays_that_fit_in_part_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As peft's names of an adapter, which lack a part; tied weights have a second name, which is no fault."""
    state = Normed().state_dict()
    run(tmp_path / "all", lambda _: Normed, initial={**state, "tied": state["head.bias"]})
    assert "initial_arrays names" not in caplog.text
    run(tmp_path / "part", lambda _: Normed, initial={**state, "head.lora_A.weight": torch.rand(2, 6)})
    assert (
        "initial_arrays names 1 tensors that no client has, such as 'head.lora_A.weight': they stay in" in caplog.text
    )
    caplog.clear()
    run(tmp_path / "local", lambda _: Normed, "method=local", initial={**state, "more": torch.rand(2)})
    assert "initial_arrays names 1 tensors that no client has, such as 'more'" in caplog.text


@pytest.mark.parametrize("encoding", ["bfloat16", "int8"])
def test_encodings_that_round_start_from_the_same_values(tmp_path: Path, encoding: str) -> None:
    nets = [Normed(), Normed()]
    result = run(tmp_path, lambda number: lambda: nets[number], f"wire.encoding={encoding}")
    assert set(result.clients) == {"c0", "c1"}


def test_a_process_that_builds_other_values_goes_on_with_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What another actor of a simulation, or a node that was started again, does."""
    made: list[Normed] = []

    def unseeded() -> nn.Module:
        with torch.random.fork_rng():
            torch.seed()
            made.append(Normed())
        return made[-1]

    forgetful = modules._built.__class__(maxsize=1)
    monkeypatch.setattr(modules, "_built", forgetful)
    sent: Sent = {}
    run(tmp_path, lambda _: lambda: unseeded(), sent=sent)
    assert len(made) > 2  # c0 and c1 take turns
    for client in ("c0", "c1"):
        net = load_personal(Normed(), client, state_dir=tmp_path / "state")
        assert net.trunk.weight.equal(made[0].trunk.weight)
        assert net.mask.equal(made[0].mask)


def test_statistics_stay_on_the_client_or_are_averaged(tmp_path: Path) -> None:
    sent: Sent = {}
    run(tmp_path / "personal", lambda _: Normed, sent=sent)
    assert "norm.running_mean" not in sent["evaluate", 0]
    nets = [load_personal(Normed(), f"c{i}", state_dir=tmp_path / "personal" / "state") for i in (0, 1)]
    assert not nets[0].norm.running_mean.equal(nets[1].norm.running_mean)
    assert int(nets[0].norm.num_batches_tracked) == 6  # the copy's 2, which replaced it, then 2 in each stage

    sent.clear()
    result = run(tmp_path / "average", lambda _: Normed, buffers="average", sent=sent)
    after = result.arrays["norm.running_mean"].numpy()
    assert sent["train", 0]["norm.running_mean"].count_nonzero() == 0
    assert sent["evaluate", 0]["norm.running_mean"].tolist() == sent["evaluate", 1]["norm.running_mean"].tolist()
    assert abs(after).max() > 0
    assert "norm.num_batches_tracked" not in sent["evaluate", 0]  # a count has no mean


def test_a_frozen_norm_stays_in_evaluation_mode(tmp_path: Path) -> None:
    class Pretrained(Normed):
        def __init__(self) -> None:
            super().__init__()
            self.norm.requires_grad_(False)
            self.norm.running_mean.fill_(0.5)

    run(tmp_path, lambda _: Pretrained)
    net = load_personal(Pretrained(), "c0", state_dir=tmp_path / "state")
    assert net.norm.running_mean.tolist() == [0.5] * 6
    assert int(net.norm.num_batches_tracked) == 0


class Counted(Normed):
    """Counts its objects: those that were built, and how many were alive at a time, copies included."""

    built = most = 0
    alive: ClassVar = WeakSet[nn.Module]()

    def __new__(cls) -> Counted:
        made = super().__new__(cls)
        cls.alive.add(made)
        cls.most = max(cls.most, len(cls.alive))
        return made

    def __init__(self) -> None:
        type(self).built += 1
        super().__init__()


def test_a_module_is_built_once_and_has_two_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modules, "_built", modules._built.__class__(maxsize=8))
    Counted.built = Counted.most = 0
    run(tmp_path, lambda _: Counted, "rounds=2")
    # Two more, at the first query of a run: one as another process builds it, one that draws other random numbers.
    assert Counted.built == 3
    ((built, _),) = modules._built.values()
    assert len(built._free) == 2
    assert built.copies == 2
    assert Counted.most == len(Counted.alive) == 3  # the third has the first values, and is never used


@pytest.mark.parametrize(("room", "kept"), [(3.0, 3), (2.9, 2), (0.5, 1)])
def test_modules_of_a_process_are_kept_up_to_a_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: float, kept: int
) -> None:
    """Clients with a function each, such as a lambda, have a module each."""
    built = modules.built_module(Normed, 0)
    assert built is not None
    tensors = built.names.all_tensors(Normed()).items()
    frozen, others = (sum(t.nbytes for n, t in tensors if n.startswith("trunk") is which) for which in (True, False))
    assert built.most_bytes == frozen + 3 * others
    monkeypatch.setattr(modules, "_built", modules._cache(int(room * built.most_bytes)))
    Counted.built = 0
    run(tmp_path, lambda _: lambda: Counted(), nodes=3)
    assert len(modules._built) == kept
    assert (Counted.built == 3 * 3) is (kept == 3)


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda net: torch.compile(net, backend="eager")])
def test_wrappers_leave_names_as_they_are(tmp_path: Path, wrap: Callable[[nn.Module], nn.Module]) -> None:
    class Called(Normed):
        def forward(self, x: Tensor) -> Tensor:
            return self.see(x)

    app = TapClientApp()

    @app.client()
    def make(context: Context) -> Client:
        number = int(context.node_config["partition-id"])
        task = digits(number)
        object.__setattr__(task, "forward", lambda net, batch: net(batch[0]))
        model = Called if number else lambda: wrap(Called())
        return Client(f"c{number}", model, [task], state_dir=tmp_path / "state")

    strategy = TapStrategy(config=load_config("plug-in", settings=SHORT), run_folder=tmp_path / "run")
    result = strategy.start(InProcessGrid(app, [{"partition-id": i} for i in range(2)], {}))
    assert "norm.weight" in result.arrays
    assert not [name for name in result.arrays if "module" in name or "orig_mod" in name]
    assert set(result.clients) == {"c0", "c1"}
    load_personal(Called(), "c0", state_dir=tmp_path / "state")
