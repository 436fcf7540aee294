"""`compute.deterministic` holds for training and evaluation alone."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tap_flower.config.options import Compute, Train
from tap_flower.errors import ClientError
from tests.small_projects import Loop, loader, session, task


@pytest.mark.parametrize("option", [False, True])
def test_deterministic_algorithms_are_for_training_and_evaluation_alone(option: bool) -> None:
    seen: list[bool] = []

    def noted(net: Any, batch: Any) -> torch.Tensor:
        seen.append(torch.are_deterministic_algorithms_enabled())
        output: torch.Tensor = net(batch[0])
        return output

    def fit(net: Any, data: Any, config: Any) -> float:
        return F.cross_entropy(noted(net, next(iter(data))), next(iter(data))[1]).item()

    def score(net: Any, data: Any) -> dict[str, float]:
        return {"loss": fit(net, data, {}), "accuracy": 0.0}

    for of in (
        task(forward=noted, validation=loader(5, 3)),
        Loop().task(fit=fit, score=score, validation=loader(5, 3)),
    ):
        made = session(of, compute=Compute(deterministic=option), train=Train(steps=1, accumulation=1))
        seen.clear()
        made.train_round(1, None, "server")
        trained = len(seen)
        made.losses(made.model(), "validation")
        assert len(seen) > trained > 0
        assert set(seen) == {option}
        assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("draw", [random.random, np.random.rand], ids=["random", "numpy"])
@pytest.mark.parametrize("own_loop", [False, True], ids=["steps", "fit"])
def test_what_a_model_draws_by_random_or_numpy_follows_from_the_seed(draw: Any, own_loop: bool) -> None:
    drawn: list[list[float]] = []

    def forward(net: Any, batch: Any) -> torch.Tensor:
        drawn[-1].append(draw())  # of LayerDrop, say
        output: torch.Tensor = net(batch[0])
        return output

    def fit(net: Any, data: Any, config: Any) -> None:
        for x, y in data:
            F.cross_entropy(forward(net, [x]), y).backward()

    for part in (1, 1, 2):
        drawn.append([])
        made = session(Loop().task(fit=fit) if own_loop else task(forward=forward))
        drawn[-1].clear()
        made.train_round(part, None, "server")
    assert drawn[0] == drawn[1] != drawn[2]


def test_an_operation_that_cannot_be_deterministic_is_refused_at_the_start() -> None:
    def puts(net: Any, batch: Any) -> torch.Tensor:
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))
        output: torch.Tensor = net(batch[0])
        return output

    assert session(task(forward=puts)).steps == 0
    with pytest.raises(
        ClientError, match=r"compute.deterministic = true, and torch's put_ \(test_deterministic.py:\d+\) has no"
    ):
        session(task(forward=puts), compute=Compute(deterministic=True))
    assert session(task(), compute=Compute(deterministic=True)).steps == 0
