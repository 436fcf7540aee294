"""Clients with several tasks: a method whose steps are not alike trains all of them."""

from __future__ import annotations

import pytest
from torch import nn

from tap_flower import Client
from tap_flower.config import HyperParameters
from tap_flower.config.options import Train
from tap_flower.methods.method import Memory
from tap_flower.methods.registry import find_method
from tests.own_clients import digits, mood
from tests.toys import Net


@pytest.mark.parametrize("method", ["fedavg", "per-fedavg", "fedrep", "pfedme", "fedala", "apfl", "feddat"])
def test_the_heads_of_both_tasks_move_within_some_rounds(method: str) -> None:
    def net() -> nn.Module:
        return Net("digits", "mood")

    settings = HyperParameters(method=method, train=Train(steps=2, accumulation=1, batch_size=4))
    session = Client("ann", net, [digits(1), mood(2)]).session(settings)
    first = session.initial_values()
    moved = set[str]()
    for server_round in range(1, 9):
        done = find_method(method).participate(session, server_round, first, Memory())
        for values in (done.returned, *done.memory.models.values()):
            moved |= {name for name, value in values.items() if not value.equal(first[name])}
    assert {"heads.digits.weight", "heads.mood.weight"} <= moved
    assert any(name.startswith("trunk") for name in moved)
