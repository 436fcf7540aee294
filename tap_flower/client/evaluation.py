"""Evaluates a client's models on its test data: metrics, answers to a few test items, gradient cosines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tap_flower.client.interference import gradient_cosines
from tap_flower.client.samples import Samples
from tap_flower.client.text_metrics import TextMetrics
from tap_flower.core.components import State
from tap_flower.methods.session import Session
from tap_flower.wire.messages import Metrics


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
    """

    metrics: Metrics
    last: str
    samples: dict[str, Any] = field(default_factory=dict)
    cosines: list[dict[str, Any]] = field(default_factory=list)


def evaluate_models(session: Session, models: Mapping[str, State | None], observer: TestObserver | None) -> Found:
    """Evaluates models on the client's test data.

    Args:
        session: the client at work.
        models: name -> tensors, at least one; None stands for the run's first values.
        observer: collects predictions, or None where the metrics of the kinds of task are all.
    """
    metrics: Metrics = {task: {} for task in session.kinds}
    cosines: list[dict[str, Any]] = []
    for name, state in models.items():
        model = session.model(state)
        if name == "server":
            cosines = gradient_cosines(session, model)
        texts = None
        if observer is not None:
            observer.samples.add(name, model)
            texts = observer.new_texts()
        found = session.evaluate(model, "test", None if texts is None else texts.observe)
        further = {} if texts is None else texts.metrics()
        for task, values in found.items():
            metrics[task][name] = values | further.get(task, {})
    samples = {} if observer is None else observer.samples.tasks
    return Found(metrics, next(reversed(models)), samples, cosines)
