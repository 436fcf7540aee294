"""Cosines between the gradients of a client's pairs, against numbers worked out by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tap_flower.client.evaluation import cosine, gradient_cosines
from tap_flower.config import HyperParameters
from tap_flower.core.components import ComponentMap, ComponentModel, Pair
from tap_flower.core.tasks import TaskKind
from tap_flower.data.batching import ClientData
from tap_flower.data.examples import OWN, Examples, own_examples
from tap_flower.methods.session import Session
from tap_flower.methods.session_task import SessionTask

REACHED = {"a": {"u", "w", "head/a"}, "b": {"u", "w"}, "c": {"w"}, "d": {"head/d"}}
"""Task -> the components that it reaches, each of one tensor."""
KIND = TaskKind.of(
    "number", lambda output, target: (output - target).square(), lambda s, t, target, T: (s - t).square()
)
DATA = {
    "a": [([3.0, 0.0], 1.0), ([0.0, 4.0], 1.0), ([100.0, 100.0], 7.0)],  # its batches have 2
    "b": [([4.0, 0.0], -0.5), ([9.0, 9.0], 9.0)],  # the run's batches have 1
    "c": [([5.0, 5.0], 0.0)],
    "d": [([5.0, 5.0], 3.0)],
}


class Sum(ComponentModel):
    """x · u + w + the task's own number, of which a task has what it reaches; all are 0, so that every output is 0."""

    def __init__(self, tasks: str) -> None:
        super().__init__()
        self.u, self.w = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
        self.heads = nn.ParameterDict({task: nn.Parameter(torch.zeros(1)) for task in "ad"})
        self.dropout = nn.Dropout(0.999)
        self.register_buffer("seen", torch.tensor(0))  # as BatchNorm counts its batches; it has no gradient
        reach = {Pair(task, ("x",)): frozenset(REACHED[task]) for task in tasks}
        names = {"u": "u", "seen": "u", "w": "w", "heads.a": "head/a", "heads.d": "head/d"}
        held = frozenset[str]().union(*reach.values())
        self.component_map = ComponentMap({name: c for name, c in names.items() if c in held}, reach)

    def forward(self, task: str, inputs: Mapping[str, Any]) -> Tensor:
        x, reached = self.dropout(inputs[OWN][0]), REACHED[task]
        parts = [x @ self.u] if "u" in reached else []
        parts += [self.w] if "w" in reached else []
        parts += [self.heads[task]] if f"head/{task}" in reached else []
        return torch.stack([part.expand(len(x)) for part in parts]).sum(0)


def client(tasks: str) -> Session:
    def examples(task: str) -> Examples:
        rows = [(torch.tensor(x), torch.tensor(target)) for x, target in DATA[task]]
        own = 2 if task == "a" else None
        return own_examples(task, rows, lambda batch: batch[1], own)  # type: ignore[arg-type]

    settings = HyperParameters()
    settings.train.batch_size = 1
    data = ClientData({"train": {task: [examples(task)] for task in tasks}})
    tasks_ = [SessionTask(Pair(task, ("x",)), KIND) for task in tasks]
    return Session("ann", tasks_, lambda: Sum(tasks), Sum(tasks), data, settings, "none", torch.device("cpu"))


def test_the_gradients_of_a_clients_pairs() -> None:
    # The gradient of the squared error at an output of 0 is -2 · target, times x for u.
    # a: the mean of its first two: u -(3, 4), w -2. b: its first: u (4, 0), w 1. c: 0. What d reaches nobody else does.
    model = Sum("dcba").train()
    ab, ac, bc = gradient_cosines(client("dcba"), model)
    assert (ab["a"], ab["b"], ac["a"], ac["b"], bc["a"], bc["b"]) == ("a", "b", "a", "c", "b", "c")
    assert ab["components"] == {"u": pytest.approx(-12 / (5 * 4)), "w": -1.0}
    assert ab["cosine"] == pytest.approx(-(3 * 4 + 2 * 1) / ((9 + 16 + 4) * (16 + 1)) ** 0.5)
    for found in (ac, bc):
        assert (found["cosine"], found["components"]) == (None, {"w": None})
    assert all(parameter.grad is None and not parameter.any() for parameter in model.parameters())


def test_recurrent_layers_do_without_cudnn_where_gradients_are_taken_in_evaluation_mode() -> None:
    """cuDNN has no such backward pass."""
    seen: list[tuple[bool, bool]] = []
    model = Sum("dcba")
    model.dropout.register_forward_hook(lambda *_: seen.append((model.training, torch.backends.cudnn.enabled)))
    gradient_cosines(client("dcba"), model)
    assert seen == [(False, False)] * 3
    assert torch.backends.cudnn.enabled


@pytest.mark.parametrize("tasks", ["a", "ad"])
def test_pairs_that_share_nothing_have_no_cosines(tasks: str) -> None:
    assert gradient_cosines(client(tasks), Sum(tasks)) == []


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ({"a": [6.0], "b": [0.0, 8.0]}, 1.0),
        ({"a": [-3.0], "b": [0.0, -4.0]}, -1.0),
        ({"a": [0.0], "b": [5.0, 0.0]}, 0.0),
        ({"a": [1.0], "b": [0.0, 0.0]}, 0.6),  # 3 / 5
        ({"a": [0.0], "b": [0.0, 0.0]}, None),
    ],
)
def test_cosine_takes_all_tensors_as_one_vector(other: dict[str, list[float]], expected: float | None) -> None:
    one = {"a": torch.tensor([3.0]), "b": torch.tensor([0.0, 4.0]), "c": torch.tensor([9.0])}
    found = cosine(one, {name: torch.tensor(values) for name, values in other.items()}, ["a", "b"])
    assert found == (None if expected is None else pytest.approx(expected))
