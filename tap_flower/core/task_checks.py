"""Checks what a task computes with: the form of outputs and targets, a batch's labels, the metrics of a kind."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from tap_flower.core.metrics import MOST_METRICS, numbers_by_name
from tap_flower.core.tasks import Statistics, TaskKind
from tap_flower.errors import ClientError, in_task

log = logging.getLogger("tap_flower")

_FORMS: Mapping[str, tuple[str, Callable[[Tensor, Tensor], bool]]] = {
    **dict.fromkeys(
        ("image_classification", "text_classification"),
        (
            "logits [examples, classes] with the numbers of classes, int64 [examples]",
            lambda output, target: (
                output.ndim == 2 and target.dtype is torch.int64 and target.shape == output.shape[:1]
            ),
        ),
    ),
    "text_generation": (
        "logits [examples, positions, tokens] with the numbers of tokens, int64 [examples, positions]",
        lambda output, target: output.ndim == 3 and target.dtype is torch.int64 and target.shape == output.shape[:2],
    ),
    "image_generation": (
        "images [examples, 3, height, width] with images of that shape",
        lambda output, target: output.ndim == 4 and target.is_floating_point() and target.shape == output.shape,
    ),
}
"""Kind -> (what it compares, in words, whether an output and a target are that)."""


def check_comparison(kind: TaskKind, task: str, output: Tensor, target: Tensor) -> None:
    """Checks what one of the four kinds compares: torch would take other shapes and types, and compare something else.

    Args:
        kind: one of your own takes whatever its losses take.
        task: name of the task.
        output: of the model.
        target: what the loss compares it with.

    Raises:
        ClientError: they do not have the kind's form.
    """
    form, fits = _FORMS.get(kind.name, ("", lambda _, __: True))
    if not fits(output, target):
        told = (f"{str(one.dtype).removeprefix('torch.')} {list(one.shape)}" for one in (output, target))
        raise ClientError(
            f"task {task!r}: the kind {kind.name!r} compares {form}, and `forward` returned {next(told)}, `target` "
            f"{next(told)}: return that, or take a kind of your own, TaskKind.of(...)"
        )


@contextmanager
def computing(task: str) -> Iterator[None]:
    """Names the task of a batch that cannot be computed with."""
    try:
        with in_task(task):
            yield
    except IndexError as error:
        # torch's words; the label itself is the client's own.
        if re.match(r"Target -?\d+ is out of bounds", str(error)):
            log.error("task %r: %s", task, error)
            raise ClientError(
                f"task {task!r}: a label is outside of the model's outputs, which are numbered from 0: give the model as "
                f"many outputs as there are classes, or correct the label, which the log of the node tells"
            ) from error
        raise
    except RuntimeError as error:
        if "device-side assert" in str(error):  # a GPU's words for the same; it computes nothing more in this process
            raise ClientError(
                f"task {task!r}: the GPU refused a batch, most often since a label, or a number that an embedding looks up, "
                f"is negative or too large: run it with CUDA_VISIBLE_DEVICES= on the CPU, which names it"
            ) from error
        raise


def metrics_of_kind(kind: TaskKind, task: str, sums: Statistics) -> dict[str, float]:
    """The metrics of a kind, checked.

    Args:
        kind: of the task.
        task: its name.
        sums: statistics of all examples.

    Raises:
        ClientError: they are not numbers by name, are too many, or lack the loss or the metric that the kind is judged by.
    """
    what = f"task {task!r}: the metrics of kind {kind.name!r}"
    returned = kind.metrics(sums)
    if not isinstance(returned, Mapping):
        raise ClientError(f"{what} are a {type(returned).__name__}: return numbers by name")
    found = numbers_by_name(what, returned, MOST_METRICS)
    if missing := {"loss", kind.headline} - found.keys():
        raise ClientError(f"{what} lack {min(missing)!r}: add it")
    return found
