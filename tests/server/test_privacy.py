"""Differential privacy of a federation."""

from __future__ import annotations

import json
import math
import secrets
from random import Random
from typing import Any

import msgspec
import pytest
import torch
from flwr.app import Message
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("dp_accounting", reason='needs: pip install "tap-flower[privacy]"')

from tap_flower.config import Encoding
from tap_flower.core.initial import Initial
from tap_flower.errors import ConfigError, MessageError
from tap_flower.files import read_record
from tap_flower.report.events import read_events
from tap_flower.server.privacy import Budget, Ledger, Privacy, PrivateAverage, budget_of
from tap_flower.server.roster import Roster
from tap_flower.server.strategy import TapStrategy
from tap_flower.wire import messages
from tap_flower.wire.messages import Manifest, TensorInfo
from tap_flower.wire.tensors import decode_tensors
from tests.federation.runs import broken, lost
from tests.federations import Make, ToyFederation
from tests.grid import round_of
from tests.server.test_accounting import exact_epsilon
from tests.server.test_rounds import difference, manifest, roster
from tests.toys import TOYS

ANN, BOB, _, DAN = TOYS
FLOAT = Encoding.float32


def no_noise(count: int) -> bytes:
    """The median of every value: 0."""
    return (2**51).to_bytes(8, "little") * (count // 8)


def private(needed: int = 1, clip_norm: float = 6.5, noise_multiplier: float = 2.0, source: Any = no_noise) -> Privacy:
    return Privacy(Budget(8.0, 1e-5, clip_norm, noise_multiplier, needed), Ledger(), source)


def averaged(
    privacy: Privacy, made: Roster, differences: dict[str, dict[str, Tensor] | None]
) -> tuple[dict[str, Tensor], set[str], dict[str, Any]]:
    """A round over some clients, None being one that does not answer: tensors, what was released, the event."""
    told: dict[str, Any] = {}
    average = PrivateAverage(privacy, made, list(differences), lambda event, **values: told.update(values, event=event))
    before = dict(privacy.ledger.rounds)
    for name, returned in differences.items():
        if returned is not None:
            average.add(name, returned)
    tensors = average.finish()
    return tensors, {c for c, count in privacy.ledger.rounds.items() if count > before.get(c, 0)}, told


def test_every_holder_counts_once_and_whoever_is_silent_counts_as_no_change() -> None:
    made = roster(ann={"a": 90}, bob={"a": 1, "b": 5}, cleo={"b": 7}, dan={"b": 7})
    tensors, released, told = averaged(
        privacy := private(),
        made,
        {
            "ann": difference(made, "ann", trunk=[0.0, 2.0, 0.0]),
            "bob": difference(made, "bob", trunk=[3.0, 4.0, 0.0], head_a=[12.0, 0.0]),  # ‖·‖ = 13: half of it counts
            "cleo": None,
        },
    )
    # Over 3 holders of the trunk, 2 of head/a, 2 of head/b
    assert tensors["trunk.w"].tolist() == pytest.approx([1 + 1.5 / 3, 1 + 4.0 / 3, 1.0])
    assert tensors["head/a.w"].tolist() == pytest.approx([1 + 6.0 / 2, 1.0])
    assert tensors["head/b.w"].tolist() == pytest.approx([1.0, 1.0])
    assert released == {"trunk", "head/a", "head/b"}  # head/b too, which nobody changed: that is a secret
    assert told == {"event": "privacy_round", "norms": {"ann": 2.0, "bob": 13.0}, "withheld": {}, "holders_needed": 1}
    assert privacy.ledger.clients == {"ann": 1, "bob": 1, "cleo": 1}  # dan was not asked


def deep(name: str, depth: int, tasks: dict[str, int] | None = None) -> Manifest:
    """A client whose trunk has so many layers."""
    made = manifest(name, tasks or {"a": 1})
    layers = {f"trunk.{i}": TensorInfo("trunk", (2,), Initial("constant", 0.0)) for i in range(depth)}
    return msgspec.structs.replace(made, tensors={**made.tensors, **layers})


def test_a_tensor_that_not_every_holder_of_its_component_has_counts_its_own_holders() -> None:
    made = Roster(1)
    for node, manifest_ in enumerate((deep("ann", 2), deep("bob", 1), deep("cleo", 1))):
        made.admit(node, manifest_)
    clients = ["ann", "bob", "cleo"]
    ann = difference(made, "ann") | {"trunk.0": torch.tensor([3.0, 0.0]), "trunk.1": torch.tensor([4.0, 0.0])}
    updates = {"ann": ann, "bob": None, "cleo": None}
    tensors, _, told = averaged(private(), made, updates)
    assert tensors["trunk.0"].tolist() == pytest.approx([1.0, 0.0])  # 3 / 3
    assert tensors["trunk.1"].tolist() == pytest.approx([4.0, 0.0])  # 4 / 1
    privacy, drawn = private(source=Random(2).randbytes), []
    for _ in range(600):
        drawn.append(averaged(privacy, made, dict.fromkeys(clients))[0])
    for name, holders in (("trunk.0", 3), ("trunk.1", 1)):
        values = torch.stack([tensors[name].double() for tensors in drawn])
        assert float(values.std()) == pytest.approx(13.0 / holders, rel=0.1), name
    tensors, released, told = averaged(privacy := private(needed=2), made, updates)
    assert tensors["trunk.1"] is made.tensors["trunk.1"]
    assert (released, told["withheld"]) == ({"trunk", "head/a"}, {"trunk": 1})


def quantile_one(count: int) -> bytes:
    """The noise of every value is its standard deviation."""
    return int(0.841344746068543 * 2**52).to_bytes(8, "little") * (count // 8)


@st.composite
def federations(draw: st.DrawFn) -> dict[str, Any]:
    """Clients with modules of different depth and different tasks, and who is asked in each round and answers."""
    tasks = st.sampled_from([{"a": 1}, {"b": 3}, {"a": 2, "b": 500}])
    clients = {f"c{i}": (draw(st.integers(0, 4)), draw(tasks)) for i in range(draw(st.integers(1, 5)))}

    def some(fewest: int) -> st.SearchStrategy[list[str]]:
        chosen = st.integers(fewest, 2 ** len(clients) - 1)
        return chosen.map(lambda bits: [name for i, name in enumerate(clients) if bits >> i & 1])

    return {
        "clients": clients,
        "rounds": draw(st.lists(st.tuples(some(1), some(0)), min_size=1, max_size=4)),
        "needed": draw(st.integers(1, 4)),
        "z": draw(st.floats(0.5, 20.0)),
        "c": draw(st.floats(0.01, 10.0)),
        "delta": draw(st.sampled_from([1e-3, 1e-5, 1e-8])),
        "seed": draw(st.integers(0, 2**32)),
    }


def spends_no_more_than_it_says(made: dict[str, Any]) -> None:
    """An accountant that knows the released values alone: each round is a Gaussian mechanism, whose μ is the length of what
    a client's update moves, each value in units of its own noise; μ of a run is √Σμ² (Dong, Roth and Su, 2019)."""
    roster_, random = Roster(1), torch.Generator().manual_seed(made["seed"])
    for node, (name, (depth, tasks)) in enumerate(made["clients"].items()):
        roster_.admit(node, deep(name, depth, tasks))
    roster_.tensors = {name: torch.zeros_like(value) for name, value in roster_.tensors.items()}
    privacy = private(made["needed"], made["c"], made["z"])
    object.__setattr__(privacy.budget, "delta", made["delta"])
    squares = dict.fromkeys(made["clients"], 0.0)
    for asked, answer in made["rounds"]:

        def released(updates: dict[str, dict[str, Tensor] | None], source: Any) -> dict[str, Tensor]:
            return averaged(private(made["needed"], made["c"], made["z"], source), roster_, updates)[0]

        updates: dict[str, dict[str, Tensor] | None] = dict.fromkeys(asked)
        for name in set(asked) & set(answer):
            # Some put all into few tensors.
            updates[name] = {
                n: torch.randn(roster_.tensors[n].shape, generator=random)
                * float(10 ** (6 * torch.rand((), generator=random) - 2))
                for n in roster_.manifests[name].tensors
            }
        plain = released(updates, no_noise)
        noisy = released(dict.fromkeys(asked), quantile_one)
        for name in asked:
            without = released({**updates, name: None}, no_noise)
            for tensor, noise in noisy.items():
                if float(noise.abs().max()):
                    moved = (plain[tensor].double() - without[tensor].double()) / noise.double()
                    squares[name] += float(moved.square().sum())
                else:
                    assert torch.equal(plain[tensor], without[tensor])
        averaged(privacy, roster_, dict.fromkeys(asked))
    for name, square in squares.items():
        said = privacy.budget.spent(privacy.ledger.clients.get(name, 0))
        assert said <= privacy.epsilon
        if square:
            mu = math.sqrt(square) * (1 - 1e-5)  # values are float32
            assert exact_epsilon(1 / mu, 1, made["delta"]) <= said


@given(federations())
def test_epsilon_is_never_understated(made: dict[str, Any]) -> None:
    spends_no_more_than_it_says(made)


@pytest.mark.slow
@settings(max_examples=1000)
@given(federations())
def test_epsilon_is_never_understated_in_a_thousand_federations(made: dict[str, Any]) -> None:
    spends_no_more_than_it_says(made)


def test_the_clients_of_a_round_are_those_of_the_strategy(make_federation: Make) -> None:
    federation = quick(make_federation(), "rounds=1", "clients_per_round=1", "privacy.max_noise=0.25")
    config = federation.strategy().config  # z is .638: 3 clients in a round
    with pytest.raises(ConfigError, match="needs 3 clients .* a round has 1 "):
        TapStrategy(config=config, run_folder=federation.out).start(federation.grid())
    strategy = TapStrategy(config=config, run_folder=federation.out, fraction_train=1.0)
    strategy.start(federation.grid())
    (start,) = [e for e in read_events(federation.out) if e["event"] == "privacy"]
    assert "fusion/mix" not in start["never"]
    assert budget_of(config, 3) == strategy.run.privacy.budget  # type: ignore[union-attr]


def test_the_noise_of_a_component_goes_with_its_holders_in_the_round() -> None:
    made = roster(ann={"a": 90}, bob={"a": 1, "b": 5}, cleo={"b": 7}, dan={"a": 1})
    privacy, updates = private(source=Random(2).randbytes), dict.fromkeys(("ann", "bob", "cleo"))
    drawn = [averaged(privacy, made, updates)[0] for _ in range(1500)]
    # z · C = 2 · 6.5 over 3 holders (of 4 that there are), 2 and 2; 3,000 values and more
    for name, holders in (("trunk.w", 3), ("head/a.w", 2), ("head/b.w", 2)):
        values = torch.stack([tensors[name].double() for tensors in drawn])
        assert float(values.std()) == pytest.approx(13.0 / holders, rel=0.05), name
        assert float(values.mean()) == pytest.approx(1.0, abs=0.6), name


def test_a_component_with_too_few_holders_keeps_its_value(caplog: pytest.LogCaptureFixture) -> None:
    made = roster(ann={"a": 9}, bob={"a": 1}, cleo={"b": 7})
    privacy = private(needed=2, source=secrets.token_bytes)
    updates = {name: difference(made, name, trunk=[1.0, 1.0, 1.0]) for name in ("ann", "bob", "cleo")}
    updates["cleo"]["head/b.w"] += 5.0
    tensors, released, told = averaged(privacy, made, updates)
    assert released == {"trunk", "head/a"}
    assert tensors["head/b.w"] is made.tensors["head/b.w"]
    assert all(not torch.equal(tensors[f"{c}.w"], made.tensors[f"{c}.w"]) for c in released)
    assert told["withheld"] == {"head/b": 1}
    assert told["holders_needed"] == 2
    assert "1 components keep their values: 'head/b' has 1 of 2 clients" in caplog.text
    _, released, told = averaged(privacy, made, {"cleo": updates["cleo"]})
    assert (released, told["withheld"]) == (set(), {"head/b": 1, "trunk": 1})
    assert privacy.ledger == Ledger(
        {"ann": 1, "bob": 1, "cleo": 1},  # cleo's second round released nothing
        {"trunk": {"ann": 1, "bob": 1, "cleo": 1}, "head/a": {"ann": 1, "bob": 1}},
        {"trunk": 1, "head/a": 1},
    )


def test_a_refused_reply_is_as_silent_as_none() -> None:
    made = roster(ann={"a": 1}, bob={"a": 1})
    good = difference(made, "bob", trunk=[3.0, 0.0, 0.0])
    average = PrivateAverage(private(), made, ["ann", "bob"], lambda *_, **__: None)
    with pytest.raises(MessageError, match="not finite"):
        average.add("ann", difference(made, "ann", head_a=[math.nan, 0.0]))
    with pytest.raises(MessageError, match="lacks 1 tensors"):
        average.add("ann", {"trunk.w": torch.ones(3)})
    average.add("bob", good)
    assert average.finish()["trunk.w"].tolist() == [2.5, 1.0, 1.0]


changes = st.lists(st.floats(-(2.0**40), 2.0**40, width=32), min_size=7, max_size=7)


@given(changes, changes, st.sampled_from([0.01, 1.0, 300.0]))
def test_no_client_moves_the_sums_by_more_than_the_sensitivity(own: list[float], others: list[float], c: float) -> None:
    """Before the noise: all components together, times their holders, with and without a client's change."""
    made = roster(ann={"a": 1, "b": 1}, bob={"a": 1, "b": 1}, cleo={"b": 1})
    updates = {
        name: difference(made, name, trunk=values[:3], head_a=values[3:5], head_b=values[5:])
        for name, values in (("ann", own), ("bob", others), ("cleo", others))
    }
    found = []
    for ann in (updates["ann"], None):
        average = PrivateAverage(private(clip_norm=c), made, ["ann", "bob", "cleo"], lambda *_, **__: None)
        for name, returned in {**updates, "ann": ann}.items():
            if returned is not None:
                average.add(name, returned)
        found.append(average._averaging.means(average._holders))
    with_, without = found
    holders = {"trunk.w": 3, "head/a.w": 2, "head/b.w": 3}
    squares = [(m * (with_[n] - without[n])).square().sum() for n, m in holders.items()]
    length = math.sqrt(sum(map(float, squares)))
    norm = math.sqrt(sum(float(v.double().square().sum()) for v in updates["ann"].values()))
    assert length <= c * (1 + 1e-6) + 1e-11
    assert length == pytest.approx(min(c, norm), rel=1e-5, abs=1e-10)


def test_what_is_spent_and_what_is_said_of_it() -> None:
    made, privacy = roster(ann={"a": 1}, bob={"b": 1}, cleo={"b": 1}), private(needed=2, noise_multiplier=3.0)
    told: dict[str, Any] = {}
    privacy.announce(made, 3, lambda event, **values: told.update(values, event=event))
    assert told["event"] == "privacy"
    assert told["never"] == {"head/a": 1}
    privacy.announce(made, 1, lambda event, **values: told.update(values))
    assert told["never"] == {"head/a": 1, "head/b": 2, "trunk": 3}  # a round has one client
    assert privacy.epsilon == 0.0
    for names in (["ann", "bob"], ["bob", "cleo"], ["bob", "cleo"], ["ann"]):
        averaged(privacy, made, dict.fromkeys(names))
    spent = privacy.spent(made)
    epsilon = privacy.budget.spent
    assert spent["components"] == {
        "head/a": {"epsilon": 0.0, "holders": 1, "rounds": 0},
        "head/b": {"epsilon": epsilon(2), "holders": 2, "rounds": 2},
        "trunk": {"epsilon": epsilon(3), "holders": 3, "rounds": 3},
    }
    assert spent["epsilon"] == privacy.epsilon == epsilon(3)  # bob took part in three releases
    assert 0 < epsilon(2) < epsilon(3)


def quick(federation: ToyFederation, *settings: str) -> ToyFederation:
    federation.settings += ["method=fedavg", "train.steps=1", "privacy.epsilon=8", "privacy.max_noise=0.5", *settings]
    return federation


def test_a_private_run_and_one_that_is_resumed(make_federation: Make) -> None:
    whole = quick(make_federation(), "rounds=3")
    strategy = whole.strategy()
    results = strategy.start(whole.grid()).summary
    assert strategy.progress.dropped == {}
    spent = results["privacy"]
    assert spent == json.loads((whole.out / "results.json").read_text())["privacy"]
    assert (spent["epsilon_requested"], spent["delta"], spent["clip_norm"]) == (8.0, 1e-5, 1.0)
    # z = 1.105 for three rounds (√3 · .638); over .5, that is 3 holders. Four clients have words, two languages.
    assert spent["noise_multiplier"] == pytest.approx(1.105, abs=0.002)
    assert spent["holders_needed"] == 3
    assert 7.99 < spent["epsilon"] <= 8.0
    found = spent["components"]
    assert found["encoder/words"] == {"epsilon": spent["epsilon"], "holders": 4, "rounds": 3}
    assert found["head/languages"] == {"epsilon": 0.0, "holders": 2, "rounds": 0}
    assert found["head/translation"] == {"epsilon": 0.0, "holders": 1, "rounds": 0}
    initial: dict[str, Tensor] = {}
    for held in strategy.roster.manifests.values():
        initial |= strategy.roster.first_values(held, held.tensors)
    for name, value in strategy.roster.tensors.items():
        released = found[strategy.roster.component_of[name]]["rounds"] > 0
        assert torch.equal(value, initial[name]) != released, name
    events = list(read_events(whole.out))
    (start,) = [e for e in events if e["event"] == "privacy"]
    assert start["never"]["head/translation"] == 1
    rounds = [e for e in events if e["event"] == "privacy_round"]
    assert [e["round"] for e in rounds] == [1, 2, 3]
    assert all(e["withheld"]["head/translation"] == 1 and e["norms"].keys() == set(results["clients"]) for e in rounds)
    assert [e["epsilon"] for e in events if e["event"] == "round"] == sorted(
        strategy.run.privacy.budget.spent(n) for n in (1, 2, 3)
    )  # type: ignore[union-attr]

    class Crash(Exception):
        pass

    again = quick(make_federation(), "rounds=3")

    def crash(message: Message, reply: Message) -> Message:
        if message.metadata.message_type == messages.TRAIN:
            # All of the round before is on disk, before anything of it is sent.
            server_round = round_of(message)
            record = read_record(again.out / "server" / "server.safetensors") if server_round > 1 else {"round": 0}
            assert record["round"] == server_round - 1
            if server_round == 3:
                raise Crash
        return reply

    with pytest.raises(Crash):
        again.strategy().start(again.grid(tamper=crash))
    ledger = read_record(again.out / "server" / "server.safetensors")["privacy"]
    assert ledger["clients"] == {"ann": 2, "bob": 2, "cleo": 2, "dan": 2}
    after = again.strategy(resume=True).start(again.grid()).summary
    assert after["privacy"] == spent
    assert [e["round"] for e in read_events(again.out) if e["event"] == "privacy_round"] == [1, 2, 3]
    assert after["clients"] != results["clients"]  # other noise: a private run cannot be repeated


class Quiet(TapStrategy):
    """Without noise."""

    def configure_train(self, *args: Any) -> Any:
        assert self.run.privacy is not None
        self.run.privacy.random_bytes = no_noise
        return super().configure_train(*args)


def huge(tensors: dict[str, Any]) -> None:
    for name, value in tensors.items():
        tensors[name] = value * 1e20 + 1e20


def test_a_client_with_an_absurd_update_moves_the_server_no_further_than_any_other(make_federation: Make) -> None:
    found = []
    for tamper in (broken(huge), lost):
        federation = quick(
            make_federation([ANN, BOB, DAN]), "rounds=1", "privacy.max_noise=10", "privacy.clip_norm=0.5"
        )
        grid, values = federation.grid(tamper=tamper), list[dict[str, Tensor]]()
        strategy = Quiet(config=federation.strategy().config, run_folder=federation.out)
        strategy.start(
            grid, timeout=0.1, evaluate_fn=lambda _, arrays, values=values: values.append(decode_tensors(arrays, FLOAT))
        )
        assert strategy.run.privacy is not None
        found.append(values[1])
        (event,) = [e for e in read_events(federation.out) if e["event"] == "privacy_round"]
        assert ("ann" in event["norms"]) == (tamper is not lost)
    component_of = strategy.roster.component_of
    asked = {"head/languages": 2, "encoder/words": 3, "head/translation": 1}
    squares = 0.0
    for name, value in found[0].items():
        component = component_of[name]
        count = sum(component in m.component_of.values() for m in strategy.roster.manifests.values())
        assert count == asked.get(component, count)
        squares += float((count * (value.double() - found[1][name])).square().sum())
    assert math.sqrt(squares) == pytest.approx(0.5, rel=1e-3)  # C, and not a bit further
