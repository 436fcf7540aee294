"""TAP: Two-Stage Adaptive Personalization (Lee et al., arXiv 2509.26524).

`participate` is the client's part of the paper's Algorithm 1, federated rounds with adaptive replacement; `second_stage` is
Algorithm 2, what happens after the last round. The server's part, sampling and averaging, is `server.strategy`.

Options go beyond the paper: `train.personal_from` leaves the personal model's steps of early rounds out,
`replacement.mode=mix` takes components over in part, `replacement.before_stage_two` and `replacement.after_stage_two` decide
once more as stage 2 begins and ends, and `distill` has stages without a teacher.
docs/concepts.md says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import inf

from tap_flower.config import Config, HyperParameters, ReplacementEvidence, ReplacementMode, ReplacementSource, StageTwo
from tap_flower.core.components import ComponentModel, State, cpu_state, load_trainable_state
from tap_flower.core.objectives import Distillation
from tap_flower.core.replacement import PARTS, Decision, decide, mixture, replace
from tap_flower.methods.method import PERSONAL, Memory, Method, Participation, SecondStage, server_and_personal
from tap_flower.methods.session import Session

LOSSES = "personal_losses"
"""In the memory: task name -> the personal model's mean training loss in its last round."""


def participate(session: Session, server_round: int, received: State, memory: Memory) -> Participation:
    """Stage 1: train the server's copy, replace where it beats the personal model by a margin, train the personal model.

    Before round `train.personal_from` the personal model is not trained: it changes by replacement alone. With
    `replacement.enabled` false nothing is compared and nothing is replaced, and it is always trained.

    Args:
        session: the client at work.
        server_round: counted from 1.
        received: the server's tensors for this client.
        memory: the personal model and its losses, from the client's last round.
    """
    settings = session.settings.replacement
    optimisation = session.settings.train.optimisation(server_round)
    on_validation = settings.evidence is ReplacementEvidence.validation
    copies_received = settings.source is ReplacementSource.received
    personal = memory.models.get(PERSONAL)

    # Algorithm 1, local training of the server's components θ_i: R optimiser steps. The loss of each pair is the evidence
    # for its replacement, either on held-out examples or as seen in training.
    teacher = session.model(received)
    source_losses: Mapping[str, float] = {}  # a pair without a loss is not decided on
    if settings.enabled and copies_received:
        source_losses = session.losses(teacher, "validation")
    losses = session.train(teacher, optimisation, order=(server_round,), noise=(server_round, "server"))
    returned = cpu_state(teacher)
    if settings.enabled and not copies_received:
        source_losses = session.losses(teacher, "validation") if on_validation else losses

    # Algorithm 1, adaptive replacement: for each pair with loss(server) + margin < loss(personal), the components that the
    # pair reaches are copied into the personal model. Before its first round the personal loss is infinite.
    source = received if copies_received else returned
    known = None if on_validation else memory.record.get(LOSSES)
    student, decisions, replaced = _replaced(session, personal, source, source_losses, known)

    # Algorithm 1, local training of the personal model φ_i: R steps. After a replacement it sees other mini-batches than
    # the copy that it was taken from.
    if settings.enabled and server_round < session.settings.train.personal_from:
        taken_over = {decision.pair.task for decision in decisions if decision.replaced}
        before = memory.record.get(LOSSES, {})
        trained_losses = before | {task: loss for task, loss in losses.items() if task in taken_over}
    else:
        order = (server_round, "replaced") if replaced else (server_round,)
        trained_losses = session.train(student, optimisation, order=order, noise=(server_round, "personal"))
    kept = Memory({PERSONAL: cpu_state(student)}, {LOSSES: trained_losses})
    return Participation(returned, losses, kept, decisions)


