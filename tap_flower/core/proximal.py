"""Staying near given tensors: the quadratic penalty of FedProx, Ditto and pFedMe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tap_flower.core.training import Batch, PairModel


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
