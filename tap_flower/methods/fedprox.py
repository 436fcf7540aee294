"""FedProx (Li et al., MLSys 2020, arXiv 1812.06127): local training that stays near the server's tensors.

A client minimises `F(w) + μ/2 · ||w − w_t||²`, where w_t is what it received in round t.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tap_flower.methods.method import Memory, Method, Participation, SecondStage, State
from tap_flower.methods.steps import finetune, near, train_round

if TYPE_CHECKING:
    from tap_flower.methods.session import LocalClient

NAME = "fedprox"


def participate(client: LocalClient, server_round: int, received: State, memory: Memory) -> Participation:
    """Trains the server's copy near where it started."""
    del memory
    penalty = near(client, received, client.settings.baselines.fedprox_mu)
    return Participation(*train_round(client, server_round, received, "server", penalty))


def second_stage(client: LocalClient, received: State, memory: Memory) -> SecondStage:
    """Fine-tunes the server's copy, without the penalty."""
    del memory
    finetuned, losses = finetune(client, received, "server")
    return SecondStage({NAME: finetuned}, losses)


METHOD = Method(NAME, participate, second_stage, (NAME,))
