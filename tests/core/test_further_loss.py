"""A further loss in a loop of the project's own has the gradients of the explicit sum."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tap_flower.core.components import ComponentModel
from tap_flower.core.further_loss import further_loss
from tap_flower.core.objectives import Distillation, Proximal
from tap_flower.core.tasks import IMAGE_CLASSIFICATION
from tap_flower.core.training import CALL, Batch
from tap_flower.errors import ClientError

Loss = Callable[[Tensor, Tensor], Tensor]


class Net(ComponentModel):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return self.net(x)


class Outputs(dict[str, Any]):
    """As transformers' outputs: items that are attributes, too."""

    __getattr__ = dict.__getitem__


class WithItsOwnLoss(Net):
    def forward(self, x: Tensor, labels: Tensor | None = None) -> Outputs:  # type: ignore[override]
        logits = self.net(x)
        return (
            Outputs(logits=logits) if labels is None else Outputs(loss=F.cross_entropy(logits, labels), logits=logits)
        )


def data(batches: int = 6, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    drawn = torch.Generator().manual_seed(3)
    return [
        (torch.randn(size, 4, generator=drawn), torch.randint(0, 3, (size,), generator=drawn)) for _ in range(batches)
    ]


def pair(kind: type[Net] = Net) -> tuple[Net, Net]:
    torch.manual_seed(0)
    return kind().double().float(), kind()


def distillation(teacher: Net) -> Distillation:
    return Distillation(teacher, {"t": IMAGE_CLASSIFICATION}, {"t": 0.7}, 2.0)


def loop(net: Net, loss: Loss, accumulation: int = 1, scale: float = 1.0) -> list[Tensor]:
    """A loop as people write it: accumulation, and the scale of a GradScaler, which is taken off before the step."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for number, (x, y) in enumerate(data(), 1):
        value = loss(net(x), y) / accumulation if accumulation > 1 else loss(net(x), y)
        (value * torch.tensor(scale)).backward()
        if number % accumulation == 0:
            for parameter in net.parameters():
                assert parameter.grad is not None
                parameter.grad /= scale
            optimizer.step()
            optimizer.zero_grad()
    return [parameter.detach().clone() for parameter in net.parameters()]


def explicit(net: Net, term: Callable[[Tensor, Tensor], Tensor], loss: Loss, accumulation: int = 1) -> list[Tensor]:
    def summed(output: Tensor, y: Tensor) -> Tensor:
        return loss(output, y) + term(output, x_of[id(y)])

    x_of: dict[int, Tensor] = {}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for number, (x, y) in enumerate(data(), 1):
        x_of[id(y)] = x
        (summed(net(x), y) / accumulation).backward()
        if number % accumulation == 0:
            optimizer.step()
            optimizer.zero_grad()
    return [parameter.detach().clone() for parameter in net.parameters()]


def summed_by_hand(output: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(output, y, reduction="sum") / len(y)


@pytest.mark.parametrize("loss", [F.cross_entropy, summed_by_hand], ids=["mean", "sum / rows"])
@pytest.mark.parametrize(("accumulation", "scale"), [(1, 1.0), (3, 1.0), (1, 1024.0), (2, 64.0)])
@pytest.mark.parametrize("which", ["distillation", "proximal"])
def test_the_gradients_are_those_of_the_explicit_sum(which: str, accumulation: int, scale: float, loss: Loss) -> None:
    net, teacher = pair()
    anchor = {name: value.detach().clone() + 0.1 for name, value in net.named_parameters()}
    by_hand = copy.deepcopy(net)

    def distilled(output: Tensor, x: Tensor) -> Tensor:
        with torch.no_grad():
            soft = F.softmax(teacher(x) / 2, -1)
        return 0.7 * 4 * F.kl_div(F.log_softmax(output / 2, -1), soft, reduction="batchmean")

    def near(output: Tensor, x: Tensor) -> Tensor:
        del output, x
        return sum(0.15 * (p - anchor[n]).square().sum() for n, p in by_hand.named_parameters())  # type: ignore[return-value]

    objective = distillation(teacher) if which == "distillation" else Proximal(net, anchor, 0.3)
    alone = loop(copy.deepcopy(net), loss, accumulation, scale)
    with further_loss(net, "t", objective):
        found = loop(net, loss, accumulation, scale)
    wanted = explicit(by_hand, distilled if which == "distillation" else near, loss, accumulation)
    for one, other, without in zip(found, wanted, alone, strict=True):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=1e-5)
        assert (one - without).abs().max() > 1e-4


@pytest.mark.parametrize("uses", ["loss", "logits"])
def test_a_module_that_computes_its_own_loss_gets_the_term_once(uses: str) -> None:
    net, teacher = pair(WithItsOwnLoss)
    x, y = data()[0]
    with torch.no_grad():
        soft = F.softmax(teacher(x).logits / 2, -1)
    out = net(x, labels=y)
    (out.loss + 0.7 * 4 * F.kl_div(F.log_softmax(out.logits / 2, -1), soft, reduction="batchmean")).backward()
    wanted = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    net.zero_grad()
    with further_loss(net, "t", distillation(teacher)):
        out = net(x, labels=y)
        assert out.loss.item() == F.cross_entropy(out.logits, y).item()  # the loop sees what it saw before
        (8 * (out.loss if uses == "loss" else F.cross_entropy(out.logits, y))).backward()
    for parameter, gradient in zip(net.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, 8 * gradient, atol=1e-5, rtol=1e-5)


class WithAFurtherLoss(Net):
    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        logits = self.net(x)
        return {"logits": logits, "router": logits.square().mean()}


@pytest.mark.parametrize("weight", [1.0, 0.01])
def test_the_weight_of_a_further_loss_of_the_module_does_not_scale_the_term(weight: float) -> None:
    net, (x, _) = WithAFurtherLoss(), data()[0]
    found = []
    for objective in (None, lambda batch, output: output.sum()):
        net.zero_grad()
        with further_loss(net, "t", objective):
            out = net(x)
            explicit = 0.0 if objective else out["logits"].sum()
            (0 * out["logits"].mean() + weight * out["router"] + explicit).backward()
        found.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("term", ["sum", "proximal"])
def test_a_sum_over_parameters_is_no_sum_over_examples(term: str) -> None:
    net, (x, y) = Net(), data(size=4)[0]
    anchor = {name: torch.zeros_like(value) for name, value in net.named_parameters()}
    objective = Proximal(net, anchor, 1.0) if term == "proximal" else lambda batch, output: output.sum()
    found = []
    for weight in (None, 0.0):
        net.zero_grad()
        with further_loss(net, "t", objective):
            loss = F.cross_entropy(net(x), y)
            loss = loss if weight is None else loss + weight * net.net[0].weight.square().sum()
            (loss / 4).backward()  # of four that are accumulated; there are four rows, too
        found.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    torch.testing.assert_close(*found)


def logs_first(loss: Tensor) -> None:
    torch.autograd.grad(loss, [node.variable for node in leaves(loss)], retain_graph=True)
    loss.backward()


def leaves(root: Tensor) -> list[Any]:
    """The nodes that add a gradient to a parameter."""
    found, nodes = {}, [root.grad_fn]
    while nodes:
        if (node := nodes.pop()) is not None and node not in found:
            found[node] = hasattr(node, "variable")
            nodes += [below for below, _ in node.next_functions]
    return [node for node, leaf in found.items() if leaf]


@pytest.mark.parametrize("which", ["distillation", "proximal"])
@pytest.mark.parametrize(
    ("factor", "backward"),
    [
        (1, logs_first),
        (0.25, lambda loss: loss.backward(torch.tensor(0.25))),
        (0.25, lambda loss: torch.autograd.backward(loss / 4)),
        (0.25, lambda loss: torch.autograd.backward([loss], [torch.tensor(0.25)])),
        (0.25, lambda loss: (loss / 4).mean().backward()),
        (0.25, lambda loss: torch.stack([loss / 4]).sum().backward()),
        (0.25, lambda loss: (-(-loss / 4)).backward()),
    ],
    ids=["autograd.grad before", "gradient", "autograd.backward", "grad_tensors", "mean", "stack", "minus"],
)
def test_each_way_to_a_backward_pass_has_the_term(which: str, factor: float, backward: Any) -> None:
    net, teacher = pair()
    x, y = data()[0]
    anchor = {name: value.detach() + 0.1 for name, value in net.named_parameters()}
    objective = distillation(teacher) if which == "distillation" else Proximal(net, anchor, 0.3)
    (factor * (F.cross_entropy(net(x), y) + objective(Batch("t", {CALL: ((x,), {})}, y), net(x)))).backward()
    wanted = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    net.zero_grad()
    with further_loss(net, "t", objective):
        backward(F.cross_entropy(net(x), y))
    for parameter, gradient in zip(net.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_the_sign_of_a_loss_is_not_that_of_the_term() -> None:
    net, (x, y) = Net(), data()[0]
    found = []
    for likelihood in (False, True):
        net.zero_grad()
        with further_loss(net, "t", lambda batch, output: output.square().sum()):
            chosen = F.log_softmax(net(x), -1)[range(len(y)), y].mean()
            (-chosen if likelihood else F.cross_entropy(net(x), y)).backward()
        found.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    "backward",
    [lambda loss: torch.autograd.backward([loss, loss / 4]), lambda loss: loss.expand(2).backward(torch.ones(2))],
    ids=["two factors", "many values"],
)
def test_a_backward_pass_of_no_one_factor_is_refused(backward: Any) -> None:
    net, teacher = pair()
    x, y = data()[0]
    words = "task 't': the method's further loss needs one number to belong to, and `fit` has called `backward`"
    with pytest.raises(ClientError, match=words), further_loss(net, "t", distillation(teacher)):
        backward(F.cross_entropy(net(x), y))


def test_checkpointed_layers_do_not_hide_the_factor() -> None:
    """Reentrant checkpointing makes a backward pass inside the backward pass."""

    class Checkpointed(Net):
        def forward(self, x: Tensor) -> Any:  # type: ignore[override]
            return self.net[2](checkpoint(self.net[:2], x, use_reentrant=True))

    found = []
    for kind in (Net, Checkpointed):
        net, teacher = pair(kind)
        x, y = data()[0]
        with further_loss(net, "t", distillation(teacher)):
            (F.cross_entropy(net(x.requires_grad_()), y) / 4).backward()
        found.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    torch.testing.assert_close(*found)


def test_a_loss_of_many_additions() -> None:
    net, (x, y) = Net(), data()[0]
    with further_loss(net, "t", distillation(Net())):
        loss = F.cross_entropy(net(x), y)
        for _ in range(2000):
            loss = loss + 1
        (loss / 2).backward()


def test_under_autocast_the_term_is_that_of_the_explicit_sum() -> None:
    net, teacher = pair()
    x, y = data()[0]
    gradients = []
    for hooked in (False, True):
        net.zero_grad()
        objective = distillation(teacher)
        with further_loss(net, "t", objective if hooked else None), torch.autocast("cpu", torch.bfloat16):
            output = net(x)
            term = 0.0 if hooked else objective(Batch("t", {CALL: ((x,), {})}, y), output)
            (F.cross_entropy(output, y) + term).backward()
        gradients.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=2e-2, rtol=2e-2)


def test_a_pass_that_is_not_trained_on_adds_nothing_and_hooks_are_gone_afterwards() -> None:
    net, teacher = pair()
    (x, y), (other, _) = data()[:2]
    backward = torch.autograd.backward
    gradients = []
    for looks in (False, True):
        net.zero_grad()
        with further_loss(net, "t", distillation(teacher)):
            if looks:
                net(other)  # for its accuracy, say
            F.cross_entropy(net(x), y).backward()
        gradients.append(next(net.parameters()).grad.clone())  # type: ignore[union-attr]
    assert gradients[0].equal(gradients[1])
    assert torch.autograd.backward is backward
    assert not net._forward_hooks


def own_way(net: Net) -> None:
    x, y = data()[0]
    F.cross_entropy(net.net(x), y).backward()


@pytest.mark.parametrize("fit", [own_way, lambda net: None], ids=["calls a part of the module", "does nothing"])
def test_a_loop_that_the_term_does_not_reach_is_refused(fit: Callable[[Net], None]) -> None:
    net, teacher = pair()
    words = "task 't': the method's further loss has not reached the loop in `fit`"
    with pytest.raises(ClientError, match=words), further_loss(net, "t", distillation(teacher)):
        fit(net)
