"""FedAvg (McMahan et al., arXiv 1602.05629), and FedAvg with fine-tuning in stage 2."""

from __future__ import annotations

from tap_flower.core.components import State
from tap_flower.methods.method import Memory, Method, Participation, SecondStage, finetunes
from tap_flower.methods.session import Session

FINETUNED = "server+finetune"


def participate(session: Session, server_round: int, received: State, memory: Memory) -> Participation:
    """Trains the server's copy."""
    del memory
    return Participation(*session.train_round(server_round, received, "server"))


def nothing(session: Session, received: State, memory: Memory) -> SecondStage:
    """FedAvg itself has no stage 2: its result is the server's copy as it is."""
    del session, received, memory
    return SecondStage()


FEDAVG = Method("fedavg", participate, nothing, (), trained=lambda _: (1, 0))
METHOD = Method("fedavg+finetune", participate, finetunes(FINETUNED), (FINETUNED,))
