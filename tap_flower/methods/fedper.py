"""FedPer (Arivazhagan et al., arXiv 1912.00818): base layers are averaged, personalisation layers stay on the client.

The personalisation layers are the heads. A client trains both together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tap_flower.methods.method import Memory, Method, Participation, SecondStage, Start, State
from tap_flower.methods.steps import finetune, train_round

if TYPE_CHECKING:
    from tap_flower.methods.session import LocalClient

NAME, HEADS = "fedper", "heads"


def is_base(component: str) -> bool:
    """Whether a component is exchanged: all but the heads are."""
    return not component.startswith("head/")


def with_heads(client: Start, received: State, memory: Memory) -> State:
    """The server's base and the client's own heads, before the first participation with their initial values."""
    return {**client.initial_values(), **memory.models.get(HEADS, {}), **received}


def participate(client: LocalClient, server_round: int, received: State, memory: Memory) -> Participation:
    """Trains base and heads; the base is returned, the heads are kept."""
    trained, losses = train_round(client, server_round, with_heads(client, received, memory), "server")
    base = {name: value for name, value in trained.items() if name in received}
    heads = {name: value for name, value in trained.items() if name not in received}
    return Participation(base, losses, Memory({HEADS: heads}))


def second_stage(client: LocalClient, received: State, memory: Memory) -> SecondStage:
    """Fine-tunes base and heads."""
    finetuned, losses = finetune(client, with_heads(client, received, memory), "server")
    return SecondStage({NAME: finetuned}, losses)


def models(client: Start, received: State, memory: Memory) -> dict[str, State | None]:
    """The server's base with the client's own heads."""
    return {"personal": with_heads(client, received, memory)}


METHOD = Method(NAME, participate, second_stage, (NAME,), models, is_base)
