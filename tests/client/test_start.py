"""What is tried before the first round: forward, loss, divergence and metrics of every task; errors name the user's line."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tap_flower import Client, TapClientApp, Task, TaskKind
from tap_flower.client.module import built_module
from tap_flower.config import HyperParameters
from tap_flower.core.components import ComponentModel, trainable_state
from tap_flower.core.module_tensors import still_norms
from tap_flower.errors import ClientError, RunError
from tap_flower.methods.session import Session
from tests.own_clients import REGRESSION, Net, digits, pixels
from tests.small_projects import federate


def session(made: Client) -> Session:
    return made.session(HyperParameters(seed=1))


def net() -> nn.Module:
    return Net("digits")


def line_of(function: Callable[..., Any], after: int = 0) -> str:
    return f"test_start.py:{function.__code__.co_firstlineno + after}"


def broken(module: Any, batch: Any) -> Tensor:
    return module.see(batch[0][:, :2])


def two(module: Any, batch: Any) -> tuple[Tensor, Tensor]:
    return module.see(batch[0]), batch[0]


def missing(batch: Any) -> Tensor:
    return batch["label"]


def out_of_range(batch: Any) -> Tensor:
    return batch[1] + 7


def halved(module: Any, batch: Any) -> Tensor:
    return module.see(batch[0].mul_(0.5))


def without_labels(module: Any, batch: Any) -> Tensor:
    batch.pop()
    return module.see(batch[0])


def freezing(module: Any, batch: Any) -> Tensor:
    module.image.requires_grad_(False)
    return module.see(batch[0])


def scalar(output: Tensor, target: Tensor) -> Tensor:
    return (output - nn.functional.one_hot(target, 3)).square().mean()


def apart(student: Tensor, teacher: Tensor, target: Tensor, temperature: float) -> Tensor:
    return (student - teacher).square().mean(-1)


def measured(metrics: dict[str, Any]) -> TaskKind:
    """A classification with metrics beside its loss and its accuracy."""
    ours = digits(0).kind
    return replace(ours, name="own", metrics=lambda sums: {**ours.metrics(sums), **metrics})


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"forward": broken}, "`forward` raised RuntimeError: toys.py:[0-9]+, the log of the node"),
        ({"target": missing}, f"`target`, or its data, raised TypeError: {line_of(missing, 1)}"),
        (
            {"target": out_of_range},
            "a label is outside of the model's outputs, which are numbered from 0: give the model as many",
        ),
        ({"forward": two}, "`forward` returned a tuple of Tensor: return a tensor, of a classifier the logits"),
        (
            {"kind": TaskKind.of("own", scalar, apart)},
            "the losses are one for each example or token, .* not of shape \\(\\)",
        ),
        (
            {"kind": TaskKind.of("own", lambda o, t: apart(o, o, t, 1.0), lambda s, t, y, k: scalar(s, y))},
            "the divergences are one for each",
        ),
        (
            {"kind": replace(digits(0).kind, name="own", headline="auc")},
            "the metrics of kind 'own' lack 'auc': add it",
        ),
        (
            {"forward": halved},
            "`forward` changes '0' of its batch, which a second model, .* is called with, too: let it",
        ),
        ({"forward": without_labels}, "`forward` removes '1' of its batch"),
        ({"forward": freezing}, "`forward` freezes 'image.weight': `requires_grad` must stay as `model` returns it"),
        ({"kind": measured({"top-1 / all": 0.5})}, "returned a metric whose name the node's log shows: use letters"),
        ({"kind": measured({"f1": None})}, "the metrics of kind 'own' returned f1 of type NoneType: return numbers"),
        ({"kind": measured({"f1": torch.ones(3)})}, "the metrics of kind 'own' returned f1 of type Tensor"),
        (
            {"kind": measured(dict.fromkeys(map(str, range(100)), 0.5))},
            "returned 103 numbers, and at most 100 are taken",
        ),
    ],
)
def test_an_error_names_the_users_line(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(ClientError, match=f"client 'ann': task 'digits': .*{problem}"):
        session(Client("ann", net, [replace(digits(0), **change)]))


@pytest.mark.parametrize(
    ("sizes", "problem"),
    [
        ({"head_size": 10, "classes": ["a", "b", "c"]}, "10 classes by `head_size`, and `forward` .* the logits of 3"),
        ({"head_size": 3, "classes": ["a", "b"]}, "2 classes by `classes`, and `forward` .* the logits of 3: correct"),
    ],
)
def test_a_number_of_classes_that_the_output_has_not(sizes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ClientError, match=f"client 'ann': task 'digits' has {problem}"):
        session(Client("ann", net, [digits(0, **sizes)]))
    assert session(Client("ann", net, [digits(0, head_size=3, classes=["a", "b", "c"])]))


def test_a_batch_may_be_added_to() -> None:
    def adding(module: Any, batch: Any) -> Tensor:
        batch.append(batch[0] > 0)
        return module.see(batch[0])

    assert session(Client("ann", net, [replace(digits(0), forward=adding)]))


class Looked(Net):
    """Looks a row up, with a sparse gradient."""

    def __init__(self) -> None:
        super().__init__("digits")
        self.table = nn.Embedding(3, 4, sparse=True)

    def see(self, pixels: Tensor) -> Tensor:
        return super().see(pixels + self.table(pixels[:, :3].argmax(1)))


class Freezes(Net):
    def __init__(self) -> None:
        super().__init__("digits")

    def train(self, mode: bool = True) -> Freezes:
        super().train(mode)
        self.trunk.requires_grad_(False)
        return self


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        (
            Looked,
            "task 'digits': the gradient of 'table.weight' is sparse, and AdamW needs a dense one: build the layer",
        ),
        (Freezes, "the model's own `train` freezes 'trunk.0.weight': `requires_grad` must stay as `model` returns it"),
    ],
)
def test_what_cannot_be_trained_in_every_round_is_refused(model: type[nn.Module], problem: str) -> None:
    for name in ("ann", "bob"):  # of one process
        with pytest.raises(ClientError, match=f"client '{name}': {problem}"):
            session(Client(name, model, [digits(0)]))


class Recomputed(Net):
    def __init__(self) -> None:
        super().__init__("digits")

    def see(self, pixels: Tensor) -> Tensor:
        return self.heads["digits"](checkpoint(self.trunk, self._seen(pixels), use_reentrant=True))


def test_what_checkpointing_with_reentrant_autograd_reaches() -> None:
    (reached,) = session(Client("ann", Recomputed, [digits(0)])).outline.component_map.reach.values()
    assert reached == {"image", "trunk.0", "trunk.1", "heads.digits"}


def test_a_metric_that_is_not_the_mean_of_the_losses_is_told(caplog: pytest.LogCaptureFixture) -> None:
    def tripled(output: Tensor, target: Tensor) -> Tensor:
        return 3 * ours.losses(output, target)

    ours = digits(0).kind
    session(Client("ann", net, [digits(0)]))
    assert "the mean of the losses" not in caplog.text
    session(Client("ann", net, [replace(digits(0), kind=replace(ours, name="own", losses=tripled))]))
    assert "task 'digits': on a few examples the mean of the losses of kind 'own' is" in caplog.text


class Spaced(Net):
    def __init__(self) -> None:
        super().__init__("digits")
        self.eyes = nn.ModuleDict({"left eye": nn.Linear(4, 3)})

    def see(self, pixels: Tensor) -> Tensor:
        return super().see(pixels) + self.eyes["left eye"](pixels)


class Empty(Net):
    def __init__(self) -> None:
        super().__init__("digits")
        self.extra = nn.Parameter(torch.zeros(0, 3))

    def see(self, pixels: Tensor) -> Tensor:
        return super().see(pixels) + pixels[:, :0] @ self.extra


@pytest.mark.parametrize(
    ("model", "components", "problem"),
    [
        (Spaced, None, "the model has the tensor 'eyes.left eye.weight': name it with at most 256 letters"),
        (net, {"the trunk": "*"}, "the model has the component 'the trunk': name it with at most 256 letters"),
        (
            Empty,
            None,
            r"tensor 'extra' of the model has the shape \[0, 3\], and so no value to train: leave its layer",
        ),
    ],
)
def test_what_no_message_carries_is_told_by_name(tmp_path: Path, model: Any, components: Any, problem: str) -> None:
    app = TapClientApp()
    app.client()(lambda _: Client("ann", model, [digits(0)], components, state_dir=tmp_path / "state"))
    with pytest.raises(RunError, match=f"client 'ann': {problem}"):
        federate(tmp_path, app, nodes=1)


def failing() -> nn.Module:
    raise OSError("/secret/weights")


def test_a_model_that_cannot_be_built(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ClientError, match=f"`model` raised OSError: {line_of(failing, 1)}") as error:
        session(Client("ann", failing, [digits(0)]))
    assert "secret" not in str(error.value)  # the server is told of the error
    assert "secret" in caplog.text


def test_what_the_process_draws_afterwards_is_as_it_would_have_been() -> None:
    def drawn() -> list[float]:
        return [float(torch.rand(())), random.random(), float(np.random.rand())]

    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    expected = drawn()
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    session(Client("ann", lambda: Net("digits", dropout=0.5), [digits(0)]))
    assert drawn() == expected


class Branches(nn.Module):
    """An expert for each half of the classes, and one for training alone; the third class comes late."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 3) for _ in range(3))
        self.late = nn.Linear(4, 3)

    def see(self, x: Tensor) -> Tensor:
        number = 2 if self.training else int(x.sum()) % 2
        return self.experts[number](x) + self.experts[1 - int(x.sum()) % 2](x)


