"""Local training: what a client reaches alone. It sends and receives no tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tap_flower.methods.method import Memory, Method, Participation, SecondStage, Start, State
from tap_flower.methods.steps import finetune, train_round

if TYPE_CHECKING:
    from tap_flower.methods.session import LocalClient

NAME = "local"


def participate(client: LocalClient, server_round: int, received: State, memory: Memory) -> Participation:
    """Trains the client's own model on."""
    del received
    own, losses = train_round(client, server_round, memory.models.get(NAME), NAME)
    return Participation({}, losses, Memory({NAME: own}))


def second_stage(client: LocalClient, received: State, memory: Memory) -> SecondStage:
    """The fine-tuning that every other method has."""
    del received
    own, losses = finetune(client, memory.models.get(NAME), NAME)
    return SecondStage({NAME: own}, losses)


def models(client: Start, received: State, memory: Memory) -> dict[str, State | None]:
    """The client's own model, with its initial values where it was never sampled."""
    del client, received
    return {"personal": memory.models.get(NAME)}


METHOD = Method(NAME, participate, second_stage, (NAME,), models, exchanges=lambda _: False)
