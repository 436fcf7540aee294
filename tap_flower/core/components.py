"""Which tensor belongs to which component, and which components a modality-task pair reaches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from tap_flower.core.initial import Initial
from tap_flower.errors import ClientError

State = dict[str, Tensor]
"""Tensor name -> value (float32), on the CPU."""


@dataclass(frozen=True, order=True)
class Pair:
    """A modality-task pair (m, o): what goes in, and what is to be done with it.

    Attributes:
        task: name of the task, unique on a client; clients that use one name share the task's head.
        modalities: names of the input modalities, sorted.
    """

    task: str
    modalities: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.modalities:
            raise ValueError(f"task {self.task!r} has no modality: name at least one")
        object.__setattr__(self, "modalities", tuple(sorted(self.modalities)))

    def __str__(self) -> str:
        return f"{'+'.join(self.modalities)}:{self.task}"


@dataclass(frozen=True)
class ComponentMap:
    """The trainable tensors of one model, by component and by the pairs whose forward pass reaches them.

    A *component* is the unit that the server averages: tensors of one component are held, sent and averaged together.

    Attributes:
        component_of: tensor name -> component name.
        reach: pair -> names of the components that the pair's forward pass reaches.
    """

    component_of: Mapping[str, str]
    reach: Mapping[Pair, frozenset[str]]

    def __post_init__(self) -> None:
        known = set(self.component_of.values())
        for pair, components in self.reach.items():
            if unknown := sorted(components - known):
                raise ValueError(f"pair {pair} reaches components without tensors: {unknown}")
        unreached = known - set().union(*self.reach.values()) if self.reach else known
        if unreached:
            raise ValueError(f"no pair reaches these components, so they must not be held: {sorted(unreached)}")

    @cached_property
    def pair_of_task(self) -> dict[str, Pair]:
        """Task name -> pair."""
        return {pair.task: pair for pair in self.reach}

    @cached_property
    def heads(self) -> frozenset[str]:
        """Names of the tensors of all heads, the components whose names begin with `head/`."""
        return frozenset(name for name, component in self.component_of.items() if component.startswith("head/"))

    def tensors_of(self, pair: Pair) -> tuple[str, ...]:
        """Names of the tensors that the forward pass of `pair` reaches: what a replacement copies."""
        reached = self.reach[pair]
        return tuple(name for name, component in self.component_of.items() if component in reached)

    def examples_per_component(self, examples: Mapping[Pair, int]) -> dict[str, int]:
        """Aggregation weights: for each component the number of examples of the pairs that reach it.

        Args:
            examples: pair -> number of its training examples.
        """
        weights = dict.fromkeys(self.component_of.values(), 0)
        for pair, components in self.reach.items():
            for component in components:
                weights[component] += examples[pair]
        return weights


class ComponentModel(nn.Module):
    """A client's model: it runs one pair at a time, and knows its components.

    Attributes:
        component_map: which tensor belongs to which component, and what each pair reaches.
        initials: name of a trainable tensor -> how it starts; nothing where the module's own values are its first ones.
        moving: names of the buffers (and of frozen parameters) that training changes; they are part of the model's state.
        local: names of the tensors of the state that stay on the client.
        is_built: whether its first values are those that a client's module was built with, not the seed's.
    """

    component_map: ComponentMap
    initials: Mapping[str, Initial]
    moving: frozenset[str] = frozenset()
    local: frozenset[str] = frozenset()
    is_built: bool = False

    @property
    def own_module(self) -> nn.Module:
        """The module that a loop of the project's own trains."""
        return self

    def forward(self, task: str, inputs: Mapping[str, Any]) -> Tensor:
        """The output of a task for a batch of inputs."""
        raise NotImplementedError

    def first_values(self, seed: int) -> State:
        """The first value of every tensor of the model's state; the model may be without memory."""
        initials = self.initials
        return {n: initials[n].value(n, tuple(t.shape), seed) for n, t in trainable_state(self).items()}

    def fixed_values(self) -> State:
        """The values of the tensors that never change in a run, of those on which its clients must agree."""
        return {}

    def fix(self, values: Mapping[str, Tensor]) -> None:
        """Sets tensors that never change in a run to the run's values; other names are passed over."""

    def marks(self) -> Mapping[str, object]:
        """Name -> what changes when training changes that tensor, of those that are no part of the state and are shared."""
        return {}

    def discard(self) -> None:
        """Says that what it shares with other models has changed: those that are made from now on must not have it."""


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """A model's state: its trainable tensors and those that training moves, by name, sharing memory with the model."""
    moving: frozenset[str] = getattr(model, "moving", frozenset())
    found = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad or name in moving}
    if moving:
        found |= {name: buffer for name, buffer in model.named_buffers() if name in moving}
    return found


def cpu_state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of a model's state on the CPU, in float32.

    Raises:
        ClientError: a buffer of integers, such as a count, has a value that float32 cannot hold.
    """
    found = {}
    for name, tensor in trainable_state(model).items():
        found[name] = tensor.to("cpu", torch.float32, copy=True)
        if not tensor.is_floating_point() and not found[name].to(tensor.dtype).equal(tensor.cpu()):
            raise ClientError(
                f"the buffer {name!r} has reached {int(tensor.abs().max())}, and is kept in float32, which holds integers "
                f"up to {2**24}: count in larger units, or register it with persistent=False if it need not be kept"
            )
    return found


@contextmanager
def only_state_changes(model: ComponentModel) -> Iterator[None]:
    """Refuses training that changes more than the state of a model.

    Raises:
        ClientError: it has changed another tensor, which is named; no other model of this process has that module.
    """
    before = model.marks()
    yield
    after = model.marks()
    if changed := [name for name in {**before, **after} if before.get(name) != after.get(name)]:
        model.discard()
        raise ClientError(
            f"training has changed {changed[0]!r}, which a few batches before the first round had not, so that it is not "
            f"kept: make it a buffer that each training pass changes in place under `torch.no_grad()`, if only by adding 0; "
            f"or register it with persistent=False, and each model starts with the value that it was built with"
        )


@torch.no_grad()
def load_trainable_state(model: nn.Module, state: Mapping[str, Tensor], names: Iterable[str] | None = None) -> None:
    """Copies tensors into the state of `model`, strictly.

    Args:
        model: the model that is changed in place.
        state: tensor name -> value; the shape must be that of the parameter.
        names: the tensors to copy; by default the whole state, and `state` must then hold exactly these.

    Raises:
        ValueError: a tensor is missing, unknown or has another shape. The model is unchanged then.
    """
    own = trainable_state(model)
    wanted = set(own if names is None else names)
    if unknown := sorted(wanted - own.keys()):
        raise ValueError(f"the model has no trainable tensor named {unknown[:3]} ({len(unknown)} unknown)")
    if missing := sorted(wanted - state.keys()):
        raise ValueError(f"the state lacks {len(missing)} of the model's tensors, such as {missing[:3]}")
    if names is None and (extra := sorted(state.keys() - wanted)):
        raise ValueError(f"the state holds {len(extra)} tensors that the model lacks, such as {extra[:3]}")
    for name in wanted:
        if own[name].shape != state[name].shape:
            raise ValueError(
                f"tensor {name!r} has shape {tuple(state[name].shape)} in the state, {tuple(own[name].shape)} in the model"
            )
    for name in wanted:
        own[name].copy_(state[name])
