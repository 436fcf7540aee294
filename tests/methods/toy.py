"""A client of two numbers, on which a participation can be worked out by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from tap_flower.config import HyperParameters
from tap_flower.core import training
from tap_flower.core.components import ComponentMap, Pair, State, load_trainable_state
from tap_flower.core.tasks import IMAGE_GENERATION, TaskKind
from tap_flower.methods.session import Session

MAP = ComponentMap(
    {"base": "encoder/text", "head": "head/t"}, {Pair("t", ("text",)): frozenset({"encoder/text", "head/t"})}
)


def state(**values: float) -> State:
    return {name: torch.tensor(value) for name, value in values.items()}


def numbers(tensors: dict[str, Tensor]) -> dict[str, float]:
    return {name: round(value.item(), 5) for name, value in tensors.items()}


class Toy(nn.Module):
    """Its output is `base + head`, the target 0: the loss is (base + head)², its gradient 2 (base + head) for both."""

    component_map = MAP
    moving = frozenset[str]()

    def __init__(self, values: State) -> None:
        super().__init__()
        self.base, self.head = nn.Parameter(torch.tensor(0.0)), nn.Parameter(torch.tensor(0.0))
        load_trainable_state(self, values)

    def forward(self, task: str, inputs: Any) -> Tensor:
        return (self.base + self.head).view(1, 1)


@dataclass
class ToyClient:
    """Plain gradient descent at rate 0.1, two steps a round, one in stage 2; it notes every training."""

    settings: HyperParameters = field(default_factory=HyperParameters)
    initial: State = field(default_factory=lambda: state(base=2.0, head=0.0))
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    trainings: list[tuple[int, tuple[object, ...]]] = field(default_factory=list)
    kinds: dict[str, TaskKind] = field(default_factory=lambda: {"t": IMAGE_GENERATION})
    steps: int = 0

    def __post_init__(self) -> None:
        self.settings.train.steps, self.settings.distill.iterations = 2, 1
        self.settings.train.learning_rate = 0.1
        self.settings.distill.learning_rate = 0.1
        self.settings.train.accumulation, self.settings.train.clip_norm = 1, 1e6

    def initial_values(self) -> State:
        return dict(self.initial)

    @property
    def outline(self) -> Toy:
        return self.model()

    def with_head_factor(self, model: Toy, optimisation: training.Optimisation) -> training.Optimisation:
        return optimisation

    def model(self, values: State | None = None) -> Toy:
        return Toy(self.initial if values is None else values)

    def train(
        self,
        model: Toy,
        optimisation: training.Optimisation,
        *,
        order: tuple[object, ...],
        noise: object,
        times: int = 1,
        **more: Any,
    ) -> dict[str, float]:
        optimisation = replace(optimisation, steps=times * optimisation.steps)
        self.trainings.append((optimisation.steps, order))
        batches = itertools.repeat(training.Batch("t", {}, torch.zeros(1, 1)))
        return training.train(model, self.kinds, batches, optimisation, **more)

    train_round, finetune, near = Session.train_round, Session.finetune, Session.near
    _trained = Session._trained

    @property
    def local(self) -> Session:
        return cast(Session, self)


def plain_descent(groups: Any, **options: Any) -> torch.optim.Optimizer:
    """In the place of AdamW."""
    make: Callable[..., torch.optim.Optimizer] = torch.optim.SGD
    return make(groups, lr=options["lr"])
