"""Components by tracing and by patterns, and what is refused."""

from __future__ import annotations

import re
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tap_flower import IMAGE_CLASSIFICATION, IMAGE_GENERATION, Client, Pair, Task, TaskKind
from tap_flower.client.module import OwnModel, adapted
from tap_flower.config import HyperParameters
from tap_flower.core.components import ComponentMap, ComponentModel, cpu_state
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


class Small(nn.Module):
    """A linear layer; subclasses hold more than its tensors."""

    def __init__(self, **buffers: Tensor | None) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(x)
        return out


def small(model: Any, **more: Any) -> Client:
    task = Task(
        "t",
        IMAGE_CLASSIFICATION,
        ["x"],
        pixels(24, 1),
        pixels(8, 2),
        **{"forward": lambda net, b: net(b[0]), "target": lambda b: b[1], **more},
    )
    return Client("ann", model, [task])


class Counts(Small):
    """Keeps a number, a hidden state with its graph, and a list."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.features, self.seen = 0, torch.zeros(()), [0]

    def forward(self, x: Tensor) -> Tensor:
        self.step += 1
        self.features = super().forward(x)
        self.seen.append(len(x))
        return self.features


def test_what_a_model_keeps_beside_its_tensors_ends_with_it(caplog: pytest.LogCaptureFixture) -> None:
    made = small(Counts).session(HyperParameters())
    assert "'step' of the model changes while the model is used, and is not kept" in caplog.text
    made.train_round(1, None, "server")
    for session in (made, small(Counts).session(HyperParameters())):
        net: Any = session.model().own_module
        assert (net.step, net.features.grad_fn, net.seen) == (0, None, [0])
    caplog.clear()
    small(Small).session(HyperParameters()).train_round(1, None, "server")
    assert caplog.text == ""


def test_what_a_loop_leaves_on_its_module_is_gone_at_its_next_call() -> None:
    found = []

    def fit(net: Any, loader: Any, config: Any) -> None:
        found.append((hasattr(net, "weights"), bool(net.head.weight._backward_hooks)))
        net.weights = 1
        net.head.weight.register_hook(lambda gradient: gradient / 2)
        x, y = next(iter(loader))
        nn.functional.cross_entropy(net(x), y).backward()
        torch.optim.SGD(net.parameters(), lr=0.1).step()

    client = small(Small, fit=fit)
    tasks = [replace(task, train=DataLoader(pixels(24, 1), batch_size=6)) for task in client.tasks]
    made = replace(client, tasks=tasks).session(HyperParameters())
    for part in (1, 2, 3):
        made.train_round(part, None, "server")
    assert found == [(False, False)] * 3


class Closed(Small):
    def __init__(self) -> None:
        super().__init__()
        self.heads = {"a": lambda z: self.head(z)}


class Hooked(Small):
    def __init__(self) -> None:
        super().__init__()
        self.head.register_forward_hook(lambda _, __, output: setattr(self, "penalty", output.square().mean()))


class Patched(Small):
    def __init__(self) -> None:
        super().__init__()
        before = self.head.forward
        self.head.forward = lambda x: before(x) + 1  # type: ignore[method-assign]


class Shared(Small):
    def __deepcopy__(self, memo: Any) -> Shared:
        return self


class Masked(Small):
    def __init__(self) -> None:
        super().__init__()
        self.head.bias.register_hook(lambda gradient: gradient * 0)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        (Closed, "the model's 'heads' holds a function that uses the model itself"),
        (Hooked, "the model's 'head._forward_hooks' holds a function that uses the model itself"),
        (Patched, "the model's 'head.forward' holds a function that uses the model itself"),
        (Shared, "a copy of the model shares the trainable tensor 'head.weight' with it"),
        (Masked, "tensor 'head.bias' has a gradient hook, which copies lack"),
        (lambda: Small(adj=torch.eye(4).to_sparse()), "the buffer 'adj' is torch.sparse_coo: register a dense tensor"),
    ],
)
def test_models_whose_copies_would_be_others_are_refused(model: Any, problem: str) -> None:
    with pytest.raises(ClientError, match=problem):
        outline(small(model))


class Tagged(Small):
    """Attributes of a parameter, a bound method, a partial view of one value, a hook that uses no model."""

    def __init__(self) -> None:
        super().__init__(ones=torch.ones(1).expand(4))
        self.head.bias.no_decay = True  # type: ignore[attr-defined]
        self.run = self.shifted
        self.head.register_forward_hook(lambda _, __, output: output * 2)

    def shifted(self, x: Tensor) -> Tensor:
        return self.head(x * self.ones)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


def test_copies_have_the_attributes_of_parameters_and_methods_of_their_own() -> None:
    made = small(Tagged).session(HyperParameters())
    made.train_round(1, None, "server")
    net: Any = made.model().own_module
    assert net.head.bias.no_decay
    assert net.run.__self__ is net


class Codes(Small):
    """Moves a buffer through `.data`, as implementations of VQ-VAE do."""

    def __init__(self) -> None:
        super().__init__(codes=torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if self.training:
            self.codes.data.mul_(0.9).add_(out.detach().mean(0))
        return out - self.codes


def test_a_buffer_that_is_changed_through_data_is_part_of_the_state() -> None:
    made = small(Codes).session(HyperParameters())
    assert made.outline.moving == {"codes"}
    assert made.train_round(1, None, "server")[0]["codes"].any()


class Slow(Small):
    """A momentum encoder, which begins with the values of the one that is trained."""

    def __init__(self, late: bool = False) -> None:
        super().__init__()
        self.slow, self.late = deepcopy(self.head).requires_grad_(False), late

    def forward(self, x: Tensor) -> Tensor:
        if self.training and (len(x) > 8 or not self.late):
            for own, slow in zip(self.head.parameters(), self.slow.parameters(), strict=True):
                slow.data.mul_(0.9).add_(own.data, alpha=0.1)
        return super().forward(x) + self.slow(x)


class Late(Small):
    """Changes a buffer in batches larger than those that it is tried with."""

    def __init__(self, **buffers: Tensor) -> None:
        super().__init__(**buffers or {"centre": torch.zeros(3)})

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if self.training and len(x) > 8:
            self.centre = 0.9 * self.centre + out.detach().mean(0)
        return out - self.centre


class Growing(Small):
    def __init__(self) -> None:
        super().__init__(places=torch.zeros(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > len(self.places):
            self.places = torch.zeros(len(x), 3)
        return super().forward(x) + self.places[: len(x)]


class Queue(Small):
    def __init__(self) -> None:
        super().__init__(queue=torch.empty(0, 3))

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        self.queue = torch.cat([self.queue, out.detach()])[-8:]
        return out


class Unset(Small):
    def __init__(self) -> None:
        super().__init__(mean=None)

    def forward(self, x: Tensor) -> Tensor:
        if self.mean is None:
            self.mean = x.mean(0).detach()
        return super().forward(x - self.mean)


class Total(Small):
    def __init__(self, value: Tensor) -> None:
        super().__init__(total=value)

    def forward(self, x: Tensor) -> Tensor:
        self.total += len(x)
        return super().forward(x)


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        (Slow, "training changes the frozen parameter 'slow.bias': make it a buffer, or train it"),
        (Unset, "training changes the buffer 'mean', which is None or missing when `model` returns"),
        (Growing, r"training changes the shape of the buffer 'places' from \[4, 3\] to \[8, 3\]"),
        (Queue, r"training changes the shape of the buffer 'queue' from \[0, 3\] to \[8, 3\]"),
        (lambda: Total(torch.zeros((), dtype=torch.float64)), "'total', which is torch.float64 and is kept in float32"),
        (lambda: Total(torch.tensor(2**24 + 1)), "'total', which is kept in float32 and begins with a larger integer"),
        (lambda: Total(torch.tensor(-torch.inf)), "'total', which begins with a value that is not finite"),
    ],
)
def test_what_training_changes_and_cannot_be_kept_is_refused_by_name(model: Any, problem: str) -> None:
    for _ in range(2):  # the module is built anew: what is frozen has its first values again
        with pytest.raises(ClientError, match=problem):
            outline(small(model))


@pytest.mark.parametrize(("model", "name"), [(Late, "centre"), (lambda: Slow(late=True), "slow.weight")])
def test_what_training_changes_later_is_refused_by_name(model: Any, name: str) -> None:
    made = small(model).session(HyperParameters())
    before = made.model().own_module.state_dict()[name].clone()
    with pytest.raises(ClientError, match=f"training has changed '{name}', which a few batches before the first round"):
        made.train_round(1, None, "server")
    assert made.model().own_module.state_dict()[name].equal(before)


def test_a_count_that_float32_cannot_hold_is_refused() -> None:
    made = small(lambda: Total(torch.tensor(2**24 - 40))).session(HyperParameters())
    model = made.model()
    assert float(cpu_state(model)["total"]) == 2**24 - 40
    model.own_module.get_buffer("total").add_(41)
    with pytest.raises(ClientError, match="the buffer 'total' has reached 16777217, and is kept in float32"):
        cpu_state(model)
