"""Components by tracing and by patterns, and what is refused."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from tap_flower import IMAGE_GENERATION, Client, Pair, Task, TaskKind
from tap_flower.client.module import OwnModel, adapted
from tap_flower.config import HyperParameters
from tap_flower.core.components import ComponentMap, ComponentModel
from tap_flower.core.module_tensors import BuiltModule
from tap_flower.core.tracing import Parts
from tap_flower.errors import ClientError
from tests.own_clients import REGRESSION, Net, client, digits, mood, pixels

BOTH = client(2)


def outline(made: Client) -> ComponentModel:
    return made.session(HyperParameters(seed=1)).outline


def test_components_are_layers_and_each_pair_reaches_its_own() -> None:
    found = outline(BOTH).component_map
    shared = {"trunk.0", "trunk.1"}
    assert found.reach == {
        Pair("digits", ("image",)): shared | {"image", "heads.digits"},
        Pair("mood", ("words",)): shared | {"words", "heads.mood"},
    }
    assert found.component_of["trunk.1.bias"] == "trunk.1"
    assert {c for n, c in found.component_of.items() if n.startswith("words.")} == {"words"}


def test_components_by_patterns() -> None:
    patterns = {"encoder/image": "image.*", "encoder/words": "words.*", "trunk": ["trunk.*"], "head/all": "heads.*"}
    made = Client("cleo", BOTH.model, [BOTH.tasks[0], BOTH.tasks[1]], components=patterns)
    found = outline(made).component_map
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
        outline(made)
    assert str(error.value).startswith("client 'cleo': ")


class Two(nn.Module):
    """A layer of which each task reaches one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterDict({"a": nn.Parameter(torch.ones(3)), "b": nn.Parameter(torch.ones(3))})


def scaled(name: str) -> Task:
    return Task(
        name, REGRESSION, ["x"], pixels(8, 1), pixels(8, 2), lambda net, b: b[0][:, :3] * net.scales[name], one_hot
    )


def test_a_layer_that_pairs_reach_in_part() -> None:
    tasks = [scaled("a"), scaled("b")]
    with pytest.raises(ClientError, match="task 'a' reaches some tensors of 'scales' and not others"):
        outline(Client("ann", Two, tasks))
    split = outline(Client("ann", Two, tasks, components={"a": "*.a", "b": "*.b"}))
    assert {pair.task: components for pair, components in split.component_map.reach.items()} == {"a": {"a"}, "b": {"b"}}
    both = outline(Client("ann", Two, tasks, reach={"a": ["scales.*"], "b": "scales.*"}))
    assert {pair.task: components for pair, components in both.component_map.reach.items()} == {
        "a": {"scales"},
        "b": {"scales"},
    }


@pytest.mark.parametrize(
    ("reach", "problem"),
    [
        ({"c": "*"}, "`reach` names the task 'c': the client has no such task"),
        (
            {"a": ["scales.*", "trunk.*"]},
            "`reach` of task 'a': 'trunk.\\*' fits no trainable tensor: the model has scales.a",
        ),
    ],
)
def test_a_reach_that_does_not_fit(reach: Any, problem: str) -> None:
    with pytest.raises(ClientError, match=problem):
        outline(Client("ann", Two, [scaled("a"), scaled("b")], reach=reach))


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        (lambda: "net", "`model` returned a str: give a function that builds a torch.nn.Module"),
        (lambda: nn.Linear(4, 3).requires_grad_(False), "the model has no trainable tensor"),
        (lambda: nn.LazyLinear(3), "tensor 'weight' has no shape yet, being of a lazy layer: give the layer its sizes"),
        (lambda: nn.Linear(4, 3).double(), "tensor 'weight' is torch.float64: trainable tensors must be torch.float32"),
    ],
)
def test_models_that_are_refused(model: Any, problem: str) -> None:
    task = Task(
        "t", REGRESSION, ["x"], pixels(8, 1), pixels(8, 2), lambda net, b: net(b[0].to(net_dtype(net))), one_hot
    )
    with pytest.raises(ClientError, match=problem):
        outline(Client("ann", model, [task]))


def net_dtype(net: nn.Module) -> torch.dtype:
    return next(net.parameters()).dtype


def one_hot(batch: Any) -> torch.Tensor:
    return nn.functional.one_hot(batch[1], 3).float()