def test_tracing_runs_batches_in_training_and_in_evaluation_mode(caplog: pytest.LogCaptureFixture) -> None:
    found = session(Client("ann", Branches, [digits(0)])).outline.component_map
    (reached,) = found.reach.values()
    assert {"experts.2"} < reached
    assert "late" not in reached
    assert "no task reaches the trainable tensors 'late.weight'" in caplog.text
    said = session(Client("ann", Branches, [digits(0)], reach={"digits": ["*"]})).outline
    assert set(said.component_map.reach.popitem()[1]) == {"experts.0", "experts.1", "experts.2", "late"}  # type: ignore[attr-defined]
    assert said.local == frozenset()


class Teacher(nn.Module):
    """A frozen parameter that moves, as a momentum encoder's."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.slow = nn.Linear(4, 3), nn.Parameter(torch.zeros(3), requires_grad=False)

    def see(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.slow += 0.1 * self.own.bias
        return self.own(x) + self.slow


class Precise(Teacher):
    """A buffer that moves and that float32 cannot hold."""

    def __init__(self) -> None:
        super().__init__()
        del self.slow
        self.register_buffer("slow", torch.full((3,), 0.1, dtype=torch.float64))

    def see(self, x: Tensor) -> Tensor:
        return super().see(x).float()


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        (Teacher, "training changes the frozen parameter 'slow': make it a buffer, or train it"),
        (Precise, "training changes the buffer 'slow', which is torch.float64 and is kept in float32: make it float32"),
    ],
)
def test_what_moves_and_cannot_be_kept_is_refused(model: type[nn.Module], problem: str) -> None:
    with pytest.raises(ClientError, match=problem):
        session(Client("ann", model, [digits(0)]))


class Away(nn.Module):
    """On its way to the CPU its tensors get other places, as from a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.still, self.own = nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 3)
        self.register_buffer("mask", torch.ones(4))

    def cpu(self) -> Away:
        return self._apply(torch.clone)

    def see(self, x: Tensor) -> Tensor:
        return self.own(self.still(x) * self.mask)


