"""Adds a loss to a project's own loop, which is not changed: hooks add it in the backward pass.

The gradients are those of `loss + term`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from tap_flower.core.objectives import Proximal
from tap_flower.core.training import CALL, Batch, Objective, comparable
from tap_flower.errors import ClientError

_THROUGH = ("MulBackward0", "DivBackward0", "NegBackward0", "ToCopyBackward0")


@dataclass
class Factor:
    """The constant by which the loop multiplies its loss: 1 / accumulation steps, the scale of a GradScaler.

    Attributes:
        task: name of the task.
        value: in the present backward pass; None where it cannot be told.
        rows: examples in the last batch.
        used: whether a term has reached a backward pass.
        in_pass: whether a backward pass is on; gradients that the loop computes otherwise are without the term.
    """

    task: str
    value: float | Tensor | None = 1.0
    rows: int = 0
    used: bool = False
    in_pass: bool = False

    @contextmanager
    def backward_pass(self, roots: Sequence[Any], gradients: Sequence[Tensor | None]) -> Iterator[None]:
        """A backward pass from `roots`; one inside another, as checkpointing makes it, belongs to the outer one."""
        if self.in_pass:
            yield
            return
        found = [
            self._of(root, gradient) for root, gradient in zip(roots, gradients, strict=False)
        ]  # torch checks both
        alike = len(found) == 1 or len({None if value is None else float(value) for value in found}) == 1
        self.value, self.in_pass = found[0] if alike else None, True
        try:
            yield
        finally:
            self.in_pass = False

    def known(self) -> float | Tensor:
        """The value.

        Raises:
            ClientError: it cannot be told.
        """
        if self.value is None:
            raise ClientError(
                f"task {self.task!r}: the method's further loss needs one number to belong to, and `fit` has called "
                f"`backward` on a tensor of many, or on several losses: call it on their mean or sum"
            )
        return self.value

    def _of(self, root: Any, gradient: Tensor | None) -> float | Tensor | None:
        """The product of the factors that lie between a loss and what `backward` is called on, with `gradient`.

        A sum that is divided by the number of rows is a mean: that divisor is part of the loss. So is a sign: a loss may be
        a likelihood that was negated.
        """
        if not isinstance(root, Tensor) or root.numel() != 1:
            return None
        node: Any = root.grad_fn
        value: float | Tensor = 1.0 if gradient is None else gradient.detach().reshape(())
        divisors = []
        while node is not None and (node.name() in _THROUGH or _of_one(node)):
            live = [at for at, (function, _) in enumerate(node.next_functions) if function is not None]
            if len(live) != 1 or (node.name() == "DivBackward0" and live != [0]):
                break
            if node.name() == "MulBackward0":
                value = value * (node._saved_self if live == [1] else node._saved_other).detach()
            elif node.name() == "DivBackward0":
                divisors.append(node._saved_other.detach())
            node = node.next_functions[live[0]][0]
        for divisor in divisors:
            if not (_sums(node) and float(divisor) == self.rows):
                value = value / divisor
        return cast(float | Tensor, abs(value))


def _of_one(node: Any) -> bool:
    """Whether a sum or a mean is of one value, or a stack of one."""
    if node.name() == "StackBackward0":
        return len(node.next_functions) == 1
    if node.name() not in ("SumBackward0", "MeanBackward0"):
        return False
    below = node.next_functions[0][0]
    return not node._saved_self_sym_sizes or (below.name() == "StackBackward0" and _of_one(below))


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
        if term.added or not term.factor.in_pass:
            return gradient, None, None
        term.added = term.factor.used = True
        # A module that computes its own loss: what arrives at a scalar is the factor.
        factor = gradient if ctx.is_loss else term.factor.known() * torch.ones_like(term.value)
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
    factor, backward = Factor(task), torch.autograd.backward

    def watched(tensors: Any, grad_tensors: Any = None, *args: Any, **options: Any) -> None:
        roots = (tensors,) if isinstance(tensors, Tensor | GradientEdge) else tuple(tensors)
        gradients = tuple(grad_tensors) if isinstance(grad_tensors, Sequence) else (grad_tensors,) * len(roots)
        with factor.backward_pass(roots, gradients):
            backward(roots, grad_tensors, *args, **options)

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
    torch.autograd.backward = watched  # `Tensor.backward` calls it
    try:
        yield
    finally:
        torch.autograd.backward = backward
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
            if not factor.in_pass:
                return gradient
            factor.used = True
            away = parameter.detach() - objective.anchor[name].to(parameter.device)
            return gradient + factor.known() * objective.weight * away

        return near

    trained = [(name, p) for name, p in objective.model.named_parameters() if p.requires_grad]
    return [p.register_hook(hook(name, p)) for name, p in trained]  # type: ignore[no-untyped-call]


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
