"""TAP on a client: arXiv 2509.26524, Algorithms 1 and 2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from tap_flower.config import ReplacementEvidence, ReplacementSource
from tap_flower.core.distillation import Distillation
from tap_flower.core.replacement import Decision, decide, replace
from tap_flower.methods.local import LocalClient, State, cpu_state


@dataclass(frozen=True)
class Personal:
    """What a client keeps between rounds.

    Attributes:
        state: the personal model.
        losses: task name -> its mean training loss at its last participation.
    """

    state: State
    losses: dict[str, float]


@dataclass(frozen=True)
class Participation:
    """Result of one round on a client.

    Attributes:
        server_copy: the trained copy of the server's components; it is returned.
        losses: task name -> mean training loss of that copy.
        personal: stays on the client.
        decisions: stay on the client; only their counts are reported.
    """

    server_copy: State
    losses: dict[str, float]
    personal: Personal
    decisions: list[Decision]


@dataclass(frozen=True)
class SecondStage:
    """Result of stage 2 on a client.

    Attributes:
        finetuned: the fine-tuned server copy, which taught (the baseline FedAvg + fine-tuning).
        tap: the distilled personal model.
        losses: task name -> mean training loss of the fine-tuning.
    """

    finetuned: State
    tap: State
    losses: dict[str, float]


def participate(
    client: LocalClient, server_round: int, received: Mapping[str, Tensor], personal: Personal | None
) -> Participation:
    """Stage 1: train the server's copy, replace where it beats the personal model by a margin, train the personal model.

    Args:
        client: the client.
        server_round: counted from 1.
        received: the server's values of all tensors of the client.
        personal: from the last participation, or None before the first.
    """
    settings = client.settings.replacement
    optimisation = client.settings.train.optimisation(server_round)
    on_validation = settings.evidence is ReplacementEvidence.validation
    copies_received = settings.source is ReplacementSource.received

    teacher = client.model(received)
    source_losses: Mapping[str, float] = {}
    if copies_received:
        source_losses = client.losses(teacher, "validation" if on_validation else "train")
    losses = client.train(teacher, optimisation, order=(server_round,), noise=(server_round, "server"))
    server_copy = cpu_state(teacher)
    if not copies_received:
        source_losses = client.losses(teacher, "validation") if on_validation else losses

    student = client.model(None if personal is None else personal.state)
    personal_losses: Mapping[str, float] = {}  # what is missing counts as infinity
    if personal is not None:
        personal_losses = client.losses(student, "validation") if on_validation else personal.losses
    decisions = decide(student.component_map, source_losses, personal_losses, client.margins)
    replaced = replace(student, received if copies_received else server_copy, student.component_map, decisions)
    # After a replacement the personal model sees other mini-batches than the copy that it was taken from.
    order = (server_round, "replaced") if replaced else (server_round,)
    trained_losses = client.train(student, optimisation, order=order, noise=(server_round, "personal"))
    return Participation(server_copy, losses, Personal(cpu_state(student), trained_losses), decisions)


def second_stage(client: LocalClient, received: Mapping[str, Tensor], personal: Personal | None) -> SecondStage:
    """Stage 2: fine-tune the server's copy, then fine-tune the personal model with distillation from it.

    Args:
        client: the client.
        received: the server's values of all tensors of the client after the last round.
        personal: from the last participation; a client that was never sampled starts from the initial values.
    """
    settings = client.settings.distill
    optimisation = settings.optimisation(client.settings.train)
    teacher = client.model(received)
    losses = client.train(teacher, optimisation, order=("stage 2",), noise=("stage 2", "server"))
    student = client.model(None if personal is None else personal.state)
    objective = Distillation(teacher, client.kinds, vars(settings.weight), settings.temperature)
    client.train(student, optimisation, order=("stage 2",), noise=("stage 2", "personal"), objective=objective)
    return SecondStage(cpu_state(teacher), cpu_state(student), losses)
