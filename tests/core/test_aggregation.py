import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tap_flower.core.aggregation import Aggregator, BadUpdateError

COMPONENTS = {"a": "one", "b": "two"}


def tensors(a: float, b: float) -> dict[str, Tensor]:
    return {"a": torch.full((2, 2), a), "b": torch.full((3,), b)}


def aggregator(**expected: int) -> Aggregator:
    return Aggregator(tensors(-1.0, -2.0), COMPONENTS, {"one": 0, "two": 0, **expected})


def test_each_component_is_averaged_over_the_clients_that_hold_it() -> None:
    merging = aggregator(one=40, two=30)
    merging.add({"a": torch.full((2, 2), 1.0)}, {"one": 10, "two": 0})
    merging.add(tensors(5.0, 8.0), {"one": 30, "two": 30})
    merged = merging.result()
    assert torch.equal(merged["a"], torch.full((2, 2), 4.0))  # (10 · 1 + 30 · 5) / 40
    assert torch.equal(merged["b"], torch.full((3,), 8.0))
    assert merging.weights == {"a": 40, "b": 30}


def test_a_component_that_nobody_returned_keeps_its_value() -> None:
    merging = aggregator(one=10, two=10)
    merging.add({"a": torch.zeros(2, 2)}, {"one": 10})
    merged = merging.result()
    assert torch.equal(merged["b"], torch.full((3,), -2.0))
    assert torch.equal(merged["a"], torch.zeros(2, 2))


def test_what_a_client_leaves_out_counts_with_its_previous_value() -> None:
    merging = aggregator(one=40, two=30)
    merging.add({"a": torch.full((2, 2), 7.0)}, {"one": 10, "two": 0})
    merging.add({"b": torch.zeros(3)}, {"one": 30, "two": 30})
    merged = merging.result()
    assert torch.equal(merged["a"], torch.full((2, 2), 1.0))  # (10 · 7 + 30 · -1) / 40
    assert torch.equal(merged["b"], torch.zeros(3))
    assert merging.changed == {"one", "two"}


def test_what_every_client_leaves_out_keeps_its_value_bit_for_bit() -> None:
    previous = {"a": torch.randn(50) * 1e-9}
    merging = Aggregator(previous, {"a": "one"}, {"one": 7})
    merging.add({}, {"one": 3})
    merging.add({}, {"one": 4})
    assert torch.equal(merging.result()["a"], previous["a"])
    assert merging.changed == set()


updates = st.lists(
    st.tuples(st.integers(1, 10_000), st.integers(0, 2**31 - 1), st.floats(1e-6, 100.0)), min_size=1, max_size=8
)


@given(updates, st.randoms())
def test_the_result_does_not_depend_on_the_order_of_arrival(rows: list[tuple[int, int, float]], random: object) -> None:
    previous = {"a": torch.zeros(37)}
    made = [
        (weight, torch.randn(37, generator=torch.Generator().manual_seed(seed)) * size) for weight, seed, size in rows
    ]
    total = sum(weight for weight, _ in made)

    def merge(order: list[tuple[int, Tensor]]) -> Tensor:
        merging = Aggregator(previous, {"a": "one"}, {"one": total})
        for weight, value in order:
            merging.add({"a": value}, {"one": weight})
        return merging.result()["a"]

    shuffled = list(made)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert torch.equal(merge(made), merge(shuffled))
    exact = sum(weight * value.double() for weight, value in made) / total
    torch.testing.assert_close(merge(made).double(), exact, atol=1e-11, rtol=1e-7)


@given(st.floats(-4000, 4000, width=32), st.integers(1, 2**31))
def test_the_mean_of_equal_values_is_that_value(value: float, weight: int) -> None:
    merging = Aggregator({"a": torch.zeros(1)}, {"a": "one"}, {"one": 2 * weight})
    for _ in range(2):
        merging.add({"a": torch.tensor([value])}, {"one": weight})
    assert math.isclose(merging.result()["a"].item(), value, rel_tol=1e-6, abs_tol=2e-12)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"a": torch.full((2, 2), math.nan)}, "'a' holds a value that is not finite"),
        ({"a": torch.full((2, 2), -math.inf)}, "'a' holds a value that is not finite"),
        ({"a": torch.zeros(4)}, r"'a' has shape \(4,\), not \(2, 2\)"),
        ({"a": torch.zeros(2, 2, dtype=torch.float64)}, "'a' is torch.float64, not torch.float32"),
        ({"a": torch.full((2, 2), 1e6)}, "'a' holds 1e\\+06; values from 4096 on are refused"),
        ({"c": torch.zeros(1)}, "not sent, such as 'c'"),
        ({"a": None}, "lacks 1 tensors, such as 'a'"),
    ],
)
def test_a_bad_update_is_refused_by_name(change: dict[str, Tensor | None], problem: str) -> None:
    update = {name: value for name, value in {**tensors(1.0, 1.0), **change}.items() if value is not None}
    with pytest.raises(BadUpdateError, match=f"client 'eve'.*{problem}"):
        aggregator(one=5, two=5).check("eve", update, {"a", "b"}, {"one": 5, "two": 5})


@pytest.mark.parametrize("weight", [-1, 6, 10**18])
def test_a_weight_beyond_what_the_round_expects_is_refused(weight: int) -> None:
    with pytest.raises(BadUpdateError, match=f"weight {weight}"):
        aggregator(one=5, two=5).check("eve", tensors(1.0, 1.0), {"a", "b"}, {"one": weight, "two": 5})


def test_a_good_update_passes() -> None:
    aggregator(one=5, two=5).check("bob", tensors(1.0, 1.0), {"a", "b"}, {"one": 5, "two": 0})
