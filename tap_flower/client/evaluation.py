"""Evaluates a client's models on its test data: metrics, answers to a few test items, gradient cosines."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from math import isfinite
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tap_flower.client.text_metrics import TextMetrics
from tap_flower.core.components import ComponentModel, State
from tap_flower.errors import DivergedError
from tap_flower.methods.session import Session
from tap_flower.wire.messages import Metrics

if TYPE_CHECKING:
    from tap_flower.client.samples import Samples  # it imports PIL and datasets


log = logging.getLogger("tap_flower")


@dataclass
class TestObserver:
    """Collects predictions during the evaluation of a client spec's models, for text metrics and sample outputs.

    Attributes:
        samples: answers to a few test items.
        new_texts: makes the collector of one model's texts.
    """

    samples: Samples
    new_texts: Callable[[], TextMetrics]


@dataclass(frozen=True)
class Found:
    """What an evaluation found.

    Attributes:
        metrics: task name -> model -> metric -> value.
        last: name of the model that was evaluated last.
        samples: answers to a few test items; see `Samples.tasks`.
        cosines: gradient cosines of the server's model; see `gradient_cosines`.
        skipped: what could not be had besides metrics -> why.
    """

    metrics: Metrics
    last: str
    samples: dict[str, Any] = field(default_factory=dict)
    cosines: list[dict[str, Any]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


def evaluate_models(session: Session, models: Mapping[str, State | None], observer: TestObserver | None) -> Found:
    """Evaluates models on the client's test data.

    Args:
        session: the client at work.
        models: name -> tensors, at least one; None stands for the run's first values.
        observer: collects predictions, or None where the metrics of the kinds of task are all.
    """
    metrics: Metrics = {task: {} for task in session.kinds}
    cosines: list[dict[str, Any]] = []
    skipped: dict[str, str] = {}
    for name, state in models.items():
        model = session.model(state)
        if name == "server":
            with _diagnostic("gradient cosines", skipped):
                cosines = gradient_cosines(session, model)
        texts = None
        if observer is not None:
            with _diagnostic("answers to test items", skipped):
                observer.samples.add(name, model)
            texts = observer.new_texts()
        found = session.evaluate(model, "test", None if texts is None else texts.observe)
        further: Mapping[str, Mapping[str, float]] = {}
        if texts is not None:
            with _diagnostic("metrics of generated texts", skipped):
                further = texts.metrics()
        for task, values in found.items():
            for metric in [metric for metric, value in values.items() if not isfinite(value)]:
                what = f"{metric} of the model {name!r}"
                if metric in ("loss", session.kinds[task].headline):
                    raise DivergedError(
                        f"task {task!r}: {what} is {values[metric]} on the test data: look there for values that are not "
                        f"finite, or lower the learning rate"
                    )
                skipped[f"task {task!r}: {what}"] = f"it is {values.pop(metric)} on the test data"
                log.warning("task %r: %s is not finite on the test data, and left out", task, what)
            metrics[task][name] = {**values, **further.get(task, {})}
    samples = {} if observer is None else observer.samples.tasks
    return Found(metrics, list(models)[-1], samples, cosines, skipped)


@contextmanager
def _diagnostic(what: str, skipped: dict[str, str]) -> Iterator[None]:
    """A diagnostic that fails is skipped with a warning; it never costs the evaluation."""
    try:
        yield
    except Exception as error:  # a user's module may raise anything
        skipped[what] = f"{type(error).__name__}: {error}"
        log.warning("%s are skipped: %s", what, skipped[what])


def gradient_cosines(session: Session, model: ComponentModel) -> list[dict[str, Any]]:
    """Cosines between the gradients of every two pairs of a client, on the components that both reach.

    The gradient of a pair is that of its mean loss on one batch of its training examples, without dropout; no step is made.
    It is zero on tensors that the module uses in training only.

    Args:
        session: the client at work; one with a single pair has no cosines.
        model: the server's, on the session's device.

    Returns:
        For every two tasks `a` and `b`: their `cosine` over all shared tensors, and `components`, the cosine on each. A
        cosine is between -1 (opposed) and 1 (the same direction), or None where a gradient is zero.
    """
    component_map = model.component_map
    held = Counter(component for reached in component_map.reach.values() for component in reached)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients: dict[str, dict[str, Tensor]] = {}
    model.eval()
    own = {task.pair.task for task in session.tasks if task.fit is not None}
    for pair in component_map.reach:
        if pair.task in own:  # its loss is in the project's own loop
            continue
        names = [
            n for n in component_map.tensors_of(pair) if n in parameters and held[component_map.component_of[n]] > 1
        ]
        if not names:
            continue
        size = session.data.splits["train"][pair.task][0].batch_size or session.settings.train.batch_size
        batch = session.data.first("train", pair.task, size, session.device)
        with torch.backends.cudnn.flags(enabled=False):  # its recurrent layers have no backward pass in evaluation mode
            output = model(pair.task, batch.inputs)
        loss = session.kinds[pair.task].losses(output, batch.target).mean()
        found = torch.autograd.grad(loss, [parameters[n] for n in names], allow_unused=True, materialize_grads=True)
        gradients[pair.task] = {name: value.double() for name, value in zip(names, found, strict=True)}
    cosines = []
    for a, b in combinations(sorted(gradients), 2):
        shared = sorted(gradients[a].keys() & gradients[b].keys())
        components: dict[str, list[str]] = {}
        for name in shared:
            components.setdefault(component_map.component_of[name], []).append(name)
        one, other = gradients[a], gradients[b]
        cosines.append(
            {
                "a": a,
                "b": b,
                "cosine": cosine(one, other, shared),
                "components": {component: cosine(one, other, names) for component, names in components.items()},
            }
        )
    return cosines


def cosine(one: Mapping[str, Tensor], other: Mapping[str, Tensor], names: Iterable[str]) -> float | None:
    """Cosine of the angle between two sets of tensors, each taken as one long vector; None where one is zero.

    Args:
        one: tensor name -> value.
        other: tensor name -> value, of equal shapes.
        names: names of the tensors that count.
    """
    products = [[(one[n] * other[n]).sum(), (one[n] ** 2).sum(), (other[n] ** 2).sum()] for n in names]
    dot, square, other_square = (float(sum(column)) for column in zip(*products, strict=True))
    length = (square * other_square) ** 0.5
    return max(-1.0, min(1.0, dot / length)) if length else None
