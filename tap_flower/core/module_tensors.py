"""A module of anybody's as a set of named tensors: plain names, values as they were built, copies to swap them in."""

from __future__ import annotations

import copy
import hashlib
import logging
import weakref
from collections.abc import Iterator, Mapping
from itertools import chain

import torch
from torch import Tensor, nn

from tap_flower.core.components import State
from tap_flower.core.module_attributes import Attributes, attributes, function_of, wrapped
from tap_flower.errors import ClientError

log = logging.getLogger("tap_flower")
COPIES = 2
"""Copies of a module that wait for their next use: a method works with two models at a time, a student and its teacher."""


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

    def all_tensors(self, module: nn.Module) -> dict[str, Tensor]:
        """As `tensors`, with the buffers that are registered with `persistent=False`."""
        return {**self.tensors(module), **dict(self.buffers(module, persistent=False))}


def as_float32(tensor: Tensor) -> Tensor | None:
    """A tensor's finite values in float32, on the CPU; None where float32 cannot hold them exactly."""
    if tensor.is_complex() or tensor.is_quantized or tensor.layout != torch.strided or not tensor.numel():
        return None
    tensor = tensor.detach()
    found = tensor.to("cpu", torch.float32)
    exact = tensor.dtype == torch.float32 or bool((found.to(tensor.dtype) == tensor.cpu()).all())
    return found if exact and bool(found.isfinite().all()) else None


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have one shape, dtype and values; devices, and the values of sparse tensors, do not count."""
    if (one.shape, one.dtype, one.layout) != (other.shape, other.dtype, other.layout):
        return False
    return one.layout != torch.strided or one.detach().cpu().equal(other.detach().cpu())


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

    The module itself is never touched: it may be one that the user holds, and gives again when asked for another. Nor is
    the template run, which the copies are made of. The copies share the frozen parameters.

    Args:
        module: as it was built.

    Attributes:
        names: of its tensors.
        trainable: names of the trainable parameters.
        copies: number of copies that were made to be used.
        unstable: what `unlike` has found, or None before it was asked.
        spoilt: whether a use has changed what copies share, so that the next model is to be built anew.
        values: name -> value that it was built with (CPU), of trainable parameters and of buffers.

    Raises:
        ClientError: copies would not be independent of the module.
    """

    def __init__(self, module: nn.Module) -> None:
        self.names = Names(module)
        self.trainable = tuple(name for name, p in self.names.parameters(module) if p.requires_grad)
        self.copies, self._frozen = 0, list[nn.Parameter]()
        self._template = self._copied(module)
        self._check_template(module)
        self._frozen = [p for p in self._template.parameters() if not p.requires_grad]
        self._free, self._lent = list[tuple[nn.Module, Attributes]](), dict[int, Attributes]()
        self.spoilt = self._warned = False
        kept = chain(
            ((n, p) for n, p in self.names.parameters(self._template) if p.requires_grad),
            self.names.buffers(self._template),
        )
        self.values: dict[str, Tensor] = {name: value.detach().cpu() for name, value in kept}
        caches = self.names.buffers(self._template, persistent=False)
        self._caches = {name: value.detach().cpu() for name, value in caches}
        self.unstable: State | None = None
        self._given = [weakref.ref(tensor) for tensor in self.names.tensors(module).values()]

    @property
    def most_bytes(self) -> int:
        """Bytes of its tensors, and of those of the copies that may wait for their next use."""
        tensors = self.names.all_tensors(self._template).values()
        frozen, all_of_them = (sum(t.numel() * t.element_size() for t in some) for some in (self._frozen, tensors))
        return frozen + (1 + COPIES) * (all_of_them - frozen)

    def _copied(self, module: nn.Module) -> nn.Module:
        memo: dict[int, object] = {id(p): p for p in self._frozen}
        made = copy.deepcopy(module, memo)
        for own, parameter in zip(module.parameters(), made.parameters(), strict=True):
            if parameter is not own:  # torch copies a parameter without its attributes
                vars(parameter).update(copy.deepcopy(vars(own), memo))
        for tensor in chain(made.parameters(), made.buffers()):
            if tensor.layout == torch.strided and 0 in tensor.stride():  # of `expand`: a value with several places
                tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
        made.zero_grad(set_to_none=True)
        keep_still(made)
        return made

    def _check_template(self, module: nn.Module) -> None:
        """Refuses a module whose copies would use its tensors, or would lack what it does with gradients."""
        copies = {id(p) for p in self._template.parameters()}
        for name, parameter in self.names.parameters(module):
            if not parameter.requires_grad:
                continue
            if id(parameter) in copies:
                raise ClientError(
                    f"a copy of the model shares the trainable tensor {name!r} with it, and each model of a round is a "
                    f"copy: let its `__deepcopy__` copy that"
                )
            if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
                raise ClientError(
                    f"tensor {name!r} has a gradient hook, which copies lack, and each model of a round is a copy: "
                    f"in place of `register_hook` there, scale or mask the gradient in `forward`, as "
                    f"`mask * w + (1 - mask) * w.detach()` does"
                )
        if (found := function_of(module, self._template)) is not None:
            raise ClientError(
                f"the model's {found!r} holds a function that uses the model itself, as `lambda z: self.head(z)` does: each "
                f"model of a round is a copy, and would run the original; put a method there, such as `self.run`"
            )

    def take(self) -> nn.Module:
        """A copy that nobody else uses; its tensors have the values of its last use."""
        if self._free:
            module, before = self._free.pop()
        else:
            self.copies += 1
            module = self._copied(self._template)
            before = attributes(module)
        self._lent[id(module)] = before
        return module

    def give_back(self, module: nn.Module) -> None:
        """Ends the use of a copy, which is used again unless something beside the values of its tensors has changed."""
        module.zero_grad(set_to_none=True)
        before, after = self._lent.pop(id(module)), attributes(module)
        if changed := [name for name in {**before, **after} if before.get(name) != after.get(name)]:
            self._tell_of(changed)
        elif len(self._free) < COPIES:
            self._free.append((module, before))

    def _tell_of(self, changed: list[str]) -> None:
        if not self._warned:
            self._warned = True
            log.warning(
                "%r of the model changes while the model is used, and is not kept: each model of a round starts with what "
                "it was built with; if it matters, make it a buffer (`register_buffer`), whose shape must not change",
                changed[0],
            )

    def _as_built(self) -> dict[str, Tensor]:
        """Name -> value that it was built with, of all tensors that count."""
        frozen = ((n, p.detach()) for n, p in self.names.parameters(self._template) if not p.requires_grad)
        return {**dict(frozen), **self.values}

    def fixed(self) -> State:
        """Name -> value (float32) that it was built with, of all tensors that are not trained and that float32 can hold."""
        found = {name: as_float32(value) for name, value in self._as_built().items() if name not in self.trainable}
        return {name: value for name, value in found.items() if value is not None}

    def unlike(self, again: nn.Module, trained: bool = True) -> State:
        """The values (float32) of those tensors that another build may give other values, in another process say.

        Args:
            again: from a second build. What it gives other values counts, and what it shares with the first.
            trained: whether tensors that are trained count, too.
        """
        first = {**self._as_built(), **self._caches}
        shared = {id(tensor) for tensor in (reference() for reference in self._given) if tensor is not None}
        found, lost = State(), list[str]()
        for name, tensor in self.names.all_tensors(again).items():
            alike = name in first and _alike(tensor, first[name])
            if name not in first or (name in self.trainable and not trained) or (alike and id(tensor) not in shared):
                continue
            value = as_float32(first[name])
            if value is not None:
                found[name] = value.clone()  # a run may give a frozen parameter another value
            elif not alike:
                lost.append(name)
        if lost:
            log.warning(
                "`model` builds %r with other values each time, and float32, in which they would be kept, cannot hold them: "
                "make it float32, or draw it from a seed of its own, or `load_personal` gives another model than the run's",
                lost[0],
            )
        return found

    def drawable(self, known: State) -> bool:
        """Whether it has tensors that are not trained, beside those in `known`: `model` may draw their values."""
        return bool({*self._as_built(), *self._caches} - {*self.trainable, *known})

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
            value = first.get(name, self._caches.get(name))
            if value is not None and value.shape == cache.shape and not _alike(cache, value):
                cache.copy_(value)
