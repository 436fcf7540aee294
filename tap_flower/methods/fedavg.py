"""FedAvg (McMahan et al., arXiv 1602.05629), and FedAvg with fine-tuning in stage 2."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tap_flower.methods.method import Memory, Method, Participation, SecondStage, State
from tap_flower.methods.steps import finetune, train_round

if TYPE_CHECKING:
    from tap_flower.methods.session import LocalClient

FINETUNED = "server+finetune"


def participate(client: LocalClient, server_round: int, received: State, memory: Memory) -> Participation:
    """Trains the server's copy."""
    del memory
    return Participation(*train_round(client, server_round, received, "server"))


def nothing(client: LocalClient, received: State, memory: Memory) -> SecondStage:
    """FedAvg itself has no stage 2: its result is the server's copy as it is."""
    del client, received, memory
    return SecondStage()


def second_stage(client: LocalClient, received: State, memory: Memory) -> SecondStage:
    """Fine-tunes the server's copy."""
    del memory
    finetuned, losses = finetune(client, received, "server")
    return SecondStage({FINETUNED: finetuned}, losses)


FEDAVG = Method("fedavg", participate, nothing, ())
METHOD = Method("fedavg+finetune", participate, second_stage, (FINETUNED,))
