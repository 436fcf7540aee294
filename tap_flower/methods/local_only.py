"""Local training: what a client reaches alone. It sends and receives no tensors."""

from __future__ import annotations

from collections.abc import Callable

from tap_flower.core.components import State
from tap_flower.methods.method import Memory, Method, Participation, SecondStage
from tap_flower.methods.session import Session

NAME = "local"


def participate(session: Session, server_round: int, received: State, memory: Memory) -> Participation:
    """Trains the client's own model on."""
    del received
    own, losses = session.train_round(server_round, memory.models.get(NAME), NAME)
    return Participation({}, losses, Memory({NAME: own}))


def second_stage(session: Session, received: State, memory: Memory) -> SecondStage:
    """The fine-tuning that every other method has."""
    del received
    own, losses = session.finetune(memory.models.get(NAME), NAME)
    return SecondStage({NAME: own}, losses)


def models(received: State, memory: Memory, first: Callable[[], State]) -> dict[str, State | None]:
    """The client's own model, with its initial values where it was never sampled."""
    del received, first
    return {"personal": memory.models.get(NAME)}


METHOD = Method(NAME, participate, second_stage, (NAME,), models, exchanges=lambda *_: False)
