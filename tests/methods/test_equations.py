"""Each method's defining equation, against numbers worked out by hand.

Without head the loss is w², its gradient 2 w; a plain step at rate 0.1 takes w to 0.8 w.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tap_flower.core import training
from tap_flower.core.components import ComponentMap, Pair, State
from tap_flower.core.objectives import Proximal
from tap_flower.errors import ConfigError
from tap_flower.methods import (
    apfl,
    ditto,
    fedala,
    fedavg,
    feddat,
    fedper,
    fedprox,
    fedrep,
    fedsa_lora,
    local_only,
    per_fedavg,
    pfedme,
)
from tap_flower.methods.disentafl import Disentanglement, disentanglement
from tap_flower.methods.method import Memory, Method
from tests.methods.toy import Toy, ToyClient, numbers, plain_descent, state


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> ToyClient:
    monkeypatch.setattr(training.torch.optim, "AdamW", plain_descent)
    return ToyClient()


@pytest.fixture
def alone(client: ToyClient, monkeypatch: pytest.MonkeyPatch) -> ToyClient:
    """A client whose output is the base alone; the head stays at 0."""
    monkeypatch.setattr(Toy, "forward", lambda self, task, inputs: self.base.view(1, 1))
    return client


def base(found: State) -> float:
    return numbers(found)["base"]


ONE = {"base": 1.0, "head": 0.0}


def test_the_proximal_gradient_is_mu_times_the_distance() -> None:
    model = Toy(state(base=3.0, head=-1.0))
    penalty = Proximal(model, state(base=1.0, head=1.0), 0.5)
    value = penalty(training.Batch("t", {}, torch.zeros(1)), torch.zeros(1))
    value.backward()
    assert value.item() == 2.0  # 0.5 / 2 · (2² + 2²)
    assert (model.base.grad, model.head.grad) == (torch.tensor(1.0), torch.tensor(-1.0))


def test_fedavg(alone: ToyClient) -> None:
    done = fedavg.participate(alone.local, 1, state(**ONE), Memory())
    assert base(done.returned) == 0.64
    assert done.losses["t"] == pytest.approx((1 + 0.8**2) / 2)
    assert base(fedavg.METHOD.second_stage(alone.local, state(**ONE), Memory()).models["server+finetune"]) == 0.8
    assert fedavg.nothing(alone.local, state(**ONE), Memory()).models == {}


def test_fedprox(alone: ToyClient) -> None:
    alone.settings.baselines.fedprox_mu = 1.0
    done = fedprox.participate(alone.local, 1, state(**ONE), Memory())
    # 1 -> 0.8 (no distance yet); 0.8 - 0.1 (1.6 + 1 · (0.8 - 1)) = 0.66
    assert base(done.returned) == 0.66
    assert base(fedprox.METHOD.second_stage(alone.local, state(**ONE), Memory()).models["fedprox"]) == 0.8


def test_ditto(alone: ToyClient) -> None:
    alone.settings.baselines.ditto_lambda = 1.0
    memory = Memory({"personal": state(base=0.5, head=0.0)})
    done = ditto.participate(alone.local, 1, state(**ONE), memory)
    assert base(done.returned) == 0.64  # as FedAvg
    # 0.5 - 0.1 (1 + 1 · (0.5 - 1)) = 0.45; 0.45 - 0.1 (0.9 + 1 · (0.45 - 1)) = 0.415
    assert base(done.memory.models["personal"]) == 0.415
    assert base(ditto.second_stage(alone.local, state(**ONE), memory).models["ditto"]) == 0.45
    # before its first participation the personal model has its initial value: 2 - 0.1 (4 + 1 · (2 - 1)) = 1.5
    assert base(ditto.second_stage(alone.local, state(**ONE), Memory()).models["ditto"]) == 1.5


@pytest.mark.parametrize(
    ("inner_steps", "expected"),
    # K = 1: θ = 0.8, w = 1 - 0.5 · 0.2 = 0.9; θ = 0.8 - 0.1 (1.6 + 2 · (0.8 - 0.9)) = 0.66, w = 0.9 - 0.5 · 0.24 = 0.78
    # K = 2: θ = 0.8, then 0.8 - 0.1 (1.6 + 2 · (0.8 - 1)) = 0.68; w = 1 - 0.5 · 0.32 = 0.84
    # K = 5: the last step moves w too
    [(1, 0.78), (2, 0.84), (5, 0.84)],
)
def test_pfedme(alone: ToyClient, inner_steps: int, expected: float) -> None:
    options = alone.settings.baselines
    options.pfedme_lambda, options.pfedme_rate, options.pfedme_inner_steps = 2.0, 0.25, inner_steps
    received = state(**ONE)
    assert base(pfedme.participate(alone.local, 1, received, Memory()).returned) == expected
    assert base(received) == 1.0
    assert base(pfedme.second_stage(alone.local, received, Memory()).models["pfedme"]) == 0.8


@pytest.mark.parametrize(("steps", "expected"), [(1, 0.8), (2, 0.9), (3, 0.72), (4, 0.81)])
def test_per_fedavg(alone: ToyClient, steps: int, expected: float) -> None:
    """θ = w - 0.25 · 2 w = w / 2, whose gradient is w: two steps take w to 0.9 w, a single one to 0.8 w."""
    alone.settings.baselines.per_fedavg_rate, alone.settings.train.steps = 0.25, steps
    assert base(per_fedavg.participate(alone.local, 1, state(**ONE), Memory()).returned) == expected
    assert alone.trainings[0][0] == steps


def test_fedper_keeps_the_heads(client: ToyClient) -> None:
    memory = Memory({"own": state(head=0.5)})
    done = fedper.METHOD.participate(client.local, 1, state(base=1.0), memory)
    # the gradient of both is 2 (1 + 0.5) = 3: 0.7 and 0.2; then 1.8: 0.52 and 0.02
    assert numbers(done.returned) == {"base": 0.52}
    assert numbers(done.memory.models["own"]) == {"head": 0.02}
    assert fedper.METHOD.exchanges("encoder/text", "w")
    assert not fedper.METHOD.exchanges("head/languages", "w")
    personal = fedper.models(state(base=1.0), memory, client.initial_values)["personal"]
    assert personal is not None
    assert numbers(personal) == {"base": 1.0, "head": 0.5}
    (never,) = fedper.models(state(base=1.0), Memory(), client.initial_values).values()
    assert never is not None
    assert numbers(never) == {"base": 1.0, "head": 0.0}
    assert numbers(fedper.second_stage(client.local, state(base=1.0), memory).models["fedper"]) == {
        "base": 0.7,
        "head": 0.2,
    }


@pytest.mark.parametrize(
    ("steps", "share", "base_", "head"),
    # With s = base + head = 1.5 a step takes what moves by 0.2 s, and s to 0.8 s.
    [(1, 0.9, 0.7, 0.2), (2, 0.9, 0.76, 0.2), (2, 0.0, 0.76, 0.2), (4, 0.75, 0.8464, -0.232), (4, 0.5, 0.6544, -0.04)],
)
def test_fedrep_moves_the_heads_first(client: ToyClient, steps: int, share: float, base_: float, head: float) -> None:
    client.settings.train.steps, client.settings.baselines.fedrep_head_share = steps, share
    memory = Memory({"own": state(head=0.5)})
    done = fedrep.participate(client.local, 1, state(base=1.0), memory)
    assert numbers(done.returned) == {"base": base_}
    assert numbers(done.memory.models["own"]) == {"head": head}
    # stage 2 leaves the server's base alone
    assert numbers(fedrep.second_stage(client.local, state(base=1.0), memory).models["fedrep"]) == {
        "base": 1.0,
        "head": 0.2,
    }
    assert client.trainings == [(steps, (1,)), (1, ("stage 2",))]


@pytest.mark.parametrize(
    ("rate", "known", "weight", "start"),
    # θ = 0.5 + 0.5 W. At W = 1 the gradient is 2 (1 + 1) = 4, and W moves by η · 4 · 0.5 = 2 η.
    # A client that begins to learn makes two passes: at W = 0.8 the gradient is 2 (1 + 0.9) = 3.8.
    [(0.1, True, 0.8, 0.9), (1.0, True, 0.0, 0.5), (-1.0, True, 1.0, 1.0), (0.1, False, 0.61, 0.805)],
)
def test_fedala_learns_how_much_of_the_head_it_takes_over(
    client: ToyClient, rate: float, known: bool, weight: float, start: float
) -> None:
    options = client.settings.baselines
    options.fedala_rate, options.fedala_share, options.fedala_start = rate, 0.5, 2
    received, heads = state(base=1.0, head=1.0), {"heads": state(head=0.5)}
    memory = Memory(heads | ({"weights": state(head=1.0)} if known else {}))
    done = fedala.participate(client.local, 3, received, memory)
    assert client.trainings == [(1 if known else 2, (3, "weights")), (2, (3,))]
    assert numbers(done.memory.models["weights"]) == {"head": weight}
    # base and head move alike, by 0.2 s and 0.12 s where s is their sum
    moved = 0.32 * (1 + start)
    assert numbers(done.returned) == {"base": pytest.approx(1 - moved), "head": pytest.approx(start - moved)}
    assert numbers(done.memory.models["heads"]) == {"head": pytest.approx(start - moved)}
    assert numbers(memory.models["heads"]) == {"head": 0.5}
    ends = Memory({"heads": state(head=0.5), "weights": state(head=weight)})
    personal = fedala.models(received, ends, client.initial_values)["personal"]
    assert personal is not None
    assert numbers(personal) == {"base": 1.0, "head": start}


def test_fedala_without_a_head_of_its_own_is_fedavg(client: ToyClient) -> None:
    received = state(base=1.0, head=0.5)
    done = fedala.participate(client.local, 1, received, Memory())
    assert client.trainings == [(2, (1,))]
    assert numbers(done.returned) == {"base": 0.52, "head": 0.02}  # 1.5 · 0.32 less
    assert {name: numbers(kept) for name, kept in done.memory.models.items()} == {"heads": {"head": 0.02}}
    personal = fedala.models(received, done.memory, client.initial_values)["personal"]
    assert personal == received
    client.trainings.clear()
    client.settings.baselines.fedala_rate = 0.0  # so that W stays 1
    finetuned = fedala.second_stage(client.local, received, done.memory).models["fedala"]
    assert client.trainings == [(10, ("stage 2", "weights")), (1, ("stage 2",))]
    assert numbers(finetuned) == {"base": 0.7, "head": 0.2}


def test_apfl(alone: ToyClient) -> None:
    alone.settings.baselines.apfl_rate = 0.1
    memory = Memory({"local": state(base=0.5, head=0.0)}, {"share": 0.5})
    done = apfl.participate(alone.local, 1, state(**ONE), memory)
    assert base(done.returned) == 0.64  # as FedAvg
    # v̄ = 0.75, its gradient 1.5: α = 0.5 - 0.1 (0.5 - 1) 1.5 = 0.575, v = 0.5 - 0.1 · 0.5 · 1.5 = 0.425, and w = 0.8;
    # v̄ = 0.575 · 0.425 + 0.425 · 0.8 = 0.584375: v = 0.425 - 0.1 · 0.575 · 2 · 0.584375, and α stays
    assert base(done.memory.models["local"]) == pytest.approx(0.3577969, abs=1e-5)
    assert done.memory.record["share"] == pytest.approx(0.575)
    assert (alone.trainings, alone.steps) == ([(2, (1,))], 2)  # and those of the mixture
    found = apfl.METHOD.models(state(**ONE), memory, alone.initial_values)
    assert {name: base(kept or {}) for name, kept in found.items()} == {"server": 1.0, "personal": 0.75}
    assert base(apfl.second_stage(alone.local, state(**ONE), memory).models["apfl"]) == 0.6


@pytest.mark.parametrize(("rate", "share"), [(1.0, 1.0), (-1.0, 0.0)])
def test_apfl_keeps_its_share_between_0_and_1(alone: ToyClient, rate: float, share: float) -> None:
    alone.settings.baselines.apfl_rate = rate
    memory = Memory({"local": state(base=0.5, head=0.0)}, {"share": 0.5})
    assert apfl.participate(alone.local, 1, state(**ONE), memory).memory.record["share"] == share


def test_apfl_begins_with_what_it_receives(alone: ToyClient) -> None:
    alone.settings.baselines.apfl_alpha = 0.25
    done = apfl.participate(alone.local, 1, state(**ONE), Memory())
    # v = w, so that α has no slope; 1 - 0.1 · 0.25 · 2 = 0.95, v̄ = 0.25 · 0.95 + 0.75 · 0.8 = 0.8375,
    # 0.95 - 0.1 · 0.25 · 1.675 = 0.908125
    assert (base(done.memory.models["local"]), done.memory.record["share"]) == (pytest.approx(0.90812, abs=1e-5), 0.25)
    never = apfl.METHOD.models(state(**ONE), Memory(), alone.initial_values)["personal"]
    assert base(never or {}) == 1.0
    assert base(apfl.second_stage(alone.local, state(**ONE), Memory()).models["apfl"]) == 0.8


@pytest.mark.parametrize(
    ("weight", "returned", "local"),
    # θ_DAT = 0.75: A_c moves by 0.1 (2 + w · 2 (1 - 0.75)) to 0.75, A_s by 0.1 · 0.5 (1.5 + w · 2 (0.75 - 1)) to 0.45;
    # θ_DAT = 0.725: by 0.1 (1.5 + w · 2 (0.75 - 0.725)), and by 0.1 · 0.5 (1.45 + w · 2 (0.725 - 0.75))
    [(1.0, 0.595, 0.38), (0.0, 0.64, 0.35375)],
)
def test_feddat(alone: ToyClient, weight: float, returned: float, local: float) -> None:
    alone.settings.baselines.feddat_weight = weight
    received, memory = state(**ONE), Memory({"local": state(base=0.5, head=0.0)}, {"share": 0.5})
    done = feddat.participate(alone.local, 1, received, memory)
    assert (base(done.returned), base(done.memory.models["local"])) == (returned, local)
    assert (base(received), done.memory.record) == (1.0, {"share": 0.5})
    assert (alone.trainings, alone.steps) == ([(2, (1,))], 2)
    assert done.losses["t"] == pytest.approx((1 + (0.8 - 0.05 * weight) ** 2) / 2)  # without the distillation
    assert base(feddat.second_stage(alone.local, received, memory).models["feddat"]) == 0.6  # from ½ (0.5 + 1)
    assert base(feddat.second_stage(alone.local, received, Memory()).models["feddat"]) == 0.8


def with_tensors(*names: str) -> Toy:
    model = Toy(state(**ONE))
    model.component_map = ComponentMap(dict.fromkeys(names, "c"), {Pair("t", ("text",)): frozenset({"c"})})
    return model


def test_fedsa_lora_exchanges_the_matrices_a() -> None:
    names = ["mote.up.A", "layer.lora_A.default.weight", "e.lora_embedding_A.default", "A"]
    others = [name.replace("A", "B") for name in names]
    assert all(fedsa_lora.is_a("mote/expert/text/x", name) for name in names)
    assert not any(fedsa_lora.is_a("c", name) for name in [*others, "head.weight", "AB", "a.Alpha", "x_A.weight"])
    for a, b in zip(names, others, strict=True):
        fedsa_lora.has_lora(with_tensors(a, b, "head.weight"))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="fedsa-lora exchanges LoRA's matrices A, and no trainable tensor is named A"):
        fedsa_lora.has_lora(with_tensors("head.weight", "lone.B"))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="'camera.A' is named like one, but there is no trainable 'camera.B'"):
        fedsa_lora.has_lora(with_tensors("up.A", "up.B", "camera.A"))  # type: ignore[arg-type]


@pytest.mark.parametrize("method", [fedper.METHOD, fedrep.METHOD, fedala.METHOD], ids=lambda method: method.name)
def test_a_model_without_heads_is_refused(method: Method) -> None:
    method.suits(Toy(state(**ONE)))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=rf"method={method.name} treats heads apart, and no component .* head/\.\.\."):
        method.suits(with_tensors("trunk.weight"))  # type: ignore[arg-type]


def test_local_goes_on_from_its_own_model(alone: ToyClient) -> None:
    first = local_only.participate(alone.local, 1, {}, Memory())
    assert (first.returned, base(first.memory.models["local"])) == ({}, 1.28)  # 2 · 0.8²
    second = local_only.participate(alone.local, 5, {}, first.memory)
    assert base(second.memory.models["local"]) == 0.8192
    assert base(local_only.second_stage(alone.local, {}, first.memory).models["local"]) == 1.024
    assert not local_only.METHOD.exchanges("encoder/text", "w")


@pytest.mark.parametrize(
    "method",
    [
        local_only.METHOD,
        fedavg.METHOD,
        fedprox.METHOD,
        fedper.METHOD,
        ditto.METHOD,
        pfedme.METHOD,
        per_fedavg.METHOD,
        fedrep.METHOD,
        apfl.METHOD,
        feddat.METHOD,
    ],
    ids=lambda method: method.name,
)
def test_every_method_has_the_same_steps_and_order(client: ToyClient, method: Method) -> None:
    received = state(base=1.0) if method.name in ("fedper", "fedrep") else state(**ONE)
    memory = method.participate(client.local, 3, received, Memory()).memory
    assert client.trainings == [(2, (3,))] * (2 if method.name == "ditto" else 1)
    client.trainings.clear()
    method.second_stage(client.local, received, memory)
    assert client.trainings == [(1, ("stage 2",))]


def test_disentafl_by_hand() -> None:
    a, b, c = ("image", "x"), ("text", "x"), ("text", "y")
    along, between, across = torch.tensor([[2.0, 0.0]]), torch.tensor([[3.0, 3.0]]), torch.tensor([[0.0, 1.0]])
    assert disentanglement({a: along}, {}).item() == 0.0
    assert disentanglement({a: along}, {b: between}).item() == pytest.approx(0.5 * 0.5)
    assert disentanglement({a: along, b: torch.cat([between, across])}, {}).item() == pytest.approx(0.5 * 0.25)
    # two new groups and an old one: cos² of 1/2, 0 and 1/2; the pair of old groups is not looked at
    new, old = {a: along, b: between}, {c: across, b: along}
    assert disentanglement(new, old).item() == pytest.approx(0.5 * (0.5 + 0 + 0.5) / 3)


def test_disentafl_remembers_the_last_latents_of_a_group_without_their_gradient() -> None:
    class Watched:
        class fusion:
            observe = None

    objective = Disentanglement(Watched)  # type: ignore[arg-type]
    batch, output = training.Batch("t", {}, torch.zeros(1)), torch.zeros(1)
    first, second = (torch.tensor([v], requires_grad=True) for v in ([1.0, 0.0], [1.0, 1.0]))
    Watched.fusion.observe(("text", "x"), first)  # type: ignore[misc]
    assert objective(batch, output).item() == 0.0
    Watched.fusion.observe(("image", "y"), second)  # type: ignore[misc]
    loss = objective(batch, output)
    assert loss.item() == pytest.approx(0.25)
    loss.backward()
    assert first.grad is None
    # d/dy of 0.5 x² / (x² + y²) at (1, 1) is -0.25, d/dx is 0.25
    torch.testing.assert_close(second.grad, torch.tensor([[0.25, -0.25]]))


def test_disentafl_golden(pytestconfig: pytest.Config) -> None:
    """The case of three groups is left out: its number is no mean over all pairs of samples."""
    folder = pytestconfig.getoption("--golden-dir") / "ortho"
    cases, inputs = json.loads(Path(folder / "expected.json").read_text()), load_file(folder / "inputs.safetensors")
    for name in ("two_groups", "one_latent"):
        latents = {(m, o): inputs[key].mean(1) for key, m, o in cases[name]["latents"]}
        assert disentanglement(latents, {}).item() == pytest.approx(cases[name]["loss"], rel=1e-5)
