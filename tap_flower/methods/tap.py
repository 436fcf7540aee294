"""TAP: Two-Stage Adaptive Personalization (Lee et al., arXiv 2509.26524), Algorithms 1 and 2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from tap_flower.config import ReplacementEvidence, ReplacementSource, StageTwo
from tap_flower.core.components import cpu_state
from tap_flower.core.distillation import Distillation
from tap_flower.core.replacement import decide, replace
from tap_flower.methods.method import Memory, Method, Participation, SecondStage, Start, State
from tap_flower.methods.steps import finetune

if TYPE_CHECKING:
    from tap_flower.methods.session import LocalClient

PERSONAL, LOSSES = "personal", "personal_losses"
"""In the memory: the personal model, and task name -> its mean training loss at its last participation."""


def participate(client: LocalClient, server_round: int, received: State, memory: Memory) -> Participation:
    """Stage 1: train the server's copy, replace where it beats the personal model by a margin, train the personal model.

    With `replacement.enabled` false nothing is compared and nothing is replaced.

    Args:
        client: the client.
        server_round: counted from 1.
        received: the server's values of all tensors of the client.
        memory: the personal model and its losses, from the last participation.
    """
    settings = client.settings.replacement
    optimisation = client.settings.train.optimisation(server_round)
    on_validation = settings.evidence is ReplacementEvidence.validation
    copies_received = settings.source is ReplacementSource.received
    personal = memory.models.get(PERSONAL)

    teacher = client.model(received)
    source_losses: Mapping[str, float] = {}  # a pair without a loss is not decided on
    if settings.enabled and copies_received:
        source_losses = client.losses(teacher, "validation" if on_validation else "train")
    losses = client.train(teacher, optimisation, order=(server_round,), noise=(server_round, "server"))
    returned = cpu_state(teacher)
    if settings.enabled and not copies_received:
        source_losses = client.losses(teacher, "validation") if on_validation else losses

    student = client.model(personal)
    personal_losses: Mapping[str, float] = {}  # what is missing counts as infinity
    if settings.enabled and personal is not None:
        personal_losses = client.losses(student, "validation") if on_validation else memory.record[LOSSES]
    decisions = decide(student.component_map, source_losses, personal_losses, client.margins)
    replaced = replace(student, received if copies_received else returned, student.component_map, decisions)
    # After a replacement the personal model sees other mini-batches than the copy that it was taken from.
    order = (server_round, "replaced") if replaced else (server_round,)
    trained_losses = client.train(student, optimisation, order=order, noise=(server_round, "personal"))
    kept = Memory({PERSONAL: cpu_state(student)}, {LOSSES: trained_losses})
    return Participation(returned, losses, kept, decisions)


def second_stage(client: LocalClient, received: State, memory: Memory) -> SecondStage:
    """Stage 2: fine-tune the server's copy, then fine-tune the personal model with distillation from it.

    The ablations fine-tune the personal model alone: for K steps, or for the 2K that teacher and student take together.

    Args:
        client: the client.
        received: the server's values of all tensors of the client after the last round.
        memory: the personal model; a client that was never sampled starts from the initial values.
    """
    settings, personal = client.settings.distill, memory.models.get(PERSONAL)
    if settings.stage is not StageTwo.distillation:
        times = 2 if settings.stage is StageTwo.finetuning_twice else 1
        tap, losses = finetune(client, personal, "personal", times=times)
        return SecondStage({"tap": tap}, losses)
    finetuned, losses = finetune(client, received, "server")
    teacher = client.model(finetuned)
    tap, _ = finetune(
        client,
        personal,
        "personal",
        lambda _: Distillation(teacher, client.kinds, client.distillation_weights, settings.temperature),
    )
    return SecondStage({"server+finetune": finetuned, "tap": tap}, losses)


def models(client: Start, received: State, memory: Memory) -> dict[str, State | None]:
    """The server's copy, and the personal model, which a client that was never sampled has with its initial values."""
    del client
    return {"server": received, "personal": memory.models.get(PERSONAL)}


METHOD = Method("tap", participate, second_stage, ("server+finetune", "tap"), models)
