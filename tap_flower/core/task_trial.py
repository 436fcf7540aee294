"""Tries a task before the first round: its forward pass, losses, divergences and metrics on a few examples."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from math import isclose, isfinite
from typing import Any

import torch
from torch import Tensor, nn

from tap_flower.core.components import Pair
from tap_flower.core.module_tensors import BuiltModule
from tap_flower.core.task_checks import check_comparison, computing, metrics_of_kind
from tap_flower.core.tasks import TASK_KINDS, Statistics, TaskKind, added
from tap_flower.core.training import check_trainable
from tap_flower.core.user_code import left_alone, of_the_user
from tap_flower.errors import ClientError

Forward = Callable[[Any, Any], Any]
"""(module, batch) -> output of a task."""
_EXAMPLES = (2, 8)
"""Examples in the batches that a forward pass is tried with."""
log = logging.getLogger("tap_flower")


@dataclass(frozen=True)
class TracedTask:
    """A task as it is tried before the first round.

    Attributes:
        pair: name and modalities.
        kind: its loss, divergence and metrics.
        forward: how the module runs a batch, or None where the task has a loop of its own.
        target: batch -> target; named where it is at fault.
        batch: number -> a batch of so many training examples, and its target.
        own_loop: whether it has a loop of its own.
        sizes: argument of the task -> the number of classes that it says; 0 where it says none.
    """

    pair: Pair
    kind: TaskKind
    forward: Forward | None
    target: Callable[[Any], Tensor] | None
    batch: Callable[[int], tuple[Any, Tensor]]
    own_loop: bool = False
    sizes: Mapping[str, int] = field(default_factory=dict)


def tried(task: TracedTask, built: BuiltModule, module: nn.Module, given: bool) -> set[str]:
    """The trainable tensors that a task's losses depend on; its loss, divergence and metrics are tried as well."""
    kind, name = task.kind, task.pair.task
    found: set[str] = set()
    sums: Statistics = {}
    total, units, metrics = 0.0, 0, {"loss": 0.0}
    assert task.forward is not None
    tried: set[tuple[torch.Size, bool]] = set()
    for size, training in zip((*_EXAMPLES, _EXAMPLES[-1]), (True, True, False), strict=True):
        with of_the_user(f"task {name!r}: `target`, or its data,", task.target):
            batch, target = task.batch(size)
        if isinstance(target, Tensor):
            if (target.shape, training) in tried:  # a loader has batches of its own size
                continue
            tried.add((target.shape, training))
        module.train(training)
        if kind.name in TASK_KINDS:
            _check_tensor(f"task {name!r}: `target`", target, "of labels the numbers of their classes, counted from 0")
        what = f"task {name!r}: `forward`"
        alone = nullcontext() if task.own_loop else left_alone(what, batch)  # a loop's teacher gets what the loop gives
        with of_the_user(what, task.forward), alone:
            output = task.forward(module, batch)
        check_trainable(what, built.names.parameters(module), built.trainable)
        if kind.name in TASK_KINDS:
            _check_tensor(f"task {name!r}: `forward`", output, "of a classifier the logits [examples, classes]")
            check_comparison(kind, name, output, target)
            _check_width(task, output)
        with _losses_told(task), computing(name):
            losses = kind.losses(output, target)
        _check_units(f"task {name!r}: the losses", losses)
        _check_not_stretched(task, output, target, losses)
        found |= _reached(task, built, module, losses)
        total, units = total + float(losses.detach().double().sum()), units + len(losses)
        with (
            of_the_user(f"task {name!r}: the divergences of kind {kind.name!r}", kind.divergences, task.forward),
            torch.no_grad(),
        ):
            _check_units(f"task {name!r}: the divergences", kind.divergences(output, output, target, 2.0))
        with (
            of_the_user(f"task {name!r}: the metrics of kind {kind.name!r}", kind.statistics, kind.metrics),
            torch.no_grad(),
        ):
            sums = added(sums, kind.statistics(output, target))
            metrics = metrics_of_kind(kind, name, sums)
    if units and not task.own_loop:
        _tell_apart(task, total / units, metrics["loss"])
    if not found and not given:
        raise ClientError(f"task {name!r}: its loss depends on no trainable tensor: look at its `forward`")
    return found


