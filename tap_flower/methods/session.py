"""A client at work: its model, its data and the run's hyper-parameters. Every method is written over a `Session`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from tap_flower.config import HyperParameters
from tap_flower.core.components import ComponentModel, Pair, State, cpu_state, load_trainable_state
from tap_flower.core.initial import named_seed
from tap_flower.core.objectives import Proximal
from tap_flower.core.tasks import TaskKind
from tap_flower.core.training import Batch, Objective, Observer, Optimisation, Update, evaluate, train
from tap_flower.data.batching import ClientData

EVALUATION_BATCH = 64
"""Examples in a batch of an evaluation; no result depends on it."""
MakeObjective = Callable[[ComponentModel], Objective]
"""(model that is about to be trained) -> a further loss of its training."""
MakeUpdate = Callable[[ComponentModel], Update]
"""(model that is about to be trained) -> what happens with the gradients of a step; see `core.training.train`."""


@dataclass(frozen=True)
class SessionTask:
    """A task as a session trains and evaluates it.

    Attributes:
        pair: name and modalities.
        kind: loss, divergence and metrics.
        domains: domains of its data.
        head_size: number of classes, on which clients that share the task's head must agree; 0 where a head has none.
        margin: the client's own replacement margin; None takes the run's for the kind of task.
    """

    pair: Pair
    kind: TaskKind
    domains: tuple[str, ...] = ()
    head_size: int = 0
    margin: float | None = None


@dataclass
class Session:
    """Trains and evaluates models of one client, in one process.

    Attributes:
        name: name of the client; it seeds the order of mini-batches and dropout.
        tasks: the client's tasks.
        build: makes a model with the client's components; the tensors of its state may have any values.
        outline: a model that is looked at only, for names and shapes; its tensors may be without memory.
        data: the client's examples.
        settings: the run's hyper-parameters, as the server sent them.
        fingerprint: fingerprint of the frozen backbone, on which all clients of a run must agree.
        device: device of models and batches.
        first: tensor name -> first value (float32) that the run has and a module built here has not.
        steps: optimiser steps that this session has made, of all models.
    """

    name: str
    tasks: Sequence[SessionTask]
    build: Callable[[], ComponentModel]
    outline: ComponentModel
    data: ClientData
    settings: HyperParameters
    fingerprint: str
    device: torch.device = field(default_factory=lambda: torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    first: State = field(default_factory=dict, init=False)
    steps: int = field(default=0, init=False)

    @cached_property
    def kinds(self) -> Mapping[str, TaskKind]:
        """Task name -> kind."""
        return {task.pair.task: task.kind for task in self.tasks}

    @cached_property
    def margins(self) -> Mapping[str, float]:
        """Task name -> replacement margin: the client's own, else the run's for the kind of task, else the kind's."""
        by_kind = vars(self.settings.replacement.margin)
        return {
            task.pair.task: by_kind.get(task.kind.name, task.kind.margin) if task.margin is None else task.margin
            for task in self.tasks
        }

    @cached_property
    def distillation_weights(self) -> Mapping[str, float]:
        """Name of a kind of task -> weight of its distillation: the run's, else the kind's."""
        by_kind = vars(self.settings.distill.weight)
        return {kind.name: by_kind.get(kind.name, kind.distillation) for kind in self.kinds.values()}

    def initial_values(self) -> State:
        """The run's first values of the tensors of the model's state."""
        own = self.outline.first_values(self.settings.seed)
        return {name: self.first.get(name, value) for name, value in own.items()}

    def built_values(self) -> State:
        """The run's first values of all tensors on which its clients must agree, frozen ones and buffers included."""
        own = {**self.outline.fixed_values(), **self.outline.first_values(self.settings.seed)}
        return {name: self.first.get(name, value) for name, value in own.items()}

    def model(self, state: Mapping[str, Tensor] | None = None) -> ComponentModel:
        """A model on the session's device.

        Args:
            state: values of the whole state; None takes the run's first values.
        """
        model = self.build()
        model.fix(self.first)
        load_trainable_state(model, self.initial_values() if state is None else state)
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
            model: on the session's device.
            optimisation: steps, learning rate and so on.
            order: names the order of the mini-batches: equal names give equal mini-batches.
            noise: names the random numbers of dropout.
            objective: a further loss.
            update: what happens with the gradients of a step; by default the optimiser's step.

        Returns:
            Task name -> mean training loss.
        """
        batches = self.data.training_batches(
            self.settings.train.batch_size,
            named_seed(self.settings.seed, self.name, "order", *order),
            self.device,
            self.settings.train.group_by_length,
        )
        torch.manual_seed(named_seed(self.settings.seed, self.name, "noise", *noise))
        heads = [n for n, component in model.component_map.component_of.items() if component.startswith("head/")]
        optimisation = replace(optimisation, factors=dict.fromkeys(heads, self.settings.train.head_factor))
        self.steps += optimisation.steps
        return train(model, self.kinds, batches, optimisation, objective, update)

    def train_round(
        self,
        server_round: int,
        start: State | None,
        name: str,
        objective: MakeObjective | None = None,
        update: MakeUpdate | None = None,
    ) -> tuple[State, dict[str, float]]:
        """Trains a model for the R optimiser steps of a round; all methods see equal mini-batches in equal order.

        Args:
            server_round: counted from 1.
            start: values of the whole model; None takes the run's first values.
            name: name of the model (`server`, `personal`), which names the random numbers of dropout.
            objective: makes a further loss.
            update: makes what happens with the gradients of a step.

        Returns:
            The trained tensors (on the CPU), and task name -> mean training loss.
        """
        model = self.model(start)
        losses = self.train(
            model,
            self.settings.train.optimisation(server_round),
            order=(server_round,),
            noise=(server_round, name),
            objective=None if objective is None else objective(model),
            update=None if update is None else update(model),
        )
        return cpu_state(model), losses

    def finetune(
        self, start: State | None, name: str, objective: MakeObjective | None = None, times: int = 1
    ) -> tuple[State, dict[str, float]]:
        """Trains a model for `times` · K optimiser steps, K being those of stage 2.

        Args:
            start: values of the whole model; None takes the run's first values.
            name: name of the model, which names the random numbers of dropout.
            objective: makes a further loss.
            times: multiple of K.

        Returns:
            The trained tensors (on the CPU), and task name -> mean training loss.
        """
        model = self.model(start)
        optimisation = self.settings.distill.optimisation(self.settings.train)
        losses = self.train(
            model,
            replace(optimisation, steps=times * optimisation.steps),
            order=("stage 2",),
            noise=("stage 2", name),
            objective=None if objective is None else objective(model),
        )
        return cpu_state(model), losses

    def near(self, anchor: Mapping[str, Tensor], weight: float) -> MakeObjective:
        """Makes the penalty `weight / 2 · ||w − anchor||²` on the model that is about to be trained."""
        on_device = {name: value.to(self.device) for name, value in anchor.items()}
        return lambda model: Proximal(model, on_device, weight)

    def evaluate(
        self, model: ComponentModel, split: str, observe: Observer | None = None
    ) -> dict[str, dict[str, float]]:
        """Metrics over all examples of a split.

        Args:
            model: on the session's device.
            split: `train`, `validation` or `test`.
            observe: called with every batch and the model's output for it.

        Returns:
            Task name -> metric -> value.
        """
        return evaluate(model, self.kinds, self.batches(split), observe)

    def scores(self, model: ComponentModel, split: str) -> dict[str, float]:
        """Task name -> score over all examples of a split: the headline metric, or 1 minus it where lower is better."""
        found = self.evaluate(model, split)
        return {task: self.kinds[task].score(metrics) for task, metrics in found.items()}

    def losses(self, model: ComponentModel, split: str) -> dict[str, float]:
        """Task name -> mean loss over all examples of a split."""
        return {task: metrics["loss"] for task, metrics in self.evaluate(model, split).items()}

    def batches(self, split: str) -> Iterator[Batch]:
        """All examples of a split once."""
        return self.data.batches(split, EVALUATION_BATCH, self.device)
