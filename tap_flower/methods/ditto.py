"""Ditto (Li et al., ICML 2021, arXiv 2012.04221): a personal model of one's own, near the server's.

The server's copy is trained as in FedAvg. The personal model v minimises `F(v) + λ/2 · ||v − w_t||²`, where w_t is what
the client received in round t.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tap_flower.methods.method import Memory, Method, Participation, SecondStage, Start, State
from tap_flower.methods.steps import finetune, near, train_round

if TYPE_CHECKING:
    from tap_flower.methods.session import LocalClient

NAME, PERSONAL = "ditto", "personal"


def participate(client: LocalClient, server_round: int, received: State, memory: Memory) -> Participation:
    """Trains the server's copy, then the personal model near what was received."""
    returned, losses = train_round(client, server_round, received, "server")
    penalty = near(client, received, client.settings.baselines.ditto_lambda)
    personal, _ = train_round(client, server_round, memory.models.get(PERSONAL), PERSONAL, penalty)
    return Participation(returned, losses, Memory({PERSONAL: personal}))


def second_stage(client: LocalClient, received: State, memory: Memory) -> SecondStage:
    """Fine-tunes the personal model near the last server's."""
    penalty = near(client, received, client.settings.baselines.ditto_lambda)
    personal, losses = finetune(client, memory.models.get(PERSONAL), PERSONAL, penalty)
    return SecondStage({NAME: personal}, losses)


def models(client: Start, received: State, memory: Memory) -> dict[str, State | None]:
    """The server's copy, and the personal model, which a client that was never sampled has with its initial values."""
    del client
    return {"server": received, PERSONAL: memory.models.get(PERSONAL)}


METHOD = Method(NAME, participate, second_stage, (NAME,), models)
