"""What a method is: what a client does in a round and in stage 2, what it keeps, and what it exchanges with the server."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tap_flower.config import Config, HyperParameters
from tap_flower.core.components import ComponentModel, State
from tap_flower.core.metrics import WORD
from tap_flower.core.replacement import Decision
from tap_flower.errors import ConfigError
from tap_flower.methods.session import Session


@dataclass(frozen=True)
class Memory:
    """What a client keeps from one round to the next; it never leaves the client.

    Attributes:
        models: name of a model -> its tensors, or those of them that the method keeps.
        record: plain values, as JSON has them: texts, numbers, booleans, None, lists, and dicts with texts as keys.
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
        decisions: on the replacement of each pair's components (TAP); they stay on the client, which reports counts.
    """

    returned: State
    losses: dict[str, float]
    memory: Memory = field(default_factory=Memory)
    decisions: Sequence[Decision] = ()


@dataclass(frozen=True)
class SecondStage:
    """Result of stage 2 on a client.

    Attributes:
        models: name -> tensors, of some or all of `Method.results`, the last of them included.
        losses: task name -> mean training loss of the fine-tuning.
        decisions: on the replacement of each pair's components as stage 2 begins, and as it ends (TAP); they stay on the
            client.
    """

    models: dict[str, State] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    decisions: tuple[Sequence[Decision], Sequence[Decision]] = ((), ())


Models = Callable[[State, Memory, Callable[[], State]], dict[str, State | None]]
"""(received, memory, makes the first values) -> name -> tensors; None stands for the first values."""


def server_copy(received: State, memory: Memory, first: Callable[[], State]) -> dict[str, State | None]:
    """The `models` of a method whose clients keep nothing: the server's copy alone."""
    del memory, first
    return {"server": received}


PERSONAL = "personal"
"""In the memory of TAP and Ditto: the personal model."""


def server_and_personal(received: State, memory: Memory, first: Callable[[], State]) -> dict[str, State | None]:
    """The `models` of a method with a personal model: a client that was never sampled has its first values there."""
    del first
    return {"server": received, PERSONAL: memory.models.get(PERSONAL)}


def finetunes(result: str) -> Callable[[Session, State, Memory], SecondStage]:
    """The `second_stage` of a method that fine-tunes the server's last model, and calls it `result`."""

    def second_stage(session: Session, received: State, memory: Memory) -> SecondStage:
        del memory
        finetuned, losses = session.finetune(received, "server")
        return SecondStage({result: finetuned}, losses)

    return second_stage


_OTHER_FILES = ("server", PERSONAL, "first")
Combine = Callable[[Tensor, Tensor], Tensor]
"""(differences of a tensor [clients, …], float64; weights of the clients [clients], which sum to 1) -> [...]."""
Step = Callable[[State, Mapping[str, Any], int], tuple[State, State]]
"""(mean differences, the server's memory, round counted from 1) -> (what is added to the server's values, memory)."""


@dataclass(frozen=True)
class ServerHalf:
    """What the server does with the clients' differences, where it is more than the weighted mean.

    Attributes:
        combine: the difference of one tensor from those of all clients that returned it, a median for example. The server
            keeps all differences of the round in memory for it, and the sum is no longer exact in whatever order. By
            default the exact weighted mean, for which a difference is dropped as soon as it has been added.
        step: what the server adds to its values, in place of the mean difference. Names are those of the tensors that
            came back; the values it keeps (the moments of an optimiser) may have any names without a slash at the front.
    """

    combine: Combine | None = None
    step: Step | None = None


@dataclass(frozen=True)
class Method:
    """A method, as a client runs it. The server averages differences, unless the method has a server half.

    Every function receives `received` (the server's tensors for this client) and `memory` (what the client kept from
    earlier rounds; empty at first).

    Attributes:
        name: as in `--set method=NAME`.
        participate: (session, round counted from 1, received, memory) -> result of the round.
        second_stage: (session, received, memory) -> result of stage 2, after the last round.
        results: names of the models that stage 2 makes; each has a file and a column of the results.
        models: makes the models that are evaluated as stage 1 left them.
        exchanges: (name of a component, name of a tensor in it) -> whether server and clients exchange the tensor; all by
            default.
        suits: raises a ConfigError where the method cannot work with a client's model.
        own_loop: why a project's own loop (`Task.fit`) cannot train for the method, after its name; empty where it can.
        server: what the server does with the differences; None is the weighted mean.
        trained: (configuration of a run) -> how many models a client trains, for `train.steps` optimiser steps each in a
            round, and for `distill.iterations` each in stage 2. A sweep with equal steps shares them out by it.
        longest: (hyper-parameters) -> the multiples of `train.steps` and of `distill.iterations` for which one model is
            trained at most; a node's limit counts them.
        compares: whether a client compares losses of held-out examples, which a project's own `score` must then return.
        distils: whether a further loss compares the module's outputs, for which a project's own loop must call the module.
    """

    name: str
    participate: Callable[[Session, int, State, Memory], Participation]
    second_stage: Callable[[Session, State, Memory], SecondStage]
    results: tuple[str, ...]
    models: Models = server_copy
    exchanges: Callable[[str, str], bool] = lambda *_: True
    suits: Callable[[ComponentModel], None] = lambda _: None
    own_loop: str = ""
    server: ServerHalf | None = None
    trained: Callable[[Config], tuple[float, float]] = lambda _: (1, 1)
    longest: Callable[[HyperParameters], tuple[int, int]] = lambda _: (1, 1)
    compares: Callable[[HyperParameters], bool] = lambda _: False
    distils: Callable[[HyperParameters], bool] = lambda _: False

    def __post_init__(self) -> None:
        for result in self.results:
            if not WORD.fullmatch(result) or result.split(".")[0] in _OTHER_FILES:
                raise ConfigError(
                    f"method {self.name!r} has {result!r} among its `results`: use letters, digits, '_', '+', '.' and '-', "
                    f"and none of the names {', '.join(_OTHER_FILES)}, which other files of a client's folder have"
                )

    def check_made(self, made: SecondStage) -> None:
        """Refuses a stage 2 that has not made what `results` says.

        Raises:
            ConfigError: it has made a model that is not there, or not the one that the method is judged by.
        """
        if others := sorted(made.models.keys() - set(self.results)):
            raise ConfigError(
                f"method {self.name!r}: `second_stage` has made the model {others[0]!r}, which its `results` do not name: "
                f"add it there, or leave it out"
            )
        if self.results and self.result not in made.models:
            raise ConfigError(
                f"method {self.name!r}: `second_stage` has not made the model {self.result!r}, the last of its `results`, "
                f"by which the method is judged: return it in `SecondStage.models`"
            )

    @property
    def result(self) -> str:
        """The model that the method is judged by: the last one of stage 2, or without a stage 2 the server's."""
        return self.results[-1] if self.results else "server"
