"""APFL (Deng, Kamani and Mahdavi, 2020, arXiv 2003.13461): each client mixes its model with the server's as it fits.

The personal model is `v̄ = α v + (1 − α) w`. In each step, on the same batch, the server's copy follows `∇F(w)` as in FedAvg
and is returned, and the client's own v follows `∂F(v̄)/∂v = α ∇F(v̄)`. In the first step of a participation α moves by its
own gradient, `α ← α − η ⟨v − w, ∇F(v̄)⟩`, and is kept between 0 and 1. v starts as what the client receives first.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from tap_flower.core.components import State, cpu_state, trainable_state
from tap_flower.core.training import Batch
from tap_flower.methods.method import Memory, Method, Participation, SecondStage
from tap_flower.methods.mixture import LOCAL, OWN_LOOP, SHARE, Mixture, mixed_models, mixture
from tap_flower.methods.session import Session

NAME = "apfl"


def participate(session: Session, server_round: int, received: State, memory: Memory) -> Participation:
    """R optimiser steps of the server's copy w, and beside each one of v."""
    settings, optimisation = session.settings.baselines, session.settings.train.optimisation(server_round)
    w, share = session.model(received), memory.record.get(SHARE, settings.apfl_alpha)
    personal = Mixture(session, memory.models.get(LOCAL, received), trainable_state(w), share, optimisation)

    def beside(batch: Batch, output: Tensor) -> Tensor:
        personal.backward(batch)
        return torch.zeros((), device=output.device)

    def update(number: int, optimizer: Optimizer) -> None:
        slope = personal.slope() if number == 0 else 0.0
        optimizer.step()
        personal.step()
        personal.share = min(max(personal.share - settings.apfl_rate * slope, 0.0), 1.0)
        personal.mix()

    order, noise = (server_round,), (server_round, "server")
    losses = session.train(w, optimisation, order=order, noise=noise, objective=beside, update=update)
    return Participation(cpu_state(w), losses, personal.kept())


def second_stage(session: Session, received: State, memory: Memory) -> SecondStage:
    """Fine-tunes the mixture with the last server's model."""
    finetuned, losses = session.finetune(mixture(received, memory), "personal")
    return SecondStage({NAME: finetuned}, losses)


METHOD = Method(NAME, participate, second_stage, (NAME,), mixed_models, own_loop=OWN_LOOP, trained=lambda _: (2, 1))
