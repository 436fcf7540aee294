"""A project's own loops and evaluations: which methods they do for, and what they return, checked."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tap_flower.core.metrics import MOST_METRICS, numbers_by_name
from tap_flower.core.tasks import TASK_KINDS, TaskKind
from tap_flower.errors import ClientError

log = logging.getLogger("tap_flower")
TRAIN_LOSS, NUM_EXAMPLES = "train-loss", "num-examples"
"""Metrics that every reply to `train` has; the second is its weight, as in Flower."""


def check_own_loops(own: Mapping[str, bool], method: str, reason: str) -> None:
    """Refuses what the projects' own loops cannot do.

    Args:
        own: task name -> whether it has a loop of its own.
        method: name of the run's method.
        reason: its `Method.own_loop`.

    Raises:
        ClientError: the method needs what only our loop gives, or some tasks have a loop and others have not.
    """
    with_fit, without = ([task for task, fits in own.items() if fits is which] for which in (True, False))
    if with_fit and reason:
        raise ClientError(
            f"task {with_fit[0]!r} has `fit`, and method={method} {reason}: use another method, or give "
            f"`forward` and `target` without `fit`"
        )
    if with_fit and without:
        raise ClientError(
            f"task {with_fit[0]!r} has `fit` and task {without[0]!r} has not: give it to all tasks or to none"
        )
    if with_fit:
        log.info("tasks %s train by their own `fit`: train.* and the steps of distill.* do nothing", with_fit)


@contextmanager
def lone_example_told(task: str) -> Iterator[None]:
    """Says in the words of the data what BatchNorm says of a batch of one example.

    Raises:
        ClientError: the model refuses such a batch of the task's.
    """
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):  # torch's words
            raise
        raise ClientError(
            f"task {task!r}: its loader has a batch of one example, perhaps since some were set aside (`validation`), on "
            f"which the model's BatchNorm cannot be trained: give the loader `drop_last=True`, or another batch size"
        ) from error


def metrics_of(task: str, returned: Any) -> dict[str, float]:
    """What `fit` returned: nothing, a number, which is the mean training loss, or numbers by name.

    Raises:
        ClientError: it is something else, or has a name that the reply's own metrics have.
    """
    if returned is None:
        return {}
    if not isinstance(returned, Mapping):
        returned = {"loss": returned}
    found = numbers_by_name(f"task {task!r}: `fit`", returned)
    if taken := found.keys() & {TRAIN_LOSS, NUM_EXAMPLES}:
        raise ClientError(
            f"task {task!r}: `fit` returned {min(taken)!r}, which the reply has anyway: return the loss as 'loss', and give "
            f"other numbers other names"
        )
    return found


def scores_of(task: str, kind: TaskKind, returned: Any) -> dict[str, float]:
    """What `score` returned: numbers by name, among them the one that the kind is judged by.

    Raises:
        ClientError: it is something else.
    """
    what = f"task {task!r}: `score`"
    if not isinstance(returned, Mapping):
        raise ClientError(
            f"{what} returned a {type(returned).__name__}: return numbers by name, such as {{'loss': 0.3, 'accuracy': 0.9}}"
        )
    found = numbers_by_name(what, returned, MOST_METRICS)
    if kind.headline not in found:
        raise ClientError(
            f"{what} returned {', '.join(found) or 'nothing'}, and the kind {kind.name!r} is judged by {kind.headline!r}: "
            f"return it, too, or take a kind with another `headline`"
        )
    value = found[kind.headline]
    if kind.name in TASK_KINDS and kind.higher_is_better and not 0 <= value <= 1:
        raise ClientError(
            f"{what} returned {kind.headline} = {value:g}, and the kind {kind.name!r} has it between 0 and 1: return the "
            f"share, not a percentage, so that clients can be compared"
        )
    return found


def check_losses(found: Mapping[str, Mapping[str, float]]) -> None:
    """Checks that evaluations give what TAP compares.

    Args:
        found: task name -> metric -> value.

    Raises:
        ClientError: a task has no loss.
    """
    if without := [task for task, metrics in found.items() if "loss" not in metrics]:
        raise ClientError(
            f"task {without[0]!r}: `score` returned no 'loss', and replacement.evidence = validation compares it: return "
            f"it, or set replacement.evidence=training and return the mean training loss from `fit`"
        )
