"""A client at work: its model, its data and the run's hyper-parameters. Every method is written over a `Session`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import isfinite
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tap_flower.config import HyperParameters, ReplacementEvidence
from tap_flower.core.components import ComponentModel, State, cpu_state, load_trainable_state, only_state_changes
from tap_flower.core.further_loss import further_loss
from tap_flower.core.objectives import Proximal
from tap_flower.core.own_loop import lent, trained
from tap_flower.core.seeds import named_seed, others_seeded, seed_torch
from tap_flower.core.tasks import TaskKind
from tap_flower.core.training import Batch, Objective, Observer, Optimisation, Update, evaluate, torch_algorithms, train
from tap_flower.data.batching import ClientData
from tap_flower.errors import ClientError, DivergedError, in_task
from tap_flower.methods.own_results import check_losses, lone_example_told, metrics_of, scores_of
from tap_flower.methods.session_task import SessionTask

EVALUATION_BATCH = 64
"""Examples in a batch of an evaluation; no result depends on it."""
Part = Callable[[DataLoader[Any]], DataLoader[Any]]
"""A loader -> one that gives some of its batches."""
MakeObjective = Callable[[ComponentModel], Objective]
"""(model that is about to be trained) -> a further loss of its training."""
MakeUpdate = Callable[[ComponentModel], Update]
"""(model that is about to be trained) -> what happens with the gradients of a step; see `core.training.train`."""


def whole(loader: DataLoader[Any]) -> DataLoader[Any]:
    """The `Part` that is all of a loader."""
    return loader


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
        compares: whether the method compares losses, which a project's own loop must then return.
        first: tensor name -> first value (float32) that the run has and a module built here has not.
        steps: optimiser steps that this session has made, of all models.
        config: Flower's `config` record of the message that is being answered.
        metrics: metric -> value that the projects' own loops returned for the message that is being answered; of the first
            model that they trained, as the losses are.
        unread: keys of Flower's run configuration that nobody read while the client was made.
    """

    name: str
    tasks: Sequence[SessionTask]
    build: Callable[[], ComponentModel]
    outline: ComponentModel
    data: ClientData
    settings: HyperParameters
    fingerprint: str
    device: torch.device = field(default_factory=lambda: torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    compares: bool = True
    first: State = field(default_factory=dict, init=False)
    steps: int = field(default=0, init=False)
    config: Mapping[str, Any] = field(default_factory=dict, init=False)
    metrics: dict[str, float] = field(default_factory=dict, init=False)
    unread: tuple[str, ...] = field(default=(), init=False)

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
        """Task name -> weight of its distillation: the run's for the kind of task, else the kind's."""
        by_kind = vars(self.settings.distill.weight)
        return {task: by_kind.get(kind.name, kind.distillation) for task, kind in self.kinds.items()}

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
        times: int = 1,
    ) -> dict[str, float]:
        """Trains `model` in place on the client's training examples, through the project's own loop where there is one.

        Args:
            model: on the session's device.
            optimisation: steps, learning rate and so on.
            order: names the order of the mini-batches: equal names give equal mini-batches.
            noise: names the random numbers of dropout, and those of `random` and `numpy.random`.
            objective: a further loss.
            update: what happens with the gradients of a step; by default the optimiser's step.
            times: multiple of the steps, and of the calls of the project's own loop.

        Returns:
            Task name -> mean training loss; of a loop of the project's own, if it returned one.
        """
        optimisation = replace(optimisation, steps=times * optimisation.steps)
        seed_torch(seed := named_seed(self.settings.seed, self.name, "noise", *noise))
        if any(task.fit is not None for task in self.tasks):
            assert update is None, "methods with an update of their own say so in `Method.own_loop`"
            with self.algorithms(), others_seeded(seed):
                return self.fit_own(model, objective, times)
        batches = self.data.training_batches(
            self.settings.train.batch_size,
            named_seed(self.settings.seed, self.name, "order", *order),
            self.device,
            self.settings.train.group_by_length,
            optimisation.steps * optimisation.accumulation,
        )
        self.steps += optimisation.steps
        with self.algorithms(), others_seeded(seed), only_state_changes(model):
            return train(model, self.kinds, batches, self.with_head_factor(model, optimisation), objective, update)

    def algorithms(self) -> AbstractContextManager[None]:
        """The algorithms that the run computes with, inside a context."""
        return torch_algorithms(self.settings.compute.deterministic)

    def with_head_factor(self, model: ComponentModel, optimisation: Optimisation) -> Optimisation:
        """The optimisation with the heads' own learning rate."""
        return replace(optimisation, factors=dict.fromkeys(model.component_map.heads, self.settings.train.head_factor))

    def fit_own(
        self, model: ComponentModel, objective: Objective | None, times: int = 1, part: Part = whole
    ) -> dict[str, float]:
        """Trains through the project's own loops, one task after the other.

        Args:
            model: on the session's device.
            objective: a further loss.
            times: calls of each loop.
            part: what a loop gets of its training loader.

        Returns:
            Task name -> mean training loss, where the loop returned one.

        Raises:
            ClientError: a loop trained another module; or it returned what is neither a loss nor metrics, or nothing where
                the loss decides.
            DivergedError: a loss is NaN or infinite.
        """
        model.train()
        losses, metrics = dict[str, float](), dict[str, float]()
        for task in self.tasks:
            assert task.fit is not None
            name, loader = task.pair.task, self.data.loader("train", task.pair.task)
            for _ in range(times):
                with (
                    in_task(name),
                    lone_example_told(name),
                    lent(model, f"task {name!r}: `fit`", trains=True) as module,
                    trained(model, self.name, name) as steps,
                    further_loss(module, name, objective),
                ):
                    found = metrics_of(name, task.fit(module, part(loader), deepcopy(dict(self.config))))
                self.steps += steps[0]
            loss = found.pop("loss", None)
            if loss is not None and not isfinite(loss):
                raise DivergedError(
                    f"the training loss of task {name!r} is {loss}: look at the learning rate of its `fit`, and for values "
                    f"that are not finite in its data"
                )
            if loss is None and self.compares and self.settings.replacement.evidence is ReplacementEvidence.training:
                raise ClientError(
                    f"task {name!r}: `fit` returned no loss, and replacement.evidence = training compares it: return the "
                    f"mean training loss, or set replacement.evidence=validation"
                )
            losses |= {} if loss is None else {name: loss}
            prefix = "" if len(self.tasks) == 1 else f"{name}."
            metrics |= {f"{prefix}{metric}": value for metric, value in found.items()}
        model.to(self.device)  # the loop may have moved it
        self.metrics = self.metrics or metrics
        return losses

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
        optimisation = self.settings.train.optimisation(server_round)
        return self._trained(start, optimisation, server_round, name, objective, update)

    def finetune(
        self,
        start: State | None,
        name: str,
        objective: MakeObjective | None = None,
        update: MakeUpdate | None = None,
        times: int = 1,
    ) -> tuple[State, dict[str, float]]:
        """Trains a model for `times` · K optimiser steps, K being those of stage 2.

        Args:
            start: values of the whole model; None takes the run's first values.
            name: name of the model, which names the random numbers of dropout.
            objective: makes a further loss.
            update: makes what happens with the gradients of a step.
            times: multiple of K.

        Returns:
            The trained tensors (on the CPU), and task name -> mean training loss.
        """
        optimisation = self.settings.distill.optimisation(self.settings.train)
        return self._trained(start, optimisation, "stage 2", name, objective, update, times)

    def _trained(
        self,
        start: State | None,
        optimisation: Optimisation,
        part: int | str,
        name: str,
        objective: MakeObjective | None,
        update: MakeUpdate | None,
        times: int = 1,
    ) -> tuple[State, dict[str, float]]:
        model = self.model(start)
        losses = self.train(
            model,
            optimisation,
            order=(part,),
            noise=(part, name),
            objective=objective and objective(model),
            update=update and update(model),
            times=times,
        )
        return cpu_state(model), losses

    def near(self, anchor: Mapping[str, Tensor], weight: float) -> MakeObjective:
        """Makes the penalty `weight / 2 · ||w − anchor||²` on the model that is about to be trained."""
        on_device = {name: value.to(self.device) for name, value in anchor.items()}
        return lambda model: Proximal(model, on_device, weight)

    def evaluate(
        self, model: ComponentModel, split: str, observe: Observer | None = None
    ) -> dict[str, dict[str, float]]:
        """Metrics over all examples of a split; of a task with an evaluation of its own, what that returned.

        Args:
            model: on the session's device.
            split: `train`, `validation` or `test`.
            observe: called with every batch and the model's output for it.

        Returns:
            Task name -> metric -> value; a task without examples in the split is missing.
        """
        with self.algorithms():
            found = evaluate(model, self.kinds, self.batches(split), observe)
            sizes = self.data.sizes(split)
            for task in self.tasks:
                name = task.pair.task
                if task.score is not None and sizes.get(name):
                    found[name] = self.score_own(task, model, self.data.loader(split, name))
        return found

    def score_own(self, task: SessionTask, model: ComponentModel, loader: DataLoader[Any]) -> dict[str, float]:
        """What a project's own evaluation returns, checked: metric -> value."""
        assert task.score is not None
        name = task.pair.task
        with in_task(name), lent(model.eval(), f"task {name!r}: `score`", trains=False) as module:
            returned = task.score(module, loader)
        model.to(self.device)  # the evaluation may have moved it
        return scores_of(name, task.kind, returned)

    def scores(self, model: ComponentModel, split: str) -> dict[str, float]:
        """Task name -> score over all examples of a split: the headline metric, or 1 minus it where lower is better."""
        found = self.evaluate(model, split)
        return {task: self.kinds[task].judged_by.score(metrics) for task, metrics in found.items()}

    def losses(self, model: ComponentModel, split: str) -> dict[str, float]:
        """Task name -> mean loss over all examples of a split."""
        found = self.evaluate(model, split)
        check_losses(found)
        return {task: metrics["loss"] for task, metrics in found.items()}

    def batches(self, split: str) -> Iterator[Batch]:
        """All examples of a split once."""
        return self.data.batches(split, EVALUATION_BATCH, self.device)
