import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tap_flower.core import averaging
from tap_flower.core.averaging import LARGEST_VALUE, LARGEST_WEIGHT, Averaging, check_form, moved
from tap_flower.errors import MessageError

COMPONENTS = {"a": "one", "b": "two"}
NEXT_BELOW = float(torch.nextafter(torch.tensor(LARGEST_VALUE), torch.tensor(0.0)))


def tensors(a: float, b: float) -> dict[str, Tensor]:
    return {"a": torch.full((2, 2), a), "b": torch.full((3,), b)}


def round_of(**asked: int) -> Averaging:
    return Averaging(tensors(0.0, 0.0), COMPONENTS, {"one": 0, "two": 0, **asked})


def mean_of(differences: Sequence[list[float]], weights: list[int], absent: int = 0) -> Tensor:
    """The mean of flat differences, added in the order given; some that were asked do not answer."""
    asked = {"one": len(weights) + absent}
    averaging = Averaging({"a": torch.zeros(len(differences[0]))}, {"a": "one"}, asked)
    for difference, weight in zip(differences, weights, strict=True):
        averaging.add("bob", {"a": torch.tensor(difference)}, {"one": weight})
    return averaging.means()["a"]


def test_each_component_is_averaged_over_the_clients_that_hold_it() -> None:
    averaging = round_of(one=2, two=1)
    averaging.add("ann", {"a": torch.full((2, 2), 1.0)}, {"one": 10})
    averaging.add("bob", tensors(5.0, 8.0), {"one": 30, "two": 30})
    means = averaging.means()
    assert torch.equal(means["a"], torch.full((2, 2), 4.0, dtype=torch.float64))  # (10 · 1 + 30 · 5) / 40
    assert torch.equal(means["b"], torch.full((3,), 8.0, dtype=torch.float64))
    values = moved(tensors(-1.0, 0.5), means)
    assert torch.equal(values["a"], torch.full((2, 2), 3.0))
    assert torch.equal(values["b"], torch.full((3,), 8.5))
    assert {value.dtype for value in values.values()} == {torch.float32}


def test_a_component_that_nobody_returned_keeps_its_value() -> None:
    averaging = round_of(one=1, two=1)
    averaging.add("ann", {"a": torch.ones(2, 2)}, {"one": 10})
    values = tensors(-1.0, 0.1)
    after = moved(values, averaging.means())
    assert after["b"] is values["b"]
    assert torch.equal(after["a"], torch.zeros(2, 2))


def test_a_weight_of_zero_counts_for_nothing() -> None:
    averaging = round_of(one=2, two=2)
    averaging.add("ann", tensors(7.0, 7.0), {"one": 0, "two": 0})
    assert averaging.means() == {}
    averaging.add("bob", tensors(3.0, 7.0), {"one": 10, "two": 0})
    assert averaging.means().keys() == {"a"}
    assert torch.equal(averaging.means()["a"], torch.full((2, 2), 3.0, dtype=torch.float64))