@pytest.mark.parametrize(
    ("change", "returned"),
    [
        (lambda y: y.float(), "`target` float32 [2]"),
        (lambda y: y.to(torch.uint8), "`target` uint8 [2]"),  # torch takes it, and counts 256 as 0
        (lambda y: y[:, None], "`target` int64 [2, 1]"),
        (lambda y: nn.functional.one_hot(y, 3).float(), "`target` float32 [2, 3]"),
    ],
)
def test_labels_of_another_type_or_shape_are_refused(change: Any, returned: str) -> None:
    task = replace(digits(0), target=lambda batch: change(batch[1]))
    words = re.escape(
        "compares logits [examples, classes] with the numbers of classes, int64 [examples], and `forward` "
    )
    with pytest.raises(ClientError, match=words + "returned float32 .2, 3., " + re.escape(returned)):
        outline(Client("ann", lambda: Net("digits"), [task]))


@pytest.mark.parametrize("squeezes", [False, True])
def test_targets_that_torch_would_stretch_to_every_output_are_refused(squeezes: bool) -> None:
    kind = TaskKind.of(
        "number",
        losses=(lambda o, t: (o.squeeze(-1) - t).square()) if squeezes else (lambda o, t: (o - t).square().mean(-1)),
        divergences=lambda student, teacher, target, temperature: (student - teacher).square().mean(-1),
    )
    data = TensorDataset(torch.rand(8, 4), torch.rand(8))
    task = Task("t", kind, ["x"], data, data, lambda net, b: net(b[0]), lambda b: b[1])
    one = Client("ann", lambda: nn.Linear(4, 1), [task])
    if squeezes:
        assert outline(one)
    else:
        with pytest.raises(
            ClientError, match=r"shape \[2, 1\], `target` \[2\], and the losses of kind 'number' compare"
        ):
            outline(one)


def test_images_that_torch_would_stretch_to_each_other_are_refused() -> None:
    images = TensorDataset(torch.rand(8, 3, 4, 4))
    task = Task("t", IMAGE_GENERATION, ["image"], images, images, lambda net, b: net(b[0]), lambda b: b[0][:, :1])
    with pytest.raises(ClientError, match=re.escape("returned float32 [2, 3, 4, 4], `target` float32 [2, 1, 4, 4]")):
        outline(Client("ann", lambda: nn.Conv2d(3, 3, 1), [task]))


def test_a_task_whose_loss_reaches_nothing() -> None:
    task = Task("t", REGRESSION, ["x"], pixels(8, 1), pixels(8, 2), lambda _, batch: batch[0][:, :3], one_hot)
    with pytest.raises(ClientError, match="client 'ann': task 't': its loss depends on no trainable tensor"):
        outline(Client("ann", lambda: Net("digits"), [task]))


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


def test_an_own_model_keeps_names_and_modes_of_its_module() -> None:
    given = Net("digits", "mood", dropout=0.5)
    made = OwnModel(BuiltModule(given), {}, Parts(ComponentMap({}, {}), frozenset(), frozenset()))
    net: Any = made.own_module
    assert net is not given
    assert dict(made.named_parameters()).keys() == dict(net.named_parameters()).keys()
    assert not made.eval().training
    assert not net.training
    assert not net.trunk[2].training
    assert made.train().training
    assert net.training
    made.to(torch.float64)
    assert {p.dtype for p in net.parameters()} == {torch.float64}


class Doubled(ComponentModel):
    def forward(self, task: str, inputs: Any) -> torch.Tensor:
        return 2 * inputs["x"]


def test_a_component_model_runs_its_own_inputs_and_the_batches_of_a_users_data() -> None:
    model = adapted(Doubled(), {"t": lambda net, batch: net("t", {"x": batch[0]}) + 1})
    assert float(model("t", {"x": torch.tensor(3.0)})) == 6.0
    assert float(model("t", {"batch": [torch.tensor(3.0)]})) == 7.0


def test_a_task_without_forward_or_target() -> None:
    whole = digits(0)
    with pytest.raises(ClientError, match="client 'ann': task 'digits': it has no `forward`"):
        outline(Client("ann", lambda: Net("digits"), [replace(whole, forward=None)]))
    with pytest.raises(ClientError, match="client 'ann': task 'digits' has no `target`"):
        outline(Client("ann", lambda: Net("digits"), [replace(whole, target=None)]))
