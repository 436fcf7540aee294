"""The further loss of stage 2, against numbers worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tap_flower.core.objectives import Distillation
from tap_flower.core.tasks import IGNORE, IMAGE_GENERATION, TEXT_CLASSIFICATION, TEXT_GENERATION
from tap_flower.core.training import Batch

KINDS = {"words": TEXT_GENERATION, "mood": TEXT_CLASSIFICATION, "picture": IMAGE_GENERATION}
PLAIN = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
"""KL of odds 3 : 1 to even ones."""
_SOFT = math.sqrt(3) / (1 + math.sqrt(3))
SOFTENED = 4 * (_SOFT * math.log(2 * _SOFT) + (1 - _SOFT) * math.log(2 * (1 - _SOFT)))
"""The same at T = 2, where the odds are √3 : 1, times T²."""


class Teacher(nn.Module):
    """Gives the same logits for everything; in training mode its dropout makes them infinite or 0."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits, self.dropout = nn.Parameter(logits), nn.Dropout(1.0)
        self.calls: list[tuple[str, Any]] = []

    def forward(self, task: str, inputs: Mapping[str, Any]) -> Tensor:
        self.calls.append((task, inputs))
        return self.dropout(1 * self.logits)


@pytest.mark.parametrize(("temperature", "divergence"), [(1.0, PLAIN), (2.0, SOFTENED)])
def test_padded_tokens_are_not_distilled(temperature: float, divergence: float) -> None:
    # Two texts of three tokens, of which 2 + 1 count; the teacher's odds are 3 : 1 at each token of the first text, and
    # even ones at each of the second. At padding they are far from the student's.
    far, sure, even = [9.0, 0.0], [math.log(3.0), 0.0], [0.0, 0.0]
    teacher = Teacher(torch.tensor([[sure, sure, far], [even, far, far]])).train()
    batch = Batch("words", {"x": 1}, torch.tensor([[0, 1, IGNORE], [1, IGNORE, IGNORE]]))
    output = torch.zeros(2, 3, 2, requires_grad=True)
    loss = Distillation(teacher, KINDS, {batch.task: 0.5}, temperature)(batch, output)
    assert loss.item() == pytest.approx(0.5 * (2 * divergence + 0) / 3, rel=1e-5)
    assert teacher.calls == [("words", {"x": 1})]
    loss.backward()  # type: ignore[no-untyped-call]
    assert teacher.logits.grad is None
    assert output.grad is not None
    assert bool(output.grad[0, 0, 0] < 0)
    assert not output.grad[0, 2].any()


def test_the_weight_is_that_of_the_task() -> None:
    teacher = Teacher(torch.tensor([[math.log(3.0), 0.0]]))
    weights = {"mood": 2.0, "words": 7.0}
    batch, output = Batch("mood", {}, torch.tensor([0])), torch.zeros(1, 2)
    assert Distillation(teacher, KINDS, weights)(batch, output).item() == pytest.approx(2 * PLAIN)
    picture = torch.zeros(1, 3, 2, 2)
    nothing = Distillation(teacher, KINDS, weights)(Batch("picture", {}, picture), picture)
    assert (nothing.item(), nothing.shape) == (0.0, ())
    assert Distillation(teacher, KINDS)(batch, output).item() == 0.0
    assert [task for task, _ in teacher.calls] == ["mood"]  # where the weight is 0, the teacher is not asked
