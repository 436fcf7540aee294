"""A module of the user's own as a client's model: its components, and what each pair reaches, found by tracing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from tap_flower.core.components import ComponentMap, ComponentModel, Pair, load_trainable_state
from tap_flower.core.initial import Initial, initial_values
from tap_flower.data.examples import OWN
from tap_flower.errors import ClientError
from tap_flower.files import read_tensors

Forward = Callable[[Any, Any], Tensor]
"""(module, batch) -> output of a task."""
Patterns = Mapping[str, str | Sequence[str]]
"""Component -> patterns (`*`, `?`) of the names of its tensors."""


class OwnModel(ComponentModel):
    """A module of the user's own.

    Args:
        module: any.
        forwards: task name -> how the module runs it.
        component_map: which trainable tensor belongs to which component, and what each pair reaches.
        initials: tensor name -> how it starts.
    """

    def __init__(
        self,
        module: nn.Module,
        forwards: Mapping[str, Forward],
        component_map: ComponentMap,
        initials: Mapping[str, Initial],
    ) -> None:
        super().__init__()
        # Tensors keep the names that they have in the module: nothing is wrapped.
        self._parameters, self._buffers, self._modules = module._parameters, module._buffers, module._modules
        self._all = [module]  # in a list: it is no part of itself
        self.component_map = component_map
        self.initials = initials
        self._forwards = forwards

    @property
    def own_module(self) -> nn.Module:
        """The user's module itself."""
        return self._all[0]

    def forward(self, task: str, inputs: Mapping[str, Any]) -> Tensor:
        """The output of a task for a batch of the client's own data."""
        return self._forwards[task](self._all[0], inputs[OWN])

    def train(self, mode: bool = True) -> Self:
        """Sets the module to training or evaluation mode."""
        self._all[0].training = mode
        return super().train(mode)


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable tensors of a module by name.

    Raises:
        ClientError: there is none, one is not float32, or the module keeps statistics that are no parameters.
    """
    found = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    if not found:
        raise ClientError("the model has no trainable tensor: leave `requires_grad` true where it is to be trained")
    for name, parameter in found.items():
        if parameter.dtype != torch.float32:
            raise ClientError(f"tensor {name!r} is {parameter.dtype}: trainable tensors must be torch.float32")
    for name, part in module.named_modules():
        if getattr(part, "track_running_stats", False):
            raise ClientError(
                f"{name or 'the model'} is a {type(part).__name__} that keeps running statistics, which are no parameters "
                f"and would be lost between rounds: use GroupNorm, or track_running_stats=False"
            )
    return found


def component_map(
    module: nn.Module, reached: Mapping[Pair, Iterable[str]], patterns: Patterns | None = None
) -> ComponentMap:
    """Which tensor belongs to which component, and which components each pair reaches.

    Without patterns, a component is a module with parameters of its own (a layer), named by its path; it is the same on
    every client that has the layer, whatever else it has.

    Args:
        module: of the client.
        reached: pair -> names of the trainable tensors that its forward pass reaches, see `reached_by`.
        patterns: name of a component -> patterns of its tensors' names; each tensor must fit one component's.

    Raises:
        ClientError: a tensor fits no component or several, is reached by no pair, or is reached by other pairs than the
            rest of its layer.
    """
    names = list(trainable(module))
    of = {pair: set(tensors) for pair, tensors in reached.items()}
    if unreached := [name for name in names if not any(name in tensors for tensors in of.values())]:
        raise ClientError(
            f"no task reaches the trainable tensor {unreached[0]!r} ({len(unreached)} in all): freeze it, build the model "
            f"without it, or add the task that it is for"
        )
    component_of = {name: _layer(name) for name in names} if patterns is None else _matched(names, patterns)
    if patterns is None:
        for pair, tensors in of.items():
            torn = {component_of[name] for name in tensors} & {component_of[n] for n in names if n not in tensors}
            if torn:
                raise ClientError(
                    f"task {pair.task!r} reaches some tensors of {min(torn)!r} and not others: say by `components` which of "
                    f"them belong together"
                )
    reach = {pair: frozenset(component_of[name] for name in tensors) for pair, tensors in of.items()}
    return ComponentMap(component_of, reach)


def reached_by(module: nn.Module, loss: Tensor) -> list[str]:
    """The names of the trainable tensors that a loss depends on.

    Args:
        module: of the client.
        loss: a scalar, from one batch of a task.

    Raises:
        ClientError: it depends on none.
    """
    parameters = trainable(module)
    if not loss.requires_grad:
        raise ClientError("its loss depends on no trainable tensor: look at its `forward`")
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return [name for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None]


def initials(module: nn.Module) -> dict[str, Initial]:
    """How the trainable tensors start: `core.initial.initial_values` of the module.

    Raises:
        ClientError: a layer's initial values are unknown.
    """
    names = trainable(module).keys()
    frozen = {part for part in module.modules() if not any(p.requires_grad for p in part.parameters(recurse=False))}
    try:
        found = initial_values(module, lambda part, _: Initial("constant", 0.0) if part in frozen else None)
    except TypeError as error:
        raise ClientError(str(error)) from error
    return {name: found[name] for name in names}


_M = TypeVar("_M", bound=nn.Module)


def load_module(module: _M, folder: str | Path, which: str = "tap") -> _M:
    """A client's own module with the tensors of one of its models; returns the module itself.

    Args:
        module: as the client's `model` builds it.
        folder: of the client in a run: STATE_DIR/NAME/RUN.
        which: `tap`, `personal`, or another model that the run's method keeps.

    Raises:
        StorageError: the folder has no such model, or it is damaged.
        ValueError: its tensors are not those of the module.
    """
    tensors, _ = read_tensors(Path(folder) / f"{which}.safetensors")
    own = {name: value for name, value in tensors.items() if ":" not in name}  # the others belong to other models
    load_trainable_state(module, own)
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


def _layer(name: str) -> str:
    """The path of the module that owns a tensor; a tensor of the outermost module is a component of its own."""
    return name.rpartition(".")[0] or name


def _matched(names: Sequence[str], patterns: Patterns) -> dict[str, str]:
    lists = {component: [p] if isinstance(p, str) else list(p) for component, p in patterns.items()}
    component_of = {}
    for name in names:
        fits = [component for component, wanted in lists.items() if any(fnmatchcase(name, p) for p in wanted)]
        if len(fits) != 1:
            found = "no component" if not fits else f"the components {', '.join(map(repr, fits))}"
            raise ClientError(f"tensor {name!r} fits {found}: change the patterns so that it fits exactly one")
        component_of[name] = fits[0]
    if unused := sorted(lists.keys() - set(component_of.values())):
        raise ClientError(f"component {unused[0]!r} fits no trainable tensor: the model has {', '.join(names[:5])} …")
    return component_of
