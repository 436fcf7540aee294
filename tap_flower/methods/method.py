"""What a method is: what a client does in a round and in stage 2, what it keeps and exchanges, what it is judged by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from tap_flower.core.components import ComponentModel
from tap_flower.core.replacement import Decision

if TYPE_CHECKING:
    from tap_flower.methods.session import LocalClient

State = dict[str, Tensor]
"""Tensor name -> value, on the CPU."""


class Start(Protocol):
    """What knows a client's initial values."""

    def initial_values(self) -> State:
        """The run's initial values of the client's tensors."""
        ...


@dataclass(frozen=True)
class Memory:
    """What a client keeps from one participation to the next; it never leaves the client.

    Attributes:
        models: name of a model -> its tensors, or those of them that the method keeps.
        record: plain values.
    """

    models: Mapping[str, State] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Participation:
    """Result of one round on a client.

    Attributes:
        returned: the trained tensors of all components that the method exchanges.
        losses: task name -> mean training loss.
        memory: stays on the client.
        decisions: on the replacement of each pair's components (TAP); they stay on the client, which reports their counts.
    """

    returned: State
    losses: dict[str, float]
    memory: Memory = field(default_factory=Memory)
    decisions: Sequence[Decision] = ()


@dataclass(frozen=True)
class SecondStage:
    """Result of stage 2 on a client.

    Attributes:
        models: name -> tensors, of some or all of `Method.results`.
        losses: task name -> mean training loss of the fine-tuning.
    """

    models: dict[str, State] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)


def server_copy(client: Start, received: State, memory: Memory) -> dict[str, State | None]:
    """The server's copy alone: all that there is to evaluate before stage 2 where a client keeps nothing."""
    del client, memory
    return {"server": received}


def every_component(component: str) -> bool:
    """Whether a component is exchanged: all are."""
    del component
    return True


def any_model(model: ComponentModel) -> None:
    """Whether the method can work with a client's model: it can with all."""
    del model


@dataclass(frozen=True)
class Method:
    """A method, as a client runs it; the server averages what comes back, whatever the method.

    Each function gets the server's values of all exchanged tensors of the client, and the client's memory, which is
    empty before its first participation.

    Attributes:
        name: `--set method=NAME`.
        participate: (client, round counted from 1, received, memory) -> result of the round.
        second_stage: (client, received, memory) -> result of stage 2, after the last round.
        results: names of the models that stage 2 makes; a file and a column of the results each.
        models: (client, received, memory) -> name -> tensors of the models to evaluate as stage 1 left them; None is the
            run's initial values.
        exchanges: name of a component -> whether server and clients send it each other.
        suits: raises a ConfigError where the method cannot work with a client's model.
    """

    name: str
    participate: Callable[[LocalClient, int, State, Memory], Participation]
    second_stage: Callable[[LocalClient, State, Memory], SecondStage]
    results: tuple[str, ...]
    models: Callable[[Start, State, Memory], dict[str, State | None]] = server_copy
    exchanges: Callable[[str], bool] = every_component
    suits: Callable[[ComponentModel], None] = any_model

    @property
    def result(self) -> str:
        """The model that the method is judged by: the last one of stage 2, or without a stage 2 the server's."""
        return self.results[-1] if self.results else "server"