def test_a_change_of_device_is_no_change_by_training() -> None:
    outline = session(Client("ann", Away, [digits(0)])).outline
    assert outline.moving == frozenset()


class Centred(nn.Module):
    """Keeps a mean that is not in its `state_dict`, and a constant."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Linear(4, 3)
        self.register_buffer("mean", torch.zeros(4), persistent=False)
        self.register_buffer("scale", torch.ones(4), persistent=False)

    def see(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.lerp_(x.mean(0).detach(), 0.1)
        return self.own((x - self.mean) * self.scale)


def test_a_buffer_that_is_not_kept_is_told_and_starts_as_it_was_built(caplog: pytest.LogCaptureFixture) -> None:
    made = session(Client("ann", Centred, [digits(0)]))
    assert "training changes 'mean', a buffer with persistent=False" in caplog.text
    assert "'scale'" not in caplog.text
    model = made.model()
    assert not model.own_module.mean.any()  # type: ignore[operator, union-attr]


def per_token(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(output.reshape(-1), target, reduction="none")


def test_losses_of_tokens_may_have_a_flat_target() -> None:
    kind = TaskKind.of("tokens", per_token, lambda s, t, y, k: (s - t).square().reshape(-1))
    target = lambda batch: nn.functional.one_hot(batch[1], 3).float().reshape(-1)  # noqa: E731
    assert session(Client("ann", net, [replace(digits(0), kind=kind, target=target)])).outline.component_map.reach


def test_a_choice_for_buffers_that_there_is_not() -> None:
    with pytest.raises(ClientError, match="client 'ann' has buffers='mean': use 'personal' or 'average'"):
        Client("ann", net, [digits(0)], buffers="mean")


def test_models_are_copies_whose_tensors_are_swapped() -> None:
    held = Net("digits")
    made = session(Client("ann", lambda: held, [digits(0)]))
    one, other = made.model(), made.model()
    with torch.no_grad():
        one.get_parameter("image.bias").fill_(7)
    assert not (other.get_parameter("image.bias") == 7).any()  # `model` gave one object for both
    assert not (held.image.bias == 7).any()
    del one
    again: ComponentModel = made.model()
    assert all(value.equal(held.state_dict()[name]) for name, value in trainable_state(again).items())
    built = built_module(lambda: held, 1)
    assert built is not None
    assert built.copies == 0  # none is made before it is used


def test_frozen_norms() -> None:
    trunk = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False)).requires_grad_(False)
    head = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4, affine=False), nn.BatchNorm1d(4))
    head[3].requires_grad_(False)
    found = still_norms(nn.Sequential(trunk, head))
    assert [id(part) for part in found] == [id(trunk[1]), id(head[3])]


def test_a_kind_whose_output_is_a_tuple() -> None:
    kind = TaskKind.of(
        "autoencoder",
        lambda output, target: (output[0] - output[1][:, :3]).square().mean(-1),
        lambda student, teacher, target, temperature: (student[0] - teacher[0]).square().mean(-1),
    )
    task = Task("code", kind, ["image"], pixels(8, 1), pixels(8, 2), two, lambda batch: batch[1])
    assert session(Client("ann", net, [task])).outline.component_map.reach
    assert REGRESSION.name != kind.name
