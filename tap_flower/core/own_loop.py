"""A project's own loop and evaluation: a further loss reaches the loop through hooks, and what both leave is checked.

The loop is not changed. `further_loss` adds the term where the loop cannot see it, in the backward pass, so that the
gradients are those of `loss + term`.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from tap_flower.core.components import ComponentModel, trainable_state
from tap_flower.core.objectives import Proximal
from tap_flower.core.training import CALL, Batch, Objective, comparable
from tap_flower.errors import ClientError

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of a value -> integers of as many; others are read byte by byte."""
_THROUGH = ("MulBackward0", "DivBackward0", "ToCopyBackward0")


@dataclass
class Factor:
    """The constant by which the loop multiplies its loss: 1 / accumulation steps, the scale of a GradScaler.

    Attributes:
        value: in the present backward pass.
        rows: examples in the last batch.
        used: whether a term has reached a backward pass.
    """

    value: float | Tensor = 1.0
    rows: int = 0
    used: bool = False

    def read(self, root: Tensor) -> None:
        """Takes the factors that lie between a loss and what `backward` is called on.

        A sum that is divided by the number of rows is a mean: that divisor is part of the loss.
        """
        node: Any = root.grad_fn
        self.value, divisors = 1.0, []
        while node is not None and node.name() in _THROUGH:
            live = [at for at, (function, _) in enumerate(node.next_functions) if function is not None]
            if len(live) != 1 or (node.name() == "DivBackward0" and live != [0]):
                break
            if node.name() == "MulBackward0":
                self.value = self.value * (node._saved_self if live == [1] else node._saved_other).detach()
            elif node.name() == "DivBackward0":
                divisors.append(node._saved_other.detach())
            node = node.next_functions[live[0]][0]
        for divisor in divisors:
            if not (_sums(node) and float(divisor) == self.rows):
                self.value = self.value / divisor


def _sums(root: Any) -> bool:
    """Whether a loss is a sum over examples, or made of such sums; a sum over parameters is none."""
    nodes = [root]
    while nodes:
        node = nodes.pop()
        if node is None:
            continue
        if node.name() == "SumBackward0" or getattr(node, "_saved_reduction", None) == 2:  # torch's number for a sum
            if _of_output(node):
                return True
        elif node.name() in ("AddBackward0", "SubBackward0", *_THROUGH):
            nodes += [below for below, _ in node.next_functions]
    return False


def _of_output(root: Any) -> bool:
    """Whether a value was computed from an output of the module."""
    nodes, seen = [root], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            if node.name() == "_WithBackward":
                return True
            seen.add(node)
            nodes += [below for below, _ in node.next_functions]
    return False


@dataclass
class _Term:
    """A further loss of one forward pass; it is added once, whichever of the outputs the loop uses."""

    value: Tensor
    factor: Factor
    added: bool = field(default=False)


