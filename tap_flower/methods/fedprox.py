"""FedProx (Li et al., MLSys 2020, arXiv 1812.06127): local training that stays near the server's tensors.

A client minimises `F(w) + μ/2 · ||w − w_t||²`, where w_t is what it received in round t.
"""

from __future__ import annotations

from tap_flower.core.components import State
from tap_flower.methods.method import Memory, Method, Participation, finetunes
from tap_flower.methods.session import Session

NAME = "fedprox"


def participate(session: Session, server_round: int, received: State, memory: Memory) -> Participation:
    """Trains the server's copy near where it started."""
    del memory
    penalty = session.near(received, session.settings.baselines.fedprox_mu)
    return Participation(*session.train_round(server_round, received, "server", penalty))


METHOD = Method(NAME, participate, finetunes(NAME), (NAME,))
