"""What a user's module consists of: every task is tried, and tells which tensors its forward pass reaches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import chain
from math import isclose, isfinite
from typing import Any

import torch
from torch import Tensor, nn

from tap_flower.core.components import ComponentMap, Pair
from tap_flower.core.module_attributes import mark
from tap_flower.core.module_tensors import BuiltModule, as_float32, is_norm, still_norms
from tap_flower.core.seeds import named_seed, seeded
from tap_flower.core.tasks import (
    TASK_KINDS,
    Statistics,
    TaskKind,
    added,
    check_comparison,
    computing,
    metrics_of_kind,
)
from tap_flower.core.training import check_trainable
from tap_flower.errors import ClientError, TapFlowerError, defined_at, users_line

Forward = Callable[[Any, Any], Any]
"""(module, batch) -> output of a task."""
Patterns = Mapping[str, str | Sequence[str]]
"""Component, or task -> patterns (`*`, `?`) of the names of its tensors."""
_Lists = Mapping[str, Sequence[str]]
PERSONAL, AVERAGE = "personal", "average"
"""What becomes of buffers that training changes: they stay on the client, or are averaged like parameters."""
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


@dataclass(frozen=True)
class Parts:
    """What a client's module consists of.

    Attributes:
        component_map: components of the tensors that pairs reach.
        moving: names of the buffers that training changes.
        local: names of the tensors of the state that stay on the client.
    """

    component_map: ComponentMap
    moving: frozenset[str]
    local: frozenset[str]


@contextmanager
def of_the_user(what: str, *functions: object) -> Iterator[None]:
    """Names the line of the user's own code that an error comes from; its words, which may quote data, go to the log."""
    try:
        yield
    except TapFlowerError:
        raise
    except Exception as error:
        log.exception("%s failed", what)
        places = [
            users_line(error) or "; ".join(dict.fromkeys(filter(None, map(defined_at, functions)))),
            "the log of the node says more",
        ]
        raise ClientError(f"{what} raised {type(error).__name__}: {', '.join(filter(None, places))}") from error


@contextmanager
def left_alone(what: str, batch: Any) -> Iterator[None]:
    """Refuses a call that changes its batch, with which a second model is called afterwards; it may add to the batch.

    Args:
        what: the call, as an error names it.
        batch: what it gets.

    Raises:
        ClientError: an entry is gone, or is another tensor; the message names it.
    """
    before = dict(_entries(batch))
    versions = _versions(before)
    yield
    after = dict(_entries(batch))
    now = _versions(after)
    changed = [name for name, version in versions.items() if name in after and now.get(name) != version]
    if wrong := [name for name in before if name not in after] + changed:
        entry = f"{wrong[0]!r} of its batch" if wrong[0] else "its batch"
        raise ClientError(
            f"{what} {'changes' if wrong[0] in after else 'removes'} {entry}, which a second model, the teacher of stage 2, "
            f"is called with, too: let it work on a copy, such as `x.clone()` of a tensor or `dict(batch)`"
        )


