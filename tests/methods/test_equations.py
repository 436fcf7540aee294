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
from tap_flower.core.components import State
from tap_flower.core.objectives import Proximal
from tap_flower.methods import ditto, fedavg, fedper, fedprox, local_only, per_fedavg, pfedme
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
    assert base(fedavg.second_stage(alone.local, state(**ONE), Memory()).models["server+finetune"]) == 0.8
    assert fedavg.nothing(alone.local, state(**ONE), Memory()).models == {}


def test_fedprox(alone: ToyClient) -> None:
    alone.settings.baselines.fedprox_mu = 1.0
    done = fedprox.participate(alone.local, 1, state(**ONE), Memory())
    # 1 -> 0.8 (no distance yet); 0.8 - 0.1 (1.6 + 1 · (0.8 - 1)) = 0.66
    assert base(done.returned) == 0.66
    assert base(fedprox.second_stage(alone.local, state(**ONE), Memory()).models["fedprox"]) == 0.8


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
    memory = Memory({"heads": state(head=0.5)})
    done = fedper.participate(client.local, 1, state(base=1.0), memory)
    # the gradient of both is 2 (1 + 0.5) = 3: 0.7 and 0.2; then 1.8: 0.52 and 0.02
    assert numbers(done.returned) == {"base": 0.52}
    assert numbers(done.memory.models["heads"]) == {"head": 0.02}
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


def test_local_goes_on_from_its_own_model(alone: ToyClient) -> None:
    first = local_only.participate(alone.local, 1, {}, Memory())
    assert (first.returned, base(first.memory.models["local"])) == ({}, 1.28)  # 2 · 0.8²
    second = local_only.participate(alone.local, 5, {}, first.memory)
    assert base(second.memory.models["local"]) == 0.8192
    assert base(local_only.second_stage(alone.local, {}, first.memory).models["local"]) == 1.024
    assert not local_only.METHOD.exchanges("encoder/text", "w")


@pytest.mark.parametrize(
    "method",
    [local_only.METHOD, fedavg.METHOD, fedprox.METHOD, fedper.METHOD, ditto.METHOD, pfedme.METHOD, per_fedavg.METHOD],
    ids=lambda method: method.name,
)
def test_every_method_has_the_same_steps_and_order(client: ToyClient, method: Method) -> None:
    received = state(base=1.0) if method.name == "fedper" else state(**ONE)
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
