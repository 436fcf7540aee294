"""Regression: squared error, distillation towards the teacher's numbers, RMSE and R²."""

from collections.abc import Mapping

import torch
from torch import Tensor

from tap_flower import TaskKind


def losses(output: Tensor, target: Tensor) -> Tensor:
    """Squared error of each example: output and target [B] -> [B]."""
    return (output - target).square()


def divergences(student: Tensor, teacher: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Squared distance between two models' numbers; there is nothing to soften by a temperature."""
    del target, temperature
    return (student - teacher).square()


def statistics(output: Tensor, target: Tensor) -> dict[str, Tensor]:
    """What adds up over batches; the metrics follow from the sums, not from means of batches."""
    target = target.double()
    return {
        "loss": losses(output, target).sum(),
        "examples": torch.tensor(float(len(target))),
        "sum": target.sum(),
        "squares": target.square().sum(),
    }


def metrics(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """Loss, its root, and the share of the variance that is explained."""
    loss, count = float(sums["loss"]), float(sums["examples"])
    variance = float(sums["squares"]) - float(sums["sum"]) ** 2 / count
    return {"loss": loss / count, "rmse": (loss / count) ** 0.5, "r2": 1 - loss / variance}


REGRESSION = TaskKind(
    name="regression",
    losses=losses,
    divergences=divergences,
    statistics=statistics,
    metrics=metrics,
    headline="r2",
    higher_is_better=True,
    margin=0.02,
    distillation=0.5,
)
