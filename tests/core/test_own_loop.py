"""What a loop of the project's own must leave as it was, and the steps that it makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tap_flower.core.components import ComponentModel
from tap_flower.core.own_loop import counted_steps, lent
from tap_flower.errors import ClientError


@pytest.mark.parametrize("optimiser", [torch.optim.SGD, torch.optim.AdamW])
def test_steps_of_any_optimiser_are_counted(optimiser: type[torch.optim.Optimizer]) -> None:
    net = nn.Linear(4, 3)
    own = optimiser(net.parameters(), lr=0.1)
    with counted_steps() as steps:
        for number in range(6):
            net(torch.ones(2, 4)).sum().backward()
            if number % 2:
                own.step()
                own.zero_grad()
    assert steps == [3]


class Adapted(ComponentModel):
    """A frozen layer with an adapter, as peft makes it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).requires_grad_(False)
        self.adapter: Any = nn.Linear(4, 8, bias=False)
        self.adapter.merged = False
        self.register_buffer("seen", torch.zeros(()))
        self.discarded = 0

    def discard(self) -> None:
        self.discarded += 1


def merges(net: Any) -> None:
    net.net[0].weight.data += net.adapter.weight.detach()  # which has no new version then


def merges_nothing(net: Any) -> None:
    net.adapter.merged = True


def unloads(net: Any) -> None:
    merges(net)
    del net.adapter


def wraps(net: Any) -> None:
    net.other = nn.Linear(2, 2)


def counts(net: Any) -> None:
    net.seen += 1


@pytest.mark.parametrize("trains", [True, False], ids=["fit", "score"])
@pytest.mark.parametrize(
    ("own", "words"),
    [
        (merges, "'net.0.weight' has changed"),
        (merges_nothing, "'adapter.merged' has changed"),
        (unloads, "'adapter.merged' is gone"),
        (wraps, "'other.weight' is new"),
        (counts, "'seen' has changed"),
        (lambda net: net.adapter.bfloat16(), "'adapter.weight' has changed"),
    ],
    ids=["merges", "merges nothing", "unloads", "wraps", "counts", "another dtype"],
)
def test_what_models_share_must_be_left_as_it_was(own: Callable[[Any], None], words: str, trains: bool) -> None:
    net = Adapted()
    with pytest.raises(ClientError, match=f"`own` must leave the module as it was.* {words}: merge adapters"):  # noqa: SIM117
        with lent(net, "`own`", trains) as module:
            own(module)
    assert net.discarded == 1


def test_an_embedding_with_max_norm_is_named_and_gradients_are_on_again() -> None:
    class Words(ComponentModel):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(3, 4, max_norm=0.1)

    words = "'words.weight' has changed: its Embedding has max_norm=0.1, which shortens the rows that are looked up; work on"

    def looks_up(net: Any) -> None:
        torch.set_grad_enabled(False)
        net.words(torch.arange(3))

    with pytest.raises(ClientError, match=words), lent(Words(), "`score`", trains=False) as module:
        looks_up(module)
    assert torch.is_grad_enabled()


def test_what_a_loop_trains_may_change_and_what_it_freezes_is_trainable_again() -> None:
    net = Adapted()
    with lent(net, "`fit`", trains=True) as module:
        module.adapter.weight.data += 1
        module.requires_grad_(False)
        module.load_state_dict(module.state_dict())
    assert [name for name, p in net.named_parameters() if p.requires_grad] == ["adapter.weight"]
    with pytest.raises(ClientError, match="'adapter.weight' has changed"), lent(net, "`score`", trains=False):
        net.adapter.weight.data += 1