class _With(torch.autograd.Function):
    """The identity on an output; its backward pass also gives the further loss its gradient."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, value: Tensor, term: _Term) -> Tensor:
        del value
        ctx.term, ctx.is_loss = term, output.dim() == 0
        return output.clone()  # a view could not be changed in place by the loop

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        term: _Term = ctx.term
        if term.added:
            return gradient, None, None
        term.added = term.factor.used = True
        # A module that computes its own loss: what arrives at a scalar is the factor.
        factor = gradient if ctx.is_loss else term.factor.value * torch.ones_like(term.value)
        return gradient, factor.to(term.value.dtype), None


@contextmanager
def further_loss(module: nn.Module, task: str, objective: Objective | None) -> Iterator[None]:
    """Adds a further loss to whatever a loop does with `module` inside the context.

    Distillation, and every other objective, becomes an identity on the module's output whose backward pass adds the
    objective's gradient; a proximal term becomes a hook on the gradients. Constant factors on the loop's loss multiply
    the term, too, so that gradient accumulation and a GradScaler act on both alike.

    Args:
        module: the module that the loop calls.
        task: name of the task.
        objective: gets a `Batch` whose inputs are {`CALL`: (args, kwargs) of the module's call}, and whose target is None.

    Raises:
        ClientError: the loop has ended and no term has reached a backward pass.
    """
    if objective is None:
        yield
        return
    factor, backward = Factor(), Tensor.backward

    def watched(root: Tensor, *args: Any, **options: Any) -> None:
        factor.read(root)
        backward(root, *args, **options)  # type: ignore[no-untyped-call]

    hooks = _proximal_hooks(objective, factor) if isinstance(objective, Proximal) else []

    def called(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        tensors = _tensors(output)
        factor.rows = next((len(tensor) for tensor in tensors if tensor.dim()), 0)
        if not torch.is_grad_enabled() or not any(t.requires_grad for t in tensors):
            return output
        if isinstance(objective, Proximal):
            value = torch.zeros(())  # its gradients come by the hooks on parameters
        else:
            batch = Batch(task, {CALL: (args, kwargs)}, None)  # type: ignore[arg-type]
            value = objective(batch, comparable(output))
        term = _Term(value, factor)
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)

        def with_term(tensor: Tensor) -> Tensor:
            # Of a router, say, whose weight in the loop's loss is none of the term's.
            auxiliary = not tensor.dim() and tensor is not output and tensor is not loss
            if auxiliary or not tensor.requires_grad:
                return tensor
            return cast(Tensor, _With.apply(tensor, value, term))  # type: ignore[no-untyped-call]

        return _mapped(output, with_term)

    hooks.append(module.register_forward_hook(called, with_kwargs=True))
    Tensor.backward = watched  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        Tensor.backward = backward  # type: ignore[method-assign]
        for hook in hooks:
            hook.remove()
    if not factor.used:
        raise ClientError(
            f"task {task!r}: the method's further loss has not reached the loop in `fit`: it must call the module that it "
            f"gets, as `net(...)` and not `net.forward(...)`, and `backward` on a loss of what that returns"
        )


def _proximal_hooks(objective: Proximal, factor: Factor) -> list[Any]:
    """Hooks that add `weight · (w − anchor)` to the gradients, once in each backward pass."""

    def hook(name: str, parameter: nn.Parameter) -> Callable[[Tensor], Tensor]:
        def near(gradient: Tensor) -> Tensor:
            factor.used = True
            away = parameter.detach() - objective.anchor[name].to(parameter.device)
            return gradient + factor.value * objective.weight * away

        return near

    trained = [(name, p) for name, p in objective.model.named_parameters() if p.requires_grad]
    return [p.register_hook(hook(name, p)) for name, p in trained]  # type: ignore[no-untyped-call]


@contextmanager
def lent(model: ComponentModel, what: str, trains: bool) -> Iterator[nn.Module]:
    """The module of a model, for code of the project's own, which must leave it as it was but for what is trained.

    Copies of a module share its frozen parameters and are used again: a merged adapter would be in all of them. What the
    code freezes, as a loop may while it trains, is trainable again afterwards, and the other way round.

    Args:
        model: of which the module is a part.
        what: the code, as an error names it.
        trains: whether the state of the model may change.

    Raises:
        ClientError: something else has changed; no other model of this process has that module.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    state = trainable_state(model).keys() if trains else ()
    before = _marks(model, state)
    try:
        yield model.own_module
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    after = _marks(model, state)
    if changed := [name for name in chain(before, after) if before.get(name) != after.get(name)]:
        model.discard()
        name = min(changed, key=lambda name: name in before and name in after)
        how = "is gone" if name not in after else "is new" if name not in before else "has changed"
        raise ClientError(
            f"{what} must leave the module as it was, but for what is trained, and {name!r} {how}: merge adapters, or do "
            f"what it does, in a copy (`copy.deepcopy(net)`); what is to be trained has `requires_grad` when `model` "
            f"returns, and a buffer that training changes is found where the task has `forward` and `target`"
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
        marks[name] = (tensor.dtype, tensor.shape, None if name in state else _bits(tensor.detach()))
    return marks


def _bits(tensor: Tensor) -> int:
    integers = _INTEGERS.get(tensor.element_size(), torch.uint8)
    return int(tensor.reshape(-1).view(integers).sum(dtype=torch.int64))


@contextmanager
def counted_steps(tell: Callable[[int], None] | None = None) -> Iterator[list[int]]:
    """Counts the steps of every optimiser inside the context, in a list of one number.

    Args:
        tell: is called with the count after each step.
    """
    count = [0]

    def step(*_: Any) -> None:
        count[0] += 1
        if tell is not None:
            tell(count[0])

    handle = register_optimizer_step_post_hook(step)
    try:
        yield count
    finally:
        handle.remove()


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

    def tell(count: int) -> None:
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


def _tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors of an output."""
    found: list[Tensor] = []
    _mapped(output, lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return found


def _mapped(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """An output with its floating-point tensors changed: a tensor, or mappings, tuples and lists of these."""
    if isinstance(output, Tensor):
        return change(output) if output.is_floating_point() else output
    if isinstance(output, Mapping):  # transformers' outputs are, too
        other = copy.copy(output)
        for name, value in output.items():
            other[name] = _mapped(value, change)  # type: ignore[index]
        return other
    if isinstance(output, tuple | list):
        parts = [_mapped(value, change) for value in output]
        return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)
    return output
