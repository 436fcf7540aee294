"""Defining a client: its name, its model, its tasks and their data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from tap_flower.client.evaluation import TestObserver
from tap_flower.client.module import OwnModel, OwnOutline, adapted, built_module
from tap_flower.config import HyperParameters
from tap_flower.core.components import ComponentModel, Pair
from tap_flower.core.initial import named_seed
from tap_flower.core.module_tensors import BuiltModule
from tap_flower.core.tasks import TaskKind
from tap_flower.core.tracing import AVERAGE, PERSONAL, Forward, Patterns, TracedTask, parts_of
from tap_flower.data.batching import ClientData
from tap_flower.data.examples import OWN, Examples, own_examples, set_aside
from tap_flower.data.spec import NAME
from tap_flower.errors import ClientError
from tap_flower.methods.method import Method
from tap_flower.methods.session import Session, SessionTask
from tap_flower.wire.messages import Instruction

Data = Dataset[Any] | DataLoader[Any] | Sequence[Examples]
"""A data set with a length and an index, a DataLoader (its data set, collate function and batch size count), or examples
that make their own batches, those of each source apart."""


@dataclass(frozen=True)
class Task:
    """One modality-task pair of a client, with its data.

    Attributes:
        name: clients that use one name share what belongs to the task.
        kind: its loss, distillation and metrics: one of `TASK_KINDS`, or one of your own (`TaskKind.of`).
        modalities: names of the input's modalities, in your own words.
        train: training data.
        test: test data.
        forward: (module, batch) -> output, as the kind wants it. None where the model is a `ComponentModel` that takes the
            batches as they are.
        target: (batch) -> target, as the kind wants it. None where the data are `Examples`.
        validation: held-out data, or None: a run that needs them sets a fifth of the training examples aside.
        margin: the client's own replacement margin; None takes the run's for the kind.
        batch_size: the task's own number of training examples in a batch; None takes the loader's, or the run's.
        domains: domains of the data.
        head_size: number of classes, on which clients that share the task must agree; 0 where it says nothing.
    """

    name: str
    kind: TaskKind
    modalities: Sequence[str]
    train: Data
    test: Data
    forward: Forward | None = None
    target: Callable[[Any], Tensor] | None = None
    validation: Data | None = None
    margin: float | None = None
    batch_size: int | None = None
    domains: Sequence[str] = ()
    head_size: int = 0

    def __post_init__(self) -> None:
        for word in (self.name, self.kind.name, *self.modalities, *self.domains):
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

    def parts(self, source: Data) -> list[Examples]:
        """The examples of one of its data, those of each source apart.

        Raises:
            ClientError: a data set has no length or index, or is empty, or the task has no `target`.
        """
        found: list[Examples]
        if isinstance(source, list | tuple) and all(isinstance(part, Examples) for part in source):
            found = list(source)
        elif self.target is None:
            raise ClientError(
                f"task {self.name!r} has no `target`: give (batch) -> what the loss compares the output with"
            )
        else:
            try:
                found = [own_examples(self.name, cast(Dataset[Any], source), self.target, self.batch_size)]
            except TypeError as error:
                raise ClientError(str(error)) from error
        if not found or not all(map(len, found)):
            raise ClientError(f"task {self.name!r} has a data set without examples: give it at least one")
        return found


@dataclass(frozen=True)
class Client:
    """A client: its name, its model, its tasks.

    Attributes:
        name: stable, and of this client alone: its personal model is found by it.
        model: builds the module. A process calls it once and copies what it gets; clients that have one function share its
            module. All calls must give equal names and shapes. Tensors with `requires_grad` are trained, and averaged with
            those of the same name on other clients. All tensors start as the module was built on the first client by name
            that has them; `torch`, `numpy.random` and `random` draw from the run's seed meanwhile.
            A `ComponentModel`, such as `models.model.TapModel`, knows its components and first values itself, and is built
            for every model that a round needs.
        tasks: its tasks, with their data.
        components: name of a component -> patterns of its tensors' names; None makes a component of every layer.
        state_dir: folder for personal models, as STATE_DIR/NAME/RUN; `state-dir` of the node's configuration goes first.
            None is `tap-flower` in Flower's home.
        folder: folder of this client's state in this run, in place of STATE_DIR/NAME/RUN.
        fingerprint: fingerprint of what is frozen in the model, on which all clients of a run must agree.
        outline: builds a model that is looked at only, whose tensors may be without memory; by default `model`.
        observe: (session, method) -> what collects predictions during an evaluation.
        describe: (folder, session, instruction) writes into the state folder what its tensors belong to.
        buffers: what becomes of buffers that training changes, such as BatchNorm's statistics: `personal`, they stay on the
            client, each model having its own; or `average`, they are averaged like parameters.
        reach: task name -> patterns of the names of the tensors that its forward pass reaches. A task that is not named is
            tried with a few of its training examples.
    """

    name: str
    model: Callable[[], nn.Module]
    tasks: Sequence[Task]
    components: Patterns | None = None
    state_dir: str | Path | None = None
    folder: Path | None = None
    fingerprint: str = "own-modules"
    outline: Callable[[], ComponentModel] | None = None
    observe: Callable[[Session, Method], TestObserver] | None = None
    describe: Callable[[Path, Session, Instruction], None] | None = None
    buffers: str = PERSONAL
    reach: Patterns | None = None

    def __post_init__(self) -> None:
        if self.buffers not in (PERSONAL, AVERAGE):
            raise ClientError(f"client {self.name!r} has buffers={self.buffers!r}: use {PERSONAL!r} or {AVERAGE!r}")
        if not NAME.fullmatch(self.name):
            raise ClientError(f"client {self.name!r}: use a name of letters, digits, '-' and '_', at most 64")
        names = [task.name for task in self.tasks]
        if not names or len(set(names)) < len(names):
            raise ClientError(f"client {self.name!r} has the tasks {names}: give at least one, each with its own name")

    def session(self, settings: HyperParameters) -> Session:
        """The client at work in a run.

        Args:
            settings: the run's hyper-parameters.

        Raises:
            ClientError: a data set cannot be used, or the model does not fit the tasks.
        """
        data = self.data(settings.seed, settings.needs_validation)
        build, outline = self._models(data, settings.seed)
        return Session(
            name=self.name,
            tasks=[
                SessionTask(task.pair, task.kind, tuple(task.domains), task.head_size, task.margin)
                for task in self.tasks
            ],
            build=build,
            outline=outline,
            data=data,
            settings=settings,
            fingerprint=self.fingerprint,
        )

    def data(self, seed: int, hold_out: bool) -> ClientData:
        """Its examples.

        Args:
            seed: seed of the run, which decides what is set aside.
            hold_out: whether a task without validation data sets a fifth of its training examples aside.

        Raises:
            ClientError: a data set cannot be used.
        """
        splits: dict[str, dict[str, Sequence[Examples]]] = {"train": {}, "validation": {}, "test": {}}
        with _told(f"client {self.name!r}"):
            for task in self.tasks:
                train, test = task.parts(task.train), task.parts(task.test)
                held = [] if task.validation is None else task.parts(task.validation)
                if hold_out and not held:
                    if min(map(len, train)) < 2:
                        raise ClientError(f"task {task.name!r} has one training example, and one is to be set aside")
                    halves = [
                        set_aside(part, named_seed(seed, self.name, task.name, "held out", number))
                        for number, part in enumerate(train)
                    ]
                    train, held = [rest for rest, _ in halves], [aside for _, aside in halves]
                for split, parts in zip(splits, (train, held, test), strict=True):
                    splits[split][task.name] = parts
        return ClientData(splits)

    def _models(self, data: ClientData, seed: int) -> tuple[Callable[[], ComponentModel], ComponentModel]:
        """What makes the client's models, and one to look at; every task of a plain module is tried.

        Raises:
            ClientError: the model does not fit the tasks.
        """
        forwards = {task.name: task.forward for task in self.tasks if task.forward is not None}
        if self.outline is not None:
            return lambda: adapted(self.model(), forwards), self.outline()
        with _told(f"client {self.name!r}"):
            built = built_module(self.model, seed)
            if built is None:
                return lambda: adapted(self.model(), forwards), adapted(self.model(), forwards)
            tasks = [
                TracedTask(task.pair, task.kind, task.forward, task.target, partial(_first_batch, data, task.name))
                for task in self.tasks
            ]
            parts = parts_of(built, tasks, seed, self.components, self.reach, self.buffers)

        def module() -> BuiltModule:
            return cast(BuiltModule, built_module(self.model, seed))

        return lambda: OwnModel(module(), forwards, parts), OwnOutline(module, parts)


def _first_batch(data: ClientData, task: str, size: int) -> tuple[Any, Tensor]:
    batch = data.first("train", task, size, torch.device("cpu"))
    return batch.inputs[OWN], batch.target


@contextmanager
def _told(where: str) -> Iterator[None]:
    """Puts `where` before the words of a ClientError."""
    try:
        yield
    except ClientError as error:
        raise ClientError(f"{where}: {error}") from error
