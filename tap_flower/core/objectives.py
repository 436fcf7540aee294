"""Losses that are added to a task's own: distillation (TAP's stage 2) and the proximal term (FedProx, Ditto, pFedMe)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from tap_flower.core.components import ComponentModel
from tap_flower.core.tasks import TaskKind
from tap_flower.core.training import CALL, Batch, PairModel, comparable


@dataclass(frozen=True)
class Distillation:
    """The additional loss of stage 2: `weight[task] · mean over units of the kind's divergence(teacher -> student)`.

    An instance is an objective for `core.training.train`. The teacher runs in evaluation mode and without gradients.

    Attributes:
        teacher: the fine-tuned server copy.
        kinds: task name -> its kind.
        weights: task name -> w; a task that is not named has weight 0.
        temperature: T of the softened distributions (classification and text).
    """

    teacher: PairModel
    kinds: Mapping[str, TaskKind]
    weights: Mapping[str, float] = field(default_factory=dict)
    temperature: float = 1.0

    def __call__(self, batch: Batch, output: Tensor) -> Tensor:
        """The weighted distillation loss of one batch.

        Args:
            batch: the batch that the student has just seen.
            output: the student's output for it.

        Returns:
            A scalar.
        """
        kind = self.kinds[batch.task]
        weight = self.weights.get(batch.task, 0.0)
        if weight == 0.0:
            return torch.zeros(())
        self.teacher.eval()
        with torch.no_grad():
            if CALL in batch.inputs:  # in a loop of the project's own, the teacher is called as the student was
                args, kwargs = batch.inputs[CALL]
                target = comparable(cast(ComponentModel, self.teacher).own_module(*args, **kwargs))
            else:
                target = self.teacher(batch.task, batch.inputs)
        return weight * kind.divergences(output, target, batch.target, self.temperature).mean()


@dataclass(frozen=True)
class Proximal:
    """`weight / 2 · ||w − anchor||²` over all trainable tensors; its gradient is `weight · (w − anchor)`.

    An instance is an objective for `core.training.train`.

    Attributes:
        model: the model that is trained, w.
        anchor: tensor name -> value, on the model's device; it may be changed between steps.
        weight: μ of FedProx, λ of Ditto and pFedMe.
    """

    model: PairModel
    anchor: Mapping[str, Tensor]
    weight: float

    def __call__(self, batch: Batch, output: Tensor) -> Tensor:
        """The penalty, a scalar; it does not depend on the batch."""
        del batch, output
        parts = [(p - self.anchor[n]).square().sum() for n, p in self.model.named_parameters() if p.requires_grad]
        return self.weight / 2 * torch.stack(parts).sum()
