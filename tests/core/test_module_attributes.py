"""Attributes of a module are equal until something in one of them changes."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tap_flower.core.module_attributes import attributes, bits, mark


class Full(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.rnn = nn.Linear(2, 2), nn.GRU(2, 2)
        self.register_buffer("mask", torch.ones(2))
        self.count, self.names, self.table = 0, ["a"], {"x": [1, {2}]}
        self.config = SimpleNamespace(rate=0.5, inner=SimpleNamespace(steps=3), of=self)
        self.draws, self.array, self.plain = random.Random(1), np.zeros(3), torch.zeros(3)
        self.also = [self.layer, self.layer.weight]
        self.run = self.forward

    def forward(self, x: Any) -> Any:
        return self.layer(x)


def steps(net: Full) -> None:
    net.config.inner.steps += 1


CHANGES: dict[str, Callable[[Full], Any]] = {
    "count": lambda net: setattr(net, "count", 1),
    "count, by type": lambda net: setattr(net, "count", False),
    "names": lambda net: net.names.append("b"),
    "table": lambda net: net.table["x"][1].add(3),
    "config": steps,
    "draws": lambda net: net.draws.random(),
    "array": lambda net: net.array.__setitem__(0, 1),
    "plain": lambda net: net.plain.data.add_(1),
    "run": lambda net: setattr(net, "run", net.layer.forward),
    "new": lambda net: setattr(net, "new", 1),
    "mask": lambda net: setattr(net, "mask", torch.ones(3)),
    "layer._modules": lambda net: net.layer.add_module("more", nn.ReLU()),
    "layer._forward_hooks": lambda net: net.layer.register_forward_hook(lambda *_: None),
    "layer.weight._backward_hooks": lambda net: net.layer.weight.register_hook(lambda gradient: gradient),
    "layer.weight.tag": lambda net: setattr(net.layer.weight, "tag", 1),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen_by_name(name: str) -> None:
    net = Full()
    before = attributes(net)
    CHANGES[name](net)
    after = attributes(net)
    changed = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    assert changed[0] == name.partition(",")[0]


def test_values_of_parameters_and_buffers_do_not_count_nor_does_the_mode() -> None:
    net = Full()
    before = attributes(net)
    net.eval().to("cpu").layer.weight.register_hook(lambda gradient: gradient).remove()
    net.mask += 1  # type: ignore[operator]
    nn.init.zeros_(net.layer.weight)
    net.forward = net.forward  # type: ignore[method-assign]  # as a wrapper leaves it
    assert attributes(net) == before


def test_marks_tell_of_changes_in_place_and_through_data() -> None:
    tensor = torch.zeros(100)
    before = mark(tensor), mark(tensor, 10)
    tensor.data[50] = 1
    assert mark(tensor) != before[0]
    assert mark(tensor, 10) != before[1]  # each tenth value is read
    assert bits(torch.zeros(3).expand(2, 3)) == bits(torch.zeros(3).to_sparse()) == 0
    assert bits(torch.ones(3, dtype=torch.complex128)) == 3 * (0x3F + 0xF0)  # 1.0 is 3FF0000000000000
    still = torch.zeros(3)
    place = mark(still)
    still += 0
    assert mark(still) != place
