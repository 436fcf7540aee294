"""What a user's module consists of: every task is tried, and tells which tensors its forward pass reaches."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import chain

import torch
from torch import Tensor, nn

from tap_flower.core.components import ComponentMap, Pair
from tap_flower.core.module_attributes import mark
from tap_flower.core.module_tensors import BuiltModule, as_float32, is_norm, still_norms
from tap_flower.core.seeds import named_seed, seeded
from tap_flower.core.task_trial import TracedTask, tried
from tap_flower.core.training import check_trainable
from tap_flower.errors import ClientError

Patterns = Mapping[str, str | Sequence[str]]
"""Component, or task -> patterns (`*`, `?`) of the names of its tensors."""
_Lists = Mapping[str, Sequence[str]]
PERSONAL, AVERAGE = "personal", "average"
"""What becomes of buffers that training changes: they stay on the client, or are averaged like parameters."""
log = logging.getLogger("tap_flower")


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
                found = tried(task, built, module, name in given)
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
