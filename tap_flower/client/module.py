"""A module of the user's own as a client's model: built once a process, copied, its tensors swapped for each use."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import torch
from cachetools import LRUCache
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from tap_flower.core.components import ComponentModel, State
from tap_flower.core.module_attributes import mark
from tap_flower.core.module_tensors import BuiltModule, Names
from tap_flower.core.seeds import named_seed, seeded
from tap_flower.core.task_trial import Forward
from tap_flower.core.tracing import Parts
from tap_flower.core.user_code import of_the_user
from tap_flower.data.examples import OWN
from tap_flower.errors import ClientError, TapFlowerError

_READ = 4096
"""Values of a frozen tensor that are read before and after training: a backbone may have 100 million."""
_KEPT_BYTES = 2 << 30
"""Size limit of the modules that a process keeps, copies included; clients whose `model` is one function share one."""
_MOST = 1024
"""Modules that a process keeps, however small they are."""


class OwnModel(ComponentModel):
    """A copy of a user's module, until nobody holds this object any more.

    Args:
        built: the module.
        forwards: task name -> how the module runs it.
        parts: what it consists of.
    """

    def __init__(self, built: BuiltModule, forwards: Mapping[str, Forward], parts: Parts) -> None:
        super().__init__()
        module = built.take()
        # A part of the model, but not by name: tensors keep the names that they have in the module.
        self._all, self._built, self._forwards = [module], built, forwards
        self._parameters, self._buffers, self._modules = module._parameters, module._buffers, module._modules
        self.component_map, self.moving, self.local = parts.component_map, parts.moving, parts.local
        self.initials = {}
        weakref.finalize(self, built.give_back, module).atexit = False

    @property
    def own_module(self) -> nn.Module:
        """The user's module."""
        return self._all[0]

    def forward(self, task: str, inputs: Mapping[str, Any]) -> Any:
        """The output of a task for a batch of the client's own data."""
        return self._forwards[task](self.own_module, inputs[OWN])

    def train(self, mode: bool = True) -> Self:
        """Sets the module to training or evaluation mode."""
        self.own_module.train(mode)
        self.training = mode
        return self

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of the module, without the names of wrappers; the arguments are not used."""
        del prefix, recurse, remove_duplicate
        return self._built.names.parameters(self.own_module)

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """The buffers of the module's `state_dict`, without the names of wrappers; the arguments are not used."""
        del prefix, recurse, remove_duplicate
        return self._built.names.buffers(self.own_module)

    def fix(self, values: Mapping[str, Tensor]) -> None:
        """Gives what is not trained its values in the run."""
        self._built.reset(self.own_module, values)

    def discard(self) -> None:
        """Marks the shared module as changed, so that the next model is built anew."""
        self._built.spoilt = True

    def marks(self) -> dict[str, tuple[int, int, int]]:
        """Name -> mark of each tensor that is no part of the state, of a large one by a part of its values."""
        tensors = self._built.names.tensors(self.own_module).items()
        return {n: mark(t, _READ) for n, t in tensors if n not in self.moving and n not in self._built.trainable}