def _entries(batch: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Path and value of what a batch holds in mappings, lists, tuples."""
    if isinstance(batch, Mapping):
        inside = batch.items()
    elif isinstance(batch, list | tuple):
        inside = dict(enumerate(batch)).items()
    else:
        yield name, batch
        return
    for key, value in inside:
        yield from _entries(value, f"{name}.{key}" if name else str(key))


def _versions(entries: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Name -> identity of a tensor, and how often it was changed in place."""
    tensors = ((name, value) for name, value in entries.items() if isinstance(value, Tensor))
    return {name: (id(value), 0 if value.is_inference() else value._version) for name, value in tensors}


def parts_of(
    built: BuiltModule,
    tasks: Sequence[TracedTask],
    seed: int,
    patterns: Patterns | None = None,
    reach: Patterns | None = None,
    buffers: str = PERSONAL,
) -> Parts:
    """Tries every task of a client, and says what its module consists of.

    Args:
        built: the module.
        tasks: of the client; a few training examples of each go through the module, in training and in evaluation mode.
        seed: seed of the run, which dropout draws from meanwhile.
        patterns: name of a component -> patterns of its tensors' names.
        reach: task name -> patterns of the tensors that its forward pass reaches, in place of tracing.
        buffers: `personal` or `average`.

    Raises:
        ClientError: a task cannot be run, or a pattern does not fit.
    """
    given, grouped = _lists(reach) or {}, _lists(patterns)
    module = built.take().cpu()  # its last use may have been on a GPU
    if unknown := sorted(given.keys() - {task.pair.task for task in tasks}):
        raise ClientError(f"`reach` names the task {unknown[0]!r}: the client has no such task")
    still = {id(buffer) for part in still_norms(module) for buffer in part.buffers()}
    moving = {
        built.names.plain(f"{path}.{name}" if path else name)
        for path, part in module.named_modules()
        if is_norm(part)
        for name, buffer in part.named_buffers(recurse=False)
        if id(buffer) not in still
    }
    for mode in (False, True):
        module.train(mode)
        check_trainable("the model's own `train`", built.names.parameters(module), built.trainable)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.01)  # a slow copy of it, which begins with its values, is seen to move then
    reached: dict[Pair, set[str]] = {}
    caches = _marks(built.names.buffers(module, persistent=False))
    with seeded(named_seed(seed, "trace")):
        for task in tasks:
            name, before, found = task.pair.task, _marks(_fixed(built, module)), set(built.trainable)
            if task.forward is not None:
                found = _tried(task, built, module, name in given)
            elif not task.own_loop:
                raise ClientError(f"task {name!r}: it has no `forward`: give (module, batch) -> output")
            after = _marks(_fixed(built, module))
            moved = {tensor for tensor in {**before, **after} if before.get(tensor) != after.get(tensor)}
            moving |= moved
            reached[task.pair] = (_fitting(name, given[name], built.trainable) if name in given else found) | moved
    for name, mark_ in _marks(built.names.buffers(module, persistent=False)).items():
        if name in caches and caches[name][0] == mark_[0] and caches[name] != mark_:
            log.warning(
                "training changes %r, a buffer with persistent=False: it is not kept, and each model starts with the value "
                "that it was built with; register it with persistent=True if that value matters",
                name,
            )
    now = dict(_fixed(built, module))
    for name in sorted(moving):
        if (problem := _unkept(built.values.get(name), now.get(name))) is not None:
            built.spoilt = True
            raise ClientError(f"training changes {problem.format(repr(name))}")
    built.give_back(module)
    for names in reached.values():
        layers = {_layer(name) for name in names}
        names |= {name for name in moving if _layer(name) in layers}
    return _parts(built, reached, moving, grouped, buffers)


def _tried(task: TracedTask, built: BuiltModule, module: nn.Module, given: bool) -> set[str]:
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


