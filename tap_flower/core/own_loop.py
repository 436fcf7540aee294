"""A project's own loop and evaluation: what they leave is checked, and their optimiser steps are counted."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from tap_flower.core.components import ComponentModel, trainable_state
from tap_flower.core.module_attributes import bits
from tap_flower.errors import ClientError

log = logging.getLogger("tap_flower")
UNCHANGED = "`fit` has changed no tensor of the model that it was called with"


@contextmanager
def lent(model: ComponentModel, what: str, trains: bool) -> Iterator[nn.Module]:
    """The module of a model, for code of the project's own, which must leave it as it was but for what is trained.

    Copies of a module share its frozen parameters and are used again: a merged adapter would be in all of them. What the
    code freezes, as a loop may while it trains, is trainable again afterwards, and the other way round; so is whether
    torch computes gradients (`torch.set_grad_enabled`).

    Args:
        model: of which the module is a part.
        what: the code, as an error names it.
        trains: whether the state of the model may change.

    Raises:
        ClientError: something else has changed; no other model of this process has that module.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    state = trainable_state(model).keys() if trains else ()
    before, gradients = _marks(model, state), torch.is_grad_enabled()
    try:
        yield model.own_module
    finally:
        torch.set_grad_enabled(gradients)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    after = _marks(model, state)
    if changed := [name for name in chain(before, after) if before.get(name) != after.get(name)]:
        model.discard()
        name = min(changed, key=lambda name: name in before and name in after)
        how = "is gone" if name not in after else "is new" if name not in before else "has changed"
        raise ClientError(
            f"{what} must leave the module as it was, but for what is trained, and {name!r} {how}: {_remedy(model, name)}"
        )


def _remedy(model: ComponentModel, name: str) -> str:
    for path, part in model.named_modules():
        if getattr(part, "max_norm", None) is not None and name == f"{path}.weight":
            return (
                f"its {type(part).__name__} has max_norm={part.max_norm}, which shortens the rows that are looked up; work "
                f"on a copy (`copy.deepcopy(net)`), or build it without max_norm"
            )
    return (
        "merge adapters, or do what it does, in a copy (`copy.deepcopy(net)`); what is to be trained has `requires_grad` "
        "when `model` returns, and a buffer that training changes is found where the task has `forward` and `target`"
    )


def _marks(model: ComponentModel, state: Collection[str]) -> dict[str, tuple[Any, ...]]:
    """Name -> what changes where a tensor does: dtype and shape, and but for `state` the sum of its values' bits.

    What is changed through `.data`, as peft does, has no new version; what `load_state_dict` gives its old values has one.
    An adapter that is 0 changes no value where it is merged, but then trains no more: peft's `merged` tells of it.
    """
    marks: dict[str, tuple[Any, ...]] = {
        f"{path}.merged": (bool(part.merged),)
        for path, part in model.own_module.named_modules()
        if hasattr(part, "merged")
    }
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        marks[name] = (tensor.dtype, tensor.shape, None if name in state else bits(tensor))
    return marks


@contextmanager
def counted_steps(tell: Callable[[int, Optimizer], None] | None = None) -> Iterator[list[int]]:
    """Counts the steps of every optimiser inside the context, in a list of one number.

    Args:
        tell: is called after each step, with the count and the optimiser.
    """
    count = [0]

    def step(optimizer: Optimizer, *_: Any) -> None:
        count[0] += 1
        if tell is not None:
            tell(count[0], optimizer)

    handle = register_optimizer_step_post_hook(step)
    try:
        yield count
    finally:
        handle.remove()


@contextmanager
def trained(model: ComponentModel, client: str, task: str) -> Iterator[list[int]]:
    """Counts the steps of every optimiser inside the context, and tells where the model has not been trained by them.

    Args:
        model: of which a loop of the project's own gets the module.
        client: its name, for the warning.
        task: name of the task.

    Raises:
        ClientError: nothing in the model has changed, and what was trained is no tensor of it.
    """
    own = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    before, optimised = {name: bits(p) for name, p in own.items()}, set[int]()

    def stepped(_: int, optimizer: Optimizer) -> None:
        optimised.update(id(p) for group in optimizer.param_groups for p in group["params"])

    with counted_steps(stepped) as steps:
        yield steps
    if any(bits(p) != before[name] for name, p in model.named_parameters() if name in before):
        return
    if optimised and not optimised & set(map(id, own.values())):
        raise ClientError(
            f"task {task!r}: {UNCHANGED}: its optimiser has the parameters of another one; make the optimiser in each call, "
            f"from `net.parameters()`"
        )
    log.warning("client %r: task %r: %s: train that one, with a learning rate above 0", client, task, UNCHANGED)


@contextmanager
def recorded_steps(file: Path | None, every: float = 1.0) -> Iterator[None]:
    """Keeps the number of optimiser steps made inside the context in a file, for whoever watches the run.

    A step costs a look at the clock; the file is written once in a while, and removed at the end.

    Args:
        file: where the number goes; None writes nothing.
        every: seconds between two writes, and before the first one.
    """
    if file is None:
        yield
        return
    last = time.monotonic()

    def tell(count: int, _: Optimizer) -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= every:
            last = now
            with suppress(OSError):  # a run does not end because its progress cannot be shown
                file.write_text(str(count))

    with suppress(OSError):
        file.unlink(missing_ok=True)  # of a process that was killed
    try:
        with counted_steps(tell):
            yield
    finally:
        with suppress(OSError):
            file.unlink(missing_ok=True)
