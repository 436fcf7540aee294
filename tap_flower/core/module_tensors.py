"""A module of anybody's as a set of named tensors: plain names, values as they were built, copies to swap them in."""

from __future__ import annotations

import copy
import hashlib
import weakref
from collections.abc import Iterator, Mapping
from itertools import chain

import torch
from torch import Tensor, nn

from tap_flower.core.components import State

COPIES = 2
"""Copies of a module that wait for their next use: a method works with two models at a time, a student and its teacher."""


def wrapped(part: nn.Module) -> str | None:
    """The name under which a wrapper holds what it wraps: `torch.compile`'s, `DataParallel`'s; None for other modules."""
    if isinstance(part, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return "module"
    return "_orig_mod" if type(part).__name__ == "OptimizedModule" else None  # its import would take a second


class Names:
    """The names of a module's tensors as they are without wrappers; a tensor that has several names has its first.

    Args:
        module: its structure must not change.
    """

    def __init__(self, module: nn.Module) -> None:
        found = [(path, wrapped(part)) for path, part in module.named_modules()]
        self._left_out = {f"{path}.{child}" if path else child for path, child in found if child is not None}

    def plain(self, name: str) -> str:
        """A name without the parts that a wrapper has added."""
        if not self._left_out:
            return name
        parts = name.split(".")
        return ".".join(part for at, part in enumerate(parts, 1) if ".".join(parts[:at]) not in self._left_out)

    def parameters(self, module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """Plain name and value of each parameter."""
        return ((self.plain(name), parameter) for name, parameter in module.named_parameters())

    def buffers(self, module: nn.Module, persistent: bool = True) -> Iterator[tuple[str, Tensor]]:
        """Plain name and value of each buffer that the module's `state_dict` has, or of the others, which are its caches."""
        parts = dict(module.named_modules(remove_duplicate=False))
        for name, buffer in module.named_buffers():
            path, _, last = name.rpartition(".")
            if persistent is (last not in parts[path]._non_persistent_buffers_set):
                yield self.plain(name), buffer

    def tensors(self, module: nn.Module) -> dict[str, Tensor]:
        """Plain name -> value of each parameter and each buffer that counts."""
        return dict(chain(self.parameters(module), self.buffers(module)))


def as_float32(tensor: Tensor) -> Tensor | None:
    """A tensor's finite values in float32, on the CPU; None where float32 cannot hold them exactly."""
    if tensor.is_complex() or tensor.is_quantized or not tensor.numel():
        return None
    tensor = tensor.detach()
    found = tensor.to("cpu", torch.float32)
    exact = tensor.dtype == torch.float32 or bool((found.to(tensor.dtype) == tensor.cpu()).all())
    return found if exact and bool(found.isfinite().all()) else None


def digest(tensor: Tensor) -> str:
    """16 letters that two tensors (float32, CPU) share only where shapes and values are equal."""
    found = hashlib.sha256(repr(tuple(tensor.shape)).encode())
    found.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def is_norm(part: nn.Module) -> bool:
    """Whether a module keeps running statistics, as BatchNorm does."""
    return getattr(part, "running_mean", None) is not None and hasattr(part, "track_running_stats")


def still_norms(module: nn.Module) -> list[nn.Module]:
    """The norms with running statistics that are frozen: none of their parameters is trained.

    One without parameters goes with the nearest module around it that has any.
    """
    parts = dict(module.named_modules(remove_duplicate=False))
    found = []
    for path, part in parts.items():
        if is_norm(part):
            around, at = part, path
            while at and not any(True for _ in around.parameters()):
                at = at.rpartition(".")[0]
                around = parts[at]
            if not any(parameter.requires_grad for parameter in around.parameters()):
                found.append(part)
    return found


def _stay(mode: bool = True) -> None:
    """In place of `train` of a frozen norm."""


def keep_still(module: nn.Module) -> None:
    """Has frozen norms stay in evaluation mode, whoever calls the module's `train`: a loop of the user's own may do so."""
    for part in still_norms(module):
        part.eval()
        part.train = _stay  # type: ignore[method-assign, assignment]


class BuiltModule:
    """A module that was built once, and copies of it, whose tensors are set for each use.

    The module itself is never touched: it may be one that the user holds, and gives again when asked for another. The
    copies share the frozen parameters.

    Args:
        module: as it was built.

    Attributes:
        names: of its tensors.
        trainable: names of the trainable parameters.
        copies: number of copies that were made.
        unstable: what `unlike` has found, or None before it was asked.
        values: name -> value that it was built with (CPU), of trainable parameters and of buffers.
    """

    def __init__(self, module: nn.Module) -> None:
        self.names = Names(module)
        self.trainable = tuple(name for name, p in self.names.parameters(module) if p.requires_grad)
        self.copies, self._frozen = 0, list[nn.Parameter]()
        self._template = self._copied(module)
        self._frozen = [p for p in self._template.parameters() if not p.requires_grad]
        self._free = [self._template]
        kept = chain(
            ((n, p) for n, p in self.names.parameters(module) if p.requires_grad), self.names.buffers(self._template)
        )
        self.values: dict[str, Tensor] = {name: value.detach().cpu().clone() for name, value in kept}
        caches = self.names.buffers(self._template, persistent=False)
        self._caches = {name: value.detach().cpu().clone() for name, value in caches}
        self.unstable: State | None = None
        self._given = [weakref.ref(tensor) for tensor in self.names.tensors(module).values()]

    def _copied(self, module: nn.Module) -> nn.Module:
        self.copies += 1
        made = copy.deepcopy(module, {id(p): p for p in self._frozen})
        made.zero_grad(set_to_none=True)
        keep_still(made)
        return made

    def take(self) -> nn.Module:
        """A copy that nobody else uses; its tensors have the values of its last use."""
        return self._free.pop() if self._free else self._copied(self._template)

    def give_back(self, module: nn.Module) -> None:
        """Ends the use of a copy."""
        module.zero_grad(set_to_none=True)
        if len(self._free) < COPIES:
            self._free.append(module)

    def fixed(self) -> State:
        """Name -> value (float32) that it was built with, of all tensors that are not trained and that float32 can hold."""
        others = ((n, p) for n, p in self.names.parameters(self._template) if not p.requires_grad)
        built = {**dict(others), **self.values}
        found = {name: as_float32(value) for name, value in built.items() if name not in self.trainable}
        return {name: value for name, value in found.items() if value is not None}

    def unlike(self, again: nn.Module) -> State:
        """The values (float32) of those tensors that another build may give other values, in another process say.

        Args:
            again: from a second build. What it gives other values counts, and what it shares with the first.
        """
        first = {**{name: self.values[name] for name in self.trainable}, **self.fixed()}
        shared = {id(tensor) for tensor in (reference() for reference in self._given) if tensor is not None}
        found = {}
        for name, tensor in self.names.tensors(again).items():
            other = as_float32(tensor)
            if name in first and (id(tensor) in shared or other is None or not other.equal(first[name])):
                found[name] = first[name]
        return found

    @torch.no_grad()
    def reset(self, module: nn.Module, first: Mapping[str, Tensor]) -> None:
        """Gives what is not trained in a copy its values in a run.

        Args:
            module: from `take`.
            first: name -> the run's value, where it is not the one that the module was built with.
        """
        for name, tensor in self.names.tensors(module).items():
            if name in self.trainable:
                continue
            if name in first and name not in self.values:
                self.values[name] = tensor.detach().cpu().clone()
            if name in self.values:
                tensor.copy_(first.get(name, self.values[name]))
        for name, cache in self.names.buffers(module, persistent=False):
            value = self._caches.get(name)
            alike = value is not None and (value.shape, value.dtype) == (cache.shape, cache.dtype)
            if value is not None and alike and not value.equal(cache.cpu()):
                cache.copy_(value)
