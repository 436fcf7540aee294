"""TAP as published (Lee et al., arXiv 2509.26524), whatever a preset has chosen for `tap`.

Components are replaced wholly or not at all, nothing is decided before or after stage 2, and stage 2 distils every pair.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from tap_flower.config import Config, HyperParameters, ReplacementMode, StageTwo
from tap_flower.core.components import State
from tap_flower.methods import tap
from tap_flower.methods.method import Memory, Participation, SecondStage
from tap_flower.methods.session import Session

_Settings = TypeVar("_Settings", bound=HyperParameters)


def as_published(settings: _Settings) -> _Settings:
    """A run's hyper-parameters with the paper's choices where TAP has others."""
    return replace(
        settings,
        train=replace(settings.train, personal_from=1),
        replacement=replace(
            settings.replacement, mode=ReplacementMode.hard, before_stage_two=False, after_stage_two=False
        ),
        distill=replace(settings.distill, stage=StageTwo.distillation, only_better=False),
    )


def participate(session: Session, server_round: int, received: State, memory: Memory) -> Participation:
    """Algorithm 1; see `tap.participate`."""
    session.settings = as_published(session.settings)
    return tap.participate(session, server_round, received, memory)


def second_stage(session: Session, received: State, memory: Memory) -> SecondStage:
    """Algorithm 2; see `tap.second_stage`."""
    session.settings = as_published(session.settings)
    return tap.second_stage(session, received, memory)


def trained(config: Config) -> tuple[float, float]:
    """Two models in a round, and in stage 2."""
    return tap.trained(as_published(config))


def distils(settings: HyperParameters) -> bool:
    """In stage 2, always."""
    return tap.distils(as_published(settings))


METHOD = replace(
    tap.METHOD,
    name="tap-published",
    participate=participate,
    second_stage=second_stage,
    trained=trained,
    longest=lambda _: (1, 1),
    compares=lambda settings: tap.compares(as_published(settings)),
    distils=distils,
)