def _fixed(built: BuiltModule, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each tensor that is not trained."""
    frozen = ((name, parameter) for name, parameter in built.names.parameters(module) if not parameter.requires_grad)
    return chain(frozen, built.names.buffers(module))


def _marks(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, tuple[int, int, int]]:
    return {name: mark(tensor) for name, tensor in tensors}


def _unkept(first: Tensor | None, now: Tensor | None) -> str | None:
    """Why a tensor cannot be kept that training changes; None where it can.

    Args:
        first: its value as a buffer of the module that was built.
        now: its value after a few batches.
    """
    if isinstance(now, nn.Parameter):
        return "the frozen parameter {}: make it a buffer, or train it"
    if first is None or now is None:
        missing = "`model` returns" if first is None else "the task has been tried"
        return (
            "the buffer {}, which is None or missing when " + missing + ": give it a tensor of one shape all the time"
        )
    if first.shape != now.shape:
        shapes = f"from {list(first.shape)} to {list(now.shape)}"
        return "the shape of the buffer {} " + shapes + ": build it in its final shape"
    if first.is_complex() or first.is_quantized or first.dtype == torch.float64:
        return "the buffer {}, which is " + str(first.dtype) + " and is kept in float32: make it float32"
    if first.is_floating_point() and not bool(first.isfinite().all()):
        return "the buffer {}, which begins with a value that is not finite: build it with finite ones"
    if first.numel() and as_float32(first) is None:
        return "the buffer {}, which is kept in float32 and begins with a larger integer: count in larger units"
    return None


def _parts(
    built: BuiltModule, reached: Mapping[Pair, set[str]], moving: set[str], patterns: _Lists | None, buffers: str
) -> Parts:
    """Which tensor belongs to which component, and which components each pair reaches."""
    anywhere = set().union(*reached.values())
    held = [name for name in (*built.trainable, *sorted(moving)) if name in anywhere]
    if patterns is None:
        component_of = {name: _layer(name) for name in held}
        for pair, tensors in reached.items():
            inside = {component_of[name] for name in tensors}
            outside = {component_of[name] for name in held if name not in tensors and name not in moving}
            if torn := inside & outside:
                raise ClientError(
                    f"task {pair.task!r} reaches some tensors of {min(torn)!r} and not others: say by `components` which of "
                    f"them belong together, or by `reach` that it reaches all of them"
                )
    else:
        component_of = _matched([n for n in held if n not in moving], patterns)
        component_of |= {n: (_fits(n, patterns) or [_layer(n)])[0] for n in held if n in moving}
    if local := [name for name in built.trainable if name not in anywhere]:
        log.warning(
            "no task reaches the trainable tensors %s: they are not averaged and stay on the client; if a task uses them on "
            "other examples, list them in `reach`",
            ", ".join(map(repr, local[:5])) + (f" and {len(local) - 5} more" if len(local) > 5 else ""),
        )
    counts = {name for name in moving if not built.values[name].is_floating_point()}  # of batches, say
    stays = (moving if buffers == PERSONAL else counts) | set(local) | (moving - anywhere)
    reach = {pair: frozenset(component_of[n] for n in names if n in component_of) for pair, names in reached.items()}
    return Parts(ComponentMap(component_of, reach), frozenset(moving), frozenset(stays))


def _layer(name: str) -> str:
    """The path of the module that owns a tensor; a tensor of the outermost module is a component of its own."""
    return name.rpartition(".")[0] or name


def _lists(patterns: Patterns | None) -> _Lists | None:
    if patterns is None:
        return None
    return {key: [wanted] if isinstance(wanted, str) else wanted for key, wanted in patterns.items()}


def _fits(name: str, patterns: _Lists) -> list[str]:
    """The components, or tasks, one of whose patterns a name fits."""
    return [key for key, wanted in patterns.items() if any(fnmatchcase(name, p) for p in wanted)]


def _fitting(task: str, wanted: Sequence[str], names: Sequence[str]) -> set[str]:
    for pattern in wanted:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ClientError(
                f"`reach` of task {task!r}: {pattern!r} fits no trainable tensor: the model has {', '.join(names[:5])} …"
            )
    return {name for name in names if _fits(name, {task: wanted})}


def _matched(names: Sequence[str], patterns: _Lists) -> dict[str, str]:
    component_of = {}
    for name in names:
        fits = _fits(name, patterns)
        if len(fits) != 1:
            found = "no component" if not fits else f"the components {', '.join(map(repr, fits))}"
            raise ClientError(f"tensor {name!r} fits {found}: change the patterns so that it fits exactly one")
        component_of[name] = fits[0]
    if unused := sorted(patterns.keys() - set(component_of.values())):
        raise ClientError(f"component {unused[0]!r} fits no trainable tensor: the model has {', '.join(names[:5])} …")
    return component_of
