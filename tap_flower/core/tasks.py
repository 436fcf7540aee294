"""The four kinds of task: loss, distillation and metrics of each.

Every kind states its loss and its divergence *per unit* (a sample, or a token that is not padding). Training takes the
mean over the units of a batch; evaluation sums over the whole data set first, so that it never is a mean of batch means.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tap_flower.core.headline import Headline
from tap_flower.core.metrics import WORD
from tap_flower.errors import ClientError

IGNORE = -100
"""Target value of a padded text position: it is in no loss, no distillation and no metric."""

_NO_LABEL = -(2**31)
"""The label that a loss of a classifier would leave out: none that data have."""
IMAGE_STD = (0.2673, 0.2564, 0.2762)
"""Deviation of each channel in the paper: what a pixel between 0 and 1 is divided by, unless the task says another."""
PSNR_LIMIT = 100.0
"""PSNR of images without any error, in dB, so that every metric is a number; rounding to 8 bits alone gives 58.9."""

Statistics = dict[str, Tensor]
"""Sums over examples (scalars or arrays, float64) that add up over batches."""
TASK_KINDS: dict[str, TaskKind] = {}
"""Name -> kind, of the four below."""


@dataclass(frozen=True)
class TaskKind:
    """What the algorithm needs to know of a kind of task.

    Attributes:
        name: as in the configuration, `image_classification` for example.
        losses: (output, target) -> loss of each unit, shape [units].
        divergences: (student, teacher, target, temperature) -> distillation loss of each unit, shape [units]. The target is
            None where a loop of the project's own trains.
        statistics: (output, target) -> sums over the batch; they add up over batches.
        metrics: summed statistics -> metric name -> value; `loss` must be among them.
        headline: name of the metric that the kind is judged by.
        higher_is_better: its direction.
        margin: replacement margin, where the run's configuration has none for the kind.
        distillation: weight of the distillation loss, where the run's configuration has none for the kind.
    """

    name: str
    losses: Callable[[Tensor, Tensor], Tensor]
    divergences: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    statistics: Callable[[Tensor, Tensor], Statistics]
    metrics: Callable[[Mapping[str, Tensor]], dict[str, float]]
    headline: str
    higher_is_better: bool
    margin: float = 0.0
    distillation: float = 1.0

    def __post_init__(self) -> None:
        if not WORD.fullmatch(self.headline):
            raise ClientError(
                f"kind {self.name!r} has headline {self.headline!r}: use letters, digits, '_', '+', '.' and '-' in the name "
                f"of a metric, at most 64"
            )
        for name in ("margin", "distillation"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ClientError(f"kind {self.name!r} has {name} {value!r}: give a number from 0 on")
        ours = TASK_KINDS.get(self.name, self)
        if changed := [field.name for field in fields(self) if _plain(self, field.name) != _plain(ours, field.name)]:
            raise ClientError(
                f"the kind {self.name!r} is tap-flower's, and this one has another `{changed[0]}`: give it a name of its own"
            )

    @classmethod
    def of(
        cls,
        name: str,
        losses: Callable[[Tensor, Tensor], Tensor],
        divergences: Callable[[Tensor, Tensor, Tensor, float], Tensor],
        **own: Any,
    ) -> TaskKind:
        """A kind of your own that is judged by its mean loss, unless `own` says more.

        Regression of vectors, for example, has the losses `(output - target).square().mean(-1)` and the divergences
        `(student - teacher).square().mean(-1)`.

        Args:
            name: letters, digits, `-` and `_`.
            losses: see the attribute.
            divergences: see the attribute.
            own: other attributes.
        """

        def statistics(output: Tensor, target: Tensor) -> Statistics:
            found = losses(output, target).double()
            return {
                "loss": found.sum(),
                "units": torch.tensor(float(len(found)), dtype=torch.float64, device=found.device),
            }

        def metrics(sums: Mapping[str, Tensor]) -> dict[str, float]:
            return {"loss": float(sums["loss"]) / float(sums["units"])}

        said = {"statistics": statistics, "metrics": metrics, "headline": "loss", "higher_is_better": False, **own}
        return cls(name, losses, divergences, **said)

    @property
    def judged_by(self) -> Headline:
        """The headline metric and its direction."""
        return Headline(self.headline, self.higher_is_better)


def _plain(kind: TaskKind, attribute: str) -> Any:
    """The value of an attribute; of a function that is bound to the deviation of an image's channels, the function."""
    value = getattr(kind, attribute)
    return value.func if isinstance(value, partial) else value


