"""What a module holds beside its tensors: attributes, hooks, functions. Copies of a module are compared by it."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

_OF_TORCH = {"_parameters", "_buffers", "_modules", "training"}
_ATOMS = (type(None), type, FunctionType, BuiltinFunctionType, ModuleType, torch.dtype, torch.device)
_PLAIN = (bool, int, float, complex, str, bytes)
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of a value -> integers of as many; others are read byte by byte."""
Attributes = Mapping[str, object]
"""Name of an attribute, with the path of the module or tensor that has it -> values that are equal until it changes."""


def bits(tensor: Tensor, most: int | None = None) -> int:
    """The sum of the bits of a tensor's values: it also tells of a change through `.data`, which makes no new version.

    Args:
        tensor: a sparse one, which has no such bits, has the sum 0.
        most: values that are read, about, evenly from the whole tensor; None reads all.
    """
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        return 0
    integers = _INTEGERS.get(tensor.element_size(), torch.uint8)
    values = tensor.detach().reshape(-1)
    if most is not None:
        values = values[:: max(1, len(values) // most)].contiguous()
    return int(values.view(integers).sum(dtype=torch.int64))


def mark(tensor: Tensor, most: int | None = None) -> tuple[int, int, int]:
    """What changes when a tensor does: where it is, how often it was changed there, and its bits.

    Args:
        tensor: a parameter or a buffer.
        most: as in `bits`; a change through `.data` of a few other values is not seen.
    """
    place = tensor.data_ptr() if tensor.layout == torch.strided else id(tensor)
    return place, 0 if tensor.is_inference() else tensor._version, bits(tensor, most)


def wrapped(part: nn.Module) -> str | None:
    """The name under which a wrapper holds what it wraps: `torch.compile`'s, `DataParallel`'s; None for other modules."""
    if isinstance(part, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return "module"
    return "_orig_mod" if type(part).__name__ == "OptimizedModule" else None  # its import would take a second


def attributes(module: nn.Module) -> Attributes:
    """The attributes of a module, its parts and its parameters: to be compared with those of the same object later.

    Values of parameters and buffers do not count, their names, shapes and dtypes do. Objects are taken apart as
    `copy.deepcopy` does it. Functions, and what cannot be taken apart, such as an open file, count by identity.
    """
    return _Reader(module).content


def function_of(module: nn.Module, copied: nn.Module) -> str | None:
    """The attribute of a copy that has a function which uses the module itself, as `lambda z: self.head(z)` does."""
    own = {id(part) for part in module.modules()} | {id(p) for p in module.parameters() if p.requires_grad}
    found = (name for name, function in _Reader(copied).functions if _uses(function, own))
    return next(found, None)


class _Reader:
    """Reads the attributes of a module.

    Attributes:
        content: name -> content.
        functions: (name of an attribute, a function in it).
    """

    def __init__(self, module: nn.Module) -> None:
        self.content: dict[str, object] = {}
        self.functions: list[tuple[str, Any]] = []
        self._name, self._seen = "", dict[int, tuple[int, object]]()
        parts, parameters = dict(module.named_modules()), dict(module.named_parameters())
        self._known: dict[int, str] = {id(part): path for path, part in {**parts, **parameters}.items()}
        self._known |= {id(buffer): name for name, buffer in module.named_buffers()}
        for path, part in parts.items():
            before = f"{path}." if path else ""
            tensors = {**part._parameters, **part._buffers}
            self.content |= {before + name: t if t is None else (t.shape, t.dtype) for name, t in tensors.items()}
            self.content[f"{before}_modules"] = type(part), [*part._modules]
            if wrapped(part) != "_orig_mod":  # what `torch.compile` keeps there
                for name, value in vars(part).items():
                    self._read(part, before + name, name, value)
        for path, parameter in parameters.items():
            hooks = {"_backward_hooks": parameter._backward_hooks}
            for name, value in {**vars(parameter), **hooks}.items():
                self._read(parameter, f"{path}.{name}", name, value)

    def _read(self, holder: object, path: str, name: str, value: object) -> None:
        if name in _OF_TORCH or value is None or (name.endswith("_hooks") and not value):
            return
        if isinstance(value, MethodType) and value.__func__ is getattr(type(holder), name, None):
            return  # put back by a wrapper
        self._name = path
        self.content[path] = self._of(value)

    def _of(self, value: Any) -> object:
        """What a value consists of, in tuples."""
        if isinstance(value, _ATOMS):
            if isinstance(value, FunctionType):
                self.functions.append((self._name, value))
            return value
        if type(value) in _PLAIN:
            return type(value), value
        if (place := id(value)) in self._known:
            return self._known[place]
        if place in self._seen:
            return self._seen[place][0]
        self._seen[place] = len(self._seen), value  # kept, so that no other value takes over its identity
        if isinstance(value, Tensor):
            return value.shape, value.dtype, value.requires_grad, bits(value)
        if isinstance(value, weakref.ref):  # of a recurrent layer: to weights, which `to` exchanges
            return weakref.ref
        if isinstance(value, MethodType):
            return self._of(value.__func__), self._of(value.__self__)
        if type(value) in (dict, OrderedDict):
            return type(value), [(self._of(key), self._of(one)) for key, one in value.items()]
        if type(value) in (list, tuple, set, frozenset):
            return type(value), [self._of(one) for one in value]
        try:
            reduced = value.__reduce_ex__(4)
        except Exception:  # whatever an object of somebody else's raises
            return place
        return place if isinstance(reduced, str) else [self._of(one) for one in _listed(reduced)]


def _listed(reduced: tuple[Any, ...]) -> Iterator[Any]:
    """The parts of what `__reduce_ex__` returns, iterators of items as lists."""
    return (list(part) if isinstance(part, Iterator) else part for part in reduced)


def _uses(function: object, own: Collection[int]) -> bool:
    """Whether a function has one of some objects, by identity, in its closure or among its defaults."""
    waiting, seen = [function], dict[int, object]()
    while waiting:
        value: Any = waiting.pop()
        if id(value) in own:
            return True
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, FunctionType):
            waiting += map(_content, value.__closure__ or ())
            waiting += [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        elif isinstance(value, MethodType):
            waiting += [value.__self__, value.__func__]
        elif isinstance(value, partial):
            waiting += [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, list | tuple | set):
            waiting += value
        elif isinstance(value, dict):
            waiting += value.values()
    return False


def _content(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # it is empty
        return None