def _tell_apart(task: TracedTask, losses: float, metric: float) -> None:
    """Warns where a kind's metric `loss` is not the mean of its losses."""
    if isfinite(losses) and isfinite(metric) and not isclose(losses, metric, rel_tol=0.01, abs_tol=1e-4):
        log.warning(
            "task %r: on a few examples the mean of the losses of kind %r is %.4g, and its metric 'loss' is %.4g: training "
            "follows the first, replacement and results follow the second",
            task.pair.task,
            task.kind.name,
            losses,
            metric,
        )


def _reached(task: TracedTask, built: BuiltModule, module: nn.Module, losses: Tensor) -> set[str]:
    """The trainable tensors that get a gradient from some losses."""
    if not losses.requires_grad:
        return set()
    module.zero_grad(set_to_none=True)
    with of_the_user(f"task {task.pair.task!r}: the backward pass of its losses", task.kind.losses, task.forward):
        losses.sum().backward()  # type: ignore[no-untyped-call]  # as in training: `torch.autograd.grad` allows less
    gradients = {name: p.grad for name, p in built.names.parameters(module) if p.grad is not None}
    if not task.own_loop and (sparse := [name for name, gradient in gradients.items() if gradient.is_sparse]):
        raise ClientError(
            f"task {task.pair.task!r}: the gradient of {sparse[0]!r} is sparse, and AdamW needs a dense one: build the "
            f"layer with sparse=False"
        )
    return set(gradients)


def _check_width(task: TracedTask, output: Tensor) -> None:
    """Refuses logits of another number of classes than the task says it has."""
    for argument, count in task.sizes.items():
        if output.ndim == 2 and count not in (0, output.shape[1]):
            raise ClientError(
                f"task {task.pair.task!r} has {count} classes by `{argument}`, and `forward` returned the logits of "
                f"{output.shape[1]}: correct the one or the other"
            )


def _check_tensor(what: str, found: Any, form: str) -> None:
    if not isinstance(found, Tensor):
        parts = {type(part).__name__ for part in found} if isinstance(found, list | tuple) else set[str]()
        told = f" of {' and '.join(sorted(parts))}" if parts else ""
        raise ClientError(f"{what} returned a {type(found).__name__}{told}: return a tensor, {form}")


def _losses_told(task: TracedTask) -> AbstractContextManager[None]:
    what = f"task {task.pair.task!r}: the losses of kind {task.kind.name!r}"
    return of_the_user(what, task.kind.losses, task.forward, task.target)


def _check_not_stretched(task: TracedTask, output: Any, target: Any, losses: Tensor) -> None:
    """Refuses [B, 1] against [B], which torch would stretch to [B, B]: losses of a part of the batch differ then."""
    both = isinstance(output, Tensor) and isinstance(target, Tensor)
    if not both or output.shape == target.shape or output.numel() != target.numel():
        return
    if output.shape[:1] != target.shape[:1] or len(output) < 2:
        return
    with torch.no_grad(), _losses_told(task):
        first = task.kind.losses(output[:1], target[:1])
    if not torch.allclose(first, losses[: len(first)], rtol=1e-3, equal_nan=True):
        raise ClientError(
            f"task {task.pair.task!r}: `forward` returned the shape {list(output.shape)}, `target` {list(target.shape)}, "
            f"and the losses of kind {task.kind.name!r} compare every example with all others: give both one shape, by "
            f"`target[:, None]` for example"
        )


def _check_units(what: str, found: Any) -> None:
    if not isinstance(found, Tensor) or found.ndim != 1:
        told = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ClientError(f"{what} are one for each example or token, a tensor of shape [units], not of {told}")