def _replaced(
    session: Session,
    personal: State | None,
    source: State,
    source_losses: Mapping[str, float],
    personal_losses: Mapping[str, float] | None = None,
) -> tuple[ComponentModel, list[Decision], set[str]]:
    """Decides on the replacement of each pair's components, and carries it out.

    Args:
        session: the client at work.
        personal: the personal model; None before the client's first round.
        source: the server's copy.
        source_losses: task name -> its loss; a pair without a loss is not decided on.
        personal_losses: task name -> loss of the personal model; None measures it on held-out examples.

    Returns:
        The personal model, the decisions, and the names of the tensors that were taken over.
    """
    student = session.model(personal)
    mixed = dict[float, Mapping[str, float]]()
    if personal is None or not source_losses:
        personal_losses = {}  # before the first round nothing has been learned that could be better
    elif personal_losses is None:
        personal_losses = session.losses(student, "validation")
        if session.settings.replacement.mode is ReplacementMode.mix:
            for share in PARTS:
                load_trainable_state(student, mixture(personal, source, share))
                mixed[share] = session.losses(student, "validation")
            load_trainable_state(student, personal)
    decisions = decide(student.component_map, source_losses, personal_losses, session.margins, mixed)
    return student, decisions, replace(student, source, student.component_map, decisions)


def second_stage(session: Session, received: State, memory: Memory) -> SecondStage:
    """Stage 2: fine-tune the personal model, as published with distillation from the fine-tuned server copy.

    Args:
        session: the client at work.
        received: the server's tensors for this client after the last round.
        memory: the personal model; a client that was never sampled starts from its first values, or where it is decided
            once more, from the server copy.
    """
    settings, personal = session.settings.distill, memory.models.get(PERSONAL)
    replacement, distils = session.settings.replacement, settings.stage is StageTwo.distillation
    before, after = (replacement.enabled and on for on in (replacement.before_stage_two, replacement.after_stage_two))
    models, losses = dict[str, State](), dict[str, float]()
    # Algorithm 2, teacher: θ_i fine-tuned for K steps. By itself this is the baseline "FedAvg + fine-tuning".
    if distils:
        models["server+finetune"], losses = session.finetune(received, "server")
    source = models.get("server+finetune", received)
    teacher = session.model(source) if distils or before else None
    teacher_losses: Mapping[str, float] = {}
    if teacher is not None and (before or settings.only_better):
        teacher_losses = session.losses(teacher, "validation")
    # The decision of stage 1 once more: since a client's last round the server's model has gone on.
    first, last = list[Decision](), list[Decision]()
    if before:
        personal, first = decided(session, personal, source, teacher_losses)
    if not distils:
        times = 2 if settings.stage is StageTwo.finetuning_twice else 1
        tuned, losses = session.finetune(personal, "personal", times=times)
    else:
        # Algorithm 2, student: K steps of φ_i on task loss + w · divergence(teacher -> student).
        assert teacher is not None
        weights = session.distillation_weights
        if settings.only_better:
            own = session.losses(session.model(personal), "validation")
            weights = {task: w for task, w in weights.items() if teacher_losses.get(task, inf) < own.get(task, inf)}
        tuned, _ = session.finetune(
            personal, "personal", lambda _: Distillation(teacher, session.kinds, weights, settings.temperature)
        )
    # And once more on the result: few examples overfit, and the server's weights as they came take some of that back.
    if after:
        tuned, last = decided(session, tuned, received, session.losses(session.model(received), "validation"))
    return SecondStage({**models, "tap": tuned}, losses, (first, last))


def decided(
    session: Session, personal: State | None, source: State, source_losses: Mapping[str, float]
) -> tuple[State, list[Decision]]:
    """The personal model after the decision on each pair, and the decisions; see `_replaced`."""
    student, decisions, _ = _replaced(session, personal, source, source_losses)
    return cpu_state(student), decisions


def trained(config: Config) -> tuple[float, float]:
    """Two models in the rounds that train both, and in stage 2 teacher and student, or what the ablation says."""
    without = min(config.train.personal_from - 1, config.rounds) if config.replacement.enabled else 0
    return 2 - without / max(config.rounds, 1), 1 if config.distill.stage is StageTwo.finetuning else 2


def compares(settings: HyperParameters) -> bool:
    """Whether components are replaced, or pairs distilled, by the losses of held-out examples."""
    return settings.replacement.enabled or settings.distill.only_better


def distils(settings: HyperParameters) -> bool:
    """Whether stage 2 compares the outputs of teacher and student."""
    return settings.distill.stage is StageTwo.distillation


METHOD = Method(
    "tap",
    participate,
    second_stage,
    ("server+finetune", "tap"),
    server_and_personal,
    trained=trained,
    longest=lambda settings: (1, 2 if settings.distill.stage is StageTwo.finetuning_twice else 1),
    compares=compares,
    distils=distils,
)
