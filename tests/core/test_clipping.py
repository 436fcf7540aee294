"""Clipping of a client's change."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tap_flower.core.averaging import clip

values = st.floats(-(2.0**100), 2.0**100, width=32)
changes = st.dictionaries(st.sampled_from("abcd"), st.lists(values, min_size=1, max_size=6), min_size=1)


def norm(change: dict[str, Tensor]) -> float:
    return math.sqrt(sum(x * x for tensor in change.values() for x in tensor.double().flatten().tolist()))


def test_all_tensors_are_clipped_together() -> None:
    # ‖(3, 0), (0, 4), (12)‖ = 13; 6.5 is half of it
    change = {"a": torch.tensor([[3.0, 0.0]]), "b": torch.tensor([0.0, 4.0]), "c": torch.tensor([12.0])}
    clipped, before = clip(change, 6.5)
    assert before == 13.0
    assert clipped["a"].tolist() == [[1.5, 0.0]]
    assert clipped["b"].tolist() == [0.0, 2.0]
    assert clipped["c"].tolist() == [6.0]


@pytest.mark.parametrize("longest", [13.0, 14.0])
def test_what_is_no_longer_than_it_may_be_is_left_alone(longest: float) -> None:
    change = {"a": torch.tensor([5.0]), "b": torch.tensor([12.0])}
    clipped, before = clip(change, longest)
    assert before == 13.0
    assert all(torch.equal(clipped[name], change[name]) for name in change)
    assert clip({}, 1.0) == ({}, 0.0)


@given(changes, st.floats(1e-3, 1e3))
def test_norm_and_direction(lists: dict[str, list[float]], longest: float) -> None:
    change = {name: torch.tensor(each, dtype=torch.float32) for name, each in lists.items()}
    clipped, before = clip(change, longest)
    assert before == pytest.approx(norm(change), rel=1e-12)
    assert norm(clipped) <= longest * (1 + 2.0**-23)
    assert norm(clipped) == pytest.approx(min(longest, before), rel=1e-6, abs=1e-37)
    for name, tensor in change.items():
        expected = tensor.double() * min(1.0, longest / before if before else 1.0)
        torch.testing.assert_close(clipped[name].double(), expected, rtol=1e-6, atol=1e-37)
        assert clipped[name].dtype == torch.float32


def test_the_largest_float32_values_are_clipped_too() -> None:
    clipped, before = clip({"a": torch.full((4,), 3e38)}, 1.0)
    assert before == pytest.approx(6e38)
    assert clipped["a"].tolist() == pytest.approx([0.5] * 4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_not_hidden(bad: float) -> None:
    clipped, before = clip({"a": torch.tensor([1.0, bad]), "b": torch.tensor([2.0])}, 1.0)
    assert before == math.inf
    assert torch.equal(clipped["a"].nan_to_num(7.0, 8.0, 9.0), torch.tensor([1.0, bad]).nan_to_num(7.0, 8.0, 9.0))
    assert clipped["b"].tolist() == [2.0]