def _kl_divergences(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² · KL(softmax(teacher / T) || softmax(student / T)) over the last axis (Hinton et al., arXiv 1503.02531)."""
    log_student = F.log_softmax(student / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher / temperature, dim=-1)
    return F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(-1) * temperature**2


def _classification_losses(output: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of each sample: output [B, C], target [B] int64 -> [B]."""
    # torch would leave a label of -100 out without a word: a class has no such number.
    return F.cross_entropy(output, target, reduction="none", ignore_index=_NO_LABEL)


def _classification_divergences(student: Tensor, teacher: Tensor, target: Tensor, temperature: float) -> Tensor:
    del target
    return _kl_divergences(student, teacher, temperature)


def _classification_statistics(output: Tensor, target: Tensor) -> Statistics:
    """Summed loss, and the confusion matrix [C, C]: examples of the row's class that were given the column's."""
    classes = output.shape[-1]
    losses = _classification_losses(output, target)  # first: it says what is wrong with a label
    cells = torch.bincount(target * classes + output.argmax(-1), minlength=classes**2)
    return {
        "loss": losses.double().sum(),
        "confusion": cells.double().view(classes, classes),
    }


def _classification_metrics(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """Loss, accuracy, and macro F1: the mean of 2·TP / (2·TP + FP + FN) over the classes.

    A class that is in no target and in no prediction has no F1 and is left out of the mean, as scikit-learn's
    `f1_score(average="macro")` leaves it out; a class with either, but no true positive, counts as 0.
    """
    confusion = sums["confusion"]
    samples, right = float(confusion.sum()), confusion.diagonal()
    occurrences = confusion.sum(0) + confusion.sum(1)  # 2·TP + FP + FN
    seen = occurrences > 0
    return {
        "loss": float(sums["loss"]) / samples,
        "accuracy": float(right.sum()) / samples,
        "macro_f1": float((2 * right[seen] / occurrences[seen]).mean()),
    }


def _tokens(target: Tensor) -> tuple[Tensor, ...]:
    """The positions that are not padding; found once, since a processor waits for a GPU to tell how many they are."""
    return (target != IGNORE).nonzero(as_tuple=True)


def _text_losses(output: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of each token: output [B, S, V], target [B, S] with `IGNORE` at padding -> [tokens]."""
    kept = _tokens(target)
    return F.cross_entropy(output[kept], target[kept], reduction="none")


def _text_divergences(student: Tensor, teacher: Tensor, target: Tensor | None, temperature: float) -> Tensor:
    if target is None:  # a loop of the project's own does not say what is padding: all positions count
        return _kl_divergences(student, teacher, temperature).flatten()
    kept = _tokens(target)
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
    """Loss (cross-entropy of a token, in nats), share of texts right in every token, and perplexity exp(loss)."""
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


def _image_statistics(std: Sequence[float], output: Tensor, target: Tensor) -> Statistics:
    """Summed mean squared error of the images: of normalised pixels, and of the same as pixels between 0 and 1."""
    by_channel = F.mse_loss(output, target, reduction="none").double().mean((2, 3))
    variance = torch.tensor(std, dtype=torch.float64, device=output.device) ** 2
    return {
        "loss": _image_losses(output, target).double().sum(),
        "pixel_error": (by_channel * variance).mean(1).sum(),
        "samples": torch.tensor(float(len(target)), dtype=torch.float64, device=output.device),
    }


def _image_metrics(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """Loss, which is the MSE of normalised pixels, and PSNR = 10·log10(1 / MSE) of all pixels, between 0 and 1, in dB."""
    samples = float(sums["samples"])
    error, pixel_error = float(sums["loss"]) / samples, float(sums["pixel_error"]) / samples
    psnr = min(-10 * math.log10(pixel_error), PSNR_LIMIT) if pixel_error else PSNR_LIMIT
    return {"loss": error, "mse": error, "psnr": psnr}


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


def image_generation(std: Sequence[float]) -> TaskKind:
    """Image generation over images that were divided by `std`, a number for each channel: PSNR takes it back."""
    return TaskKind(
        name="image_generation",
        losses=_image_losses,
        divergences=_image_divergences,
        statistics=partial(_image_statistics, std),
        metrics=_image_metrics,
        headline="mse",
        higher_is_better=False,
    )


IMAGE_GENERATION = image_generation(IMAGE_STD)

TASK_KINDS |= {
    kind.name: kind for kind in (IMAGE_CLASSIFICATION, TEXT_CLASSIFICATION, TEXT_GENERATION, IMAGE_GENERATION)
}


def added(sums: Statistics, more: Statistics) -> Statistics:
    """The sums of two sets of examples; what one set has no sum of, a class that is not in it say, counts as 0."""
    return {**sums, **{name: sums[name] + value if name in sums else value for name, value in more.items()}}
