"""What a user says of a client that brings its own model: name, model, tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from tap_flower.client.module import Forward, OwnModel, Patterns, component_map, initials, prefixed, reached_by
from tap_flower.core.components import ComponentMap, ComponentModel, Pair
from tap_flower.core.initial import Initial, named_seed
from tap_flower.core.tasks import TaskKind
from tap_flower.data.batching import ClientData
from tap_flower.data.examples import OWN, Examples, own_examples, set_aside
from tap_flower.data.spec import NAME
from tap_flower.errors import ClientError
from tap_flower.methods.session import LocalTask

_TRACED = 2
"""Examples in the batch that a forward pass is traced with."""


@dataclass(frozen=True)
class Task:
    """One modality-task pair of a client, with its data.

    Attributes:
        name: clients that use one name share what belongs to the task.
        kind: its loss, distillation and metrics: one of `TASK_KINDS`, or one of your own (`TaskKind.of`).
        modalities: of the input, in your own words.
        train: a data set with a length and an index, or a DataLoader: its data set, collate function and batch size count.
        test: likewise.
        forward: (module, batch) -> output, as the kind wants it.
        target: batch -> target, as the kind wants it.
        validation: held-out examples, or None: a run that needs them sets a fifth of the training examples aside.
        margin: the client's own replacement margin; None takes the run's for the kind.
        batch_size: the task's own number of training examples in a batch; None takes the loader's, or the run's.
    """

    name: str
    kind: TaskKind
    modalities: Sequence[str]
    train: Dataset[Any] | DataLoader[Any]
    test: Dataset[Any] | DataLoader[Any]
    forward: Forward
    target: Callable[[Any], Tensor]
    validation: Dataset[Any] | DataLoader[Any] | None = None
    margin: float | None = None
    batch_size: int | None = None

    def __post_init__(self) -> None:
        for word in (self.name, self.kind.name, *self.modalities):
            if not NAME.fullmatch(word):
                raise ClientError(
                    f"task {self.name!r}: {word!r} is no name: use letters, digits, '-' and '_', at most 64"
                )
        if not self.modalities or isinstance(self.modalities, str):
            raise ClientError(f"task {self.name!r} has the modalities {self.modalities!r}: give a list of at least one")
        if self.margin is not None and not self.margin >= 0:
            raise ClientError(f"task {self.name!r} has margin {self.margin}: give a number from 0 on")

    @property
    def pair(self) -> Pair:
        """Its name and modalities."""
        return Pair(self.name, tuple(self.modalities))

    def examples(self, source: Dataset[Any] | DataLoader[Any]) -> Examples:
        """The examples of one of its data sets.

        Raises:
            ClientError: it has no length, no index, or is empty.
        """
        try:
            found = own_examples(self.name, source, self.target, self.batch_size)
        except TypeError as error:
            raise ClientError(str(error)) from error
        if not len(found):
            raise ClientError(f"task {self.name!r} has a data set without examples: give it at least one")
        return found


@dataclass(frozen=True)
class Client:
    """A client: its name, its model, its tasks.

    Attributes:
        name: stable, and of this client alone: its personal model is found by it.
        model: builds the module; called for every model that a round needs. All calls must give the same names and shapes.
            A `ComponentModel`, such as `models.model.TapModel`, knows its components and initial values itself.
            Tensors with `requires_grad` are trained and averaged with those of the same name on other clients; the others
            are yours to load, and never leave the client.
        tasks: with their data.
        components: name of a component -> patterns of its tensors' names; None makes a component of every layer.
        state_dir: folder for personal models, as STATE_DIR/NAME/RUN; `state-dir` of the node's configuration goes first.
            None is `tap-flower` in Flower's home.
    """

    name: str
    model: Callable[[], nn.Module]
    tasks: Sequence[Task]
    components: Patterns | None = None
    state_dir: str | Path | None = None

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ClientError(f"client {self.name!r}: use a name of letters, digits, '-' and '_', at most 64")
        names = [task.name for task in self.tasks]
        if not names or len(set(names)) < len(names):
            raise ClientError(f"client {self.name!r} has the tasks {names}: give at least one, each with its own name")

    def data(self, seed: int, hold_out: bool) -> ClientData:
        """Its examples.

        Args:
            seed: of the run; it decides what is set aside.
            hold_out: whether a task without validation examples sets a fifth of its training examples aside.

        Raises:
            ClientError: a data set cannot be used.
        """
        splits: dict[str, dict[str, Sequence[Examples]]] = {"train": {}, "validation": {}, "test": {}}
        with _told(f"client {self.name!r}"):
            for task in self.tasks:
                train, test = task.examples(task.train), task.examples(task.test)
                held = [] if task.validation is None else [task.examples(task.validation)]
                if hold_out and not held:
                    if len(train) < 2:
                        raise ClientError(f"task {task.name!r} has one training example, and one is to be set aside")
                    train, aside = set_aside(train, named_seed(seed, self.name, task.name, "held out", 0))
                    held = [aside]
                for split, parts in zip(splits, ([train], held, [test]), strict=True):
                    splits[split][task.name] = parts
        return ClientData(splits)


@dataclass(frozen=True)
class ClientHoldings:
    """A client's tasks and model, as a method works with them.

    Attributes:
        client: as the user says it.
        data: its examples; the forward pass of each pair is traced with the first of them.
    """

    client: Client
    data: ClientData

    @property
    def name(self) -> str:
        """Of the client."""
        return self.client.name

    @property
    def fingerprint(self) -> str:
        """The same for all: what is frozen in a module is its client's own."""
        return "own-modules"

    @cached_property
    def tasks(self) -> Sequence[LocalTask]:
        """Of the client."""
        return [LocalTask(task.pair, task.kind, margin=task.margin) for task in self.client.tasks]

    def new_model(self) -> OwnModel:
        """A model of the client's; its trainable tensors have whatever values the client's `model` gave them."""
        forwards = {task.name: task.forward for task in self.client.tasks}
        return OwnModel(self.client.model(), forwards, *self._traced)

    def outline(self) -> OwnModel:
        """The same."""
        return self.new_model()

    @cached_property
    def _traced(self) -> tuple[ComponentMap, dict[str, Initial]]:
        """Components and initial values, found once.

        Raises:
            ClientError: the model does not fit the tasks.
        """
        with _told(f"client {self.client.name!r}"):
            module, cpu = self.client.model().train(), torch.device("cpu")
            if isinstance(module, ComponentModel):
                return prefixed(module)
            reached = {}
            for task in self.client.tasks:
                batch = self.data.first("train", task.name, _TRACED, cpu)
                losses = task.kind.losses(task.forward(module, batch.inputs[OWN]), batch.target)
                with _told(f"task {task.name!r}"):
                    reached[task.pair] = reached_by(module, losses.sum())
            return component_map(module, reached, self.client.components), initials(module)


@contextmanager
def _told(where: str) -> Iterator[None]:
    """Puts `where` before the words of a ClientError."""
    try:
        yield
    except ClientError as error:
        raise ClientError(f"{where}: {error}") from error
