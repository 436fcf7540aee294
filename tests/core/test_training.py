from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tap_flower.core.distillation import Distillation
from tap_flower.core.tasks import IMAGE_GENERATION, TEXT_CLASSIFICATION
from tap_flower.core.training import Batch, DivergedError, Optimisation, evaluate, train

KINDS = {"a": IMAGE_GENERATION, "b": IMAGE_GENERATION}


class Constant(nn.Module):
    """Gives back one learned number for each task, whatever the input is."""

    def __init__(self, **values: float) -> None:
        super().__init__()
        self.values = nn.ParameterDict({name: nn.Parameter(torch.tensor(value)) for name, value in values.items()})

    def forward(self, task: str, inputs: Mapping[str, Any]) -> Tensor:
        return self.values[task].expand(inputs["size"], 3, 1, 1)


def batch(task: str, target: float, size: int = 1) -> Batch:
    return Batch(task, {"size": size}, torch.full((size, 3, 1, 1), target))


def test_a_step_follows_the_mean_loss_of_its_batches() -> None:
    # AdamW's first step moves by the learning rate against the gradient's sign. Errors +3 and -1 leave +1 on average.
    model = Constant(a=0.0)
    batches = iter([batch("a", 3.0), batch("a", -1.0)])
    losses = train(model, KINDS, batches, Optimisation(1, 0.5, weight_decay=0.0, accumulation=2))
    assert losses == {"a": pytest.approx((9.0 + 1.0) / 2)}
    assert model.values["a"].item() == pytest.approx(0.5, rel=1e-4)


def test_losses_are_means_over_units_not_over_batches() -> None:
    model = Constant(a=0.0)
    batches = iter([batch("a", 1.0, size=1), batch("a", 2.0, size=3)])
    losses = train(model, KINDS, batches, Optimisation(1, 1e-9, accumulation=2))
    assert losses["a"] == pytest.approx((1.0 + 3 * 4.0) / 4)


def test_every_task_trains_and_others_do_not_move() -> None:
    model = Constant(a=0.0, b=0.0, spare=0.25)
    batches = itertools.cycle([batch("a", 1.0), batch("b", -1.0)])
    train(model, KINDS, batches, Optimisation(200, 0.02, weight_decay=0.01))
    assert model.values["a"].item() == pytest.approx(1.0, abs=0.05)
    assert model.values["b"].item() == pytest.approx(-1.0, abs=0.05)
    assert model.values["spare"].item() == 0.25


def test_modules_that_model_and_teacher_share_are_in_training_mode_in_every_step() -> None:
    """A batch of a step as well as what the backward pass computes again."""
    modes: list[tuple[str, bool]] = []

    class Shared(Constant):
        def __init__(self, role: str, part: nn.Module) -> None:
            super().__init__(a=0.0)
            self.role, self.part = role, part

        def forward(self, task: str, inputs: Mapping[str, Any]) -> Tensor:
            modes.append((self.role, self.part.training))
            output = super().forward(task, inputs) * 1
            if self.role == "student":
                output.register_hook(lambda _: modes.append(("backward", self.part.training)))
            return output

    part = nn.Dropout().eval()
    student, teacher = Shared("student", part), Shared("teacher", part)
    objective = Distillation(teacher, KINDS, {IMAGE_GENERATION.name: 1.0})
    train(student, KINDS, itertools.cycle([batch("a", 1.0)]), Optimisation(2, 0.1, accumulation=2), objective)
    assert modes == [("student", True), ("teacher", False), ("backward", True)] * 4


def test_frozen_parameters_stay() -> None:
    model = Constant(a=0.0)
    model.frozen = nn.Parameter(torch.tensor(3.0), requires_grad=False)
    train(model, KINDS, itertools.cycle([batch("a", 1.0)]), Optimisation(2, 0.1))
    assert model.frozen.item() == 3.0


def test_a_loss_that_is_not_finite_is_an_error_that_names_the_task() -> None:
    with pytest.raises(DivergedError, match="task 'a' is nan.*lower the learning rate"):
        train(Constant(a=0.0), KINDS, itertools.cycle([batch("a", math.nan)]), Optimisation(1, 0.1))


def test_evaluation_sums_over_all_batches() -> None:
    batches = [batch("a", 1.0, size=1), batch("a", 3.0, size=3), batch("b", 2.0)]
    found = evaluate(Constant(a=0.0, b=0.0), KINDS, batches)
    assert found["a"]["mse"] == pytest.approx((1 + 3 * 9) / 4)
    assert found["b"]["mse"] == pytest.approx(4.0)


def test_an_evaluation_shows_every_batch_with_its_output() -> None:
    batches, seen = [batch("a", 1.0), batch("b", 3.0, size=2)], []
    evaluate(Constant(a=0.5, b=0.25), KINDS, batches, lambda *pair: seen.append(pair))
    assert [shown for shown, _ in seen] == batches
    assert [output.flatten()[0].item() for _, output in seen] == [0.5, 0.25]


class Logits(nn.Module):
    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values))

    def forward(self, task: str, inputs: Mapping[str, Any]) -> Tensor:
        return self.values.expand(len(inputs["x"]), -1)


def test_distillation_pulls_the_student_to_the_teacher() -> None:
    # Half of the labels say class 0, half class 1: the task alone ends at 50 : 50. The teacher says 75 : 25.
    teacher, student = Logits([math.log(3.0), 0.0]), Logits([0.0, 0.0])
    kinds = {"t": TEXT_CLASSIFICATION}

    def batches() -> Iterator[Batch]:
        while True:
            yield Batch("t", {"x": [0, 0]}, torch.tensor([0, 1]))

    objective = Distillation(teacher, kinds, {"text_classification": 100.0})
    train(student, kinds, batches(), Optimisation(300, 0.05, weight_decay=0.0), objective)
    assert student.values.softmax(0)[0].item() == pytest.approx(0.75, abs=0.02)
    assert teacher.values.grad is None
    assert teacher.values.tolist() == pytest.approx([math.log(3.0), 0.0])


def test_a_kind_without_weight_is_not_distilled() -> None:
    objective = Distillation(Logits([1.0, 0.0]), {"t": TEXT_CLASSIFICATION}, {"image_generation": 1.0})
    assert objective(Batch("t", {"x": [0]}, torch.tensor([0])), torch.zeros(1, 2)).item() == 0.0
