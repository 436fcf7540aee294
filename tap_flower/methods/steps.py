"""The two pieces of training that every method is made of: a round's, and stage 2's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from tap_flower.core.components import cpu_state
from tap_flower.core.proximal import Proximal
from tap_flower.core.training import Objective, Update
from tap_flower.methods.method import State

if TYPE_CHECKING:
    from tap_flower.core.components import ComponentModel
    from tap_flower.methods.session import LocalClient

MakeObjective = Callable[["ComponentModel"], Objective]
"""The model that is about to be trained -> the further loss of its training."""
MakeUpdate = Callable[["ComponentModel"], Update]
"""Likewise -> what happens with the gradients of a step; see `core.training.train`."""


def train_round(
    client: LocalClient,
    server_round: int,
    start: State | None,
    name: str,
    objective: MakeObjective | None = None,
    update: MakeUpdate | None = None,
) -> tuple[State, dict[str, float]]:
    """The R optimiser steps of a participation; all methods see the same mini-batches in the same order.

    Args:
        client: the client.
        server_round: counted from 1.
        start: tensors of the whole model, or None for the run's initial values.
        name: of the model (`server`, `personal`); it names the random numbers of dropout.
        objective: makes the further loss.
        update: makes what happens with the gradients of a step.

    Returns:
        The trained tensors, and task name -> mean training loss.
    """
    model = client.model(start)
    losses = client.train(
        model,
        client.settings.train.optimisation(server_round),
        order=(server_round,),
        noise=(server_round, name),
        objective=None if objective is None else objective(model),
        update=None if update is None else update(model),
    )
    return cpu_state(model), losses


def finetune(
    client: LocalClient, start: State | None, name: str, objective: MakeObjective | None = None, times: int = 1
) -> tuple[State, dict[str, float]]:
    """The K optimiser steps of stage 2, `times` as often; otherwise as `train_round`."""
    model = client.model(start)
    settings = client.settings
    optimisation = settings.distill.optimisation(settings.train)
    losses = client.train(
        model,
        replace(optimisation, steps=times * optimisation.steps),
        order=("stage 2",),
        noise=("stage 2", name),
        objective=None if objective is None else objective(model),
    )
    return cpu_state(model), losses


def near(client: LocalClient, anchor: Mapping[str, Tensor], weight: float) -> MakeObjective:
    """The penalty `weight / 2 · ||w − anchor||²` on the model that is about to be trained."""
    on_device = {name: value.to(client.device) for name, value in anchor.items()}
    return lambda model: Proximal(model, on_device, weight)
