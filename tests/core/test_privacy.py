"""The noise of a private round."""

from __future__ import annotations

import math
import os
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tap_flower.core.averaging import gaussian, holders_needed, release, sensitivity

HALF = (2**51).to_bytes(8, "little")
"""The median: noise of 2^-53 of a uniform number, which is nothing."""


def test_the_holders_that_a_noise_needs() -> None:
    assert holders_needed(2.0, 0.1) == 20
    assert holders_needed(2.001, 0.1) == 21
    assert holders_needed(0.01, 0.1) == 1


@given(st.floats(1e-3, 1e4), st.floats(1e-6, 1e3))
def test_they_are_enough_and_one_less_is_not(multiplier: float, most: float) -> None:
    needed = holders_needed(multiplier, most)
    assert multiplier / needed <= most * (1 + 1e-12)
    assert needed == 1 or multiplier / (needed - 1) > most * (1 - 1e-12)


def test_the_sensitivity_is_the_norm_and_a_little() -> None:
    assert sensitivity(2.0, 1, 0) == 2.0 * (1 + 2.0**-22)
    # 2^10 holders: 2^-12 of C for float32; 2^20 values off by 2^10 · 2^-39 each: 2^10 · 2^-29 = 2^-19
    assert sensitivity(1.0, 2**10, 2**20) == pytest.approx(1 + 2.0**-12 + 2.0**-19, rel=1e-15)


def test_gaussian_values_are_quantiles_of_the_random_bits() -> None:
    assert gaussian(0).shape == (0,)
    assert gaussian(3, lambda n: HALF * (n // 8)).abs().max() < 1e-15
    # Bits above the 52nd do not count. u = (m + ½) / 2^52; Φ(1) = .841344746068543, Φ(-2) = .022750131948179
    for quantile, probability in ((1.0, 0.841344746068543), (-2.0, 0.022750131948179)):
        bits = (int(probability * 2**52) + (0xABC << 52)).to_bytes(8, "little")
        assert float(gaussian(1, lambda _, bits=bits: bits)) == pytest.approx(quantile, abs=1e-13)
    extremes = gaussian(2, lambda _: bytes(8) + b"\xff" * 8)
    assert extremes.tolist() == pytest.approx([-8.2095, 8.2095], abs=1e-3)


def test_gaussian_values_have_the_normal_distribution() -> None:
    drawn = gaussian(200_000, Random(3).randbytes)
    assert drawn.dtype == torch.float64
    # Standard errors of 200,000: .0022 of the mean, .0016 of the deviation, .011 of the 4th moment
    assert float(drawn.mean()) == pytest.approx(0.0, abs=0.01)
    assert float(drawn.std()) == pytest.approx(1.0, abs=0.007)
    assert float((drawn**4).mean()) == pytest.approx(3.0, abs=0.12)
    assert float((drawn < -1.959964).double().mean()) == pytest.approx(0.025, abs=0.0015)
    assert float((drawn[1:] * drawn[:-1]).mean()) == pytest.approx(0.0, abs=0.01)


def test_without_a_source_of_ones_own_no_two_draws_are_alike() -> None:
    torch.manual_seed(1)
    first = gaussian(8)
    torch.manual_seed(1)
    assert not torch.equal(first, gaussian(8))
    assert gaussian.__defaults__ == release.__defaults__ == (os.urandom,)


def test_the_noise_on_a_mean_goes_with_the_number_of_holders() -> None:
    size = 150_000  # more than one block
    previous = {
        "w": torch.full((size,), 5.0),
        "b": torch.zeros(2, 3),
        "v": torch.ones(2, size // 2),
        "u": torch.ones(4),
    }
    means = {"w": torch.full((size,), 0.25), "b": torch.zeros(2, 3), "v": torch.zeros(2, size // 2), "u": torch.ones(4)}
    found = release(previous, means, {"w": 4, "b": 4, "v": 12}, 3.0, Random(7).randbytes)
    # z · C = 3 over m = 4 and 12; standard error of a deviation of 150,000 values: .0018 of it
    for name, centre, std in (("w", 5.25, 0.75), ("v", 1.0, 0.25)):
        assert float(found[name].double().std()) == pytest.approx(std, rel=0.01), name
        assert float(found[name].double().mean()) == pytest.approx(centre, abs=5 * std / math.sqrt(size)), name
        assert (found[name].dtype, found[name].shape) == (torch.float32, previous[name].shape)
    blocks = (found["w"][: 1 << 16], found["w"][1 << 16 : 2 << 16], found["v"].flatten()[: 1 << 16])
    assert not any(torch.equal(a, b) for a, b in ((blocks[0], blocks[1]), (blocks[0], blocks[2])))
    assert found["u"] is previous["u"]
    assert bool((previous["w"] == 5.0).all())  # what went in is not changed


def test_the_noise_is_drawn_from_the_given_source() -> None:
    # Each value of the noise is the quantile 1 of the standard normal distribution: 3 / 4 of it on a mean of 4 holders
    one = int(0.841344746068543 * 2**52).to_bytes(8, "little")
    previous, means = {"w": torch.tensor([[1.0, 2.0]]), "v": torch.ones(1)}, {"w": torch.tensor([[0.5, -0.5]])}
    found = release(previous, means, {"w": 4}, 3.0, lambda count: one * (count // 8))
    assert found["w"].tolist() == [[2.25, 2.25]]
    assert found["v"] is previous["v"]


def test_a_released_component_that_nobody_returned_moves_by_its_noise_alone() -> None:
    found = release({"w": torch.tensor([1.5, -2.0])}, {}, {"w": 4}, 3.0, lambda count: HALF * (count // 8))
    assert found["w"].tolist() == [1.5, -2.0]


def test_every_value_of_a_component_has_the_noise_of_its_round() -> None:
    """One value, drawn again and again: each draw is N(mean, (z · C / m)²)."""
    source = Random(5).randbytes
    previous, means = {"v": torch.zeros(1)}, {"v": torch.tensor([0.5])}
    drawn = torch.cat([release(previous, means, {"v": 5}, 2.0, source)["v"] for _ in range(4000)])
    assert float(drawn.std()) == pytest.approx(0.4, rel=0.05)
    assert float(drawn.mean()) == pytest.approx(0.5, abs=0.025)