class OwnOutline(ComponentModel):
    """What is known of a client's models without one: names, shapes, components, first values.

    Args:
        model: gives the module.
        parts: what it consists of.
    """

    is_built = True

    def __init__(self, model: Callable[[], BuiltModule], parts: Parts) -> None:
        super().__init__()
        self._model = model
        self.component_map, self.moving, self.local = parts.component_map, parts.moving, parts.local
        self.initials = {}
        self._shapes = {name: tensor.shape for name, tensor in self.first_values(0).items()}

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The tensors of the state, without memory."""
        return ((n, nn.Parameter(torch.empty(shape, device="meta"))) for n, shape in self._shapes.items())

    def first_values(self, seed: int) -> State:
        """The values that the module was built with, whatever the seed."""
        del seed
        built = self._model()
        return {name: built.values[name].float() for name in (*built.trainable, *sorted(self.moving))}

    def fixed_values(self) -> State:
        """The values that frozen parameters and buffers were built with, where float32 can hold them."""
        return {name: value for name, value in self._model().fixed().items() if name not in self.moving}


_Built = tuple[BuiltModule, Callable[[], nn.Module]]
"""A module, and the function that built it, so that no other takes over its identity."""


def _cache(limit: int) -> LRUCache[tuple[int, int], _Built]:
    """Modules by (identity of `Client.model`, seed), of so many bytes at most; one that is larger is kept alone."""
    return LRUCache(limit, getsizeof=lambda built: min(limit, max(built[0].most_bytes, limit // _MOST)))


_built = _cache(_KEPT_BYTES)


def built_module(model: Callable[[], nn.Module], seed: int) -> BuiltModule | None:
    """The module that a function builds, once a process; None for a `ComponentModel`, which is built for each use.

    Args:
        model: as in `Client`.
        seed: seed of the run, from which `torch`, `numpy.random` and `random` draw meanwhile.

    Raises:
        ClientError: the function fails, or the module cannot be trained.
    """
    key = id(model), seed
    if key not in _built or _built[key][0].spoilt:
        module = _fresh(model, seed)
        if isinstance(module, ComponentModel):
            return None
        names = Names(module)
        found = {name: p for name, p in names.parameters(module) if p.requires_grad}
        if not found:
            raise ClientError("the model has no trainable tensor: leave `requires_grad` true where it is to be trained")
        for name, parameter in found.items():
            if isinstance(parameter, UninitializedParameter):
                raise ClientError(f"tensor {name!r} has no shape yet, being of a lazy layer: give the layer its sizes")
            if parameter.dtype != torch.float32:
                raise ClientError(f"tensor {name!r} is {parameter.dtype}: trainable tensors must be torch.float32")
            if not bool(parameter.isfinite().all()):
                raise ClientError(f"tensor {name!r} is built with a value that is not finite: look at its first values")
        for name, buffer in names.buffers(module):
            if buffer.layout != torch.strided:
                raise ClientError(
                    f"the buffer {name!r} is {buffer.layout}: register a dense tensor, or its indices and values, and make "
                    f"it sparse in `forward`; or register it with persistent=False"
                )
        try:
            _built[key] = BuiltModule(module), model
        except TapFlowerError:
            raise
        except Exception as error:  # whatever a part's own `__deepcopy__` raises
            raise ClientError(
                f"the model cannot be copied, and each model of a round is a copy: copy.deepcopy says {error}"
            ) from error
    return _built[key][0]


def unstable(model: Callable[[], nn.Module], seed: int) -> State:
    """The first values (float32) of those tensors that a build in another process may give other values.

    Of what is not trained, a build that draws other random numbers counts, too: whoever loads a personal model makes one.

    Args:
        model: as in `Client`.
        seed: seed of the run.
    """
    built = built_module(model, seed)
    if built is None:
        return {}
    if built.unstable is None:
        built.unstable = built.unlike(_fresh(model, seed))
        if built.drawable(built.unstable):
            built.unstable |= built.unlike(_fresh(model, seed, "to load"), trained=False)
    return built.unstable


def _fresh(model: Callable[[], nn.Module], seed: int, purpose: str = "model") -> nn.Module:
    with of_the_user("`model`", model), seeded(named_seed(seed, purpose)):
        module = model()
    if not isinstance(module, nn.Module):
        raise ClientError(f"`model` returned a {type(module).__name__}: give a function that builds a torch.nn.Module")
    return module


def adapted(module: nn.Module, forwards: Mapping[str, Forward]) -> ComponentModel:
    """A `ComponentModel` that also runs the batches of a client's own data.

    Args:
        module: a `ComponentModel`, changed in place; its tensors keep their names.
        forwards: task name -> how the module runs a batch; a task without one takes its batches as they are.
    """
    assert isinstance(module, ComponentModel)
    forward = module.forward

    def run(task: str, inputs: Mapping[str, Any]) -> Tensor:
        return forwards[task](module, inputs[OWN]) if OWN in inputs else forward(task, inputs)

    module.forward = run  # type: ignore[method-assign]
    return module
