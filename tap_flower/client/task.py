"""Defining a client: its name, its model, its tasks and their data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from tap_flower.client.evaluation import TestObserver
from tap_flower.client.known_parts import KnownParts
from tap_flower.client.module import OwnModel, OwnOutline, adapted, built_module
from tap_flower.config import HyperParameters
from tap_flower.core.components import ComponentModel, Pair
from tap_flower.core.module_tensors import BuiltModule
from tap_flower.core.seeds import named_seed
from tap_flower.core.task_trial import Forward, TracedTask
from tap_flower.core.tasks import TaskKind
from tap_flower.core.tracing import AVERAGE, PERSONAL, Patterns, parts_of
from tap_flower.data.batching import ClientData
from tap_flower.data.examples import HELD_OUT, OWN, Examples, OwnLoader, own_examples, set_aside, split_off
from tap_flower.data.spec import NAME
from tap_flower.errors import ClientError
from tap_flower.methods.method import Method
from tap_flower.methods.own_results import check_own_loops
from tap_flower.methods.registry import find_method
from tap_flower.methods.session import Session
from tap_flower.methods.session_task import Fit, Score, SessionTask
from tap_flower.methods.trial import try_batches
from tap_flower.wire.messages import Instruction

Data = Dataset[Any] | DataLoader[Any] | Sequence[Examples]
"""A data set with a length and an index, a DataLoader, which is iterated as it is, or examples that make their own batches,
those of each source apart."""
Parts = list[Examples | OwnLoader]


@dataclass(frozen=True)
class Task:
    """One modality-task pair of a client, with its data.

    Attributes:
        name: clients that use one name share what belongs to the task.
        kind: its loss, distillation and metrics: one of `TASK_KINDS`, or one of your own (`TaskKind.of`).
        modalities: names of the input's modalities, in your own words.
        train: training data.
        test: test data; they may be empty, and the task is not tested then.
        forward: (module, batch) -> output, as the kind wants it. None where the model is a `ComponentModel` that takes the
            batches as they are.
        target: (batch) -> target, as the kind wants it. None where the data are `Examples`.
        validation: held-out data; or the share of the training examples, of a loader its sampler's rows, that a run which
            needs held-out data sets aside; or None: no example is set aside, and such a run is refused.
        margin: the client's own replacement margin; None takes the run's for the kind.
        batch_size: the task's own number of training examples in a batch; None takes the run's. A DataLoader has its own.
        domains: domains of the data.
        head_size: number of classes, on which clients that share the task must agree; 0 where it says nothing.
        classes: their names, in the order of the output, on which clients that share the task must agree; the server
            sees a keyed hash of them.
        fit: the project's own training loop, (module, training loader, config) -> None, the mean training loss, or numbers
            by name (`loss` and others, which become metrics of the reply). It runs once where the run would make its own
            steps; config is Flower's `config` record of the message. The data must be DataLoaders.
        score: the project's own evaluation, (module, loader) -> numbers by name: `loss`, and the kind's headline metric.
            It changes nothing in the module, and `fit` only what is trained: an adapter is merged in a copy.
    """

    name: str
    kind: TaskKind
    modalities: Sequence[str]
    train: Data
    test: Data
    forward: Forward | None = None
    target: Callable[[Any], Tensor] | None = None
    validation: Data | float | None = HELD_OUT
    margin: float | None = None
    batch_size: int | None = None
    domains: Sequence[str] = ()
    head_size: int = 0
    classes: Sequence[str] = ()
    fit: Fit | None = None
    score: Score | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.kind, TaskKind):
            raise ClientError(
                f"task {self.name!r} has kind {self.kind!r}: give a TaskKind, such as tap_flower.IMAGE_CLASSIFICATION, or "
                f"one of your own, TaskKind.of(...)"
            )
        for field in ("modalities", "domains", "classes"):
            given = getattr(self, field)
            if isinstance(given, str) or not isinstance(given, Iterable):
                # The server, which is told, must not see the names of classes.
                raise ClientError(f"task {self.name!r} has {field} of type {type(given).__name__}: give a list")
            object.__setattr__(self, field, tuple(given))
        for word in (self.name, self.kind.name, *self.modalities, *self.domains):
            if not _is_name(word):
                raise ClientError(
                    f"task {self.name!r}: {word!r} is no name: use letters, digits, '-' and '_', at most 64"
                )
        for field in ("forward", "target", "fit", "score"):
            given = getattr(self, field)
            if given is not None and not callable(given):
                raise ClientError(f"task {self.name!r} has a {type(given).__name__} as `{field}`: give a function")
        if not self.modalities or len(set(self.modalities)) < len(self.modalities):
            raise ClientError(
                f"task {self.name!r} has the modalities {list(self.modalities)}: give at least one, and each once"
            )
        if self.margin is not None and not (isinstance(self.margin, int | float) and self.margin >= 0):
            raise ClientError(f"task {self.name!r} has margin {self.margin!r}: give a number from 0 on")
        if self.batch_size is not None:
            object.__setattr__(self, "batch_size", self._whole("batch_size", 1))
        object.__setattr__(self, "head_size", self._whole("head_size", 0))
        if self.fit is not None and self.score is None and (self.forward is None or self.target is None):
            raise ClientError(
                f"task {self.name!r} has `fit`, and nothing to evaluate by: give `score`, or `forward` and `target`"
            )
        if isinstance(self.validation, int | float) and not 0 < self.validation < 1:
            raise ClientError(
                f"task {self.name!r} has validation {self.validation}: give a share between 0 and 1, or None"
            )

    def _whole(self, field: str, least: int) -> int:
        value = getattr(self, field)
        if not isinstance(value, Integral) or isinstance(value, bool) or int(value) < least:
            raise ClientError(f"task {self.name!r} has {field} {value!r}: give a whole number from {least} on")
        return int(value)

    @property
    def pair(self) -> Pair:
        """Its name and modalities."""
        return Pair(self.name, tuple(self.modalities))

    def parts(self, split: str, source: Data) -> Parts:
        """The examples of one of its data, those of each source apart.

        Args:
            split: `train`, `validation` or `test`.
            source: data of the split.

        Raises:
            ClientError: a data set has no length or index, is empty and not for testing, or does not fit `fit` or `score`.
        """
        found: Parts
        own = {"fit": self.fit is not None and split == "train", "score": self.score is not None and split != "train"}
        if isinstance(source, list | tuple) and all(isinstance(part, Examples) for part in source):
            found = list(source)
        elif not isinstance(source, DataLoader) and any(own.values()):
            name = next(name for name, used in own.items() if used)
            raise ClientError(
                f"task {self.name!r} has `{name}`, and its {split} data are a {type(source).__name__}: give a DataLoader, "
                f"with which `{name}` is called"
            )
        elif self.target is None and not any(own.values()):
            raise ClientError(
                f"task {self.name!r} has no `target`: give (batch) -> what the loss compares the output with, or `fit` and "
                f"`score`"
            )
        else:
            try:
                found = [self._own(source, scored=own["score"])]
            except TypeError as error:
                raise ClientError(str(error)) from error
        if split != "test" and (not found or not all(map(len, found))):
            raise ClientError(f"task {self.name!r} has {split} data without examples: give it at least one")
        return [part for part in found if len(part)]

    def _own(self, source: Any, scored: bool) -> Examples | OwnLoader:
        if not isinstance(source, DataLoader):
            assert self.target is not None
            return own_examples(self.name, source, self.target, self.batch_size)
        if self.batch_size is not None:
            raise ClientError(
                f"task {self.name!r} has batch_size={self.batch_size} and a DataLoader, which has its own batch size: leave "
                f"`batch_size` out"
            )
        if len(source) == 0 < len(source.dataset):  # type: ignore[arg-type]
            raise ClientError(
                f"task {self.name!r} has a DataLoader that yields no batch: it has fewer rows than one batch, and drop_last "
                f"discards them"
            )
        return OwnLoader(self.name, source, None if scored else self.target)

    def halves(self, train: Parts, seeds: Callable[[int], int]) -> tuple[Parts, Parts]:
        """(what is left of the training examples, what is set aside of them).

        Args:
            train: its training examples.
            seeds: number of a source -> seed of the choice.

        Raises:
            ClientError: nothing may, or can, be set aside.
        """
        share = self.validation
        if not isinstance(share, int | float):
            raise ClientError(
                f"task {self.name!r} has validation=None, and the run compares losses of held-out examples: give such data, "
                f"or a share such as 0.2, or set replacement.evidence=training and stopping.patience=0"
            )
        if min(map(len, train)) < 2:
            raise ClientError(
                f"task {self.name!r} has one training example, and one is to be set aside: give `validation`"
            )
        rest: Parts = []
        held: Parts = []
        for number, part in enumerate(train):
            if isinstance(part, Examples):
                left, aside = set_aside(part, seeds(number), share)
                rest, held = [*rest, left], [*held, aside]
                continue
            try:
                loader, held_out = split_off(part.loader, share, seeds(number))
            except TypeError as error:
                raise ClientError(f"task {self.name!r}: {error}") from error
            scored = self.score is not None
            rest.append(OwnLoader(self.name, loader, self.target))
            held.append(OwnLoader(self.name, held_out, None if scored else self.target))
        return rest, held


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
        if isinstance(self.model, nn.Module) or not callable(self.model):
            raise ClientError(
                f"client {self.name!r} has a {type(self.model).__name__} as `model`: give the function that builds the "
                f"module, such as its class, or `lambda: net`"
            )
        tasks = tuple(self.tasks) if isinstance(self.tasks, Iterable) else None
        if tasks is None or not all(isinstance(task, Task) for task in tasks):
            raise ClientError(
                f"client {self.name!r} has a {type(self.tasks).__name__} as `tasks`: give a list of Tasks"
            )
        object.__setattr__(self, "tasks", tasks)
        if not _is_name(self.name):
            raise ClientError(
                f"client {self.name!r}: use a name of letters, digits, '-' and '_', at most 64, such as "
                f"f\"client-{{context.node_config['partition-id']}}\""
            )
        for field in ("components", "reach"):
            self._check_patterns(field, getattr(self, field))
        names = [task.name for task in self.tasks]
        if not names or len(set(names)) < len(names):
            raise ClientError(f"client {self.name!r} has the tasks {names}: give at least one, each with its own name")

    def _check_patterns(self, field: str, patterns: Any) -> None:
        if patterns is None:
            return
        if not isinstance(patterns, Mapping):
            raise ClientError(
                f"client {self.name!r} has a {type(patterns).__name__} as `{field}`: give patterns by name"
            )
        for name, given in patterns.items():
            several = [given] if isinstance(given, str) or not isinstance(given, Sequence) else given
            if not all(isinstance(pattern, str) for pattern in several):
                raise ClientError(
                    f"client {self.name!r}: `{field}` of {name!r} is {given!r}: give a pattern such as 'encoder.*', or "
                    f"a list"
                )

    def session(self, settings: HyperParameters, known: KnownParts | None = None) -> Session:
        """The client at work in a run.

        Args:
            settings: the run's hyper-parameters.
            known: where it is kept what a plain module consists of; None tries every task.

        Raises:
            ClientError: a data set cannot be used, or the model does not fit the tasks.
        """
        with _told(f"client {self.name!r}"):
            own, method = {task.name: task.fit is not None for task in self.tasks}, find_method(settings.method)
            check_own_loops(own, method.name, method.own_loop)
        needed = method.compares(settings) or settings.stopping.patience > 0
        data = self.data(settings.seed, settings.needs_validation, needed)
        build, outline = self._models(data, settings.seed, known)
        session = Session(
            name=self.name,
            tasks=[
                SessionTask(
                    task.pair, task.kind, tuple(task.domains), task.head_size, task.margin, task.fit, task.score
                )
                for task in self.tasks
            ],
            build=build,
            outline=outline,
            data=data,
            settings=settings,
            fingerprint=self.fingerprint,
            compares=method.compares(settings),
        )
        with _told(f"client {self.name!r}"):
            try_batches(session, method)
        return session

    def data(self, seed: int, hold_out: bool, needed: bool = True) -> ClientData:
        """Its examples.

        Args:
            seed: seed of the run, which decides what is set aside.
            hold_out: whether a task without validation data sets a share of its training examples aside.
            needed: whether a task with `validation=None` is refused then.

        Raises:
            ClientError: a data set cannot be used.
        """
        splits: dict[str, dict[str, Parts]] = {"train": {}, "validation": {}, "test": {}}
        with _told(f"client {self.name!r}"):
            for task in self.tasks:
                train, test = task.parts("train", task.train), task.parts("test", task.test)
                given = task.validation
                held = [] if given is None or isinstance(given, int | float) else task.parts("validation", given)
                if hold_out and not held and (needed or given is not None):
                    train, held = task.halves(train, partial(named_seed, seed, self.name, task.name, "held out"))
                for split, parts in zip(splits, (train, held, test), strict=True):
                    splits[split][task.name] = parts
        return ClientData(splits)

    def _models(
        self, data: ClientData, seed: int, known: KnownParts | None
    ) -> tuple[Callable[[], ComponentModel], ComponentModel]:
        """What makes the client's models, and one to look at; every task of a plain module is tried where it is not known.

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
                TracedTask(
                    task.pair,
                    task.kind,
                    None if task.target is None and task.fit is not None else task.forward,
                    task.target,
                    partial(_first_batch, data, task.name),
                    own_loop=task.fit is not None,
                    sizes={"head_size": task.head_size, "classes": len(task.classes)},
                )
                for task in self.tasks
            ]
            given = self.components, self.reach, self.buffers
            trace = partial(parts_of, built, tasks, seed, *given)
            parts = trace() if known is None else known.parts(built, [task.pair for task in tasks], given, trace)

        def module() -> BuiltModule:
            return cast(BuiltModule, built_module(self.model, seed))

        return lambda: OwnModel(module(), forwards, parts), OwnOutline(module, parts)


def _is_name(word: object) -> bool:
    return isinstance(word, str) and NAME.fullmatch(word) is not None


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
