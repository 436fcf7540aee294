"""The four kinds of task: loss, distillation and metrics of each.

Every kind states its loss and its divergence *per unit* (a sample, or a token that is not padding). Training takes the
mean over the units of a batch; evaluation sums over the whole data set first, so that it never is a mean of batch means.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE = -100
"""Target value of a padded text position: it is in no loss, no distillation and no metric."""

Statistics = dict[str, Tensor]
"""Sums over examples (scalars or vectors, float64) that add up over batches."""


@dataclass(frozen=True)
class TaskKind:
    """What the algorithm needs to know of a kind of task.

    Attributes:
        name: as in the configuration, `image_classification` for example.
        losses: (output, target) -> loss of each unit, shape [units].
        divergences: (student, teacher, target, temperature) -> distillation loss of each unit, shape [units].
        statistics: (output, target) -> sums over the batch; they add up over batches.
        metrics: summed statistics -> metric name -> value.
        higher_is_better: name and direction of the metric that the kind is judged by.
    """

    name: str
    losses: Callable[[Tensor, Tensor], Tensor]
    divergences: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    statistics: Callable[[Tensor, Tensor], Statistics]
    metrics: Callable[[Mapping[str, Tensor]], dict[str, float]]
    headline: str
    higher_is_better: bool


def _kl_divergences(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² · KL(softmax(teacher / T) || softmax(student / T)) over the last axis (Hinton et al., arXiv 1503.02531)."""
    log_student = F.log_softmax(student / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher / temperature, dim=-1)
    return F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(-1) * temperature**2


def _classification_losses(output: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of each sample: output [B, C], target [B] int64 -> [B]."""
    return F.cross_entropy(output, target, reduction="none")


def _classification_divergences(student: Tensor, teacher: Tensor, target: Tensor, temperature: float) -> Tensor:
    del target
    return _kl_divergences(student, teacher, temperature)


def _classification_statistics(output: Tensor, target: Tensor) -> Statistics:
    return {
        "loss": _classification_losses(output, target).double().sum(),
        "correct": (output.argmax(-1) == target).double().sum(),
        "samples": torch.tensor(float(len(target)), dtype=torch.float64, device=output.device),
    }


def _classification_metrics(sums: Mapping[str, Tensor]) -> dict[str, float]:
    samples = float(sums["samples"])
    return {"loss": float(sums["loss"]) / samples, "accuracy": float(sums["correct"]) / samples}


def _text_losses(output: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of each token: output [B, S, V], target [B, S] with `IGNORE` at padding -> [tokens]."""
    kept = target != IGNORE
    return F.cross_entropy(output[kept], target[kept], reduction="none")


def _text_divergences(student: Tensor, teacher: Tensor, target: Tensor, temperature: float) -> Tensor:
    kept = target != IGNORE
    return _kl_divergences(student[kept], teacher[kept], temperature)


def _text_statistics(output: Tensor, target: Tensor) -> Statistics:
    kept = target != IGNORE
    right = (output.argmax(-1) == target) | ~kept
    return {
        "loss": _text_losses(output, target).double().sum(),
        "tokens": kept.double().sum(),
        "exact": right.all(-1).double().sum(),
        "samples": torch.tensor(float(len(target)), dtype=torch.float64, device=output.device),
    }


def _text_metrics(sums: Mapping[str, Tensor]) -> dict[str, float]:
    cross_entropy = float(sums["loss"]) / float(sums["tokens"])
    return {
        "loss": cross_entropy,
        "exact_match": float(sums["exact"]) / float(sums["samples"]),
        "perplexity": math.exp(min(cross_entropy, 700.0)),
    }


def _image_losses(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each image on normalised pixels: output and target [B, 3, H, W] -> [B]."""
    return F.mse_loss(output, target, reduction="none").flatten(1).mean(1)


def _image_divergences(student: Tensor, teacher: Tensor, target: Tensor, temperature: float) -> Tensor:
    del target, temperature
    return _image_losses(student, teacher)


def _image_statistics(output: Tensor, target: Tensor) -> Statistics:
    return {
        "loss": _image_losses(output, target).double().sum(),
        "samples": torch.tensor(float(len(target)), dtype=torch.float64, device=output.device),
    }


def _image_metrics(sums: Mapping[str, Tensor]) -> dict[str, float]:
    error = float(sums["loss"]) / float(sums["samples"])
    return {"loss": error, "mse": error}


def _classification(name: str) -> TaskKind:
    return TaskKind(
        name=name,
        losses=_classification_losses,
        divergences=_classification_divergences,
        statistics=_classification_statistics,
        metrics=_classification_metrics,
        headline="accuracy",
        higher_is_better=True,
    )


IMAGE_CLASSIFICATION = _classification("image_classification")
TEXT_CLASSIFICATION = _classification("text_classification")
TEXT_GENERATION = TaskKind(
    name="text_generation",
    losses=_text_losses,
    divergences=_text_divergences,
    statistics=_text_statistics,
    metrics=_text_metrics,
    headline="exact_match",
    higher_is_better=True,
)
IMAGE_GENERATION = TaskKind(
    name="image_generation",
    losses=_image_losses,
    divergences=_image_divergences,
    statistics=_image_statistics,
    metrics=_image_metrics,
    headline="mse",
    higher_is_better=False,
)

TASK_KINDS: Mapping[str, TaskKind] = {
    kind.name: kind for kind in (IMAGE_CLASSIFICATION, TEXT_CLASSIFICATION, TEXT_GENERATION, IMAGE_GENERATION)
}
