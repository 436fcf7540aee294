"""What a method works with on a client: its model, its data and the run's hyper-parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from tap_flower.config import HyperParameters, Model
from tap_flower.core.components import Pair, load_trainable_state, trainable_state
from tap_flower.core.initial import named_seed
from tap_flower.core.tasks import TASK_KINDS, TaskKind
from tap_flower.core.training import Batch, Objective, Observer, Optimisation, Update, evaluate, train
from tap_flower.data.loading import ClientData
from tap_flower.data.spec import ClientSpec
from tap_flower.methods.method import State
from tap_flower.models.backbones import Backbone, BackboneError, outline
from tap_flower.models.model import ModelTask, TapModel

EVALUATION_BATCH = 64
"""Examples in a batch of an evaluation; no result depends on it."""


@dataclass
class LocalClient:
    """A client in one process.

    Attributes:
        spec: name and tasks.
        data: its examples.
        backbone: shared by all clients of the process.
        settings: the run's hyper-parameters, as the server sent them.
        device: where it computes.
        steps: optimiser steps that it has made in this process, of all models.
    """

    spec: ClientSpec
    data: ClientData
    backbone: Backbone
    settings: HyperParameters
    device: torch.device = field(default_factory=lambda: torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    steps: int = field(default=0, init=False)

    @cached_property
    def kinds(self) -> Mapping[str, TaskKind]:
        """Task name -> kind."""
        return {task.name: TASK_KINDS[task.kind] for task in self.spec.tasks}

    @cached_property
    def margins(self) -> Mapping[str, float]:
        """Task name -> the client's own margin, or the run's for the kind of task."""
        by_kind = self.settings.replacement.margin
        return {
            task.name: getattr(by_kind, task.kind) if task.margin is None else task.margin for task in self.spec.tasks
        }

    @cached_property
    def outline(self) -> TapModel:
        """The client's model without values: what it consists of."""
        with torch.device("meta"):
            return self.new_model()

    def initial_values(self) -> State:
        """The run's initial values of the client's tensors."""
        initials, seed = self.outline.initials, self.settings.seed
        return {n: initials[n].value(n, tuple(t.shape), seed) for n, t in trainable_state(self.outline).items()}

    def new_model(self) -> TapModel:
        """A model of the client's components; its trainable tensors have no values yet."""
        return client_model(self.backbone, self.spec, self.settings.model.text_length)

    def model(self, state: Mapping[str, Tensor] | None = None) -> TapModel:
        """A model with the trainable tensors of `state`, or with the run's initial values, on the client's device."""
        model = self.new_model()
        if state is None:
            model.initialise(self.settings.seed)
        else:
            load_trainable_state(model, state)
        return model.to(self.device)

    def train(
        self,
        model: TapModel,
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
        name, seed = self.spec.name, self.settings.seed
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

    def evaluate(self, model: TapModel, split: str, observe: Observer | None = None) -> dict[str, dict[str, float]]:
        """Task name -> metric -> value over all examples of a split; `observe` is shown every batch."""
        return evaluate(model, self.kinds, self.batches(split), observe)

    def scores(self, model: TapModel, split: str) -> dict[str, float]:
        """Task name -> score over all examples of a split: the headline metric, or 1 minus it where lower is better."""
        found = self.evaluate(model, split)
        return {task: self.kinds[task].score(metrics) for task, metrics in found.items()}

    def losses(self, model: TapModel, split: str) -> dict[str, float]:
        """Task name -> loss over all examples of a split."""
        return {task: metrics["loss"] for task, metrics in self.evaluate(model, split).items()}

    def batches(self, split: str) -> Iterator[Batch]:
        """All examples of a split once."""
        return self.data.batches(split, EVALUATION_BATCH, self.device)


class TaskOutline(Protocol):
    """What of a task its model depends on; see `TaskSpec`."""

    @property
    def pair(self) -> Pair: ...  # noqa: D102
    @property
    def kind(self) -> str: ...  # noqa: D102
    @property
    def domains(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def classes(self) -> tuple[str, ...]: ...  # noqa: D102


class ClientOutline(Protocol):
    """What of a client its model depends on; see `ClientSpec`."""

    @property
    def backbone(self) -> str: ...  # noqa: D102
    @property
    def tasks(self) -> Sequence[TaskOutline]: ...  # noqa: D102


def client_model(backbone: Backbone, spec: ClientOutline, text_length: int) -> TapModel:
    """A model of a client's components; its trainable tensors have no values yet.

    Args:
        backbone: of the client.
        spec: of the client, or what its folder says of it.
        text_length: longest text and longest target, in tokens.

    Raises:
        BackboneError: the backbone has no positions for texts of this length.
    """
    reads_text = any("text" in task.pair.modalities for task in spec.tasks)
    if reads_text and text_length > backbone.text_length:
        raise BackboneError(
            f"model.text_length = {text_length} is too long for backbone {spec.backbone!r}, which has positions for "
            f"{backbone.text_length} tokens: choose at most {backbone.text_length}"
        )
    return TapModel(backbone, model_tasks(spec, text_length))


def model_tasks(spec: ClientOutline, text_length: int) -> list[ModelTask]:
    """A client's tasks, as its model knows them; see `client_model`."""
    return [
        ModelTask(
            pair=task.pair,
            kind=task.kind,
            domains=task.domains,
            classes=len(task.classes),
            target_length=text_length if task.kind == "text_generation" else 0,
        )
        for task in spec.tasks
    ]


def exchanged(spec: ClientSpec, model: Model) -> dict[str, Tensor]:
    """The tensors that a client and the server send each other, without values; no weights are read for it.

    Args:
        spec: of the client.
        model: the run's.

    Raises:
        BackboneError: the client's backbone cannot be used.
    """
    backbone = outline(spec.backbone, model.layers, model.image_size, spec.revision)
    with torch.device("meta"):
        return trainable_state(client_model(backbone, spec, model.text_length))
