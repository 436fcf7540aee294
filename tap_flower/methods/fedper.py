"""FedPer (Arivazhagan et al., arXiv 1912.00818): base layers are averaged, personalisation layers stay on the client.

The personalisation layers are the heads. A client trains both together.
"""

from __future__ import annotations

from collections.abc import Callable

from tap_flower.core.components import State
from tap_flower.methods.method import Memory, Method, Participation, SecondStage
from tap_flower.methods.session import Session

NAME, HEADS = "fedper", "heads"


def is_base(component: str, tensor: str) -> bool:
    """Whether a tensor is exchanged: all but those of the heads are."""
    del tensor
    return not component.startswith("head/")


def with_heads(received: State, memory: Memory, first: Callable[[], State]) -> State:
    """The server's base and the client's own heads, which have their first values before the client's first round."""
    return {**first(), **memory.models.get(HEADS, {}), **received}


def participate(session: Session, server_round: int, received: State, memory: Memory) -> Participation:
    """Trains base and heads; the base is returned, the heads are kept."""
    trained, losses = session.train_round(server_round, with_heads(received, memory, session.initial_values), "server")
    base = {name: value for name, value in trained.items() if name in received}
    heads = {name: value for name, value in trained.items() if name not in received}
    return Participation(base, losses, Memory({HEADS: heads}))


def second_stage(session: Session, received: State, memory: Memory) -> SecondStage:
    """Fine-tunes base and heads."""
    finetuned, losses = session.finetune(with_heads(received, memory, session.initial_values), "server")
    return SecondStage({NAME: finetuned}, losses)


def models(received: State, memory: Memory, first: Callable[[], State]) -> dict[str, State | None]:
    """The server's base with the client's own heads."""
    return {"personal": with_heads(received, memory, first)}


METHOD = Method(NAME, participate, second_stage, (NAME,), models, is_base)
