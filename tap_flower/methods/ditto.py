"""Ditto (Li et al., ICML 2021, arXiv 2012.04221): each client trains a personal model near the server's.

The server's copy is trained as in FedAvg. The personal model v minimises `F(v) + λ/2 · ||v − w_t||²`, where w_t is what
the client received in round t.
"""

from __future__ import annotations

from tap_flower.core.components import State
from tap_flower.methods.method import PERSONAL, Memory, Method, Participation, SecondStage, server_and_personal
from tap_flower.methods.session import Session

NAME = "ditto"


def participate(session: Session, server_round: int, received: State, memory: Memory) -> Participation:
    """Trains the server's copy, then the personal model near what was received."""
    returned, losses = session.train_round(server_round, received, "server")
    penalty = session.near(received, session.settings.baselines.ditto_lambda)
    personal, _ = session.train_round(server_round, memory.models.get(PERSONAL), PERSONAL, penalty)
    return Participation(returned, losses, Memory({PERSONAL: personal}))


def second_stage(session: Session, received: State, memory: Memory) -> SecondStage:
    """Fine-tunes the personal model near the last server's."""
    penalty = session.near(received, session.settings.baselines.ditto_lambda)
    personal, losses = session.finetune(memory.models.get(PERSONAL), PERSONAL, penalty)
    return SecondStage({NAME: personal}, losses)


METHOD = Method(NAME, participate, second_stage, (NAME,), server_and_personal, trained=lambda _: (2, 1))
