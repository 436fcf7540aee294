"""Components by tracing and by patterns, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tap_flower import Client, Initial, Pair, Task
from tap_flower.client.module import component_map
from tap_flower.client.task import ClientHoldings
from tap_flower.errors import ClientError
from tests.own_clients import REGRESSION, Net, client, digits, mood, pixels

BOTH = client(2)


def holdings(made: Client) -> ClientHoldings:
    return ClientHoldings(made, made.data(1, hold_out=True))


def test_components_are_layers_and_each_pair_reaches_its_own() -> None:
    found = holdings(BOTH).outline().component_map
    shared = {"trunk.0", "trunk.1"}
    assert found.reach == {
        Pair("digits", ("image",)): shared | {"image", "heads.digits"},
        Pair("mood", ("words",)): shared | {"words", "heads.mood"},
    }
    assert found.component_of["components.trunk.1.bias"] == "trunk.1"
    assert {c for n, c in found.component_of.items() if n.startswith("components.words.")} == {"words"}


def test_components_by_patterns() -> None:
    patterns = {"encoder/image": "image.*", "encoder/words": "words.*", "trunk": ["trunk.*"], "head/all": "heads.*"}
    made = Client("cleo", BOTH.model, [BOTH.tasks[0], BOTH.tasks[1]], components=patterns)
    found = holdings(made).outline().component_map
    assert found.reach[Pair("mood", ("words",))] == {"encoder/words", "trunk", "head/all"}


@pytest.mark.parametrize(
    ("patterns", "problem"),
    [
        ({"all": "image.*"}, "tensor 'words.weight_ih_l0' fits no component: change the patterns"),
        ({"all": "*", "head": "heads.*"}, "tensor 'heads.digits.weight' fits the components 'all', 'head'"),
        ({"all": "*", "tail": "tails.*"}, "component 'tail' fits no trainable tensor: the model has image.weight"),
    ],
)
def test_patterns_that_do_not_fit(patterns: dict[str, str], problem: str) -> None:
    made = Client("cleo", BOTH.model, BOTH.tasks, components=patterns)
    with pytest.raises(ClientError, match=problem) as error:
        holdings(made).outline()
    assert str(error.value).startswith("client 'cleo': ")


class Two(nn.Module):
    """A layer of which each task reaches one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterDict({"a": nn.Parameter(torch.ones(3)), "b": nn.Parameter(torch.ones(3))})


def test_a_layer_that_pairs_reach_in_part() -> None:
    net = Two()
    reached = {Pair("a", ("x",)): ["scales.a"], Pair("b", ("x",)): ["scales.b"]}
    with pytest.raises(ClientError, match="task 'a' reaches some tensors of 'scales' and not others"):
        component_map(net, reached)
    split = component_map(net, reached, {"a": "*.a", "b": "*.b"})
    assert split.reach == {Pair("a", ("x",)): {"a"}, Pair("b", ("x",)): {"b"}}


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.ones(3))

    def see(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :3] * self.own


class Said(Odd):
    INITIALS = {"own": Initial("constant", 2.0)}  # noqa: RUF012


def test_how_a_tensor_of_ones_own_starts_must_be_said() -> None:
    with pytest.raises(ClientError, match="no initial value is defined for Odd.own .* INITIALS"):
        holdings(Client("ann", Odd, [digits(0)])).outline()
    said = holdings(Client("ann", Said, [digits(0)])).outline()
    assert said.component_map.component_of == {"components.own": "own"}
    assert said.initialise(1).components.own.tolist() == [2.0, 2.0, 2.0]


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        (normed, "1 is a BatchNorm1d that keeps running statistics"),
        (lambda: nn.Linear(4, 3).requires_grad_(False), "the model has no trainable tensor"),
        (lambda: nn.Linear(4, 3).double(), "tensor 'weight' is torch.float64: trainable tensors must be torch.float32"),
    ],
)
def test_models_that_are_refused(model: Any, problem: str) -> None:
    task = Task(
        "t", REGRESSION, ["x"], pixels(8, 1), pixels(8, 2), lambda net, b: net(b[0].to(net_dtype(net))), one_hot
    )
    with pytest.raises(ClientError, match=problem):
        holdings(Client("ann", model, [task])).outline()


def net_dtype(net: nn.Module) -> torch.dtype:
    return next(net.parameters()).dtype


def one_hot(batch: Any) -> torch.Tensor:
    return nn.functional.one_hot(batch[1], 3).float()


def test_a_task_whose_loss_reaches_nothing() -> None:
    task = Task("t", REGRESSION, ["x"], pixels(8, 1), pixels(8, 2), lambda _, batch: batch[0][:, :3], one_hot)
    with pytest.raises(ClientError, match="client 'ann': task 't': its loss depends on no trainable tensor"):
        holdings(Client("ann", lambda: Net("digits"), [task])).outline()


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        (lambda: Client("a b", Net, [digits(0)]), "client 'a b': use a name"),
        (lambda: Client("ann", Net, []), "client 'ann' has the tasks \\[\\]"),
        (lambda: Client("ann", Net, [digits(0), digits(1)]), "each with its own name"),
        (lambda: mood(0, margin=-1.0), "task 'mood' has margin -1.0: give a number from 0 on"),
    ],
)
def test_definitions_that_are_refused(wrong: Any, problem: str) -> None:
    with pytest.raises(ClientError, match=problem):
        wrong()
