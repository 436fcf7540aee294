"""What a method works with on a client: its model, its data and the run's hyper-parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from tap_flower.config import HyperParameters
from tap_flower.core.components import ComponentModel, Pair, load_trainable_state, trainable_state
from tap_flower.core.initial import named_seed
from tap_flower.core.tasks import TaskKind
from tap_flower.core.training import Batch, Objective, Observer, Optimisation, Update, evaluate, train
from tap_flower.data.batching import ClientData
from tap_flower.methods.method import State

EVALUATION_BATCH = 64
"""Examples in a batch of an evaluation; no result depends on it."""


@dataclass(frozen=True)
class LocalTask:
    """A task of a client.

    Attributes:
        pair: its name and modalities.
        kind: of task.
        domains: of its data.
        head_size: what clients that share the task's head must agree on, the number of classes; 0 where it says nothing.
        margin: the client's own replacement margin; None takes the run's for the kind of task.
    """

    pair: Pair
    kind: TaskKind
    domains: tuple[str, ...] = ()
    head_size: int = 0
    margin: float | None = None


class Holdings(Protocol):
    """What a client has beside its data, whatever its model is made of."""

    @property
    def name(self) -> str:
        """Of the client."""
        ...

    @property
    def fingerprint(self) -> str:
        """Of what is frozen in its models: clients of one run must agree on it."""
        ...

    @property
    def tasks(self) -> Sequence[LocalTask]:
        """Its tasks."""
        ...

    def new_model(self) -> ComponentModel:
        """A model of the client's components; its trainable tensors have no values yet."""
        ...

    def outline(self) -> ComponentModel:
        """The same, to be looked at only: its tensors may be without memory."""
        ...


@dataclass
class LocalClient:
    """A client in one process.

    Attributes:
        holdings: name, tasks and model.
        data: its examples.
        settings: the run's hyper-parameters, as the server sent them.
        device: where it computes.
        steps: optimiser steps that it has made in this process, of all models.
    """

    holdings: Holdings
    data: ClientData
    settings: HyperParameters
    device: torch.device = field(default_factory=lambda: torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    steps: int = field(default=0, init=False)

    @cached_property
    def kinds(self) -> Mapping[str, TaskKind]:
        """Task name -> kind."""
        return {task.pair.task: task.kind for task in self.holdings.tasks}

    @cached_property
    def margins(self) -> Mapping[str, float]:
        """Task name -> the client's own margin, or the run's for the kind of task, or the kind's."""
        by_kind = vars(self.settings.replacement.margin)
        return {
            task.pair.task: by_kind.get(task.kind.name, task.kind.margin) if task.margin is None else task.margin
            for task in self.holdings.tasks
        }

    @cached_property
    def distillation_weights(self) -> Mapping[str, float]:
        """Name of a kind of task -> the run's weight of its distillation, or the kind's."""
        by_kind = vars(self.settings.distill.weight)
        return {kind.name: by_kind.get(kind.name, kind.distillation) for kind in self.kinds.values()}

    @cached_property
    def outline(self) -> ComponentModel:
        """The client's model, to be looked at only."""
        return self.holdings.outline()

    def initial_values(self) -> State:
        """The run's initial values of the client's tensors."""
        initials, seed = self.outline.initials, self.settings.seed
        return {n: initials[n].value(n, tuple(t.shape), seed) for n, t in trainable_state(self.outline).items()}

    def model(self, state: Mapping[str, Tensor] | None = None) -> ComponentModel:
        """A model with the trainable tensors of `state`, or with the run's initial values, on the client's device."""
        model = self.holdings.new_model()
        if state is None:
            model.initialise(self.settings.seed)
        else:
            load_trainable_state(model, state)
        return model.to(self.device)

    def train(
        self,
        model: ComponentModel,
        optimisation: Optimisation,
        *,
        order: tuple[object, ...],
        noise: tuple[object, ...],
        objective: Objective | None = None,
        update: Update | None = None,
    ) -> dict[str, float]:
        """Trains `model` in place on the client's training examples.

        Args:
            model: on the client's device.
            optimisation: steps, learning rate and so on.
            order: names the order of the mini-batches: the same names give the same mini-batches.
            noise: names the random numbers of dropout.
            objective: a further loss.
            update: what happens with the gradients of a step; without it, the optimiser's step.

        Returns:
            Task name -> mean training loss.
        """
        name, seed = self.holdings.name, self.settings.seed
        batches = self.data.training_batches(
            self.settings.train.batch_size,
            named_seed(seed, name, "order", *order),
            self.device,
            self.settings.train.group_by_length,
        )
        torch.manual_seed(named_seed(seed, name, "noise", *noise))
        heads = [n for n, component in model.component_map.component_of.items() if component.startswith("head/")]
        optimisation = replace(optimisation, factors=dict.fromkeys(heads, self.settings.train.head_factor))
        self.steps += optimisation.steps
        return train(model, self.kinds, batches, optimisation, objective, update)

    def evaluate(
        self, model: ComponentModel, split: str, observe: Observer | None = None
    ) -> dict[str, dict[str, float]]:
        """Task name -> metric -> value over all examples of a split; `observe` is shown every batch."""
        return evaluate(model, self.kinds, self.batches(split), observe)

    def scores(self, model: ComponentModel, split: str) -> dict[str, float]:
        """Task name -> score over all examples of a split: the headline metric, or 1 minus it where lower is better."""
        found = self.evaluate(model, split)
        return {task: self.kinds[task].score(metrics) for task, metrics in found.items()}

    def losses(self, model: ComponentModel, split: str) -> dict[str, float]:
        """Task name -> loss over all examples of a split."""
        return {task: metrics["loss"] for task, metrics in self.evaluate(model, split).items()}

    def batches(self, split: str) -> Iterator[Batch]:
        """All examples of a split once."""
        return self.data.batches(split, EVALUATION_BATCH, self.device)
