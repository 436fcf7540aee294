"""Losses that are added to a task's own: distillation (TAP's stage 2) and the proximal term (FedProx, Ditto, pFedMe)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tap_flower.core.components import ComponentModel
from tap_flower.core.tasks import TASK_KINDS, TaskKind
from tap_flower.core.training import CALL, Batch, comparable
from tap_flower.core.user_code import left_alone, of_the_user
from tap_flower.errors import ClientError


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

    teacher: ComponentModel
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

        Raises:
            ClientError: in a loop of the project's own, the kind cannot compare what the module returns.
        """
        kind = self.kinds[batch.task]
        weight = self.weights.get(batch.task, 0.0)
        if weight == 0.0:
            return torch.zeros(())
        self.teacher.eval()
        if CALL not in batch.inputs:
            with torch.no_grad():
                target = self.teacher(batch.task, batch.inputs)
            return weight * kind.divergences(output, target, batch.target, self.temperature).mean()
        # In a loop of the project's own, the teacher is called as the student was.
        args, kwargs = batch.inputs[CALL]
        what = f"task {batch.task!r}: the module"
        with torch.no_grad(), left_alone(what, {**dict(enumerate(args)), **kwargs}):
            target = comparable(self.teacher.own_module(*args, **kwargs))
        if kind.name in TASK_KINDS and not isinstance(output, Tensor):
            raise ClientError(
                f"task {batch.task!r}: the output of the module is a {type(output).__name__}, which the kind {kind.name!r} "
                f"cannot distil: return a tensor, or an output with `logits`"
            )
        what = f"task {batch.task!r}: the divergences of kind {kind.name!r}, whose target is None with `fit`,"
        with of_the_user(what, kind.divergences):
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

    model: nn.Module
    anchor: Mapping[str, Tensor]
    weight: float

    def __call__(self, batch: Batch, output: Tensor) -> Tensor:
        """The penalty, a scalar; it does not depend on the batch."""
        del batch, output
        parts = [(p - self.anchor[n]).square().sum() for n, p in self.model.named_parameters() if p.requires_grad]
        return self.weight / 2 * torch.stack(parts).sum()
