"""FedALA (Zhang et al., AAAI 2023, arXiv 2212.01197): a client learns how much of the server's head it takes over.

A participation starts from `θ = θ_local + (θ_server − θ_local) ⊙ W` with W in [0, 1], an element for each value. W follows
`W ← clip(W − η · ∇F(θ) ⊙ (θ_server − θ_local))`, where ∇F is the gradient at the θ that W gives. Then θ is trained and
returned as in FedAvg. W weighs the last layers, here the heads (p = 1 in the paper); what is below starts from the server's.

In the paper W is learned in a pass over a share s of the data, where a participation is a pass over all; here a pass is
s · R steps, R being those of a participation. The first time W is ones, and learned until its loss has stood still for ten
passes: here `fedala_start` passes. Steps of W count like others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch.optim import Optimizer

from tap_flower.config import Config, HyperParameters
from tap_flower.config.baselines import Baselines
from tap_flower.core.components import State
from tap_flower.core.training import Optimisation
from tap_flower.methods.fedper import check_heads
from tap_flower.methods.method import Memory, Method, Participation, SecondStage
from tap_flower.methods.session import Session

NAME, HEADS, WEIGHTS = "fedala", "heads", "weights"


def aggregated(received: State, memory: Memory) -> State:
    """The server's model, with heads as W gives them; W is ones before the client has learned it."""
    local, weights = memory.models.get(HEADS, {}), memory.models.get(WEIGHTS, {})
    return {**received, **{n: local[n] + (received[n] - local[n]) * w for n, w in weights.items()}}


def steps_of_a_pass(settings: Baselines, steps: int) -> int:
    """Optimiser steps of W in a pass over its share of the data, where a training makes `steps`."""
    return max(round(settings.fedala_share * steps), 1)


def learned(session: Session, received: State, memory: Memory, optimisation: Optimisation, name: object) -> Memory:
    """The memory with W learned for what the server sent; a client without heads of its own has nothing to weigh."""
    if not (local := memory.models.get(HEADS)):
        return memory
    settings, start = session.settings.baselines, memory.models.get(WEIGHTS)
    passes = settings.fedala_start if start is None else 1
    memory = Memory({HEADS: local, WEIGHTS: start or {n: torch.ones_like(value) for n, value in local.items()}})
    model, device = session.model(aggregated(received, memory)), session.device
    weights = {n: value.to(device, copy=True) for n, value in memory.models[WEIGHTS].items()}
    own, apart = ({n: v.to(device) for n, v in s.items()} for s in (local, {n: received[n] - local[n] for n in local}))
    heads = {n: parameter for n, parameter in model.named_parameters() if n in local}

    @torch.no_grad()
    def update(number: int, optimizer: Optimizer) -> None:
        del number, optimizer  # W moves, and with it the heads; nothing else does
        for n, parameter in heads.items():
            if parameter.grad is not None:
                weights[n].sub_(settings.fedala_rate * parameter.grad * apart[n]).clamp_(0, 1)
                parameter.copy_(own[n] + apart[n] * weights[n])

    steps = passes * steps_of_a_pass(settings, optimisation.steps)
    optimisation = replace(optimisation, steps=steps, clip_norm=math.inf)
    session.train(model, optimisation, order=(name, WEIGHTS), noise=(name, WEIGHTS), update=update)
    return Memory({HEADS: local, WEIGHTS: {n: value.cpu() for n, value in weights.items()}})


def participate(session: Session, server_round: int, received: State, memory: Memory) -> Participation:
    """Learns W, and trains the model that starts from it."""
    kept = learned(session, received, memory, session.settings.train.optimisation(server_round), server_round)
    trained, losses = session.train_round(server_round, aggregated(received, kept), "server")
    heads = session.outline.component_map.heads - session.outline.moving
    own = {name: value for name, value in trained.items() if name in heads}
    return Participation(trained, losses, Memory({**kept.models, HEADS: own}))


def second_stage(session: Session, received: State, memory: Memory) -> SecondStage:
    """Learns W for the last server's model, and fine-tunes the model that starts from it."""
    optimisation = session.settings.distill.optimisation(session.settings.train)
    kept = learned(session, received, memory, optimisation, "stage 2")
    finetuned, losses = session.finetune(aggregated(received, kept), "server")
    return SecondStage({NAME: finetuned}, losses)


def models(received: State, memory: Memory, first: Callable[[], State]) -> dict[str, State | None]:
    """The server's copy, and that with heads as the W of the client's last round gives them."""
    del first
    return {"server": received, "personal": aggregated(received, memory)}


def trained(config: Config) -> tuple[float, float]:
    """The model, and W as often as a client that is sampled as often as the others learns it: not before it has heads."""
    clients = len(config.clients) or config.clients_per_round
    rounds = max(config.rounds * min(config.clients_per_round / clients, 1.0), 1.0)  # in which it takes part
    share, first = config.baselines.fedala_share, config.baselines.fedala_start
    began = min(rounds - 1.0, 1.0)  # in stage 1; who has not by then, in stage 2
    passes = began * first + max(rounds - 2.0, 0.0)
    return 1.0 + share * passes / rounds, 1.0 + share * (began + (1.0 - began) * first)


def longest(settings: HyperParameters) -> tuple[int, int]:
    """The first time, W is learned in `fedala_start` passes."""

    def times(steps: int) -> int:
        learning = settings.baselines.fedala_start * steps_of_a_pass(settings.baselines, steps)
        return max(math.ceil(learning / steps), 1)

    return times(settings.train.steps), times(settings.distill.iterations)


OWN_LOOP = "learns the weights of its heads between optimiser steps, which are the loop's own"
METHOD = Method(
    NAME,
    participate,
    second_stage,
    (NAME,),
    models,
    suits=partial(check_heads, NAME),
    own_loop=OWN_LOOP,
    trained=trained,
    longest=longest,
)
