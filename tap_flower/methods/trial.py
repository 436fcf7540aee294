"""Tries what is a project's own, so that what it lacks is told before the first round."""

from __future__ import annotations

from dataclasses import replace
from math import isfinite

from tap_flower.config import ReplacementEvidence
from tap_flower.core.objectives import Distillation
from tap_flower.core.own_loop import UNCHANGED
from tap_flower.core.seeds import named_seed, others_seeded, seed_torch
from tap_flower.data.examples import OwnLoader, beginning, extremes
from tap_flower.errors import ClientError
from tap_flower.methods.method import Method
from tap_flower.methods.own_results import check_losses, lone_example_told
from tap_flower.methods.session import Session

_BATCHES = 2
"""Batches on which a project's own evaluation is tried."""


def try_loops(session: Session, method: Method) -> None:
    """Runs a project's own training loops over two batches each, the first and the smallest, on a model that is thrown away.

    Args:
        session: the client at work.
        method: of the run.

    Raises:
        ClientError: a loop returned what cannot be used, cannot train on its smallest batch, trains nothing, or does not
            call the module where the method must see its outputs; or these outputs cannot be distilled.
    """
    if all(task.fit is None for task in session.tasks):
        return
    model, steps, metrics = session.model(), session.steps, session.metrics
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    seed_torch(seed := named_seed(session.settings.seed, session.name, "trial"))
    objective = None
    if method.distils(session.settings):
        objective = Distillation(session.model(), session.kinds, dict.fromkeys(session.kinds, 1.0))
    with session.algorithms(), others_seeded(seed):
        session.fit_own(model, objective, part=extremes)
    unchanged = all(p.equal(before[name]) for name, p in model.named_parameters() if name in before)
    if unchanged and session.steps == steps:  # else the learning rate is 0, and may rise
        raise ClientError(f"{UNCHANGED}: train that one")
    session.steps, session.metrics = steps, metrics


def try_evidence(session: Session, method: Method) -> None:
    """Evaluates the run's first values on the held-out examples that the method is going to compare.

    Args:
        session: the client at work.
        method: of the run.

    Raises:
        ClientError: a loss is not finite: no decision on the task would ever be made.
    """
    on_validation = session.settings.replacement.evidence is ReplacementEvidence.validation
    if not on_validation or not method.compares(session.settings):
        return
    for task, loss in session.losses(session.model(), "validation").items():
        if not isfinite(loss):
            raise ClientError(
                f"task {task!r}: the loss on its held-out examples is {loss} with the run's first values: look for values "
                f"that are not finite in its data"
            )


def try_batches(session: Session, method: Method) -> None:
    """Tries a project's own evaluations, its loaders' batches of one example, and the run's algorithms.

    Args:
        session: the client at work.
        method: of the run.

    Raises:
        ClientError: an evaluation returns what cannot be used, the model refuses a batch of a loader, or it has an operation
            that cannot be deterministic.
    """
    if session.settings.compute.deterministic and all(task.fit is None for task in session.tasks):
        once = replace(session.settings.train.optimisation(1), steps=1, accumulation=len(session.tasks))
        before = session.steps
        session.train(session.model(), once, order=("trial",), noise=("trial",))
        session.steps = before
    for task in session.tasks:
        name = task.pair.task
        for own in session.data.splits["train"][name]:
            if task.fit is None and isinstance(own, OwnLoader) and (lone := own.lone(session.device)) is not None:
                with lone_example_told(name):
                    session.model().train()(name, lone.inputs)
        splits = [split for split in ("validation", "test") if session.data.sizes(split).get(name)]
        if task.score is not None and splits:
            loader = beginning(session.data.loader(splits[0], name), _BATCHES)
            found = {name: session.score_own(task, session.model(), loader)}
            if method.compares(session.settings) and splits[0] == "validation":
                check_losses(found)
