"""Intervals, paired differences, ranks: against numbers worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tap_flower.study.statistics import estimate, holm, mean_ranks, paired, slope_by_doubling


def test_the_interval_is_students() -> None:
    """Of 1, 2, 3: s = 1, t(0.975, 2) = 4.3027, half = 4.3027 / √3."""
    found = estimate([1.0, 2.0, 3.0])
    assert (found.mean, found.count) == (2.0, 3)
    assert found.half == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
    assert not found.significant
    assert estimate([2.0, 2.1, 1.9]).significant


def test_one_value_has_no_interval() -> None:
    assert estimate([0.5]).half is None
    assert not estimate([0.5]).significant


def test_differences_are_of_the_seeds_that_both_have() -> None:
    found = paired({1: 0.5, 2: 0.7, 3: 9.0}, {1: 0.4, 2: 0.5, 4: 0.0})
    assert found is not None
    assert found.mean == pytest.approx(0.15)
    assert found.half == pytest.approx(12.7062 * (0.05 * 2**0.5) / 2**0.5, rel=1e-4)
    assert paired({1: 0.5}, {2: 0.5}) is None


def test_the_p_value_is_students() -> None:
    """Of 1, 2, 3: t = 2 · √3; with two degrees of freedom p = 1 − t / √(t² + 2)."""
    assert estimate([1.0, 2.0, 3.0]).p == pytest.approx(1 - 12**0.5 / 14**0.5, rel=1e-6)
    assert estimate([-2.0, -2.1, -1.9]).p == pytest.approx(estimate([2.0, 2.1, 1.9]).p)
    assert (estimate([0.5]).p, estimate([0.5, 0.5]).p, estimate([0.0, 0.0]).p) == (None, 0.0, 1.0)


def test_holms_correction() -> None:
    """Of .01, .03, .04: 3 · .01, 2 · .03, and .04, which is not smaller than the one before."""
    assert holm({"a": 0.04, "b": 0.01, "c": 0.03}) == pytest.approx({"b": 0.03, "c": 0.06, "a": 0.06})
    assert holm({"a": 0.6, "b": 0.9}) == {"a": 1.0, "b": 1.0}
    assert holm({"a": 0.02}) == {"a": 0.02}
    assert holm({}) == {}


def test_the_slope_is_of_doublings() -> None:
    """Of (0, 1), (1, 3), (2, 2) over the number of doublings: Σ (x − 1) (y − 2) / Σ (x − 1)² = (1 + 0 + 0) / 2."""
    assert slope_by_doubling({1: 1.0, 2: 3.0, 4: 2.0}) == pytest.approx(0.5)


def test_ranks() -> None:
    scores = [{"a": 0.9, "b": 0.5, "c": 0.5}, {"a": 0.1, "b": 0.2, "c": 0.3}, {"a": 1.0}]
    assert mean_ranks(scores) == {"a": 2.0, "b": 2.25, "c": 1.75}
    assert mean_ranks([]) == {}


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=9), st.floats(-1e3, 1e3))
def test_a_paired_difference_does_not_depend_on_what_both_share(values: list[float], shift: float) -> None:
    ours = {seed: value + shift for seed, value in enumerate(values)}
    found = paired(ours, {seed: value - 1.0 for seed, value in enumerate(values)})
    assert found is not None
    assert found.mean == pytest.approx(shift + 1.0, abs=1e-6)
    assert found.half == pytest.approx(0.0, abs=1e-6)