def test_a_tensor_that_only_some_holders_of_its_component_return_is_averaged_over_them() -> None:
    like = {"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(1)}
    differences = [{"a": 1.0, "b": 2.0}, {"b": 5.0, "c": 6.0}, {"a": 4.0, "b": 8.0}]
    weights = [10, 20, 30]
    expected = {"a": 130 / 40, "b": 360 / 60, "c": 6.0}
    for order in itertools.permutations(range(3)):
        averaging = Averaging(like, dict.fromkeys("abc", "one"), {"one": 3})
        for number in order:
            difference = {name: torch.full(like[name].shape, value) for name, value in differences[number].items()}
            averaging.add("ann", difference, {"one": weights[number]})
        means = averaging.means()
        assert {name: set(mean.tolist()) for name, mean in means.items()} == {n: {e} for n, e in expected.items()}


@given(st.lists(st.floats(-4000, 4000, width=32), min_size=1, max_size=50), st.integers(1, 10**9))
def test_a_difference_of_zero_keeps_a_value(values: list[float], weight: int) -> None:
    value = torch.tensor(values)
    averaging = Averaging({"a": value}, {"a": "one"}, {"one": 2})
    for name in ("ann", "bob"):
        averaging.add(name, {"a": torch.zeros_like(value)}, {"one": weight})
    assert torch.equal(moved({"a": value}, averaging.means())["a"], value)


def test_a_sum_can_be_divided_by_more_than_what_arrived() -> None:
    averaging = round_of(one=4, two=4)
    averaging.add("ann", tensors(2.0, 4.0), {"one": 1, "two": 1})
    means = averaging.means({"a": 4, "b": 2})
    assert set(means["a"].flatten().tolist()) == {0.5}
    assert set(means["b"].tolist()) == {2.0}


@pytest.mark.parametrize("block", [1, 5, 7, 64])
def test_tensors_that_are_cut_into_blocks_are_averaged_as_others(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(averaging, "_BLOCK", block)
    shapes = {"a": (3, 4), "b": (), "c": (2, 5), "d": (0, 3), "e": (1,)}
    random = torch.Generator().manual_seed(1)
    updates = [{n: torch.randn(shape, generator=random) for n, shape in shapes.items()} for _ in range(2)]
    updates[1]["a"] = torch.randn(4, 3, generator=random).T  # not contiguous
    found = Averaging(updates[0], dict.fromkeys(shapes, "one"), {"one": 4})
    for update, weight in zip(updates, (1, 3), strict=True):
        found.add("ann", update, {"one": weight})
    for name, value in found.means().items():
        mean = (updates[0][name].double() + 3 * updates[1][name].double()) / 4
        torch.testing.assert_close(value, mean, atol=2e-11, rtol=0.0)


magnitudes = st.one_of(
    st.floats(-NEXT_BELOW, NEXT_BELOW, width=32),
    st.floats(-(2.0**-7), 2.0**-7, width=32),
    st.sampled_from([0.0, -0.0, NEXT_BELOW, -NEXT_BELOW, 2.0**-39, 2.0**-40, -(2.0**-40), 3 * 2.0**-40, 1e-45]),
)
"""Values near the limit, subnormal ones, and such as lie half-way between two units of the sums."""
weights_ = st.one_of(st.integers(1, 2000), st.integers(1, 10**9), st.sampled_from([1, 2**29, 2**30, 10**9]))
weighted = st.integers(1, 5).flatmap(
    lambda size: st.lists(
        st.tuples(weights_, st.lists(magnitudes, min_size=size, max_size=size)), min_size=1, max_size=8
    )
)
"""Of each client, its weight and its difference."""


@given(weighted, st.randoms(use_true_random=False), st.integers(0, 1000))
def test_the_result_does_not_depend_on_the_order_of_arrival(
    made: list[tuple[int, list[float]]], random: Random, absent: int
) -> None:
    shuffled = list(made)
    random.shuffle(shuffled)
    means = [mean_of([v for _, v in order], [w for w, _ in order], absent) for order in (made, shuffled)]
    assert torch.equal(means[0].view(torch.int64), means[1].view(torch.int64))


@given(weighted, st.sampled_from([0, 0, 1, 1000]))
def test_the_mean_is_as_near_to_the_exact_one_as_is_said(made: list[tuple[int, list[float]]], absent: int) -> None:
    weights, arrived = [w for w, _ in made], sum(w for w, _ in made)
    means = mean_of([v for _, v in made], weights, absent).tolist()
    bound = 16 * 2 * (len(made) + absent) * Fraction(1, 2**40)
    rounded = [torch.tensor(values).tolist() for _, values in made]
    for mean, values in zip(means, zip(*rounded, strict=True), strict=True):
        # Fractions are exact; Fraction(float) too.
        exact = sum(Fraction(w) * Fraction(v) for w, v in zip(weights, values, strict=True)) / arrived
        of_float64 = 4 * Fraction(math.ulp(1.0)) * max(abs(exact), abs(Fraction(mean)))
        assert abs(Fraction(mean) - exact) <= bound + of_float64


@given(magnitudes, st.integers(1, 10**9), st.integers(1, 6))
def test_the_mean_of_equal_values_is_that_value(value: float, weight: int, count: int) -> None:
    mean = mean_of([[value]] * count, [weight] * count).item()
    assert math.isclose(mean, value, rel_tol=1.2e-7, abs_tol=count * 2.0**-35)


@pytest.mark.parametrize(
    ("value", "mean"),
    # In units of 2^-39, a half goes to the even neighbour: 1, 1/2, 3/2, 5/2, and a little more than 1/2.
    [(2.0**-39, 2.0**-39), (2.0**-40, 0.0), (3 * 2.0**-40, 2.0**-38), (5 * 2.0**-40, 2.0**-38), (2.5e-12, 2.0**-39)],
)
def test_weighted_values_are_rounded_to_units(value: float, mean: float) -> None:
    for sign in (1, -1):
        assert mean_of([[sign * value]], [1]).item() == sign * mean
        # As the second of two, where the sum loses the bias that the first has brought in.
        assert mean_of([[0.0], [2 * sign * value]], [1, 1]).item() == sign * mean
        # Where 2^20 clients were asked, the unit is 2^-19.
        assert mean_of([[sign * value]], [1], absent=2**20 - 1).item() == 0.0


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_what_a_sum_of_floats_would_lose_in_some_orders_is_in_none(order: tuple[int, ...]) -> None:
    # 10^9 · 4095 + 2^-12 is 10^9 · 4095 in float64: in one sum, what comes between the large values would be lost.
    values, weights = [[4095.0], [2.0**-12], [-4095.0]], [10**9, 1, 10**9]
    mean = mean_of([values[i] for i in order], [weights[i] for i in order]).item()
    assert mean == 2.0**-12 / (2 * 10**9 + 1)


def test_whoever_states_many_examples_and_is_silent_takes_nothing_from_the_others() -> None:
    mean = mean_of([[1e-6, -3e-5], [3e-6, 5e-5]], [100, 300], absent=1)  # whatever number the third has stated
    assert mean.tolist() == pytest.approx([2.5e-6, 3e-5], rel=1e-5)


def test_whoever_states_many_examples_and_answers_does_not_round_the_others_away() -> None:
    mean = mean_of([[1.0], [0.0]], [100, LARGEST_WEIGHT]).item()
    assert mean == pytest.approx(100 / (100 + LARGEST_WEIGHT), rel=1e-9)


def test_a_sum_of_the_largest_values_stays_exact() -> None:
    merging = Averaging({"a": torch.zeros(1)}, {"a": "one"}, {"one": 4})
    for value in (NEXT_BELOW, NEXT_BELOW, NEXT_BELOW, -NEXT_BELOW):
        merging.add("ann", {"a": torch.tensor([value])}, {"one": 1})
    assert merging.means()["a"].item() == NEXT_BELOW / 2


BAD: list[tuple[dict[str, Any], str]] = [
    ({"a": torch.full((2, 2), math.nan)}, "'a' holds a value that is not finite"),
    ({"a": torch.full((2, 2), -math.inf)}, "'a' holds a value that is not finite"),
    ({"b": torch.tensor([0.0, 1.0, math.nan])}, "'b' holds a value that is not finite"),
    ({"a": torch.zeros(4)}, r"'a' has shape \(4,\), not \(2, 2\)"),
    ({"a": torch.zeros(2, 2, dtype=torch.float64)}, "'a' is torch.float64, not torch.float32"),
    ({"a": torch.full((2, 2), 1e6)}, "'a' holds 1e\\+06; values of 4096 or more are refused"),
    ({"b": torch.full((3,), -4096.0)}, "'b' holds 4096; values of 4096 or more are refused"),
    (
        {"b": torch.tensor([0.0, 0.0, LARGEST_VALUE])},
        "more are refused: scale the inputs, .*, or use buffers='personal'",
    ),
    ({"c": torch.zeros(1)}, "holds 1 tensors that were not sent, such as 'c'"),
    ({"n" * 400: torch.zeros(1)}, f"holds 1 tensors that were not sent, such as '{'n' * 300}'$"),
    ({"a": None}, "lacks 1 tensors, such as 'a'"),
]


def checked_add(found: Averaging, difference: dict[str, Tensor]) -> None:
    like = tensors(0.0, 0.0)
    check_form("client 'eve': the reply", difference, like.keys(), like)
    found.add("eve", difference, {"one": 5, "two": 5})


@pytest.mark.parametrize(("change", "problem"), BAD)
def test_a_bad_difference_is_refused_by_name_and_leaves_no_trace(
    change: dict[str, Tensor | None], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(averaging, "_BLOCK", 2)
    difference = {name: value for name, value in {**tensors(0.1, 0.2), **change}.items() if value is not None}
    found, untouched = round_of(one=3, two=3), round_of(one=3, two=3)
    for number, (a, b) in enumerate([(0.3, 0.7), (-0.1, NEXT_BELOW)]):
        for one in (found, untouched):
            one.add("bob", tensors(a, b), {"one": 5, "two": 5})
        with pytest.raises(MessageError, match=f"client 'eve'.*{problem}"):
            checked_add(found, difference)
        assert all(torch.equal(mean, untouched.means()[name]) for name, mean in found.means().items()), number


@pytest.mark.parametrize("weight", [-1, LARGEST_WEIGHT + 1, 10**18])
def test_an_impossible_weight_is_refused(weight: int) -> None:
    problem = f"^client 'eve': component 'one' has weight {weight}, not between 0 and {LARGEST_WEIGHT}"
    with pytest.raises(MessageError, match=problem):
        round_of(one=5, two=5).add("eve", tensors(1.0, 1.0), {"one": weight, "two": 5})


def test_more_clients_than_were_asked_are_refused() -> None:
    found = round_of(one=2, two=2)
    found.add("bob", tensors(1.0, 1.0), {"one": 3, "two": 0})
    found.add("ann", tensors(1.0, 1.0), {"one": 2, "two": 0})
    with pytest.raises(
        MessageError, match="^client 'eve': component 'one' was returned by more clients than the 2 that"
    ):
        found.add("eve", tensors(2.0, 2.0), {"one": 1, "two": 0})
    assert set(found.means()["a"].flatten().tolist()) == {1.0}


def test_a_component_that_nobody_was_asked_for_is_refused() -> None:
    found = Averaging(tensors(0.0, 0.0), COMPONENTS, {"one": 5})
    with pytest.raises(MessageError, match="^client 'eve': component 'two' was returned by more clients than the 0"):
        found.add("eve", tensors(1.0, 1.0), {"one": 5, "two": 1})
    found.add("ann", {"a": torch.ones(2, 2)}, {"one": 5})
    assert found.means().keys() == {"a"}


def test_many_large_values_are_no_reason_to_refuse() -> None:
    many = torch.full((100_000,), 100.0)  # the sum of their squares is far above the square of the largest value
    found = Averaging({"a": torch.zeros_like(many)}, {"a": "one"}, {"one": 1})
    found.add("bob", {"a": many}, {"one": 1})
    assert torch.equal(found.means()["a"].float(), many)
