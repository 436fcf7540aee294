"""A client's task as a session trains and evaluates it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from tap_flower.core.components import Pair
from tap_flower.core.tasks import TaskKind

Fit = Callable[[nn.Module, DataLoader[Any], Mapping[str, Any]], Any]
"""(module, training loader, config of the server's message) -> None, the mean training loss, or metrics by name."""
Score = Callable[[nn.Module, DataLoader[Any]], Mapping[str, Any]]
"""(module, loader) -> metrics by name."""


@dataclass(frozen=True)
class SessionTask:
    """A task as a session trains and evaluates it.

    Attributes:
        pair: name and modalities.
        kind: loss, divergence and metrics.
        domains: domains of its data.
        head_size: number of classes, on which clients that share the task's head must agree; 0 where a head has none.
        margin: the client's own replacement margin; None takes the run's for the kind of task.
        fit: the project's own training loop, in place of `core.training.train`.
        score: the project's own evaluation, in place of the kind's metrics.
    """

    pair: Pair
    kind: TaskKind
    domains: tuple[str, ...] = ()
    head_size: int = 0
    margin: float | None = None
    fit: Fit | None = None
    score: Score | None = None
